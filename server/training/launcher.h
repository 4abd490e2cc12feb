// Starts and ends worker processes. What it promises: a process that was started has its pid
// record on disk before the worker's first line runs, so that a later server finds it.
#ifndef PYRAMID_SERVER_TRAINING_LAUNCHER_H_
#define PYRAMID_SERVER_TRAINING_LAUNCHER_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pyramid {

struct WorkerKey {
  std::string job_id;
  int64_t epoch = 0;
  int rank = 0;
  auto operator<=>(const WorkerKey&) const = default;
};

struct WorkerLaunch {
  WorkerKey key;
  int world = 1;
  std::string device;  // "cpu", "cuda:0"
  int threads = 1;     // for computing, also as OMP_NUM_THREADS
  std::filesystem::path program;
  std::filesystem::path server_file;     // server.json
  std::filesystem::path folder;          // the job's; attempts/<epoch> in it exists
  std::filesystem::path config;          // the resolved recipe
  std::vector<std::string> environment;  // "NAME=value", beside and before the server's own
};

// A process that has ended.
struct ProcessEnd {
  WorkerKey key;
  bool status_known = false;  // false: it wasn't our child
  int exit_code = 0;
  int signal = 0;  // 0: it exited by itself
};

// Thread-safe.
class Launcher {
 public:
  virtual ~Launcher() = default;

  // Starts the process in a group of its own; its pid.
  //   NotFound, PermissionDenied  the program can't be run
  //   ResourceExhausted           disk full
  //   Unavailable                 no memory or no process left
  //   Internal                    anything else; in every case no process is left
  virtual absl::StatusOr<int64_t> Launch(const WorkerLaunch& launch) = 0;

  // Takes over a process that an earlier server started, by its pid record in the job's folder.
  //   NotFound  it was never started, or has ended
  virtual absl::StatusOr<int64_t> Adopt(const WorkerKey& key,
                                        const std::filesystem::path& folder) = 0;

  // Sends a signal to the process and its children. NotFound: it has ended, or isn't known.
  virtual absl::Status Signal(const WorkerKey& key, int signal) = 0;

  // The processes that ended since the last call; each is told once.
  virtual std::vector<ProcessEnd> Poll() = 0;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_LAUNCHER_H_
