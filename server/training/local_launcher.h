// Worker processes on this machine: fork and exec, reaped here; /proc tells about adopted ones.
#ifndef PYRAMID_SERVER_TRAINING_LOCAL_LAUNCHER_H_
#define PYRAMID_SERVER_TRAINING_LOCAL_LAUNCHER_H_

#include <sys/types.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/training/launcher.h"

namespace pyramid {

// Which process a pid means: pids are used again, start times with boots aren't.
struct ProcessIdentity {
  int64_t pid = 0;
  uint64_t start_time = 0;  // clock ticks after boot, /proc/<pid>/stat field 22
  std::string boot_id;      // /proc/sys/kernel/random/boot_id; empty: not told
  bool operator==(const ProcessIdentity&) const = default;
};

// NotFound: no such process, or a dead one that nobody has reaped.
absl::StatusOr<ProcessIdentity> IdentityOf(int64_t pid);
// Reads a pid record: {"boot_id":"…","pid":1,"start_time":2}. NotFound, DataLoss.
absl::StatusOr<ProcessIdentity> ReadPidRecord(const std::filesystem::path& path);

// Standard output and error of a worker are appended to <folder>/attempts/<epoch>/rank<R>.log,
// its pid record is rank<R>.pid beside it. The destructor leaves the processes alone.
class LocalLauncher final : public Launcher {
 public:
  absl::StatusOr<int64_t> Launch(const WorkerLaunch& launch) override;
  absl::StatusOr<int64_t> Adopt(const WorkerKey& key, const std::filesystem::path& folder) override;
  absl::Status Signal(const WorkerKey& key, int signal) override;
  std::vector<ProcessEnd> Poll() override;

  // The command line of a worker.
  static std::vector<std::string> CommandOf(const WorkerLaunch& launch);

 private:
  struct Running {
    ProcessIdentity identity;
    bool child = false;  // ours to reap
  };
  absl::Mutex mutex_;
  std::map<WorkerKey, Running> running_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_LOCAL_LAUNCHER_H_
