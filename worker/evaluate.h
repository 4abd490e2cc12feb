// Scores a network on labelled pictures by counts that add up over ranks. Torch-free.
#ifndef PYRAMID_WORKER_EVALUATE_H_
#define PYRAMID_WORKER_EVALUATE_H_

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/base/answer_mix.h"
#include "worker/data/loader.h"

namespace pyramid {

struct EvalCounts {
  int64_t images = 0;
  int64_t top1 = 0;     // label has the largest logit (the lower index first among equals)
  int64_t top5 = 0;     // among the five largest
  double loss_sum = 0;  // cross entropy with label smoothing
  // Of pictures whose logits are all finite: by best class, by its probability
  // (proto/base/answer_mix.h).
  std::vector<int64_t> classes;
  std::array<int64_t, kConfidenceBuckets> confidence{};
  bool interrupted = false;

  // 0 without pictures.
  double Top1() const {
    return images == 0 ? 0 : static_cast<double>(top1) / static_cast<double>(images);
  }
  double Top5() const {
    return images == 0 ? 0 : static_cast<double>(top5) / static_cast<double>(images);
  }
  double Loss() const { return images == 0 ? 0 : loss_sum / static_cast<double>(images); }
};

// As numbers that add up over ranks, and back from their sums. `classes`: of the network, as a rank
// may have seen no picture. `interrupted` of the sums: of any.
std::vector<double> NumbersOf(const EvalCounts& counts, int64_t classes);
EvalCounts CountsFromNumbers(const std::vector<double>& sums);

// Adds a batch. A row with a logit that isn't a number counts as wrong.
void CountBatch(std::span<const float> logits, std::span<const int64_t> labels,
                double label_smoothing, EvalCounts& counts);

// A batch's pixels, [count, channels, side, side] → logits, [count, classes].
using LogitsFunction = std::function<absl::StatusOr<std::vector<float>>(const Batch& batch)>;

// Takes every batch of the loader. `stop`, asked between batches, ends it early with `interrupted`.
absl::StatusOr<EvalCounts> Evaluate(Loader& loader, double label_smoothing,
                                    const LogitsFunction& logits,
                                    const std::function<bool(int64_t images)>& stop);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_EVALUATE_H_
