#include "worker/local_launcher.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "worker/failure.h"
#include "worker/signals.h"

namespace pyramid {
namespace {

constexpr absl::Duration kPatience = absl::Seconds(10);

struct Child {
  pid_t pid = 0;
  bool running = false;
  int code = 0;
};

// The child's side of fork: only calls that are safe there, then exec.
[[noreturn]] void RunChild(char* const* argv, char* const* environment, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(kExitFailed);
  execve("/proc/self/exe", argv, environment);
  _exit(127);
}

std::vector<char*> Pointers(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

std::vector<std::string> EnvironmentOf(int rank, int workers, const std::string& key) {
  std::vector<std::string> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) environment.emplace_back(*entry);
  environment.push_back(absl::StrCat("RANK=", rank));
  environment.push_back(absl::StrCat("LOCAL_RANK=", rank));
  environment.push_back(absl::StrCat("WORLD_SIZE=", workers));
  environment.push_back(absl::StrCat("LOCAL_WORLD_SIZE=", workers));
  environment.push_back(absl::StrCat("PYRAMID_MEETING_KEY=", key));
  return environment;
}

void SignalAll(const std::vector<Child>& children, int signal) {
  for (const Child& child : children) {
    if (child.running) kill(child.pid, signal);
  }
}

}  // namespace

absl::StatusOr<int> LaunchLocally(const std::vector<std::string>& arguments, int workers) {
  InstallSignals();
  const std::string key = absl::StrCat("local-", getpid(), "-", absl::ToUnixMicros(absl::Now()));
  std::vector<Child> children(workers);
  const pid_t parent = getpid();
  for (int rank = 0; rank < workers; ++rank) {
    std::vector<std::string> argument_texts = {"pyramid-worker"};
    argument_texts.insert(argument_texts.end(), arguments.begin(), arguments.end());
    std::vector<std::string> environment_texts = EnvironmentOf(rank, workers, key);
    const std::vector<char*> argv = Pointers(argument_texts);
    const std::vector<char*> environment = Pointers(environment_texts);
    const pid_t pid = fork();
    if (pid == 0) RunChild(argv.data(), environment.data(), parent);
    if (pid < 0) {
      SignalAll(children, SIGKILL);
      return absl::InternalError(absl::StrCat("starting rank ", rank, ": ", std::strerror(errno)));
    }
    children[rank] = {.pid = pid, .running = true};
  }

  int running = workers;
  int first_failure = 0;
  bool passed_on = false;
  absl::Time kill_at = absl::InfiniteFuture();
  while (running > 0) {
    int status = 0;
    const pid_t pid = waitpid(-1, &status, WNOHANG);
    if (pid > 0) {
      for (int rank = 0; rank < workers; ++rank) {
        Child& child = children[rank];
        if (child.pid != pid || !child.running) continue;
        child.running = false;
        child.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        --running;
        const bool failed = child.code != kExitDone && child.code != kExitStopped;
        if (!failed || first_failure != 0) continue;
        first_failure = child.code;
        if (running == 0) continue;
        std::fprintf(stderr, "pyramid-worker: rank %d ended with %s %d; ending the others\n", rank,
                     WIFEXITED(status) ? "exit code" : "signal",
                     WIFEXITED(status) ? child.code : WTERMSIG(status));
        SignalAll(children, SIGTERM);
        kill_at = absl::Now() + kPatience;
      }
      continue;
    }
    if (StopSignalled() && !passed_on) {
      passed_on = true;
      SignalAll(children, SIGTERM);
    }
    if (absl::Now() > kill_at) {
      SignalAll(children, SIGKILL);
      kill_at = absl::InfiniteFuture();
    }
    absl::SleepFor(absl::Milliseconds(20));
  }
  return first_failure != 0 ? first_failure : children[0].code;
}

}  // namespace pyramid
