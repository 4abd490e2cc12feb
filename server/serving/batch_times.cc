#include "server/serving/batch_times.h"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace pyramid {
namespace {

constexpr size_t kBatches = 16;                        // of about one size
constexpr absl::Duration kMemory = absl::Seconds(60);  // of a batch size that no longer runs
constexpr size_t kErrors = 128;
// Without many errors to go by. Clipper (NSDI 2017) plans with 0.92 of the time there is.
constexpr double kLeastSlow = 1 / 0.92;
constexpr double kMostSlow = 3;

// Sizes within a factor of 1.4 take about the same time.
int ClassOf(int64_t pixels) {
  return static_cast<int>(std::lround(2 * std::log2(static_cast<double>(pixels))));
}

// 1, 2, 3-4, 5-8, …
int BinOf(int pictures) {
  int bin = 0;
  while ((1 << bin) < pictures) ++bin;
  return bin;
}

}  // namespace

absl::Duration BatchTime::Of(int pictures) const {
  const int known_to = 2 * measured;
  const double seconds = per_picture * std::min(pictures, known_to) + fixed;
  return absl::Seconds(pictures <= known_to ? seconds : seconds * pictures / known_to);
}

int BatchTime::Largest(absl::Duration limit, int most) const {
  if (!known() || AtMost(most) <= limit) return most;
  if (limit < AtMost(1)) return 0;
  const int known_to = 2 * measured;
  const double at_once = absl::ToDoubleSeconds(limit) / slow;
  const double last = absl::ToDoubleSeconds(Of(known_to));
  // Rounding must not make Of(n) a batch that doesn't fit its own time.
  const double pictures =
      at_once > last ? known_to * at_once / last : (at_once - fixed) / per_picture;
  return std::clamp(static_cast<int>(pictures * (1 + 1e-9)), 1, most);
}

template <typename T>
void BatchTimes::Window<T>::Add(const T& value, size_t size) {
  if (values.size() < size) {
    values.push_back(value);
  } else {
    values[next] = value;
    next = (next + 1) % size;
  }
}

void BatchTimes::Observe(int64_t pixels, int pictures, absl::Duration time, absl::Time now) {
  const double seconds = absl::ToDoubleSeconds(time);
  if (seconds <= 0) return;  // a clock that stands still
  SizeClass& size = classes_[ClassOf(pixels)];
  size.pixels = static_cast<double>(pixels);
  // A batch of a size that was only guessed says nothing of how even times are.
  if (size.time.known() && pictures <= 2 * size.time.measured) {
    size.errors.Add(seconds / absl::ToDoubleSeconds(size.time.Of(pictures)), kErrors);
  }
  Batches& batches = size.batches[BinOf(pictures)];
  batches.samples.Add({pictures, seconds}, kBatches);
  batches.newest = now;
  Try(pixels, now);
  for (auto it = size.batches.begin(); it != size.batches.end();) {
    it = it->second.newest < now - kMemory ? size.batches.erase(it) : std::next(it);
  }
  size.time = Fit(size);
}

absl::Time BatchTimes::newest(int64_t pixels) const {
  const auto found = newest_.find(ClassOf(pixels));
  return found == newest_.end() ? absl::InfinitePast() : found->second;
}

void BatchTimes::Try(int64_t pixels, absl::Time now) { newest_[ClassOf(pixels)] = now; }

BatchTime BatchTimes::For(int64_t pixels) const {
  if (classes_.empty()) return {};
  const int wanted = ClassOf(pixels);
  auto found = classes_.lower_bound(wanted);
  if (found != classes_.end() && found->first == wanted) return found->second.time;
  if (found == classes_.end() ||
      (found != classes_.begin() && wanted - std::prev(found)->first < found->first - wanted)) {
    --found;
  }
  BatchTime time = found->second.time;
  time.per_picture *= static_cast<double>(pixels) / found->second.pixels;
  return time;
}

BatchTimes::Sample BatchTimes::Median(const Batches& batches) {
  std::vector<double> each;
  int pictures = 0;
  for (const Sample& sample : batches.samples.values) {
    each.push_back(sample.seconds / sample.pictures);
    pictures += sample.pictures;
  }
  const auto middle = each.begin() + static_cast<std::ptrdiff_t>((each.size() - 1) / 2);
  std::nth_element(each.begin(), middle, each.end());
  const double mean = static_cast<double>(pictures) / static_cast<double>(each.size());
  return {.pictures = static_cast<int>(std::lround(mean)), .seconds = *middle * mean};
}

// Least squares of the relative error, neither part negative.
BatchTime BatchTimes::Fit(const SizeClass& size) {
  BatchTime time{.slow = kLeastSlow};
  double w = 0, wn = 0, wnn = 0, wt = 0, wnt = 0;
  for (const auto& [bin, batches] : size.batches) {
    const Sample sample = Median(batches);
    const double weight = 1 / (sample.seconds * sample.seconds);
    const double n = sample.pictures;
    time.measured = std::max(time.measured, sample.pictures);
    w += weight;
    wn += weight * n;
    wnn += weight * n * n;
    wt += weight * sample.seconds;
    wnt += weight * n * sample.seconds;
  }
  const double spread = w * wnn - wn * wn;
  if (spread > 1e-9 * w * wnn) {
    time.per_picture = (w * wnt - wn * wt) / spread;
    time.fixed = (wt - time.per_picture * wn) / w;
  }
  if (time.fixed < 0) {
    time.per_picture = wnt / wnn;
    time.fixed = 0;
  } else if (time.per_picture <= 0) {
    // Also where all were of one size: that twice as many take as long invites a try.
    time.per_picture = 0;
    time.fixed = wt / w;
  }
  std::vector<double> errors = size.errors.values;
  if (errors.size() >= kErrors / 8) {
    const size_t rank = (errors.size() - 1) * 98 / 100;
    std::nth_element(errors.begin(), errors.begin() + static_cast<std::ptrdiff_t>(rank),
                     errors.end());
    time.slow = std::clamp(errors[rank], kLeastSlow, kMostSlow);
  }
  return time;
}

}  // namespace pyramid
