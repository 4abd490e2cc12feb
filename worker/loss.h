// The training loss.
#ifndef PYRAMID_WORKER_LOSS_H_
#define PYRAMID_WORKER_LOSS_H_

#include <torch/torch.h>

namespace pyramid {

// Cross entropy with label smoothing, summed over the batch: the target is (1 - smoothing) *
// one-hot + smoothing / classes (MindCV cross_entropy_smooth.py, PyTorch's label_smoothing). logits
// [B, classes], computed in f32 or wider; labels [B] i64.
torch::Tensor SmoothedCrossEntropySum(const torch::Tensor& logits, const torch::Tensor& labels,
                                      double smoothing);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_LOSS_H_
