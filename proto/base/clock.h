// Time as an input: production code takes a Clock, tests give it a FakeClock
// (tests/testing/fake_clock.h).
#ifndef PYRAMID_PROTO_BASE_CLOCK_H_
#define PYRAMID_PROTO_BASE_CLOCK_H_

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace pyramid {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() = 0;

  // Waits until `condition` holds or `deadline` has come; true if the condition holds. `mutex` is
  // held on entry and on return.
  virtual bool AwaitUntil(absl::Mutex& mutex, const absl::Condition& condition, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) = 0;

  // The machine's clock. Lives as long as the process.
  static Clock& Real();
};

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_CLOCK_H_
