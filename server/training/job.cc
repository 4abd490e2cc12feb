#include "server/training/job.h"

#include <signal.h>
#include <string.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

constexpr absl::Duration kLongestBackoff = absl::Minutes(5);

struct Transition {
  v1::JobState from;
  v1::JobState to;
};

// PAUSING and PAUSED are stored values that no caller reaches yet.
constexpr Transition kTransitions[] = {
    {v1::QUEUED, v1::STARTING},     {v1::QUEUED, v1::CANCELED},     {v1::QUEUED, v1::FAILED},

    {v1::STARTING, v1::RUNNING},    {v1::STARTING, v1::SUCCEEDED},  {v1::STARTING, v1::FAILED},
    {v1::STARTING, v1::RECOVERING}, {v1::STARTING, v1::STOPPING},

    {v1::RUNNING, v1::SUCCEEDED},   {v1::RUNNING, v1::FAILED},      {v1::RUNNING, v1::RECOVERING},
    {v1::RUNNING, v1::STOPPING},    {v1::RUNNING, v1::PAUSING},

    {v1::RECOVERING, v1::STARTING}, {v1::RECOVERING, v1::CANCELED}, {v1::RECOVERING, v1::FAILED},

    {v1::STOPPING, v1::CANCELED},   {v1::STOPPING, v1::FAILED},     {v1::STOPPING, v1::SUCCEEDED},

    {v1::PAUSING, v1::PAUSED},      {v1::PAUSING, v1::SUCCEEDED},   {v1::PAUSING, v1::FAILED},
    {v1::PAUSING, v1::STOPPING},    {v1::PAUSED, v1::QUEUED},       {v1::PAUSED, v1::CANCELED},
};

std::string SignalText(int signal) {
  const char* name = sigabbrev_np(signal);
  return absl::StrCat("signal ", signal, name == nullptr ? "" : absl::StrCat(" (SIG", name, ")"));
}

bool Succeeded(const WorkerEnd& end) { return end.finish.has_value() && end.finish->succeeded(); }
bool Stopped(const WorkerEnd& end) {
  return end.finish.has_value() && !end.finish->succeeded() && end.finish->stopped();
}
bool SaidFailed(const WorkerEnd& end) {
  return end.finish.has_value() && !end.finish->succeeded() && !end.finish->stopped();
}

// It ended because we told it to, and not by a stronger signal than ours.
bool Induced(const WorkerEnd& end) {
  if (end.signal_sent == 0) return false;
  if (!end.status_known || end.signal == 0) return true;
  return end.signal == end.signal_sent || end.signal == SIGTERM;
}

std::string Said(const WorkerEnd& end) {
  const std::string& message = end.finish->message();
  return absl::StrCat("rank ", end.rank, ": ",
                      message.empty() ? absl::StrCat("failed without a message (",
                                                     FailureName(end.finish->failure()), ")")
                                      : message);
}

std::string HowItDied(const WorkerEnd& end) {
  if (end.pid == 0) return absl::StrCat("rank ", end.rank, " was never launched");
  const std::string who = absl::StrCat("rank ", end.rank, " (pid ", end.pid, ")");
  if (!end.status_known) return absl::StrCat(who, " ended unseen and left no exit record");
  if (end.signal == SIGKILL) {
    return absl::StrCat(who, " was killed by ", SignalText(SIGKILL),
                        ": out of memory, or somebody ended it");
  }
  if (end.signal != 0) return absl::StrCat(who, " was killed by ", SignalText(end.signal));
  if (end.exit_code == 0) return absl::StrCat(who, " exited without saying how the job stands");
  return absl::StrCat(who, " exited with code ", end.exit_code);
}

}  // namespace

bool IsEnded(v1::JobState state) {
  return state == v1::SUCCEEDED || state == v1::CANCELED || state == v1::FAILED;
}

bool IsWaiting(v1::JobState state) { return state == v1::QUEUED || state == v1::RECOVERING; }

bool HasWorkers(v1::JobState state) {
  return state == v1::STARTING || state == v1::RUNNING || state == v1::STOPPING ||
         state == v1::PAUSING;
}

bool MayFollow(v1::JobState from, v1::JobState to) {
  return std::any_of(std::begin(kTransitions), std::end(kTransitions),
                     [&](const Transition& t) { return t.from == from && t.to == to; });
}

FailureRule RuleOf(v1::FailureClass failure) {
  switch (failure) {
    case v1::USER_ERROR:
    case v1::CONFIG:
    case v1::DATA_CORRUPT:
    case v1::OOM_DEVICE:
    case v1::OOM_HOST:
    case v1::DISK_FULL:
    case v1::NOT_A_NUMBER:
      return {.retry = false, .counted = true};
    case v1::HANG:
    case v1::COMM:
    case v1::WORKER_LOST:
    case v1::NODE_LOST:
      return {.retry = true, .counted = true};
    case v1::PREEMPTED:
    case v1::COORDINATOR_RESTART:
      return {.retry = true, .counted = false};
    default:
      return {.retry = true, .counted = true};
  }
}

std::string FailureName(v1::FailureClass failure) {
  if (failure == v1::FAILURE_CLASS_UNSPECIFIED) return "none";
  return v1::FailureClass_Name(failure);
}

AttemptOutcome Judge(const std::vector<WorkerEnd>& workers,
                     const std::optional<EndVerdict>& verdict) {
  // The final checkpoint is published and validated when rank 0 says so; what its peers did while
  // they were leaving doesn't undo that.
  for (const WorkerEnd& end : workers) {
    if (end.rank == 0 && Succeeded(end)) return {.succeeded = true};
  }
  if (verdict.has_value()) return {.failure = verdict->failure, .cause = verdict->cause};
  for (const WorkerEnd& end : workers) {
    if (SaidFailed(end) && end.finish->failure() != v1::COMM &&
        end.finish->failure() != v1::FAILURE_CLASS_UNSPECIFIED) {
      return {.failure = end.finish->failure(), .cause = Said(end)};
    }
  }
  for (const WorkerEnd& end : workers) {
    if (!end.finish.has_value() && !Induced(end)) {
      return {.failure = v1::WORKER_LOST, .cause = HowItDied(end)};
    }
  }
  for (const WorkerEnd& end : workers) {
    if (!SaidFailed(end)) continue;
    const bool classed = end.finish->failure() != v1::FAILURE_CLASS_UNSPECIFIED;
    return {.failure = classed ? end.finish->failure() : v1::WORKER_LOST, .cause = Said(end)};
  }
  for (const WorkerEnd& end : workers) {
    if (Stopped(end)) return {.stopped = true, .cause = "saved and stopped"};
  }
  return {.failure = v1::WORKER_LOST, .cause = "the workers were ended before they had saved"};
}

NextStep AfterAttempt(const v1::Job& job, const AttemptOutcome& outcome, bool draining,
                      absl::Duration first_backoff) {
  NextStep next;
  next.failure = outcome.failure;
  next.cause = outcome.cause;
  if (outcome.succeeded) {
    next.state = v1::SUCCEEDED;
    next.cause = "done";
    return next;
  }
  if (job.state() == v1::STOPPING) {
    // The reason of the request stays; a failure on the way out is worth knowing.
    next.state = v1::CANCELED;
    next.reason = job.reason();
    if (outcome.stopped || RuleOf(outcome.failure).retry) {
      next.failure = v1::FAILURE_CLASS_UNSPECIFIED;
      next.cause = absl::StrCat("canceled; ", outcome.cause);
    } else {
      absl::StrAppend(&next.reason, "; ", outcome.cause);
    }
    return next;
  }
  if (draining && (outcome.stopped || RuleOf(outcome.failure).retry)) {
    next.state = v1::RECOVERING;
    next.failure = v1::COORDINATOR_RESTART;
    next.cause = absl::StrCat("the server was stopped; the workers ",
                              outcome.stopped ? "saved and stopped" : "were ended");
    next.reason = "goes on when the server is back";
    return next;
  }
  if (outcome.stopped) {
    next.failure = v1::PREEMPTED;
    next.cause = "the workers were asked to stop from outside; they saved and stopped";
  }
  const FailureRule rule = RuleOf(next.failure);
  if (!rule.retry) {
    next.state = v1::FAILED;
    next.reason = absl::StrCat(FailureName(next.failure), ": ", next.cause);
    return next;
  }
  if (rule.counted && job.restarts() >= job.max_restarts()) {
    next.state = v1::FAILED;
    next.reason = absl::StrCat(FailureName(next.failure), ": ", next.cause, "; gave up after ",
                               job.restarts(), " of ", job.max_restarts(), " restarts");
    return next;
  }
  next.state = v1::RECOVERING;
  next.reason = absl::StrCat("starts again: ", next.cause);
  next.backoff = first_backoff;
  if (rule.counted) {
    next.backoff =
        std::min(first_backoff * std::pow(2.0, std::min(job.restarts(), 20)), kLongestBackoff);
  } else if (next.failure == v1::COORDINATOR_RESTART) {
    next.backoff = absl::ZeroDuration();
  }
  return next;
}

const v1::Checkpoint* NewestCheckpoint(const v1::Job& job) {
  const v1::Checkpoint* newest = nullptr;
  for (const v1::Checkpoint& checkpoint : job.checkpoints()) {
    if (newest == nullptr || checkpoint.step() >= newest->step()) newest = &checkpoint;
  }
  return newest;
}

const v1::Attempt* LiveAttemptOf(const v1::Job& job) {
  if (job.attempts().empty()) return nullptr;
  const v1::Attempt& last = job.attempts(job.attempts_size() - 1);
  return last.has_ended() ? nullptr : &last;
}

std::filesystem::path AttemptFolder(const std::filesystem::path& job_folder, int64_t epoch) {
  return job_folder / "attempts" / absl::StrCat(epoch);
}
std::filesystem::path WorkerLogPath(const std::filesystem::path& job_folder, int64_t epoch,
                                    int rank) {
  return AttemptFolder(job_folder, epoch) / absl::StrCat("rank", rank, ".log");
}
std::filesystem::path WorkerPidPath(const std::filesystem::path& job_folder, int64_t epoch,
                                    int rank) {
  return AttemptFolder(job_folder, epoch) / absl::StrCat("rank", rank, ".pid");
}
std::filesystem::path WorkerExitPath(const std::filesystem::path& job_folder, int64_t epoch,
                                     int rank) {
  return AttemptFolder(job_folder, epoch) / absl::StrCat("rank", rank, ".exit.json");
}

}  // namespace pyramid
