// Starts copies of this program as the ranks of one job on this machine.
#ifndef PYRAMID_WORKER_LOCAL_LAUNCHER_H_
#define PYRAMID_WORKER_LOCAL_LAUNCHER_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace pyramid {

// Runs `arguments` (without the program's name) `workers` times with RANK, WORLD_SIZE and
// LOCAL_RANK set, and waits for all. Rank 0 speaks; the others only on standard error. When one
// fails, the others are ended: asked first, killed after 10 s. SIGTERM and SIGINT are passed on.
// Should this process be killed, the ranks end too. Result: the first failing rank's exit code (128
// + signal if a signal ended it), else rank 0's.
absl::StatusOr<int> LaunchLocally(const std::vector<std::string>& arguments, int workers);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_LOCAL_LAUNCHER_H_
