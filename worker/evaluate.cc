#include "worker/evaluate.h"

#include <algorithm>
#include <cmath>

#include "proto/base/status.h"

namespace pyramid {

void CountBatch(std::span<const float> logits, std::span<const int64_t> labels,
                double label_smoothing, EvalCounts& counts) {
  const int64_t classes = labels.empty() ? 0 : static_cast<int64_t>(logits.size() / labels.size());
  if (counts.classes.size() < static_cast<size_t>(classes)) counts.classes.resize(classes);
  for (size_t i = 0; i < labels.size(); ++i) {
    const std::span<const float> row = logits.subspan(i * classes, classes);
    const float mine = row[labels[i]];
    const auto best = std::max_element(row.begin(), row.end());  // the first among equals
    const float largest = *best;
    int64_t ahead = 0;  // logits larger than the label's
    bool numbers = true;
    double sum_exp = 0;
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) {
      numbers = numbers && std::isfinite(row[c]);
      if (row[c] > mine || (row[c] == mine && c < labels[i])) ++ahead;
      sum_exp += std::exp(static_cast<double>(row[c]) - largest);
      sum += row[c];
    }
    const double log_sum = largest + std::log(sum_exp);
    counts.loss_sum += (1 - label_smoothing) * (log_sum - mine) +
                       label_smoothing * (log_sum - sum / static_cast<double>(classes));
    counts.top1 += numbers && ahead < 1;
    counts.top5 += numbers && ahead < 5;
    if (numbers) {
      ++counts.classes[best - row.begin()];
      ++counts.confidence[ConfidenceBucket(1 / sum_exp)];
    }
    ++counts.images;
  }
}

std::vector<double> NumbersOf(const EvalCounts& counts, int64_t classes) {
  std::vector<double> numbers = {static_cast<double>(counts.images),
                                 static_cast<double>(counts.top1), static_cast<double>(counts.top5),
                                 counts.loss_sum, counts.interrupted ? 1.0 : 0.0};
  numbers.insert(numbers.end(), counts.confidence.begin(), counts.confidence.end());
  const size_t before_classes = numbers.size();
  numbers.insert(numbers.end(), counts.classes.begin(), counts.classes.end());
  numbers.resize(before_classes + static_cast<size_t>(classes));
  return numbers;
}

EvalCounts CountsFromNumbers(const std::vector<double>& sums) {
  EvalCounts counts{.images = std::llround(sums[0]),
                    .top1 = std::llround(sums[1]),
                    .top5 = std::llround(sums[2]),
                    .loss_sum = sums[3],
                    .interrupted = sums[4] > 0};
  auto next = sums.begin() + 5;
  for (int64_t& count : counts.confidence) count = std::llround(*next++);
  while (next != sums.end()) counts.classes.push_back(std::llround(*next++));
  return counts;
}

absl::StatusOr<EvalCounts> Evaluate(Loader& loader, double label_smoothing,
                                    const LogitsFunction& logits,
                                    const std::function<bool(int64_t images)>& stop) {
  EvalCounts counts;
  while (true) {
    if (stop(counts.images)) {
      counts.interrupted = true;
      return counts;
    }
    ASSIGN_OR_RETURN(const Batch* batch, loader.Take());
    if (batch == nullptr) return counts;
    if (batch->count == 0) continue;
    ASSIGN_OR_RETURN(const std::vector<float> values, logits(*batch));
    CountBatch(values, batch->labels, label_smoothing, counts);
  }
}

}  // namespace pyramid
