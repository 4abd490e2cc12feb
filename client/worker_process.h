// Running pyramid-worker: in place of this process, or beside it with its output read.
#ifndef PYRAMID_CLIENT_WORKER_PROCESS_H_
#define PYRAMID_CLIENT_WORKER_PROCESS_H_

#include <sys/types.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/environment.h"

namespace pyramid {

// pyramid-worker in `beside`, else in the folders of `search_path` ("a:b"); empty: nowhere.
std::filesystem::path FindWorker(const std::filesystem::path& beside,
                                 absl::string_view search_path);

// Replaces this process. Returns only on failure.
absl::Status Become(const std::filesystem::path& program,
                    const std::vector<std::string>& arguments);

// Becomes the worker; the exit code if that fails.
int RunWorker(Environment& environment, const std::vector<std::string>& arguments);

// A child whose standard output is read here. Its standard error is ours. Not thread-safe.
class WorkerPipe {
 public:
  static absl::StatusOr<std::unique_ptr<WorkerPipe>> Start(
      const std::filesystem::path& program, const std::vector<std::string>& arguments,
      const std::filesystem::path& folder);
  // Ends the child if it still runs.
  ~WorkerPipe();
  WorkerPipe(const WorkerPipe&) = delete;
  WorkerPipe& operator=(const WorkerPipe&) = delete;

  // Up to `size` bytes; 0: the child closed its output.
  absl::StatusOr<size_t> Read(char* to, size_t size);

  // Waits for its end. Unless it exits 0: NotFound (exit 3), FailedPrecondition (4), else Internal,
  // naming code or signal.
  absl::Status Finish();

 private:
  WorkerPipe(pid_t pid, int fd) : pid_(pid), fd_(fd) {}
  pid_t pid_;
  int fd_;
};

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_WORKER_PROCESS_H_
