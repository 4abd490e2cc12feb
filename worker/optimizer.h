// AdamW: betas 0.9 and 0.999, eps 1e-8, decoupled weight decay (MindCV adamw.py, PyTorch's AdamW).
#ifndef PYRAMID_WORKER_OPTIMIZER_H_
#define PYRAMID_WORKER_OPTIMIZER_H_

#include <torch/torch.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "model/fused_training.h"
#include "model/tensors.h"

namespace pyramid {

// Is this parameter decayed? `filter`: "disable" decays everything; "norm_and_bias" spares norms
// and every bias; "auto" spares the norms' weights and biases only, which is what MindSpore does by
// itself.
bool IsDecayed(absl::string_view parameter, absl::string_view filter);

// Steps all parameters in a fused kernel, LibTorch's or ours: one pass over parameter, gradient and
// both moments.
class AdamW {
 public:
  // The tensors are shared with the module.
  AdamW(const NamedTensors& parameters, double weight_decay, absl::string_view weight_decay_filter);

  // From now on steps with our kernels, all tensors in one pass; f32 parameters on the CPU.
  void Fuse(const FusedOps& ops) { fused_ = ops; }

  // One update with each parameter's grad, which must be there.
  void Step(double learning_rate);

  // Drops the gradients: the next backward pass makes new ones instead of adding (one pass over
  // memory less than zeroing).
  void DropGradients();

  // Their Euclidean norm over all parameters. `clip` > 0: scaled down to it if larger.
  double GradientNorm(double clip);

  // "exp_avg.<name>", "exp_avg_sq.<name>"; the step count is the owner's.
  NamedTensors State() const;
  // Copies the moments in. InvalidArgument lists what is missing or misshapen; other tensors are
  // ignored.
  absl::Status LoadState(const NamedTensors& state, int64_t steps_done);

 private:
  struct Group {
    double weight_decay = 0;
    std::vector<torch::Tensor> parameters, first, second;
    std::vector<torch::Tensor> gradients;  // of the current step
  };
  std::vector<Group> groups_;
  std::vector<std::string> names_;
  std::vector<torch::Tensor> parameters_, first_, second_;  // in the module's order
  torch::Tensor steps_;                                     // f32 scalar, shared by all
  std::optional<FusedOps> fused_;
};

}  // namespace pyramid

#endif  // PYRAMID_WORKER_OPTIMIZER_H_
