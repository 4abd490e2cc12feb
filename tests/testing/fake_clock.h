// A clock that stands still until a test moves it.
#ifndef PYRAMID_TESTS_TESTING_FAKE_CLOCK_H_
#define PYRAMID_TESTS_TESTING_FAKE_CLOCK_H_

#include <atomic>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/base/clock.h"

namespace pyramid::testing {

// Thread-safe. Threads in AwaitUntil notice Advance within a millisecond.
class FakeClock final : public Clock {
 public:
  explicit FakeClock(absl::Time start = absl::FromUnixSeconds(1'700'000'000))
      : nanos_(absl::ToUnixNanos(start)) {}

  absl::Time Now() override { return absl::FromUnixNanos(nanos_.load()); }

  void Advance(absl::Duration duration) { nanos_ += absl::ToInt64Nanoseconds(duration); }

  bool AwaitUntil(absl::Mutex& mutex, const absl::Condition& condition,
                  absl::Time deadline) override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    if (deadline != absl::InfiniteFuture()) ++waiting_;
    while (!condition.Eval() && Now() < deadline) {
      mutex.AwaitWithTimeout(condition, absl::Milliseconds(1));
    }
    if (deadline != absl::InfiniteFuture()) --waiting_;
    return condition.Eval();
  }

  // Returns when `threads` wait for a moment of this clock, or after ten real seconds: false.
  bool AwaitWaiting(int threads) {
    for (int i = 0; i < 10'000; ++i) {
      if (waiting_.load() >= threads) return true;
      absl::SleepFor(absl::Milliseconds(1));
    }
    return false;
  }

 private:
  std::atomic<int64_t> nanos_;
  std::atomic<int> waiting_{0};
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_FAKE_CLOCK_H_
