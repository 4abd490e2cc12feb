// PVT v2's parts for training on the CPU with fused kernels: each half of a block is one autograd
// function over model/kernels, forward and backward. What is cheap is computed again in the
// backward pass instead of kept: norms, GELU, gathered patches, attention's probabilities.
//
// Storage of activations and their gradients: f32, or bf16 with sums in f32. Parameters and their
// gradients are f32. The same threads give the same bits. PvtV2 calls these when it is given a
// FusedOps; the plain tensor operations in pvt_v2.cc are the reference.
#ifndef PYRAMID_MODEL_FUSED_TRAINING_H_
#define PYRAMID_MODEL_FUSED_TRAINING_H_

#include <torch/torch.h>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/kernels/kernel_table.h"
#include "model/kernels/train_table.h"

namespace pyramid {

struct FusedOps {
  const kernels::CpuKernels* forward = nullptr;
  const kernels::TrainKernels* train = nullptr;
  torch::ScalarType type = torch::kFloat32;  // of activations
};

// For `dtype` "fp32" | "bf16" on this machine; PYRAMID_KERNELS forces a set. bf16 without AMX is
// computed in f32.
//   InvalidArgument, FailedPrecondition  as ChooseCpuKernels
absl::StatusOr<FusedOps> ChooseFusedOps(absl::string_view dtype);

struct FusedParameter {
  torch::Tensor weight, bias;  // f32, as the module has them
};

struct MapSize {
  int64_t height = 0, width = 0;
};

// Convolution and norm. `input`: for `kernel` 7 the pictures [B, C', H, W] f32, without a gradient;
// else tokens [B, H·W, C'] of ops.type. Result: tokens [B, ceil(H / stride)·ceil(W / stride), C].
torch::Tensor FusedPatchEmbed(const FusedOps& ops, const torch::Tensor& input, MapSize size,
                              int64_t kernel, int64_t stride, bool pad_same,
                              const FusedParameter& conv, const FusedParameter& norm, double eps);

struct FusedAttentionShape {
  MapSize size;
  int64_t heads = 1;
  int64_t reduction = 1;
  bool pad_same = false;
  double eps_block = 1e-6;
  double eps_outer = 1e-5;
};

// x + scale·proj(attention(norm1(x))). `scale` [B] f32, or undefined: 1; pictures of scale 0 are
// skipped. `sr`, `sr_norm` undefined where reduction is 1.
torch::Tensor FusedAttention(const FusedOps& ops, const torch::Tensor& x,
                             const torch::Tensor& scale, const FusedAttentionShape& shape,
                             const FusedParameter& norm1, const FusedParameter& q,
                             const FusedParameter& kv, const FusedParameter& proj,
                             const FusedParameter& sr, const FusedParameter& sr_norm);

// x + scale·fc2(gelu(dwconv(fc1(norm2(x))))).
torch::Tensor FusedMlp(const FusedOps& ops, const torch::Tensor& x, const torch::Tensor& scale,
                       MapSize size, bool gelu_tanh, double eps, const FusedParameter& norm2,
                       const FusedParameter& fc1, const FusedParameter& dwconv,
                       const FusedParameter& fc2);

torch::Tensor FusedNorm(const FusedOps& ops, const torch::Tensor& x, const FusedParameter& norm,
                        double eps);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FUSED_TRAINING_H_
