// What attention's forward and backward kernels share: rows between global and shared memory, and
// multiplies of 16 rows with a tile of shared memory.
#ifndef PYRAMID_MODEL_KERNELS_CUDA_ATTENTION_TILES_H_
#define PYRAMID_MODEL_KERNELS_CUDA_ATTENTION_TILES_H_

#include <cmath>

#include "model/kernels/cuda/lanes.h"

namespace pyramid::kernels::cuda {

inline constexpr float kLog2E = 1.44269504088896340736f;

// Rows 0 … count - 1 of `from` (`stride` elements apart) to shared rows; zeros to the rows from
// there to `padded`. `thread` of `threads` share the work.
template <typename T, int kD>
__device__ inline void RowsToShared(const T* from, int64_t stride, int count, int padded,
                                    int thread, int threads, T* shared) {
  constexpr int kPieces = kD / kPiece;
  for (int i = thread; i < padded * kPieces; i += threads) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    Bytes16 piece{};
    if (row < count) piece = *reinterpret_cast<const Bytes16*>(from + row * stride + column);
    *reinterpret_cast<Bytes16*>(shared + row * SharedStride(kD) + column) = piece;
  }
}

// The other way, without padding.
template <typename T, int kD>
__device__ inline void RowsFromShared(const T* shared, int count, int thread, int threads, T* to,
                                      int64_t stride) {
  constexpr int kPieces = kD / kPiece;
  for (int i = thread; i < count * kPieces; i += threads) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    *reinterpret_cast<Bytes16*>(to + row * stride + column) =
        *reinterpret_cast<const Bytes16*>(shared + row * SharedStride(kD) + column);
  }
}

// The A operand of a warp's 16 rows of kD elements.
template <typename T, int kD>
__device__ inline void LoadRows(const T* shared, int lane, uint32_t (&a)[kD / 16][4]) {
  const Cell cell = DownFirst(lane);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    LoadMatrices(a[k], shared + cell.row * SharedStride(kD) + k * 16 + cell.column);
  }
}

// left, right += a · bᵀ for the 16 rows of kD elements at `shared`: `left` for the first eight.
template <typename T, int kD>
__device__ inline void MultiplyByRows(const uint32_t (&a)[kD / 16][4], const T* shared, int lane,
                                      float (&left)[4], float (&right)[4]) {
  const Cell cell = AcrossFirst(lane);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t b[4];
    LoadMatrices(b, shared + cell.row * SharedStride(kD) + k * 16 + cell.column);
    Multiply<T>(left, a[k], b[0], b[1]);
    Multiply<T>(right, a[k], b[2], b[3]);
  }
}

// sum += a · b for the 16 rows of kD elements at `shared`.
template <typename T, int kD>
__device__ inline void MultiplyDown(const uint32_t (&a)[4], const T* shared, int lane,
                                    float (&sum)[kD / 8][4]) {
  const Cell cell = DownFirst(lane);
#pragma unroll
  for (int n = 0; n < kD / 16; ++n) {
    uint32_t b[4];
    LoadMatricesTransposed(b, shared + cell.row * SharedStride(kD) + n * 16 + cell.column);
    Multiply<T>(sum[2 * n], a, b[0], b[1]);
    Multiply<T>(sum[2 * n + 1], a, b[2], b[3]);
  }
}

// Two accumulators of 16x8, side by side, as the A operand of the next multiply: a lane holds the
// same cells of both.
template <typename T>
__device__ inline void AsOperand(const float (&left)[4], const float (&right)[4],
                                 uint32_t (&a)[4]) {
  a[0] = Pack<T>(left[0], left[1]);
  a[1] = Pack<T>(left[2], left[3]);
  a[2] = Pack<T>(right[0], right[1]);
  a[3] = Pack<T>(right[2], right[3]);
}

// A warp's 16 rows of kD sums to shared rows, times `upper` (rows 0 to 7) and `lower`.
template <typename T, int kD>
__device__ inline void StoreRows(const float (&sum)[kD / 8][4], float upper, float lower, int lane,
                                 T* shared) {
  const int row = AccumulatorCell(lane, 0).row, column = AccumulatorCell(lane, 0).column;
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
    T* to = shared + row * SharedStride(kD) + n * 8 + column;
    *reinterpret_cast<uint32_t*>(to) = Pack<T>(sum[n][0] * upper, sum[n][1] * upper);
    *reinterpret_cast<uint32_t*>(to + 8 * SharedStride(kD)) =
        Pack<T>(sum[n][2] * lower, sum[n][3] * lower);
  }
}

// Over the four lanes that share a row.
__device__ inline float RowMax(float x) {
  x = fmaxf(x, ShuffleXor(x, 1));
  return fmaxf(x, ShuffleXor(x, 2));
}
__device__ inline float RowSum(float x) {
  x += ShuffleXor(x, 1);
  return x + ShuffleXor(x, 2);
}

}  // namespace pyramid::kernels::cuda

#endif  // PYRAMID_MODEL_KERNELS_CUDA_ATTENTION_TILES_H_
