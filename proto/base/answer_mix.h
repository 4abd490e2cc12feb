// How answers are counted, in a validation and on live traffic alike, so that they can be compared:
// v1::AnswerMix (proto/model.proto).
#ifndef PYRAMID_PROTO_BASE_ANSWER_MIX_H_
#define PYRAMID_PROTO_BASE_ANSWER_MIX_H_

#include <algorithm>
#include <array>
#include <cstddef>

namespace pyramid {

// Upper ends, inclusive, of the buckets of the best class's probability; one more is above the
// last.
inline constexpr std::array<double, 12> kConfidenceBounds = {0.05, 0.1, 0.2, 0.3, 0.4,  0.5,
                                                             0.6,  0.7, 0.8, 0.9, 0.95, 0.99};
inline constexpr size_t kConfidenceBuckets = kConfidenceBounds.size() + 1;

inline size_t ConfidenceBucket(double probability) {
  const auto* const at =
      std::lower_bound(kConfidenceBounds.begin(), kConfidenceBounds.end(), probability);
  return static_cast<size_t>(at - kConfidenceBounds.begin());
}

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_ANSWER_MIX_H_
