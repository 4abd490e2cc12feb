// The rules of a job's life, written once: which state may follow which, and what an attempt's end
// means. Pure: no I/O, no clock, no locks. The job itself is v1::Job, as stored and as answered.
#ifndef PYRAMID_SERVER_TRAINING_JOB_H_
#define PYRAMID_SERVER_TRAINING_JOB_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "proto/training.pb.h"
#include "proto/worker.pb.h"

namespace pyramid {

// SUCCEEDED, CANCELED, FAILED: nothing follows them.
bool IsEnded(v1::JobState state);
// QUEUED, RECOVERING: the scheduler may launch it.
bool IsWaiting(v1::JobState state);
// STARTING, RUNNING, STOPPING, PAUSING: workers of it may be alive.
bool HasWorkers(v1::JobState state);
// The table of transitions. A state may not follow itself.
bool MayFollow(v1::JobState from, v1::JobState to);

// What a failure class means for the job.
struct FailureRule {
  bool retry = false;    // start again from the last checkpoint
  bool counted = false;  // against max_restarts
};
FailureRule RuleOf(v1::FailureClass failure);

// "WORKER_LOST"; "none" for the unspecified one.
std::string FailureName(v1::FailureClass failure);

// How one worker process of an attempt ended, as far as is known.
struct WorkerEnd {
  int rank = 0;
  bool status_known = false;  // exit_code and signal mean something
  int exit_code = 0;
  int signal = 0;
  int signal_sent = 0;                      // the strongest one that we sent; 0: none
  int64_t pid = 0;                          // 0: it was never launched
  std::optional<v1::FinishRequest> finish;  // what it said itself, by RPC or exit record
};

// The manager's own reason to end an attempt: it came before anything the workers said.
struct EndVerdict {
  v1::FailureClass failure = v1::FAILURE_CLASS_UNSPECIFIED;
  std::string cause;
};

struct AttemptOutcome {
  bool succeeded = false;
  bool stopped = false;  // saved and stopped, nothing failed
  v1::FailureClass failure = v1::FAILURE_CLASS_UNSPECIFIED;
  std::string cause;  // one line
};

// Finds the cause of a gang's end. One worker's death ends its peers (their connections break, we
// stop them), so: the verdict first, then what a worker said of itself, then a death by itself,
// then broken connections, then a stop. Rank 0 alone decides success.
AttemptOutcome Judge(const std::vector<WorkerEnd>& workers,
                     const std::optional<EndVerdict>& verdict);

struct NextStep {
  v1::JobState state = v1::FAILED;
  v1::FailureClass failure = v1::FAILURE_CLASS_UNSPECIFIED;  // of the attempt
  std::string cause;                                         // of the attempt's end
  std::string reason;                                        // of the job's new state
  absl::Duration backoff;                                    // before the next launch
};

// What follows for `job`, whose live attempt ended with `outcome`. `draining`: the server is being
// stopped and asked the workers to stop. `first_backoff` doubles with each counted restart, up to
// five minutes.
NextStep AfterAttempt(const v1::Job& job, const AttemptOutcome& outcome, bool draining,
                      absl::Duration first_backoff);

// The newest checkpoint; null if there is none.
const v1::Checkpoint* NewestCheckpoint(const v1::Job& job);

// The attempt that hasn't ended; null if there is none. Only the last one can be live.
const v1::Attempt* LiveAttemptOf(const v1::Job& job);

// Where things lie in a job's folder (docs/formats.md).
std::filesystem::path AttemptFolder(const std::filesystem::path& job_folder, int64_t epoch);
std::filesystem::path WorkerLogPath(const std::filesystem::path& job_folder, int64_t epoch,
                                    int rank);
std::filesystem::path WorkerPidPath(const std::filesystem::path& job_folder, int64_t epoch,
                                    int rank);
std::filesystem::path WorkerExitPath(const std::filesystem::path& job_folder, int64_t epoch,
                                     int rank);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_JOB_H_
