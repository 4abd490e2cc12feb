// What is known in memory of an attempt whose workers may be alive, and the policy of when it must
// end. No I/O, no clock.
#ifndef PYRAMID_SERVER_TRAINING_LIVE_ATTEMPT_H_
#define PYRAMID_SERVER_TRAINING_LIVE_ATTEMPT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "proto/worker.pb.h"
#include "server/training/job.h"

namespace pyramid {

struct LiveWorker {
  bool gone = false;     // the process has ended, or was never launched
  WorkerEnd end;         // pid, signals sent, what it said; the status once it is gone
  bool heard = false;    // it has registered or reported to this server
  bool reports = false;  // it has reported, so silence means something
  absl::Time last_heard = absl::InfinitePast();
  absl::Time finished = absl::InfiniteFuture();  // when `end.finish` became known
  int64_t last_sequence = 0;
  int64_t last_step = 0;
  std::vector<std::string> last_lines;  // of its log, once it is gone
};

struct AttemptLimits {
  absl::Duration lost_after = absl::Seconds(60);
  absl::Duration start_timeout = absl::Seconds(120);
  absl::Duration stop_grace = absl::Seconds(30);
  absl::Duration kill_grace = absl::Seconds(5);  // between SIGTERM and SIGKILL
};

struct SignalOrder {
  int rank = 0;
  int signal = 0;
};

struct LiveAttempt {
  int64_t epoch = 0;
  bool launching = false;  // processes are being started; nothing is decided
  absl::Time launched = absl::InfinitePast();
  // After a restart of the server: how long silent workers have. InfinitePast: not reattaching.
  absl::Time reattach_until = absl::InfinitePast();
  std::vector<LiveWorker> workers;  // by rank
  std::optional<EndVerdict> verdict;
  // Checkpoints on request: rank 0 is told to save until it has saved as often as was wanted.
  int64_t saves_wanted = 0;
  int64_t saves_done = 0;
  // SIGTERM and SIGKILL for whoever is left by then. They only come nearer.
  absl::Time terminate_at = absl::InfiniteFuture();
  absl::Time kill_at = absl::InfiniteFuture();

  bool AllGone() const;
  bool AllHeard() const;
  std::vector<WorkerEnd> Ends() const;
  void EndBy(absl::Time terminate, absl::Time kill);
  // Moves everything measured so far by a pause of this process, in which it couldn't hear.
  void Shift(absl::Duration pause);

  // Looks whether the gang must end (a worker failed, was lost, is silent), and gives the signals
  // that are due, each once.
  std::vector<SignalOrder> Supervise(const AttemptLimits& limits, absl::Time now);

 private:
  void FindReasonToEnd(const AttemptLimits& limits, absl::Time now);
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_LIVE_ATTEMPT_H_
