// Runs a program of ours as a user would: its own process, output kept, a bound on its life.
#ifndef PYRAMID_TESTS_TESTING_PROCESS_H_
#define PYRAMID_TESTS_TESTING_PROCESS_H_

#include <sys/types.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace pyramid::testing {

struct RunResult {
  int exit_code = -1;  // -1: ended by a signal
  int signal = 0;
  bool timed_out = false;  // it was killed
  std::string out;
  std::string err;
};

// A child process. Killed (SIGKILL, with its process group) in the destructor if it still runs.
class Process {
 public:
  struct Options {
    std::filesystem::path folder;                    // to run in; empty: this process's
    std::map<std::string, std::string> environment;  // added
  };
  Process(std::vector<std::string> command, const std::filesystem::path& log_prefix);
  Process(std::vector<std::string> command, const std::filesystem::path& log_prefix,
          Options options);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  bool Running();
  void Signal(int signal);
  // Waits; kills it when `limit` has passed.
  RunResult Wait(absl::Duration limit);
  std::string Out() const;
  std::string Err() const;

 private:
  bool Reap(bool block);
  pid_t pid_ = -1;
  bool reaped_ = false;
  int wait_status_ = 0;
  std::filesystem::path out_path_;
  std::filesystem::path err_path_;
};

// Starts it and waits.
RunResult Run(std::vector<std::string> command, const std::filesystem::path& log_prefix,
              absl::Duration limit = absl::Seconds(60));

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_PROCESS_H_
