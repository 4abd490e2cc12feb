// How long a forward pass takes, learned from those that ran.
#ifndef PYRAMID_SERVER_SERVING_BATCH_TIMES_H_
#define PYRAMID_SERVER_SERVING_BATCH_TIMES_H_

#include <cstdint>
#include <map>
#include <vector>

#include "absl/time/time.h"

namespace pyramid {

// time(n) = per_picture * n + fixed, in seconds; both 0: nothing is known. Beyond twice the largest
// batch measured nothing gets cheaper: the time is in proportion.
struct BatchTime {
  double per_picture = 0;
  double fixed = 0;
  int measured = 1;  // the largest batch
  double slow = 1;   // what one batch in twenty takes longer, times as long

  bool known() const { return per_picture + fixed > 0; }
  // As half of them take.
  absl::Duration Of(int pictures) const;
  // As nearly all of them take at most: what can be promised.
  absl::Duration AtMost(int pictures) const { return slow * Of(pictures); }
  // The largest batch that takes `limit` AtMost, 0..most; `most` while nothing is known.
  int Largest(absl::Duration limit, int most) const;
};

// A line for each class of picture sizes, through the medians of the last 16 batches of about 1, 2,
// 4, 8 … pictures: a hiccup doesn't count. How far batches are off the line gives `slow`. A batch
// size that hasn't run for a minute is forgotten once others have. Not thread-safe.
class BatchTimes {
 public:
  // A batch of `pictures` of `pixels` each took `time` and ended `now`.
  void Observe(int64_t pixels, int pictures, absl::Duration time, absl::Time now);

  // For pictures of `pixels`. Sizes never seen: as the nearest one, scaled.
  BatchTime For(int64_t pixels) const;

  // When pictures of about this size were last measured, or somebody set out to measure them;
  // InfinitePast: never.
  absl::Time newest(int64_t pixels) const;
  void Try(int64_t pixels, absl::Time now);

 private:
  struct Sample {
    int pictures = 0;
    double seconds = 0;
  };
  template <typename T>
  struct Window {
    std::vector<T> values;
    size_t next = 0;  // the oldest one, once the window is full
    void Add(const T& value, size_t size);
  };
  struct Batches {  // of about one size
    Window<Sample> samples;
    absl::Time newest = absl::InfinitePast();
  };
  struct SizeClass {
    double pixels = 0;
    std::map<int, Batches> batches;  // by the logarithm of their size
    Window<double> errors;           // measured ÷ predicted
    BatchTime time;
  };

  static Sample Median(const Batches& batches);
  static BatchTime Fit(const SizeClass& size);

  std::map<int, SizeClass> classes_;
  std::map<int, absl::Time> newest_;  // by class; also of those that were only tried
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_BATCH_TIMES_H_
