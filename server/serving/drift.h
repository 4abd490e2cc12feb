// How far a version's live answers are from those of its validation: by best class and by that
// class's probability.
//
// The population stability index of two mixes p and q is the sum of (p - q) ln(p / q); under 0.1
// counts as steady, over 0.25 as shifted. Chance alone makes it about (k - 1)(1/N + 1/M) for k
// kinds and samples of N and M pictures; that much is taken off. Thread-safe.
#ifndef PYRAMID_SERVER_SERVING_DRIFT_H_
#define PYRAMID_SERVER_SERVING_DRIFT_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "proto/model.pb.h"

namespace pyramid {

class DriftMeter {
 public:
  struct Index {  // 0 and up; NaN: too few pictures, validated or answered, to tell
    double classes = std::numeric_limits<double>::quiet_NaN();
    double confidence = std::numeric_limits<double>::quiet_NaN();
  };

  explicit DriftMeter(const v1::AnswerMix& validation);

  // False: the checkpoint says nothing about its validation's answers.
  bool available() const { return !classes_.validation.empty(); }

  // A picture's best class, below the number of classes, and its probability. A new index now and
  // then, nothing in between. Of at least the newest 1,000 pictures, or 10 a class, and at most
  // twice as many.
  std::optional<Index> Observe(int index, double probability);

 private:
  struct Mix {
    std::vector<int64_t> validation;
    std::vector<int64_t> before, now;  // blocks of live pictures
    int64_t least = 0;                 // pictures on each side
    double Index() const;
  };

  int64_t block_ = 0;  // pictures
  absl::Mutex mutex_;
  int64_t seen_ ABSL_GUARDED_BY(mutex_) = 0;  // of this block
  Mix classes_;
  Mix confidence_;
};

// The index of two samples counted by the same kinds, chance taken off; 0 for an empty one.
double PopulationStabilityIndex(std::span<const int64_t> a, std::span<const int64_t> b);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_DRIFT_H_
