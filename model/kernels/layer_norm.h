// out[r, c] = (in[r, c] - mean of row) / sqrt(variance of row + eps) * gamma[c] + beta[c]; sums in
// f32. In place is allowed.
#ifndef PYRAMID_MODEL_KERNELS_LAYER_NORM_H_
#define PYRAMID_MODEL_KERNELS_LAYER_NORM_H_

#include <cstdint>

namespace pyramid::kernels {

struct LayerNormParams {
  const void* in;      // [rows, c] activations without gaps
  void* out;           // the same
  const float* gamma;  // [c]
  const float* beta;   // [c]
  float eps;
  int64_t rows;
  int c;  // a multiple of 32
};

}  // namespace pyramid::kernels

#endif  // PYRAMID_MODEL_KERNELS_LAYER_NORM_H_
