// A card's lanes on the host, for the .cu files compiled as C++ with this file in front (-include):
// what model/kernels/cuda/lanes.h gives them on a card, written from the PTX ISA 8.7, "Matrix
// Fragments for mma.m16n8k16" and "ldmatrix".
//
// Blocks run one after the other, a block's lanes as fibers: a lane runs until it waits for its
// warp or its block. Stricter than a card: every lane of a warp must come to the same exchange,
// every lane of a block to the same barrier. Shared memory has exactly the bytes that were asked
// for, then a page that can't be touched, and holds NaN patterns at first. Breaches abort with a
// line of text.
#ifndef PYRAMID_TESTS_MODEL_KERNELS_CUDA_EMULATED_LANES_H_
#define PYRAMID_TESTS_MODEL_KERNELS_CUDA_EMULATED_LANES_H_

#define PYRAMID_EMULATED_LANES

#include <cmath>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(int64_t nx, int64_t ny = 1, int64_t nz = 1)
      : x(static_cast<unsigned>(nx)), y(static_cast<unsigned>(ny)), z(static_cast<unsigned>(nz)) {}
};

namespace pyramid::kernels::cuda {

struct F16 {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};
float ToFloat(F16 x);
float ToFloat(Bf16 x);
inline float ToFloat(float x) { return x; }
void FromFloat(float x, F16& out);
void FromFloat(float x, Bf16& out);
inline void FromFloat(float x, float& out) { out = x; }

inline float FastExp2(float x) { return std::exp2(x); }

void LoadMatrices(uint32_t (&r)[4], const void* row);
void LoadMatricesTransposed(uint32_t (&r)[4], const void* row);
template <typename T>
void Multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
void Multiply<F16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
void Multiply<Bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
float ShuffleXor(float x, int mask);
void SyncWarp();
void SyncBlock();
unsigned char* SharedMemory();

// How blocks and warps take turns: results must not depend on it.
enum class Order { kForward, kBackward };
void SetOrder(Order order);
// The largest shared memory that a launch has asked for since the program began.
int MostSharedBytes();

const dim3& ThreadIndex();
const dim3& BlockIndex();
const dim3& GridSize();
int LaunchLanes(const std::function<void()>& lane, dim3 grid, int shared_bytes);

template <typename Params>
int Launch(void (*kernel)(Params), dim3 grid, int shared_bytes, void*, const Params& params) {
  return LaunchLanes([&] { kernel(params); }, grid, shared_bytes);
}

}  // namespace pyramid::kernels::cuda

#define threadIdx (::pyramid::kernels::cuda::ThreadIndex())
#define blockIdx (::pyramid::kernels::cuda::BlockIndex())
#define gridDim (::pyramid::kernels::cuda::GridSize())

#endif  // PYRAMID_TESTS_MODEL_KERNELS_CUDA_EMULATED_LANES_H_
