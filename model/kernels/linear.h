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

// A weight as f32, which output j and input i have at weight[j * output_stride + i * input_stride].
// One of the strides is 1: by the other a weight can be packed transposed, as gradients need it.
struct PackLinearParams {
  const float* weight;
  int64_t output_stride;
  int64_t input_stride;
  int n;        // outputs
  int inputs;   // given; those from here to k are zeros
  int k;        // as LinearParams will say, a multiple of 32
  float scale;  // of all numbers
  void* packed;
};

// [n, k] row-major, as it is.
inline PackLinearParams RowMajor(const float* weight, int n, int k, void* packed) {
  return {weight, k, 1, n, k, k, 1.0f, packed};
}

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
