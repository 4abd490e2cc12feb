// Attention, forward. A block has the keys and values of one picture and head in shared memory; on
// tensor cores a warp keeps all scores of its 16 queries in registers, so that softmax is plain:
// maximum, exponentials, sum, no rescaling on the way.
#include "model/kernels/cuda/attention_tiles.h"

namespace pyramid::kernels::cuda {
namespace {

template <typename T, int kD, int kSteps>
__global__ void __launch_bounds__(kThreads, kSteps > 10 ? 2 : 3)
    AttentionKernel(AttentionParams p) {
  const int head = blockIdx.y, picture = blockIdx.z;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int padded = PaddedKeys(p.keys);
  T* keys = reinterpret_cast<T*>(SharedMemory());
  T* values = keys + padded * SharedStride(kD);
  T* rows = values + padded * SharedStride(kD) + warp * kWarpQueries * SharedStride(kD);

  const int64_t first_key = picture * p.kv_batch + head * kD;
  RowsToShared<T, kD>(static_cast<const T*>(p.k) + first_key, p.kv_row, p.keys, padded, threadIdx.x,
                      kThreads, keys);
  RowsToShared<T, kD>(static_cast<const T*>(p.v) + first_key, p.kv_row, p.keys, padded, threadIdx.x,
                      kThreads, values);
  SyncBlock();

  const float to_exponent = p.scale * kLog2E;
  const int tiles = CeilDiv(p.queries, kQueryTile);
  const int per_block = TilesPerBlock(tiles, int64_t{p.heads} * p.batch);
  const int last_tile = Smaller(tiles, (static_cast<int>(blockIdx.x) + 1) * per_block);
  for (int tile = blockIdx.x * per_block; tile < last_tile; ++tile) {
    const int first = tile * kQueryTile + warp * kWarpQueries;
    if (first >= p.queries) break;  // the whole warp
    const int count = Smaller(kWarpQueries, p.queries - first);

    SyncWarp();  // the rows of the last tile are stored
    RowsToShared<T, kD>(
        static_cast<const T*>(p.q) + picture * p.q_batch + first * p.q_row + head * kD, p.q_row,
        count, kWarpQueries, lane, kLanes, rows);
    SyncWarp();
    uint32_t q[kD / 16][4];
    LoadRows<T, kD>(rows, lane, q);

    float scores[2 * kSteps][4];
    float upper_max = -INFINITY, lower_max = -INFINITY;  // of the lane's two rows
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[2 * step][i] = scores[2 * step + 1][i] = 0;
      if (step * kKeyStep < padded) {
        MultiplyByRows<T, kD>(q, keys + step * kKeyStep * SharedStride(kD), lane, scores[2 * step],
                              scores[2 * step + 1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[2 * step + half][i];
          const int key = step * kKeyStep + half * 8 + AccumulatorCell(lane, i).column;
          if (key >= p.keys) score = -INFINITY;
          (i < 2 ? upper_max : lower_max) = fmaxf(i < 2 ? upper_max : lower_max, score);
        }
      }
    }
    upper_max = RowMax(upper_max);
    lower_max = RowMax(lower_max);
    // A row without a reachable key: any finite number in the maximum's place gives zeros.
    const float upper_shift = upper_max == -INFINITY ? 0 : upper_max * to_exponent;
    const float lower_shift = lower_max == -INFINITY ? 0 : lower_max * to_exponent;

    float out[kD / 8][4];
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
    }
    float upper_sum = 0, lower_sum = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step * kKeyStep >= padded) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float(&score)[4] = scores[2 * step + half];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[i] = FastExp2(score[i] * to_exponent - (i < 2 ? upper_shift : lower_shift));
        }
      }
      uint32_t a[4];
      AsOperand<T>(scores[2 * step], scores[2 * step + 1], a);
      // The sum of what is multiplied, not of what was rounded: outputs stay between the values,
      // and values at the type's limit don't overflow.
      upper_sum += First<T>(a[0]) + Second<T>(a[0]) + First<T>(a[2]) + Second<T>(a[2]);
      lower_sum += First<T>(a[1]) + Second<T>(a[1]) + First<T>(a[3]) + Second<T>(a[3]);
      MultiplyDown<T, kD>(a, values + step * kKeyStep * SharedStride(kD), lane, out);
    }
    upper_sum = RowSum(upper_sum);
    lower_sum = RowSum(lower_sum);

    const float upper_inverse = upper_sum == 0 ? 0 : 1 / upper_sum;
    const float lower_inverse = lower_sum == 0 ? 0 : 1 / lower_sum;
    StoreRows<T, kD>(out, upper_inverse, lower_inverse, lane, rows);
    SyncWarp();
    RowsFromShared<T, kD>(
        rows, count, lane, kLanes,
        static_cast<T*>(p.out) + picture * p.out_batch + first * p.out_row + head * kD, p.out_row);
    if (p.softmax != nullptr && lane % 4 == 0) {
      float* to = p.softmax + ((int64_t{picture} * p.heads + head) * p.queries + first) * 2;
      const int row = AccumulatorCell(lane, 0).row;
      if (row < count) to[2 * row] = upper_shift, to[2 * row + 1] = upper_inverse;
      if (row + 8 < count) to[2 * row + 16] = lower_shift, to[2 * row + 17] = lower_inverse;
    }
  }
}

// f32: a thread a query. Keys and values pass through shared memory by kKeyChunk, so sums are
// rescaled when the maximum grows, once for eight keys.
template <int kD>
__global__ void __launch_bounds__(kThreads) PlainAttentionKernel(AttentionParams p) {
  constexpr int kAtOnce = 8;
  const int head = blockIdx.y, picture = blockIdx.z;
  const int query = blockIdx.x * kThreads + threadIdx.x;
  const bool mine = query < p.queries;
  float* keys = reinterpret_cast<float*>(SharedMemory());
  float* values = keys + kKeyChunk * kD;
  const int64_t first_key = picture * p.kv_batch + head * kD;
  const float* k = static_cast<const float*>(p.k) + first_key;
  const float* v = static_cast<const float*>(p.v) + first_key;

  float q[kD], out[kD];
  const float* from =
      static_cast<const float*>(p.q) + picture * p.q_batch + query * p.q_row + head * kD;
#pragma unroll
  for (int i = 0; i < kD; i += 4) {
    float four[4] = {0, 0, 0, 0};
    if (mine) Load4(from + i, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) q[i + j] = four[j], out[i + j] = 0;
  }
  float max = -INFINITY, sum = 0;
  for (int chunk = 0; chunk < p.keys; chunk += kKeyChunk) {
    const int count = Smaller(kKeyChunk, p.keys - chunk);
    SyncBlock();  // the last chunk is read
    for (int i = threadIdx.x * 4; i < kKeyChunk * kD; i += kThreads * 4) {
      const int row = i / kD, column = i % kD;
      float key[4] = {0, 0, 0, 0}, value[4] = {0, 0, 0, 0};
      if (row < count) {
        Load4(k + (chunk + row) * p.kv_row + column, key);
        Load4(v + (chunk + row) * p.kv_row + column, value);
      }
      Store4(key, keys + i);
      Store4(value, values + i);
    }
    SyncBlock();
    for (int first = 0; first < count; first += kAtOnce) {
      float scores[kAtOnce];
      float new_max = max;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        scores[j] = 0;
#pragma unroll
        for (int i = 0; i < kD; i += 4) {
          float key[4];
          Load4(keys + (first + j) * kD + i, key);
#pragma unroll
          for (int n = 0; n < 4; ++n) scores[j] += q[i + n] * key[n];
        }
        // As in the backward pass, to the bit.
        scores[j] = first + j < count ? scores[j] * (p.scale * kLog2E) : -INFINITY;
        new_max = fmaxf(new_max, scores[j]);
      }
      const float shift = new_max == -INFINITY ? 0 : new_max;
      const float factor = exp2f(max - shift);
      sum *= factor;
#pragma unroll
      for (int i = 0; i < kD; ++i) out[i] *= factor;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float probability = exp2f(scores[j] - shift);
        sum += probability;
#pragma unroll
        for (int i = 0; i < kD; i += 4) {
          float value[4];
          Load4(values + (first + j) * kD + i, value);
#pragma unroll
          for (int n = 0; n < 4; ++n) out[i + n] += probability * value[n];
        }
      }
      max = new_max;
    }
  }
  if (!mine) return;
  const float inverse = sum == 0 ? 0 : 1 / sum;
  float* to = static_cast<float*>(p.out) + picture * p.out_batch + query * p.out_row + head * kD;
#pragma unroll
  for (int i = 0; i < kD; i += 4) {
    const float four[4] = {out[i] * inverse, out[i + 1] * inverse, out[i + 2] * inverse,
                           out[i + 3] * inverse};
    Store4(four, to + i);
  }
  if (p.softmax != nullptr) {
    float* at = p.softmax + ((int64_t{picture} * p.heads + head) * p.queries + query) * 2;
    at[0] = max == -INFINITY ? 0 : max;
    at[1] = inverse;
  }
}

template <typename T, int kD>
int LaunchTiled(const AttentionParams& p, void* stream) {
  const dim3 grid(AttentionBlocks(p.queries, int64_t{p.heads} * p.batch), p.heads, p.batch);
  const int shared = AttentionSharedBytes(p.keys, kD);
  switch (StepsFor(p.keys)) {
    case 4:
      return Launch(AttentionKernel<T, kD, 4>, grid, shared, stream, p);
    case 10:
      return Launch(AttentionKernel<T, kD, 10>, grid, shared, stream, p);
    default:
      return Launch(AttentionKernel<T, kD, 16>, grid, shared, stream, p);
  }
}

template <int kD>
int LaunchPlain(const AttentionParams& p, void* stream) {
  const dim3 grid(CeilDiv(p.queries, kThreads), p.heads, p.batch);
  return Launch(PlainAttentionKernel<kD>, grid, PlainAttentionSharedBytes(kD), stream, p);
}

}  // namespace

int LaunchAttention(const AttentionParams& p, void* stream) {
  switch (p.type) {
    case Scalar::kF16:
      return p.d == 32 ? LaunchTiled<F16, 32>(p, stream) : LaunchTiled<F16, 64>(p, stream);
    case Scalar::kBf16:
      return p.d == 32 ? LaunchTiled<Bf16, 32>(p, stream) : LaunchTiled<Bf16, 64>(p, stream);
    case Scalar::kF32:
      break;
  }
  return p.d == 32 ? LaunchPlain<32>(p, stream) : LaunchPlain<64>(p, stream);
}

}  // namespace pyramid::kernels::cuda
