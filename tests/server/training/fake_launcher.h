// Processes that exist only in a test: it decides when and how they end.
#ifndef PYRAMID_TESTS_SERVER_TRAINING_FAKE_LAUNCHER_H_
#define PYRAMID_TESTS_SERVER_TRAINING_FAKE_LAUNCHER_H_

#include <signal.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/training/job.h"
#include "server/training/launcher.h"

namespace pyramid::testing {

// Its processes outlive a job manager, as real ones do: after Forget they are nobody's children.
class FakeLauncher final : public Launcher {
 public:
  absl::StatusOr<int64_t> Launch(const WorkerLaunch& launch) override {
    absl::MutexLock lock(&mutex_);
    if (!launch_error_.ok()) return launch_error_;
    std::ofstream(WorkerPidPath(launch.folder, launch.key.epoch, launch.key.rank)) << "{}";
    processes_[launch.key] = {.pid = ++last_pid_, .child = true};
    launches_.push_back(launch);
    size_t live_attempts = 0;
    std::set<std::pair<std::string, int64_t>> attempts;
    for (const auto& [key, process] : processes_) attempts.insert({key.job_id, key.epoch});
    std::set<std::string> jobs;
    for (const auto& [job, epoch] : attempts) live_attempts += jobs.insert(job).second ? 0 : 1;
    if (live_attempts > 0) doubled_ = true;
    return last_pid_;
  }
  absl::StatusOr<int64_t> Adopt(const WorkerKey& key, const std::filesystem::path&) override {
    absl::MutexLock lock(&mutex_);
    const auto found = processes_.find(key);
    if (found == processes_.end()) return absl::NotFoundError("it has ended");
    return found->second.pid;
  }
  absl::Status Signal(const WorkerKey& key, int signal) override {
    absl::MutexLock lock(&mutex_);
    signals_.push_back({key, signal});
    if (processes_.count(key) == 0) return absl::NotFoundError("it has ended");
    if (signal == SIGKILL || dies_of_term_) EndLocked(key, {.signal = signal});
    return absl::OkStatus();
  }
  std::vector<ProcessEnd> Poll() override {
    absl::MutexLock lock(&mutex_);
    return std::exchange(ends_, {});
  }

  // The test's side.
  void Exit(const WorkerKey& key, int code) {
    absl::MutexLock lock(&mutex_);
    EndLocked(key, {.exit_code = code});
  }
  void Kill(const WorkerKey& key, int signal) {
    absl::MutexLock lock(&mutex_);
    EndLocked(key, {.signal = signal});
  }
  // The server that started them is gone.
  void Forget() {
    absl::MutexLock lock(&mutex_);
    for (auto& [key, process] : processes_) process.child = false;
    ends_.clear();
  }
  void set_launch_error(absl::Status status) {
    absl::MutexLock lock(&mutex_);
    launch_error_ = std::move(status);
  }
  void set_dies_of_term(bool dies) {
    absl::MutexLock lock(&mutex_);
    dies_of_term_ = dies;
  }
  std::vector<WorkerLaunch> launches() {
    absl::MutexLock lock(&mutex_);
    return launches_;
  }
  std::vector<std::pair<WorkerKey, int>> signals() {
    absl::MutexLock lock(&mutex_);
    return signals_;
  }
  size_t running() {
    absl::MutexLock lock(&mutex_);
    return processes_.size();
  }
  // Whether two attempts of one job were ever alive together.
  bool doubled() {
    absl::MutexLock lock(&mutex_);
    return doubled_;
  }

 private:
  struct Running {
    int64_t pid = 0;
    bool child = false;
  };
  void EndLocked(const WorkerKey& key, ProcessEnd end) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto found = processes_.find(key);
    if (found == processes_.end()) return;
    end.key = key;
    end.status_known = found->second.child;
    if (!end.status_known) end.exit_code = end.signal = 0;
    ends_.push_back(end);
    processes_.erase(found);
  }

  absl::Mutex mutex_;
  std::map<WorkerKey, Running> processes_ ABSL_GUARDED_BY(mutex_);
  std::vector<WorkerLaunch> launches_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::pair<WorkerKey, int>> signals_ ABSL_GUARDED_BY(mutex_);
  std::vector<ProcessEnd> ends_ ABSL_GUARDED_BY(mutex_);
  absl::Status launch_error_ ABSL_GUARDED_BY(mutex_);
  bool dies_of_term_ ABSL_GUARDED_BY(mutex_) = true;
  bool doubled_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t last_pid_ ABSL_GUARDED_BY(mutex_) = 1000;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_SERVER_TRAINING_FAKE_LAUNCHER_H_
