#include "server/security/rate_limit.h"

#include <algorithm>

namespace pyramid {

absl::Duration TokenBucket::Take(int count, absl::Time now) {
  if (now > filled_) {
    if (filled_ != absl::InfinitePast()) {
      tokens_ = std::min(capacity_, tokens_ + rate_ * absl::ToDoubleSeconds(now - filled_));
    }
    filled_ = now;
  }
  const double needed = std::min<double>(count, capacity_);
  // A sum of tenths falls short of the whole by a rounding error.
  if (tokens_ < needed - 1e-9) {
    return std::max(absl::Seconds((needed - tokens_) / rate_), absl::Nanoseconds(1));
  }
  tokens_ -= count;
  return absl::ZeroDuration();
}

}  // namespace pyramid
