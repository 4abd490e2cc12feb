#include "server/training/local_launcher.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "server/training/job.h"

extern char** environ;

namespace pyramid {
namespace {

const std::string& BootId() {
  static const std::string id = [] {
    const absl::StatusOr<std::string> text = ReadFile("/proc/sys/kernel/random/boot_id", 4096);
    return text.ok() ? std::string(absl::StripAsciiWhitespace(*text)) : "";
  }();
  return id;
}

// Whether the recorded process has ended. An error in looking (no file descriptor left) isn't an
// end: a living process mustn't be taken for a dead one.
bool HasEnded(const ProcessIdentity& recorded) {
  if (!recorded.boot_id.empty() && !BootId().empty() && recorded.boot_id != BootId()) return true;
  const absl::StatusOr<ProcessIdentity> now = IdentityOf(recorded.pid);
  if (!now.ok()) return absl::IsNotFound(now.status());
  return now->start_time != recorded.start_time;
}

// What the child needs between fork and exec, where memory may not be allocated: everything is
// prepared by the parent.
struct ChildPlan {
  const char* program;
  char* const* arguments;
  char* const* environment;
  const char* log_path;
  const char* pid_path;
  const char* pid_path_aside;
  const char* pid_record_head;  // {"boot_id":"…","pid":
  int error_pipe;               // takes an errno and the stage; closes on exec
  long max_files;
};

enum class Stage : int { kSession, kLog, kPidRecord, kExec };

struct ChildError {
  int error;
  Stage stage;
};

[[noreturn]] void FailChild(int pipe, Stage stage) {
  const ChildError error{errno, stage};
  // If the parent is gone nobody reads it.
  if (write(pipe, &error, sizeof error) < 0) _exit(126);
  _exit(127);
}

// Decimal digits of `value`, at `out`; the end of them.
char* WriteNumber(uint64_t value, char* out) {
  char digits[24];
  int count = 0;
  do {
    digits[count++] = static_cast<char>('0' + value % 10);
    value /= 10;
  } while (value != 0);
  while (count > 0) *out++ = digits[--count];
  return out;
}

// Field 22 of a /proc/<pid>/stat line; the name in field 2 may hold anything. 0: not found.
uint64_t StartTimeIn(const char* stat, size_t size, char* state) {
  size_t at = size;
  while (at > 0 && stat[at - 1] != ')') --at;
  if (at == 0 || at + 1 >= size) return 0;
  ++at;  // field 3, the state
  *state = stat[at];
  for (int field = 3; field < 22; ++field) {
    while (at < size && stat[at] != ' ') ++at;
    ++at;
  }
  uint64_t value = 0;
  while (at < size && stat[at] >= '0' && stat[at] <= '9') {
    value = value * 10 + static_cast<uint64_t>(stat[at++] - '0');
  }
  return value;
}

// Writes {"boot_id":"…","pid":1,"start_time":2} aside and renames it. Async-signal-safe.
bool WritePidRecord(const ChildPlan& plan) {
  char stat[1024];
  const int stat_file = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
  if (stat_file < 0) return false;
  const ssize_t size = read(stat_file, stat, sizeof stat);
  close(stat_file);
  if (size <= 0) return false;
  char state = 0;
  const uint64_t start_time = StartTimeIn(stat, static_cast<size_t>(size), &state);

  char record[512];
  const size_t head = strlen(plan.pid_record_head);
  if (head > 300) return false;
  memcpy(record, plan.pid_record_head, head);
  char* at = WriteNumber(static_cast<uint64_t>(getpid()), record + head);
  constexpr char kMiddle[] = ",\"start_time\":";
  memcpy(at, kMiddle, sizeof kMiddle - 1);
  at = WriteNumber(start_time, at + sizeof kMiddle - 1);
  *at++ = '}';
  *at++ = '\n';

  const int file = open(plan.pid_path_aside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file < 0) return false;
  const ssize_t length = at - record;
  const bool written = write(file, record, static_cast<size_t>(length)) == length;
  if (close(file) != 0 || !written) return false;
  return rename(plan.pid_path_aside, plan.pid_path) == 0;
}

// Runs in the child. Async-signal-safe calls only: other threads' locks are frozen in this copy.
[[noreturn]] void RunChild(const ChildPlan& plan) {
  // Signals as a fresh process has them.
  struct sigaction standard {};
  standard.sa_handler = SIG_DFL;
  for (const int signal : {SIGPIPE, SIGTERM, SIGINT, SIGHUP, SIGCHLD, SIGUSR1, SIGUSR2}) {
    sigaction(signal, &standard, nullptr);
  }
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  if (setsid() < 0) FailChild(plan.error_pipe, Stage::kSession);

  const int log = open(plan.log_path, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (log < 0) FailChild(plan.error_pipe, Stage::kLog);
  const int input = open("/dev/null", O_RDONLY);
  if (input < 0) FailChild(plan.error_pipe, Stage::kLog);
  // Out of the way of 0..3 first, so that no dup2 closes what the next one needs.
  const int high_log = fcntl(log, F_DUPFD, 10);
  const int high_input = fcntl(input, F_DUPFD, 10);
  const int high_pipe = fcntl(plan.error_pipe, F_DUPFD_CLOEXEC, 10);
  if (high_log < 0 || high_input < 0 || high_pipe < 0 || dup2(high_input, 0) < 0 ||
      dup2(high_log, 1) < 0 || dup2(high_log, 2) < 0 || dup3(high_pipe, 3, O_CLOEXEC) < 0) {
    FailChild(plan.error_pipe, Stage::kLog);
  }
  if (syscall(SYS_close_range, 4U, ~0U, 0U) != 0) {
    for (long fd = 4; fd < plan.max_files; ++fd) close(static_cast<int>(fd));
  }
  if (!WritePidRecord(plan)) FailChild(3, Stage::kPidRecord);
  execve(plan.program, plan.arguments, plan.environment);
  FailChild(3, Stage::kExec);
}

std::vector<char*> Pointers(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  pointers.reserve(texts.size() + 1);
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

// Whether `environment` has the variable of `entry`, "NAME=value".
bool IsSet(const std::vector<std::string>& environment, absl::string_view entry) {
  const absl::string_view name = entry.substr(0, entry.find('=') + 1);
  return std::any_of(environment.begin(), environment.end(), [&](const std::string& set) {
    return !name.empty() && absl::StartsWith(set, name);
  });
}

absl::Status ChildStatus(const ChildError& error, const WorkerLaunch& launch) {
  const std::filesystem::path& folder = launch.folder;
  switch (error.stage) {
    case Stage::kSession:
      return ErrnoStatus(error.error, "can't make a session for", launch.program);
    case Stage::kLog:
      return ErrnoStatus(error.error, "can't open log",
                         WorkerLogPath(folder, launch.key.epoch, launch.key.rank));
    case Stage::kPidRecord:
      return ErrnoStatus(error.error, "can't write pid record",
                         WorkerPidPath(folder, launch.key.epoch, launch.key.rank));
    case Stage::kExec:
      return ErrnoStatus(error.error, "can't run", launch.program);
  }
  return absl::InternalError("launcher: unknown stage");
}

}  // namespace

absl::StatusOr<ProcessIdentity> IdentityOf(int64_t pid) {
  ASSIGN_OR_RETURN(const std::string stat, ReadFile(absl::StrCat("/proc/", pid, "/stat"), 4096));
  char state = 0;
  ProcessIdentity identity;
  identity.pid = pid;
  identity.start_time = StartTimeIn(stat.data(), stat.size(), &state);
  if (state == 'Z' || state == 'X') {
    return absl::NotFoundError(absl::StrCat("process ", pid, " is dead"));
  }
  identity.boot_id = BootId();
  return identity;
}

absl::StatusOr<ProcessIdentity> ReadPidRecord(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, 4096));
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("pid") || !json["pid"].is_number_integer() ||
      !json.contains("start_time") || !json["start_time"].is_number_integer()) {
    return absl::DataLossError(absl::StrCat(path.string(), " is no pid record"));
  }
  ProcessIdentity identity;
  identity.pid = json["pid"].get<int64_t>();
  identity.start_time = json["start_time"].get<uint64_t>();
  if (json.contains("boot_id") && json["boot_id"].is_string()) {
    identity.boot_id = json["boot_id"].get<std::string>();
  }
  return identity;
}

std::vector<std::string> LocalLauncher::CommandOf(const WorkerLaunch& launch) {
  return {launch.program.string(),
          "train",
          "--job",
          launch.key.job_id,
          "--epoch",
          absl::StrCat(launch.key.epoch),
          "--rank",
          absl::StrCat(launch.key.rank),
          "--world",
          absl::StrCat(launch.world),
          "--server-file",
          launch.server_file.string(),
          "--folder",
          launch.folder.string(),
          "--config",
          launch.config.string(),
          "--device",
          launch.device,
          "--threads",
          absl::StrCat(launch.threads)};
}

absl::StatusOr<int64_t> LocalLauncher::Launch(const WorkerLaunch& launch) {
  std::vector<std::string> arguments = CommandOf(launch);
  std::vector<std::string> environment = launch.environment;
  environment.push_back(absl::StrCat("OMP_NUM_THREADS=", launch.threads));
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!IsSet(environment, *entry)) environment.emplace_back(*entry);
  }
  const std::vector<char*> argument_pointers = Pointers(arguments);
  const std::vector<char*> environment_pointers = Pointers(environment);
  const std::string log = WorkerLogPath(launch.folder, launch.key.epoch, launch.key.rank).string();
  const std::string record =
      WorkerPidPath(launch.folder, launch.key.epoch, launch.key.rank).string();
  const std::string record_aside = record + ".tmp";
  const std::string boot_id = BootId();
  const std::string record_head = absl::StrCat("{\"boot_id\":\"", boot_id, "\",\"pid\":");

  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0)
    return ErrnoStatus(errno, "can't make a pipe for", launch.program);
  const absl::Cleanup close_read = [&] { close(ends[0]); };
  const ChildPlan plan{.program = launch.program.c_str(),
                       .arguments = argument_pointers.data(),
                       .environment = environment_pointers.data(),
                       .log_path = log.c_str(),
                       .pid_path = record.c_str(),
                       .pid_path_aside = record_aside.c_str(),
                       .pid_record_head = record_head.c_str(),
                       .error_pipe = ends[1],
                       .max_files = sysconf(_SC_OPEN_MAX)};

  absl::MutexLock lock(&mutex_);
  const pid_t pid = fork();
  if (pid == 0) RunChild(plan);
  const int fork_error = errno;
  close(ends[1]);
  if (pid < 0) {
    if (fork_error == EAGAIN || fork_error == ENOMEM) {
      return absl::UnavailableError(
          absl::StrCat("can't start ", launch.program.string(), ": ", strerror(fork_error)));
    }
    return ErrnoStatus(fork_error, "can't start", launch.program);
  }
  // Ends when the child's exec closes the pipe.
  ChildError error{};
  ssize_t got = 0;
  do {
    got = read(ends[0], &error, sizeof error);
  } while (got < 0 && errno == EINTR);
  if (got != 0) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    std::error_code ignored;
    std::filesystem::remove(record, ignored);
    std::filesystem::remove(record_aside, ignored);
    if (got == sizeof error) return ChildStatus(error, launch);
    return absl::InternalError(absl::StrCat("can't start ", launch.program.string()));
  }
  running_[launch.key] = {.identity = {.pid = pid, .boot_id = boot_id}, .child = true};
  return pid;
}

absl::StatusOr<int64_t> LocalLauncher::Adopt(const WorkerKey& key,
                                             const std::filesystem::path& folder) {
  ASSIGN_OR_RETURN(const ProcessIdentity recorded,
                   ReadPidRecord(WorkerPidPath(folder, key.epoch, key.rank)));
  if (HasEnded(recorded)) {
    return absl::NotFoundError(absl::StrCat("process ", recorded.pid, " has ended"));
  }
  absl::MutexLock lock(&mutex_);
  running_[key] = {.identity = recorded, .child = false};
  return recorded.pid;
}

absl::Status LocalLauncher::Signal(const WorkerKey& key, int signal) {
  absl::MutexLock lock(&mutex_);
  const auto found = running_.find(key);
  const absl::Status ended =
      absl::NotFoundError(absl::StrCat("rank ", key.rank, " of ", key.job_id, " isn't running"));
  if (found == running_.end()) return ended;
  const Running& running = found->second;
  if (!running.child && HasEnded(running.identity)) return ended;
  // A child keeps its pid until Poll reaps it, so this can't hit another one.
  if (kill(-static_cast<pid_t>(running.identity.pid), signal) == 0) return absl::OkStatus();
  return errno == ESRCH
             ? ended
             : ErrnoStatus(errno, "can't signal", absl::StrCat("pid ", running.identity.pid));
}

std::vector<ProcessEnd> LocalLauncher::Poll() {
  absl::MutexLock lock(&mutex_);
  std::vector<ProcessEnd> ends;
  for (auto it = running_.begin(); it != running_.end();) {
    const pid_t pid = static_cast<pid_t>(it->second.identity.pid);
    ProcessEnd end{.key = it->first};
    bool ended = false;
    if (it->second.child) {
      siginfo_t info{};
      const int waited = waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT);
      if (waited == 0 && info.si_pid == pid) {
        // What it started goes with it; as long as it isn't reaped the group is still its own.
        kill(-pid, SIGKILL);
        int status = 0;
        if (waitpid(pid, &status, WNOHANG) == pid) {
          end.status_known = true;
          if (WIFSIGNALED(status)) end.signal = WTERMSIG(status);
          if (WIFEXITED(status)) end.exit_code = WEXITSTATUS(status);
        }
        ended = true;
      } else if (waited != 0 && errno == ECHILD) {
        ended = true;  // somebody else reaped it
      }
    } else {
      ended = HasEnded(it->second.identity);
    }
    if (!ended) {
      ++it;
      continue;
    }
    ends.push_back(std::move(end));
    it = running_.erase(it);
  }
  return ends;
}

}  // namespace pyramid
