// What one time in fifty of the last 256 exceeded. Thread-safe.
#ifndef PYRAMID_SERVER_SERVING_RECENT_SLOW_H_
#define PYRAMID_SERVER_SERVING_RECENT_SLOW_H_

#include <algorithm>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace pyramid {

class RecentSlow {
 public:
  void Observe(absl::Duration time) {
    absl::MutexLock lock(&mutex_);
    if (times_.size() < kTimes) {
      times_.push_back(time);
    } else {
      times_[next_ % kTimes] = time;
    }
    if (++next_ % kEvery != 0) return;
    std::vector<absl::Duration> sorted = times_;
    const auto slow = sorted.begin() + static_cast<std::ptrdiff_t>((sorted.size() - 1) * 98 / 100);
    std::nth_element(sorted.begin(), slow, sorted.end());
    slow_ = *slow;
  }
  // Zero before the first 16.
  absl::Duration Get() const {
    absl::MutexLock lock(&mutex_);
    return slow_;
  }

 private:
  static constexpr size_t kTimes = 256;
  static constexpr size_t kEvery = 16;

  mutable absl::Mutex mutex_;
  std::vector<absl::Duration> times_ ABSL_GUARDED_BY(mutex_);
  size_t next_ ABSL_GUARDED_BY(mutex_) = 0;  // observations
  absl::Duration slow_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_RECENT_SLOW_H_
