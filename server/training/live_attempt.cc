#include "server/training/live_attempt.h"

#include <signal.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

// It has left the job in order: done, or saved and stopped.
bool LeftInOrder(const LiveWorker& worker) {
  return worker.end.finish.has_value() &&
         (worker.end.finish->succeeded() || worker.end.finish->stopped());
}

bool MustTalk(const LiveWorker& worker) { return !worker.gone && !worker.end.finish.has_value(); }

}  // namespace

bool LiveAttempt::AllGone() const {
  return !launching && std::all_of(workers.begin(), workers.end(),
                                   [](const LiveWorker& worker) { return worker.gone; });
}

bool LiveAttempt::AllHeard() const {
  return std::all_of(workers.begin(), workers.end(),
                     [](const LiveWorker& worker) { return worker.heard; });
}

std::vector<WorkerEnd> LiveAttempt::Ends() const {
  std::vector<WorkerEnd> ends;
  for (const LiveWorker& worker : workers) ends.push_back(worker.end);
  return ends;
}

void LiveAttempt::EndBy(absl::Time terminate, absl::Time kill) {
  terminate_at = std::min(terminate_at, terminate);
  kill_at = std::min(kill_at, kill);
}

void LiveAttempt::Shift(absl::Duration pause) {
  launched += pause;
  reattach_until += pause;
  terminate_at += pause;
  kill_at += pause;
  for (LiveWorker& worker : workers) {
    worker.last_heard += pause;
    worker.finished += pause;
  }
}

void LiveAttempt::FindReasonToEnd(const AttemptLimits& limits, absl::Time now) {
  for (const LiveWorker& worker : workers) {
    const bool left = worker.end.finish.has_value() || worker.gone;
    if (left && !LeftInOrder(worker)) return EndBy(now, now + limits.kill_grace);
  }
  // Rank 0 has left in order; its peers follow, or are helped along.
  if (!workers.empty() && LeftInOrder(workers[0])) {
    const absl::Time by = workers[0].finished + limits.stop_grace;
    return EndBy(by, by + limits.kill_grace);
  }
  if (terminate_at != absl::InfiniteFuture()) return;  // already told to go

  if (reattach_until != absl::InfinitePast()) {
    for (const LiveWorker& worker : workers) {
      if (worker.heard || !MustTalk(worker)) continue;
      if (now < reattach_until) return;
      verdict = EndVerdict{
          v1::COORDINATOR_RESTART,
          absl::StrCat("rank ", worker.end.rank, " didn't report after the server's restart")};
      return EndBy(now, now + limits.kill_grace);
    }
    reattach_until = absl::InfinitePast();
  }

  absl::Time last_heard = absl::InfinitePast();
  for (const LiveWorker& worker : workers) {
    last_heard = std::max(last_heard, worker.last_heard);
    if (!MustTalk(worker)) continue;
    if (!worker.heard) {
      if (now - launched <= limits.start_timeout) continue;
      verdict = EndVerdict{
          v1::HANG, absl::StrCat("rank ", worker.end.rank, " didn't report within ",
                                 absl::FormatDuration(limits.start_timeout), " of its launch")};
      return EndBy(now, now + limits.kill_grace);
    }
    if (worker.reports && now - worker.last_heard > limits.lost_after) {
      verdict = EndVerdict{
          v1::HANG, absl::StrCat("rank ", worker.end.rank, " lives but didn't report for ",
                                 absl::FormatDuration(limits.lost_after), "; its last step was ",
                                 worker.last_step)};
      return EndBy(now, now + limits.kill_grace);
    }
  }
  if (AllHeard() && now - last_heard > limits.lost_after) {
    verdict = EndVerdict{
        v1::HANG, absl::StrCat("no worker reported for ", absl::FormatDuration(limits.lost_after))};
    EndBy(now, now + limits.kill_grace);
  }
}

std::vector<SignalOrder> LiveAttempt::Supervise(const AttemptLimits& limits, absl::Time now) {
  std::vector<SignalOrder> orders;
  if (launching) return orders;
  FindReasonToEnd(limits, now);
  const int due = now >= kill_at ? SIGKILL : now >= terminate_at ? SIGTERM : 0;
  if (due == 0) return orders;
  for (LiveWorker& worker : workers) {
    if (worker.gone || worker.end.signal_sent == due || worker.end.signal_sent == SIGKILL) continue;
    worker.end.signal_sent = due;
    orders.push_back({worker.end.rank, due});
  }
  return orders;
}

}  // namespace pyramid
