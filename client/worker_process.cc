#include "client/worker_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/exit_code.h"
#include "proto/base/file.h"

namespace pyramid {
namespace {

constexpr absl::string_view kWorkerName = "pyramid-worker";

std::vector<char*> Pointers(std::vector<std::string>& words) {
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  return pointers;
}

std::vector<std::string> Command(const std::filesystem::path& program,
                                 const std::vector<std::string>& arguments) {
  std::vector<std::string> words = {program.string()};
  words.insert(words.end(), arguments.begin(), arguments.end());
  return words;
}

bool IsProgram(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(path, ignored) && access(path.c_str(), X_OK) == 0;
}

}  // namespace

std::filesystem::path FindWorker(const std::filesystem::path& beside,
                                 absl::string_view search_path) {
  const std::string name(kWorkerName);
  if (!beside.empty() && IsProgram(beside / name)) return beside / name;
  for (const absl::string_view folder : absl::StrSplit(search_path, ':', absl::SkipEmpty())) {
    const std::filesystem::path path = std::filesystem::path(std::string(folder)) / name;
    if (IsProgram(path)) return path;
  }
  return {};
}

absl::Status Become(const std::filesystem::path& program,
                    const std::vector<std::string>& arguments) {
  std::vector<std::string> words = Command(program, arguments);
  execv(program.c_str(), Pointers(words).data());
  return ErrnoStatus(errno, "can't run", program);
}

int RunWorker(Environment& environment, const std::vector<std::string>& arguments) {
  if (environment.worker.empty()) {
    return Fail(environment,
                absl::InternalError("pyramid-worker is neither beside this program nor on PATH; it "
                                    "does the training, so build or install it"));
  }
  environment.out->flush();
  environment.err->flush();
  const absl::Status status = environment.become(environment.worker, arguments);
  return status.ok() ? kDone : Fail(environment, absl::InternalError(status.message()));
}

absl::StatusOr<std::unique_ptr<WorkerPipe>> WorkerPipe::Start(
    const std::filesystem::path& program, const std::vector<std::string>& arguments,
    const std::filesystem::path& folder) {
  // Everything that allocates happens before the fork: other threads may hold the allocator's lock.
  std::vector<std::string> words = Command(program, arguments);
  const std::vector<char*> pointers = Pointers(words);
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return ErrnoStatus(errno, "can't make a pipe for", program);
  const pid_t pid = fork();
  if (pid < 0) {
    const int error = errno;
    close(ends[0]);
    close(ends[1]);
    return ErrnoStatus(error, "can't start", program);
  }
  if (pid == 0) {
    dup2(ends[1], STDOUT_FILENO);
    if (!folder.empty() && chdir(folder.c_str()) != 0) _exit(126);
    execv(pointers[0], pointers.data());
    _exit(127);
  }
  close(ends[1]);
  return std::unique_ptr<WorkerPipe>(new WorkerPipe(pid, ends[0]));
}

WorkerPipe::~WorkerPipe() {
  if (fd_ >= 0) close(fd_);
  if (pid_ > 0) {
    kill(pid_, SIGTERM);
    int status = 0;
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
  }
}

absl::StatusOr<size_t> WorkerPipe::Read(char* to, size_t size) {
  while (true) {
    const ssize_t got = read(fd_, to, size);
    if (got >= 0) return static_cast<size_t>(got);
    if (errno != EINTR) return ErrnoStatus(errno, "can't read from", std::string(kWorkerName));
  }
}

absl::Status WorkerPipe::Finish() {
  close(fd_);
  fd_ = -1;
  int status = 0;
  while (waitpid(pid_, &status, 0) < 0) {
    if (errno != EINTR) return ErrnoStatus(errno, "can't wait for", std::string(kWorkerName));
  }
  pid_ = -1;
  if (WIFSIGNALED(status)) {
    return absl::InternalError(
        absl::StrCat("pyramid-worker was ended by signal ", WTERMSIG(status)));
  }
  const int code = WEXITSTATUS(status);
  const std::string message =
      absl::StrCat("pyramid-worker couldn't export the pictures (exit code ", code, ")");
  switch (code) {
    case 0:
      return absl::OkStatus();
    case kNotFound:
      return absl::NotFoundError(message);
    case kRefused:
      return absl::FailedPreconditionError(message);
    default:
      return absl::InternalError(message);
  }
}

}  // namespace pyramid
