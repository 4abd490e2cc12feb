// The CPU's kernels: one table of functions per instruction set, chosen once at run time.
//
// Buffers: activations and hidden rows are NHWC (tokens x channels), 64-byte aligned, and readable
// (not necessarily written) for kSlack bytes behind their end; kernels write valid elements only.
// Channel counts are multiples of 32. Every function is thread-safe and allocates nothing; scratch
// lives on the stack: thread-local arrays would be taken from the stack of every thread of the
// process, and libraries start some with 100 KiB. A call handles whatever rows it is given: callers
// split work between threads.
//
// Rule for every set: error against the double reference at most twice that of the plain
// computation in its dtype (tests/model/kernels).
//
// Files with instruction-set flags include this, intrinsics and <cstdint> only, everything else in
// an unnamed namespace: an inline function compiled for AVX-512 must not be the copy the linker
// keeps.
#ifndef PYRAMID_MODEL_KERNELS_KERNEL_TABLE_H_
#define PYRAMID_MODEL_KERNELS_KERNEL_TABLE_H_

#include <cstddef>
#include <cstdint>

#include "model/kernels/attention.h"
#include "model/kernels/dwconv_gelu.h"
#include "model/kernels/layer_norm.h"
#include "model/kernels/linear.h"

namespace pyramid::kernels {

inline constexpr int64_t kSlack = 8192;  // bytes

struct CpuKernels {
  const char* name;      // "amx" | "amx-f32math" | "avx512-bf16" | "avx512" | "avx2" | "portable"
  int activation_bytes;  // 4: f32, 2: bf16
  int hidden_bytes;      // 4: f32, 2: fp16 ("amx") or bf16

  // 32 outputs, beginning at a multiple of 32, are packed as they would be without the others and
  // lie packed_linear_bytes(32, k) behind the 32 before them.
  size_t (*packed_linear_bytes)(int n, int k);
  void (*pack_linear)(const PackLinearParams& p);
  void (*linear)(const LinearParams& p);

  void (*layer_norm)(const LayerNormParams& p);

  // weight [c, 3, 3] f32, bias [c].
  size_t (*packed_dwconv_bytes)(int c);
  void (*pack_dwconv)(const float* weight, const float* bias, int c, void* packed);
  void (*dwconv_gelu)(const DwconvGeluParams& p);

  size_t (*packed_keys_bytes)(int keys, int d);
  void (*pack_keys)(const PackKeysParams& p);
  void (*attention)(const AttentionParams& p);

  // n floats to activations and back; used at the network's ends and by its rare operations.
  void (*from_float)(const float* in, void* out, int64_t n);
  void (*to_float)(const void* in, float* out, int64_t n);

  // Called once by each thread before its first kernel; may be called again. False: the system
  // doesn't grant what the set needs.
  bool (*prepare_thread)();
};

extern const CpuKernels kPortableKernels;    // any machine; aarch64 too
extern const CpuKernels kAvx2Kernels;        // f32
extern const CpuKernels kAvx512Kernels;      // f32
extern const CpuKernels kAmxKernels;         // bf16, hidden fp16 (AVX512-FP16)
extern const CpuKernels kAmxF32MathKernels;  // bf16, hidden bf16, f32 arithmetic between GEMMs
extern const CpuKernels kAvx512Bf16Kernels;  // the same without tiles (AVX512-BF16)

}  // namespace pyramid::kernels

#endif  // PYRAMID_MODEL_KERNELS_KERNEL_TABLE_H_
