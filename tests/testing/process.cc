#include "tests/testing/process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/time/clock.h"

namespace pyramid::testing {
namespace {

std::string Slurp(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

}  // namespace

Process::Process(std::vector<std::string> command, const std::filesystem::path& log_prefix)
    : Process(std::move(command), log_prefix, Options()) {}

Process::Process(std::vector<std::string> command, const std::filesystem::path& log_prefix,
                 Options options)
    : out_path_(log_prefix.string() + ".out"), err_path_(log_prefix.string() + ".err") {
  // Everything that allocates happens before the fork.
  std::vector<char*> arguments;
  for (std::string& word : command) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  std::vector<std::string> variables;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string text = *variable;
    if (options.environment.count(text.substr(0, text.find('='))) == 0) variables.push_back(text);
  }
  for (const auto& [name, value] : options.environment) variables.push_back(name + "=" + value);
  std::vector<char*> environment;
  for (std::string& variable : variables) environment.push_back(variable.data());
  environment.push_back(nullptr);

  pid_ = fork();
  if (pid_ == 0) {
    setpgid(0, 0);
    const int out = open(out_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    const int err = open(err_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    const int in = open("/dev/null", O_RDONLY);
    dup2(in, 0);
    dup2(out, 1);
    dup2(err, 2);
    if (!options.folder.empty() && chdir(options.folder.c_str()) != 0) _exit(126);
    execvpe(arguments[0], arguments.data(), environment.data());
    _exit(127);
  }
}

Process::~Process() {
  if (pid_ > 0 && !reaped_) {
    kill(-pid_, SIGKILL);
    kill(pid_, SIGKILL);
    Reap(true);
  }
}

bool Process::Reap(bool block) {
  if (reaped_) return true;
  if (waitpid(pid_, &wait_status_, block ? 0 : WNOHANG) == pid_) reaped_ = true;
  return reaped_;
}

bool Process::Running() { return !Reap(false); }

void Process::Signal(int signal) {
  if (!reaped_) kill(pid_, signal);
}

RunResult Process::Wait(absl::Duration limit) {
  RunResult result;
  const absl::Time deadline = absl::Now() + limit;
  while (Running()) {
    if (absl::Now() > deadline) {
      result.timed_out = true;
      kill(-pid_, SIGKILL);
      kill(pid_, SIGKILL);
      Reap(true);
      break;
    }
    absl::SleepFor(absl::Milliseconds(10));
  }
  if (WIFEXITED(wait_status_)) result.exit_code = WEXITSTATUS(wait_status_);
  if (WIFSIGNALED(wait_status_)) result.signal = WTERMSIG(wait_status_);
  result.out = Out();
  result.err = Err();
  return result;
}

std::string Process::Out() const { return Slurp(out_path_); }
std::string Process::Err() const { return Slurp(err_path_); }

RunResult Run(std::vector<std::string> command, const std::filesystem::path& log_prefix,
              absl::Duration limit) {
  return Process(std::move(command), log_prefix).Wait(limit);
}

}  // namespace pyramid::testing
