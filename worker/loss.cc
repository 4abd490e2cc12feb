#include "worker/loss.h"

namespace pyramid {

torch::Tensor SmoothedCrossEntropySum(const torch::Tensor& logits, const torch::Tensor& labels,
                                      double smoothing) {
  const bool narrow =
      logits.scalar_type() == torch::kBFloat16 || logits.scalar_type() == torch::kHalf;
  return at::cross_entropy_loss(narrow ? logits.to(torch::kFloat) : logits, labels, /*weight=*/{},
                                at::Reduction::Sum,
                                /*ignore_index=*/-100, smoothing);
}

}  // namespace pyramid
