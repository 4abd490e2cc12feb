// out[m, n] = act(sum over k of a[m, k] * weight[n, k] + bias[n]) + residual[m, n].
//
// The weight is packed once by the kernel set that computes with it. Convolutions are this over
// gathered patches (patches.h).
#ifndef PYRAMID_MODEL_KERNELS_LINEAR_H_
#define PYRAMID_MODEL_KERNELS_LINEAR_H_

#include <cstdint>

namespace pyramid::kernels {

// What an activation or hidden buffer holds is the kernel set's: f32, or bf16 (hidden: fp16).
enum class Output { kActivation, kHidden, kFloat };

struct LinearParams {
  const void* a;  // [m, k] activations, row stride lda elements
  int64_t lda;
  const void* weight;    // packed
  const float* bias;     // [n rounded up to 32], zeros behind n
  const void* residual;  // [m, n] activations, row stride ldo; null: none; may be `out`
  void* out;             // [m, n] of `output`'s type, row stride ldo elements
  int64_t ldo;
  int64_t m;
  int n;
  int k;
  Output output;
  bool relu;
};

}  // namespace pyramid::kernels

#endif  // PYRAMID_MODEL_KERNELS_LINEAR_H_
