// What the kernels need of the device beyond plain C++: 16-bit numbers, tensor-core multiplies,
// exchange between lanes, launching. On the host tests/model/kernels/cuda/emulated_lanes.h stands
// in for the first half, so that the kernels themselves run lane by lane without a card.
#ifndef PYRAMID_MODEL_KERNELS_CUDA_LANES_H_
#define PYRAMID_MODEL_KERNELS_CUDA_LANES_H_

#ifndef PYRAMID_EMULATED_LANES
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pyramid::kernels::cuda {

// Numbers as they lie in memory.
struct F16 {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float ToFloat(Bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

// Round to nearest even.
__device__ inline void FromFloat(float x, float& out) { out = x; }
__device__ inline void FromFloat(float x, F16& out) {
  out.bits = __half_as_ushort(__float2half_rn(x));
}
__device__ inline void FromFloat(float x, Bf16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// 2^x to two units in the last place; the accurate one costs a few more instructions.
__device__ inline float FastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8x8 matrices of 16-bit elements from shared memory; `row` is 16 aligned bytes.
__device__ inline void LoadMatrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void LoadMatricesTransposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// sum += a · b, 16x16 by 16x8; `T` is the type of a and b.
template <typename T>
__device__ inline void Multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void Multiply<F16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void Multiply<Bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Of the lane whose number differs in the bits of `mask`. Every lane of the warp must call it.
__device__ inline float ShuffleXor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
__device__ inline void SyncWarp() { __syncwarp(); }
__device__ inline void SyncBlock() { __syncthreads(); }

__device__ inline unsigned char* SharedMemory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

template <typename Params>
int Launch(void (*kernel)(Params), dim3 grid, int shared_bytes, void* stream,
           const Params& params) {
  // Above 48 KB a kernel has to ask.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, 128, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace pyramid::kernels::cuda
#endif  // PYRAMID_EMULATED_LANES

#include "model/kernels/cuda/maps.h"
#include "model/kernels/cuda/params.h"

namespace pyramid::kernels::cuda {

struct alignas(16) Bytes16 {
  uint32_t words[4];
};
struct alignas(16) Floats4 {
  float values[4];
};
struct alignas(8) Bytes8 {
  uint16_t halves[4];
};

template <typename T>
__device__ inline T As(float x) {
  T out;
  FromFloat(x, out);
  return out;
}

// Two neighbours in a register, the first in the low half.
template <typename T>
__device__ inline uint32_t Pack(float first, float second) {
  return As<T>(first).bits | static_cast<uint32_t>(As<T>(second).bits) << 16;
}
template <typename T>
__device__ inline float First(uint32_t pair) {
  return ToFloat(T{static_cast<uint16_t>(pair)});
}
template <typename T>
__device__ inline float Second(uint32_t pair) {
  return ToFloat(T{static_cast<uint16_t>(pair >> 16)});
}

// Four elements, aligned to their size together.
__device__ inline void Load4(const float* from, float (&to)[4]) {
  const Floats4 raw = *reinterpret_cast<const Floats4*>(from);
  for (int i = 0; i < 4; ++i) to[i] = raw.values[i];
}
template <typename T>
__device__ inline void Load4(const T* from, float (&to)[4]) {
  const Bytes8 raw = *reinterpret_cast<const Bytes8*>(from);
  for (int i = 0; i < 4; ++i) to[i] = ToFloat(T{raw.halves[i]});
}
__device__ inline void Store4(const float (&from)[4], float* to) {
  *reinterpret_cast<Floats4*>(to) = Floats4{from[0], from[1], from[2], from[3]};
}
template <typename T>
__device__ inline void Store4(const float (&from)[4], T* to) {
  Bytes8 raw;
  for (int i = 0; i < 4; ++i) raw.halves[i] = As<T>(from[i]).bits;
  *reinterpret_cast<Bytes8*>(to) = raw;
}

}  // namespace pyramid::kernels::cuda

#endif  // PYRAMID_MODEL_KERNELS_CUDA_LANES_H_
