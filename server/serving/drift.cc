#include "server/serving/drift.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "proto/base/answer_mix.h"

namespace pyramid {
namespace {

constexpr int64_t kLeastBlock = 1000;  // pictures
constexpr int64_t kBlockPerClass = 10;
constexpr int64_t kLeastPerClass = 5;
constexpr int64_t kLeastForConfidence = 200;
constexpr int64_t kAnew = 100;  // pictures from one index to the next
// A kind that one side never showed would make the index infinite.
constexpr double kUnseen = 0.5;

int64_t Sum(std::span<const int64_t> counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

}  // namespace

double PopulationStabilityIndex(std::span<const int64_t> a, std::span<const int64_t> b) {
  const int64_t all_a = Sum(a);
  const int64_t all_b = Sum(b);
  if (all_a == 0 || all_b == 0) return 0;
  int kinds = 0;
  for (size_t i = 0; i < a.size(); ++i) kinds += a[i] + b[i] > 0;
  const double size_a = static_cast<double>(all_a) + kUnseen * kinds;
  const double size_b = static_cast<double>(all_b) + kUnseen * kinds;
  double index = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] + b[i] == 0) continue;
    const double p = (static_cast<double>(a[i]) + kUnseen) / size_a;
    const double q = (static_cast<double>(b[i]) + kUnseen) / size_b;
    index += (p - q) * std::log(p / q);
  }
  const double chance = (kinds - 1) * (1 / size_a + 1 / size_b);
  return std::max(0.0, index - chance);
}

double DriftMeter::Mix::Index() const {
  std::vector<int64_t> live(before);
  for (size_t i = 0; i < live.size(); ++i) live[i] += now[i];
  if (Sum(live) < least || Sum(validation) < least) return std::numeric_limits<double>::quiet_NaN();
  return PopulationStabilityIndex(validation, live);
}

DriftMeter::DriftMeter(const v1::AnswerMix& validation) {
  const auto classes = static_cast<size_t>(validation.classes_size());
  if (classes == 0 || validation.confidence_size() != static_cast<int>(kConfidenceBuckets)) return;
  block_ = std::max(kLeastBlock, kBlockPerClass * static_cast<int64_t>(classes));
  classes_ = {
      .validation = {validation.classes().begin(), validation.classes().end()},
      .before = std::vector<int64_t>(classes),
      .now = std::vector<int64_t>(classes),
      .least = std::max(kLeastForConfidence, kLeastPerClass * static_cast<int64_t>(classes))};
  confidence_ = {.validation = {validation.confidence().begin(), validation.confidence().end()},
                 .before = std::vector<int64_t>(kConfidenceBuckets),
                 .now = std::vector<int64_t>(kConfidenceBuckets),
                 .least = kLeastForConfidence};
}

std::optional<DriftMeter::Index> DriftMeter::Observe(int index, double probability) {
  if (!available()) return std::nullopt;
  absl::MutexLock lock(&mutex_);
  const auto kind = static_cast<size_t>(index);
  if (kind >= classes_.now.size()) return std::nullopt;
  ++classes_.now[kind];
  ++confidence_.now[ConfidenceBucket(probability)];
  ++seen_;
  if (seen_ % kAnew != 0) return std::nullopt;
  const Index anew{.classes = classes_.Index(), .confidence = confidence_.Index()};
  if (seen_ >= block_) {
    for (Mix* mix : {&classes_, &confidence_}) {
      mix->before = std::exchange(mix->now, std::vector<int64_t>(mix->now.size()));
    }
    seen_ = 0;
  }
  return anew;
}

}  // namespace pyramid
