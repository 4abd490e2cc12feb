// The coordinator's heart: the only writer of job state. Takes submissions, launches gangs of
// workers, hears their reports, ends and restarts them, and goes on with all of it after a restart
// of the server.
//
// A transition is on disk before it is acted on: an attempt's epoch is committed before its first
// worker starts, a submission before it is answered. Thread-safe. One thread of its own launches,
// watches over the processes and ends attempts.
#ifndef PYRAMID_SERVER_TRAINING_JOB_MANAGER_H_
#define PYRAMID_SERVER_TRAINING_JOB_MANAGER_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/base/clock.h"
#include "proto/training.pb.h"
#include "proto/worker.pb.h"
#include "server/metrics.h"
#include "server/training/job_entry.h"
#include "server/training/job_spec.h"
#include "server/training/job_store.h"
#include "server/training/job_watch.h"
#include "server/training/launcher.h"
#include "server/training/live_attempt.h"
#include "server/training/scheduler.h"

namespace pyramid {

class JobManager {
 public:
  // The finished checkpoints in a job's folder, oldest first. Called without a lock held.
  using FindCheckpoints =
      std::function<std::vector<v1::Checkpoint>(const std::filesystem::path& job_folder)>;

  struct Options {
    std::filesystem::path data;  // holds jobs.sqlite, jobs/<id>/, server.json
    DeviceCounts devices;        // worker slots: {"cpu", 2}
    std::filesystem::path worker_program;
    int cores = 1;  // shared by the CPU slots
    AttemptLimits limits;
    absl::Duration reattach_window = absl::Seconds(20);
    absl::Duration first_backoff = absl::Seconds(1);
    absl::Duration tick = absl::Milliseconds(100);
    absl::Duration progress_interval = absl::Seconds(5);  // between two writes of mere progress
    FindCheckpoints find_checkpoints;                     // empty: only reported ones are known
    // Variables for the workers of an attempt, "NAME=value": what they show the server. Empty:
    // none.
    std::function<std::vector<std::string>(const std::string& job_id, int64_t epoch)>
        worker_environment;
    // For tests: true at a named point stops the manager dead, as kill -9 would.
    std::function<bool(absl::string_view point)> dies_at;
  };

  // Opens the store and looks at what still runs. Errors: JobStore::Open's.
  static absl::StatusOr<std::unique_ptr<JobManager>> Create(Options options, Launcher& launcher,
                                                            Metrics& metrics,
                                                            Clock& clock = Clock::Real());
  // Starts the thread; until then nothing is launched and nothing ended. Once, when workers can
  // reach the server.
  void Start();
  // Leaves workers running: the next server takes them over. See Drain.
  ~JobManager();
  JobManager(const JobManager&) = delete;
  JobManager& operator=(const JobManager&) = delete;

  // What people ask. Errors as in proto/training.proto; Unavailable while draining.
  absl::StatusOr<v1::SubmitJobResponse> Submit(const v1::SubmitJobRequest& request);
  absl::StatusOr<v1::Job> Get(absl::string_view job_id);
  std::vector<v1::Job> List(const v1::ListJobsRequest& request);
  absl::StatusOr<std::unique_ptr<JobWatch>> Watch(const v1::WatchJobRequest& request);
  absl::StatusOr<v1::Job> Cancel(const v1::CancelJobRequest& request);
  // FailedPrecondition: the job isn't running.
  absl::StatusOr<v1::Job> Save(absl::string_view job_id);
  // The folder of a checkpoint to promote; `checkpoint_id` empty: the newest.
  //   NotFound            no such job or checkpoint, or the worker has removed it since
  //   FailedPrecondition  the job has no checkpoint yet
  absl::StatusOr<std::filesystem::path> CheckpointFolder(absl::string_view job_id,
                                                         absl::string_view checkpoint_id);

  // What workers say. FailedPrecondition: the attempt isn't the live one; the worker must exit.
  absl::StatusOr<v1::RegisterResponse> Register(const v1::RegisterRequest& request);
  absl::StatusOr<v1::ReportResponse> Report(const v1::ReportRequest& request);
  absl::StatusOr<v1::FinishResponse> Finish(const v1::FinishRequest& request);

  // For SIGTERM: nothing is launched any more, workers save and stop, watchers get Unavailable.
  // Blocks until no worker is left: SIGTERM after half of `timeout`, SIGKILL after all of it. The
  // workers' calls must be served meanwhile. The next server goes on with the jobs.
  void Drain(absl::Duration timeout);

 private:
  friend class JobWatch;
  struct ShorterFirst {
    bool operator()(const std::string& a, const std::string& b) const {
      return a.size() != b.size() ? a.size() < b.size() : a < b;
    }
  };
  using Entry = JobEntry;
  struct SeenEnd;  // a process's end with the files it left

  JobManager(Options options, std::unique_ptr<JobStore> store, Launcher& launcher, Metrics& metrics,
             Clock& clock);
  absl::Status Restore();
  void Reattach(Entry& entry, const std::vector<StoredWorker>& stored)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // Requests (job_manager.cc).
  std::filesystem::path FolderOf(absl::string_view job_id) const;
  absl::StatusOr<Entry*> Find(absl::string_view job_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<std::pair<Entry*, LiveWorker*>> FindWorker(const v1::WorkerId& id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  v1::Directive DirectiveFor(const Entry& entry) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<v1::JobEvent> NextEvent(JobWatch& watch, absl::Time deadline);
  // Writes `change` with change.job (a changed copy of entry.job), then makes it entry.job. A new
  // state gets an event.
  absl::Status Apply(Entry& entry, v1::Job next, JobChange change)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AddCheckpoints(v1::Job& job,
                      const google::protobuf::RepeatedPtrField<v1::Checkpoint>& checkpoints,
                      JobChange& change) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SetProgress(Entry& entry, v1::Job& next, const v1::Progress& progress)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CountJobs() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // The thread (job_manager_loop.cc).
  void Loop();
  void Tick();
  bool DiesAt(absl::string_view point);
  SeenEnd LookAt(const ProcessEnd& end) const;
  void Record(SeenEnd seen) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EndAttempt(const std::string& job_id);
  std::vector<GangLaunch> PlanLaunches(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<GangLaunch> BeginAttempt(Entry& entry, const std::vector<std::string>& devices,
                                          absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void LaunchGang(const GangLaunch& gang);
  std::map<std::string, DevicePool> FreeDevices() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::vector<WaitingJob> WaitingJobs() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Options options_;
  const std::unique_ptr<JobStore> store_;
  Launcher& launcher_;
  Metrics& metrics_;
  Clock& clock_;

  absl::Mutex mutex_;
  // Entries stay where they are and are never removed.
  std::map<std::string, Entry, ShorterFirst> jobs_ ABSL_GUARDED_BY(mutex_);
  int64_t next_epoch_ ABSL_GUARDED_BY(mutex_) = 1;
  bool wake_ ABSL_GUARDED_BY(mutex_) = false;  // the thread has something to do
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;  // the thread ends
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;  // watchers end
  bool dead_ ABSL_GUARDED_BY(mutex_) = false;    // a test killed it
  absl::Time last_tick_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  std::thread thread_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_JOB_MANAGER_H_
