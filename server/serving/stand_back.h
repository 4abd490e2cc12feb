// Threads that compute for long beside threads that react.
//
// What the kernel doesn't let be set is left: then the threads only disturb each other more. Slices
// are Linux's from 6.12 on.
#ifndef PYRAMID_SERVER_SERVING_STAND_BACK_H_
#define PYRAMID_SERVER_SERVING_STAND_BACK_H_

#include "absl/time/time.h"

namespace pyramid {

// For the calling thread: it computes. `nice` steps (0..19) make its share of a busy core smaller;
// `slice` 0.1 to 100 ms.
void StandBack(int nice, absl::Duration slice = absl::Milliseconds(3));

// For the calling thread: it computes only while a core has nothing else to do (SCHED_IDLE), and
// whoever wakes up is given that core at once. False, and nothing has changed: it couldn't be ended
// by EndStandingAside, for which Linux wants CAP_SYS_NICE or an RLIMIT_NICE of 20 less the thread's
// nice value.
bool StandAside();
// Of that thread (gettid), by any: it has its share again.
void EndStandingAside(int thread);

// While it lives, the threads and processes that the calling thread makes react: one that wakes up
// waits for the slice of the thread that has its core instead of interrupting it (SCHED_BATCH), and
// then comes first. What comes in meanwhile is done in one go: under five times the load that can
// be answered a refusal takes 47 µs instead of 105, while latencies at half and at four fifths of
// saturation are the same within their spread. Those that compute are to say so themselves
// (StandBack).
class TurnTaking {
 public:
  TurnTaking();
  ~TurnTaking();
  TurnTaking(const TurnTaking&) = delete;
  TurnTaking& operator=(const TurnTaking&) = delete;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_STAND_BACK_H_
