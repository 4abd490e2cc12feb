// A bucket of tokens, one a picture: the rate limit of a key. Pure; time is an argument.
#ifndef PYRAMID_SERVER_SECURITY_RATE_LIMIT_H_
#define PYRAMID_SERVER_SECURITY_RATE_LIMIT_H_

#include "absl/time/time.h"

namespace pyramid {

// Fills at `rate` tokens a second up to a second's worth (at least one token). Not thread-safe.
class TokenBucket {
 public:
  explicit TokenBucket(double rate) : rate_(rate), capacity_(rate < 1 ? 1 : rate) {}

  // Takes `count` tokens and returns zero, or takes none and returns how long to wait. A request of
  // more than a second's worth is taken when the bucket is full and leaves it in debt, so that over
  // time `rate` holds for requests of any size.
  absl::Duration Take(int count, absl::Time now);

  double rate() const { return rate_; }

 private:
  const double rate_;
  const double capacity_;
  double tokens_ = capacity_;
  absl::Time filled_ = absl::InfinitePast();
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_RATE_LIMIT_H_
