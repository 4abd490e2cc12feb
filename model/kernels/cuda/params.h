// What the host asks of the CUDA kernels. No torch and no CUDA types, so that the .cu files, the
// plug-in's ATen side and the host's tests all see the same structs.
//
// Every launch function queues its kernels on `stream` (a cudaStream_t) and returns a cudaError_t
// as int, 0: queued. They assume what their params promise; torch_ops.cc checks. Workspaces are the
// caller's; the sizes are functions in maps.h. Sums are f32 and in a fixed order: the same
// arguments give the same bits.
#ifndef PYRAMID_MODEL_KERNELS_CUDA_PARAMS_H_
#define PYRAMID_MODEL_KERNELS_CUDA_PARAMS_H_

#include <cstdint>

namespace pyramid::kernels::cuda {

enum class Scalar { kF32, kF16, kBf16 };

// softmax(q·kᵀ·scale)·v of each picture and head. Head h has the columns h·d … h·d + d - 1 of its
// tensor. Pointers are aligned to 16 bytes, and so are the strides (in elements).
struct AttentionParams {
  const void* q;  // [batch, queries, heads · d]
  const void* k;  // [batch, keys, heads · d]
  const void* v;  // the same
  void* out;      // like q
  // [batch, heads, queries, 2] of each query, for the backward pass: largest score · scale · log2
  // e, and 1 / the sum of 2^(score · scale · log2 e - that). 0 and 0 for a query that reaches no
  // key (its output is 0). Null: not wanted.
  float* softmax;
  int64_t q_batch, q_row;
  int64_t kv_batch, kv_row;
  int64_t out_batch, out_row;
  int batch, heads, queries;
  int keys;     // 1..256
  int d;        // 32 or 64
  float scale;  // > 0
  Scalar type;
};

struct AttentionBackwardParams {
  AttentionParams forward;  // its `out` is read
  const void* d_out;        // like out, with out's strides
  // Gradients, without gaps. dkv has the keys' in its first half: [batch, keys, 2 · heads · d].
  void* dq;  // [batch, queries, heads · d]
  void* dkv;
  float* dkv_partial;  // DkvPartialCount floats
  float* dq_partial;   // DqPartialCount floats; may be null where that is 0
};

int LaunchAttention(const AttentionParams& params, void* stream);
int LaunchAttentionBackward(const AttentionBackwardParams& params, void* stream);

// gelu(depthwise 3x3 convolution + bias), stride 1, zero padding 1. Maps are channels-last without
// gaps; pointers aligned to 16 bytes.
struct DwconvParams {
  const void* in;       // [batch, height, width, c]
  const float* weight;  // [9][c], taps in the order ky, kx
  const float* bias;    // [c]
  void* out;            // like in
  int64_t batch;
  int height, width;
  int c;  // a multiple of 4
  bool tanh;
  Scalar type;
};

struct DwconvBackwardParams {
  DwconvParams forward;  // `out` isn't read
  const void* d_out;     // like out
  void* d_hidden;        // workspace like out: gradient of what goes into GELU
  void* d_in;            // like in
  float* d_weight;       // [10][c]: nine taps, then the bias
  float* partial;        // DwconvPartialCount floats
};

int LaunchDwconvGelu(const DwconvParams& params, void* stream);
int LaunchDwconvGeluBackward(const DwconvBackwardParams& params, void* stream);

// (in - mean) · rstd · gamma + beta of each row.
struct LayerNormParams {
  const void* in;      // [rows, c] without gaps, of type in_type
  const float* gamma;  // [c]
  const float* beta;   // [c]
  void* out;           // [rows, c] of type out_type
  float* mean;         // [rows]
  float* rstd;         // [rows] 1 / sqrt(variance + eps)
  int64_t rows;
  int c;  // a multiple of 4, at most 1024
  float eps;
  Scalar in_type;   // kF32, or out_type
  Scalar out_type;  // of the gradient of out as well
};

struct LayerNormBackwardParams {
  LayerNormParams forward;  // `out` and `beta` aren't read
  const void* d_out;        // like out
  void* d_in;               // like in
  float* d_gamma_beta;      // [2][c]
  float* partial;           // LayerNormPartialCount floats
};

int LaunchLayerNorm(const LayerNormParams& params, void* stream);
int LaunchLayerNormBackward(const LayerNormBackwardParams& params, void* stream);

// out[i] = sum over s of partial[s · count + i], s from 0 on.
struct SumPartialsParams {
  const float* partial;
  void* out;
  int64_t count;  // a multiple of 4
  int partials;
  Scalar type;  // of out
};

int LaunchSumPartials(const SumPartialsParams& params, void* stream);

}  // namespace pyramid::kernels::cuda

#endif  // PYRAMID_MODEL_KERNELS_CUDA_PARAMS_H_
