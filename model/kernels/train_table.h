// The CPU's training kernels: what the backward pass needs beside kernel_table.h, in f32 arithmetic
// over f32 or bf16 storage; matrix products of bf16 on AMX.
//
// Conventions of kernel_table.h hold. Gradients of parameters are f32 and are added to what is
// there. Callers split work between threads: by rows where a result is per row, else each thread
// adds to its own copy, and copies are summed in the order of the ranks, so that the same threads
// give the same bits. Forward kernels: kernel_table.h's set with the same storage (hidden rows are
// activations: "amx-f32math", "avx512", "avx2", "portable").
#ifndef PYRAMID_MODEL_KERNELS_TRAIN_TABLE_H_
#define PYRAMID_MODEL_KERNELS_TRAIN_TABLE_H_

#include <cstddef>
#include <cstdint>

#include "model/kernels/dwconv_gelu.h"

namespace pyramid::kernels {

// dw[n, k] += sum over m of dy[m, n] * x[m, k]; db[n] += sum over m of dy[m, n].
struct LinearGradParams {
  const void* dy;  // [m, n] activations, row stride ldy elements
  int64_t ldy;
  const void* x;  // [m, k] activations, row stride ldx elements
  int64_t ldx;
  int64_t m;
  int n;
  int k;
  float* dw;  // [n, k]
  float* db;  // [n]; null: not wanted
};

// As LayerNormParams, and keeps what the backward pass needs.
struct LayerNormTrainParams {
  const void* in;
  void* out;
  const float* gamma;
  const float* beta;
  float eps;
  int64_t rows;
  int c;
  float* mean;     // [rows]
  float* inverse;  // [rows], 1 / sqrt(variance + eps)
};

struct LayerNormGradParams {
  const void* dy;  // [rows, c]
  const void* in;  // [rows, c], the forward pass's
  const float* gamma;
  const float* mean;
  const float* inverse;
  const void* add;  // [rows, c] added to dx: the gradient that skips the norm; null: none
  void* dx;         // [rows, c]; may be dy or add
  int64_t rows;
  int c;
  float* dgamma;  // [c]
  float* dbeta;   // [c]
};

// Backward of DwconvGeluParams over whole maps, n pictures: recomputes the convolution from the
// hidden map, so that only that is kept.
struct DwconvGeluGradParams {
  const void* hidden;   // [n, height, width, c]
  const void* dout;     // [n, height, width, c]
  const float* weight;  // [9][c], taps ky, kx
  const float* bias;    // [c]
  void* dhidden;        // [n, height, width, c]
  float* dweight;       // [9][c]
  float* dbias;         // [c]
  float* scratch;       // dwconv_grad_scratch_floats(width, c); aligned to 64 bytes
  int n;
  int height;
  int width;
  int c_first;  // only channels [c_first, c_last), multiples of 32: how threads share
  int c_last;
  int c;
  Gelu gelu;
  bool relu = false;  // `hidden` is a ReLU's result: dhidden is the gradient in front of it
  // [n, height, width, c]: what the forward pass gave, once more; null: not wanted. Costs a quarter
  // of computing it apart.
  void* gelu_out = nullptr;
};

struct GeluParams {
  const void* in;
  void* out;  // may be `in`
  int64_t n;  // a multiple of 32
  Gelu gelu;
};

struct GeluGradParams {
  const void* in;  // the forward pass's
  const void* dout;
  void* dx;   // may be `dout`
  int64_t n;  // a multiple of 32
  Gelu gelu;
};

// Adaptive average pooling, the linear variant's key map. Cell i of a side covers elements
// floor(i·side / cells) to ceil((i + 1)·side / cells), so cells overlap where the side is no
// multiple, and on sides shorter than `cells`.
struct PoolParams {
  const void* in;  // [height, width, c]
  void* out;       // [cells, cells, c]
  int height;
  int width;
  int cells;
  int c;
};

struct PoolGradParams {
  const float* dout;  // [cells, cells, c]
  void* dx;           // [height, width, c]
  int height;
  int width;
  int cells;
  int c;
};

// Backward of one head's softmax(q·kᵀ)·v, scores as base-2 exponents (q is scaled by the caller,
// and dq is with respect to the scaled q: the gradient of 2^score has a factor ln 2). Recomputes
// the probabilities, and with them sum(dout * out) of a query as sum(P * dP), which bf16 doesn't
// round: `out` is there for sets that would rather read it.
struct AttentionGradParams {
  const void* q;     // [queries, d], row stride ld
  const void* k;     // [keys, d], row stride ld_kv
  const void* v;     // [keys, d], row stride ld_kv
  const void* out;   // [queries, d], row stride ld: the forward pass's
  const void* dout;  // [queries, d], row stride ld
  int64_t ld;
  int64_t ld_kv;
  void* dq;        // [queries, d], row stride ld
  float* dk;       // [keys, d] dense, added to
  float* dv;       // [keys, d] dense, added to
  float* scratch;  // attention_grad_scratch_floats(keys, d)
  int64_t queries;
  int keys;  // 1..kMostKeys
  int d;     // 32 or 64
};

// One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) on n numbers, as PyTorch computes it:
// p *= 1 - lr·wd; m = b1·m + (1-b1)·g; v = b2·v + (1-b2)·g²;
// p -= lr / bias1 · m / (sqrt(v / bias2) + eps). PyTorch's scalars are doubles: 1 - 0.999f is off
// by 1e-5.
struct AdamWParams {
  float* p;
  float* m;
  float* v;
  const float* g;
  int64_t n;
  float grad_scale;  // g is multiplied by it first (clipping); 1: as it is
  double lr;
  double weight_decay;
  double beta1;
  double beta2;
  double eps;
  double bias1;  // 1 - beta1^step
  double bias2;  // 1 - beta2^step
};

struct TrainKernels {
  const char* name;      // of the forward set it belongs to
  int activation_bytes;  // 4: f32, 2: bf16

  void (*linear_grad)(const LinearGradParams& p);
  void (*layer_norm)(const LayerNormTrainParams& p);
  void (*layer_norm_grad)(const LayerNormGradParams& p);
  size_t (*dwconv_grad_scratch_floats)(int width, int c);
  void (*dwconv_gelu_grad)(const DwconvGeluGradParams& p);
  void (*gelu)(const GeluParams& p);
  void (*gelu_grad)(const GeluGradParams& p);
  void (*pool)(const PoolParams& p);
  void (*pool_grad)(const PoolGradParams& p);
  size_t (*attention_grad_scratch_floats)(int keys, int d);
  void (*attention_grad)(const AttentionGradParams& p);
  void (*adamw)(const AdamWParams& p);

  // out[i] = (a[i] + b[i] * scale): residual sums and drop path; activations.
  void (*add_scaled)(const void* a, const void* b, float scale, void* out, int64_t n);
};

extern const TrainKernels kPortableTrainKernels;
extern const TrainKernels kAvx2TrainKernels;
extern const TrainKernels kAvx512TrainKernels;  // f32
extern const TrainKernels kAmxTrainKernels;     // bf16

}  // namespace pyramid::kernels

#endif  // PYRAMID_MODEL_KERNELS_TRAIN_TABLE_H_
