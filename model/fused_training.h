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
  // That share the work; 0: as many as LibTorch has. LibTorch's own spin for milliseconds after
  // each operation, on cores that ours want: give it one and say here how many there are.
  int threads = 0;
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
  int64_t reduction = 1;    // side of the windows that `sr` takes for a key
  int64_t pooled_side = 0;  // of the linear variant's key map: pooled, `sr`, `sr_norm`, GELU
  bool pad_same = false;
  bool gelu_tanh = false;
  double eps_block = 1e-6;
  double eps_outer = 1e-5;
};

// x + scale·proj(attention(norm1(x))). `scale` [B] f32, or undefined: 1; pictures of scale 0 are
// skipped. `sr`, `sr_norm` undefined where every token is a key.
torch::Tensor FusedAttention(const FusedOps& ops, const torch::Tensor& x,
                             const torch::Tensor& scale, const FusedAttentionShape& shape,
                             const FusedParameter& norm1, const FusedParameter& q,
                             const FusedParameter& kv, const FusedParameter& proj,
                             const FusedParameter& sr, const FusedParameter& sr_norm);

struct FusedMlpShape {
  MapSize size;
  bool relu = false;  // behind fc1: the linear variant
  bool gelu_tanh = false;
  double eps = 1e-6;
};

// x + scale·fc2(gelu(dwconv(fc1(norm2(x))))).
torch::Tensor FusedMlp(const FusedOps& ops, const torch::Tensor& x, const torch::Tensor& scale,
                       const FusedMlpShape& shape, const FusedParameter& norm2,
                       const FusedParameter& fc1, const FusedParameter& dwconv,
                       const FusedParameter& fc2);

torch::Tensor FusedNorm(const FusedOps& ops, const torch::Tensor& x, const FusedParameter& norm,
                        double eps);

struct AdamWStep {
  int64_t step = 1;  // 1: the first
  double learning_rate = 0;
  double weight_decay = 0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
};

// One step of AdamW (train_table.h) for all tensors in one parallel pass: the threads share the
// numbers, whatever tensors they lie in, and the result doesn't depend on how. Everything f32 on
// the CPU; parameters and moments without gaps, in the same layout (gradients in any). Throws
// c10::Error for anything else.
void FusedAdamW(const FusedOps& ops, const AdamWStep& step, torch::TensorList parameters,
                torch::TensorList gradients, torch::TensorList first, torch::TensorList second);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FUSED_TRAINING_H_
