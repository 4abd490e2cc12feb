// Attention, backward. Scores are computed again; the forward pass left each query's largest and
// the sum of its exponentials. A block has a chunk of 64 keys of one picture and head and goes
// through the query tiles of one split, keeping its part of the gradients of keys and values in
// registers. The parts of the splits (and, with more than one chunk, the parts of the queries'
// gradient) are added by a second kernel.
//
//   P = 2^(q·kᵀ·scale·log2 e - max) / sum   dP = dO·vᵀ   dS = P ∘ (dP - rowsum(O ∘ dO))
//   dQ = scale·dS·k   dK = scale·dSᵀ·q   dV = Pᵀ·dO
#include "model/kernels/cuda/attention_tiles.h"

namespace pyramid::kernels::cuda {
namespace {

struct BackwardWork {
  AttentionBackwardParams p;
  int tiles_per_split;
};

// sum += (16 columns of `shared` from `column` on)ᵀ · (64 rows of `rows`).
template <typename T, int kD>
__device__ inline void MultiplyTransposed(const T* shared, int column, const T* rows, int lane,
                                          float (&sum)[kD / 8][4]) {
  const Cell cell = AcrossFirst(lane);
#pragma unroll
  for (int step = 0; step < kQueryTile / 16; ++step) {
    uint32_t a[4];
    LoadMatricesTransposed(
        a, shared + (step * 16 + cell.row) * SharedStride(kKeyChunk) + column + cell.column);
    MultiplyDown<T, kD>(a, rows + step * 16 * SharedStride(kD), lane, sum);
  }
}

// A warp's 16 keys of kD sums to the split's partial gradients.
template <int kD>
__device__ inline void StorePartial(const float (&sum)[kD / 8][4], float factor, int count,
                                    int lane, float* to, int64_t stride) {
  const Cell cell = AccumulatorCell(lane, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = cell.row + half * 8;
    if (row >= count) continue;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      to[row * stride + n * 8 + cell.column] = sum[n][2 * half] * factor;
      to[row * stride + n * 8 + cell.column + 1] = sum[n][2 * half + 1] * factor;
    }
  }
}

// The tile's gradient of the output to shared memory, and of each query the product with its
// output.
template <typename T, int kD>
__device__ inline void LoadGradient(const T* d_out, const T* out, int64_t stride, int count,
                                    T* shared, float* products) {
  constexpr int kPieces = kD / kPiece;  // neighbouring lanes have a row's pieces
  for (int i = threadIdx.x; i < kQueryTile * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    Bytes16 d{}, o{};
    if (row < count) {
      d = *reinterpret_cast<const Bytes16*>(d_out + row * stride + column);
      o = *reinterpret_cast<const Bytes16*>(out + row * stride + column);
    }
    *reinterpret_cast<Bytes16*>(shared + row * SharedStride(kD) + column) = d;
    float product = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      product += First<T>(d.words[w]) * First<T>(o.words[w]);
      product += Second<T>(d.words[w]) * Second<T>(o.words[w]);
    }
#pragma unroll
    for (int mask = 1; mask < kPieces; mask *= 2) product += ShuffleXor(product, mask);
    if (column == 0) products[row] = product;
  }
}

template <typename T, int kD>
__global__ void __launch_bounds__(kThreads, 2) AttentionBackwardKernel(BackwardWork work) {
  const AttentionBackwardParams& p = work.p;
  const AttentionParams& f = p.forward;
  constexpr int kTile = kKeyChunk * SharedStride(kD);
  T* keys = reinterpret_cast<T*>(SharedMemory());
  T* values = keys + kTile;
  T* queries = values + kTile;
  T* gradients = queries + kTile;
  T* probabilities = gradients + kTile;  // [query][key]
  T* d_scores = probabilities + kQueryTile * SharedStride(kKeyChunk);
  float* shifts = reinterpret_cast<float*>(d_scores + kQueryTile * SharedStride(kKeyChunk));
  float* inverses = shifts + kQueryTile;
  float* products = inverses + kQueryTile;

  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int chunks = KeyChunks(f.keys);
  const int split = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int head = blockIdx.y, picture = blockIdx.z;
  const int first_key = chunk * kKeyChunk, key_count = Smaller(kKeyChunk, f.keys - first_key);
  const int64_t width = int64_t{f.heads} * kD;

  const int64_t key_offset = picture * f.kv_batch + first_key * f.kv_row + head * kD;
  RowsToShared<T, kD>(static_cast<const T*>(f.k) + key_offset, f.kv_row, key_count, kKeyChunk,
                      threadIdx.x, kThreads, keys);
  RowsToShared<T, kD>(static_cast<const T*>(f.v) + key_offset, f.kv_row, key_count, kKeyChunk,
                      threadIdx.x, kThreads, values);

  float dk[kD / 8][4], dv[kD / 8][4];  // of keys 16·warp … of the chunk
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0;
  }

  const float to_exponent = f.scale * kLog2E;
  const int last_tile = Smaller(CeilDiv(f.queries, kQueryTile), (split + 1) * work.tiles_per_split);
  for (int tile = split * work.tiles_per_split; tile < last_tile; ++tile) {
    const int first = tile * kQueryTile, count = Smaller(kQueryTile, f.queries - first);
    SyncBlock();  // the last tile is read
    RowsToShared<T, kD>(
        static_cast<const T*>(f.q) + picture * f.q_batch + first * f.q_row + head * kD, f.q_row,
        count, kQueryTile, threadIdx.x, kThreads, queries);
    const int64_t out_offset = picture * f.out_batch + first * f.out_row + head * kD;
    LoadGradient<T, kD>(static_cast<const T*>(p.d_out) + out_offset,
                        static_cast<const T*>(f.out) + out_offset, f.out_row, count, gradients,
                        products);
    if (threadIdx.x < kQueryTile) {
      const int row = threadIdx.x;
      // 0 makes all probabilities of a query that isn't there 0.
      const float* softmax =
          f.softmax + ((int64_t{picture} * f.heads + head) * f.queries + first + row) * 2;
      shifts[row] = row < count ? softmax[0] : 0;
      inverses[row] = row < count ? softmax[1] : 0;
    }
    SyncBlock();

    // Each warp its 16 queries against all keys of the chunk, 16 at a time.
    const int row = warp * kWarpQueries;
    const int upper = row + AccumulatorCell(lane, 0).row, lower = upper + 8;
    const float upper_shift = shifts[upper], lower_shift = shifts[lower];
    const float upper_inverse = inverses[upper], lower_inverse = inverses[lower];
    const float upper_product = products[upper], lower_product = products[lower];
    uint32_t q[kD / 16][4], d[kD / 16][4];
    LoadRows<T, kD>(queries + row * SharedStride(kD), lane, q);
    LoadRows<T, kD>(gradients + row * SharedStride(kD), lane, d);
    float dq[kD / 8][4];
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[n][i] = 0;
    }
#pragma unroll
    for (int step = 0; step < kKeyChunk / kKeyStep; ++step) {
      const int offset = step * kKeyStep * SharedStride(kD);
      float s[2][4] = {}, ds[2][4] = {};
      if (step * kKeyStep < key_count) {
        MultiplyByRows<T, kD>(q, keys + offset, lane, s[0], s[1]);
        MultiplyByRows<T, kD>(d, values + offset, lane, ds[0], ds[1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = step * kKeyStep + half * 8 + AccumulatorCell(lane, 0).column;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool there = key + i % 2 < key_count;
          s[half][i] =
              there ? FastExp2(s[half][i] * to_exponent - (i < 2 ? upper_shift : lower_shift)) *
                          (i < 2 ? upper_inverse : lower_inverse)
                    : 0;
          ds[half][i] = s[half][i] * (ds[half][i] - (i < 2 ? upper_product : lower_product));
        }
        uint32_t* p_to =
            reinterpret_cast<uint32_t*>(probabilities + upper * SharedStride(kKeyChunk) + key);
        uint32_t* d_to =
            reinterpret_cast<uint32_t*>(d_scores + upper * SharedStride(kKeyChunk) + key);
        constexpr int kEightRows = 8 * SharedStride(kKeyChunk) / 2;  // in pairs
        p_to[0] = Pack<T>(s[half][0], s[half][1]);
        p_to[kEightRows] = Pack<T>(s[half][2], s[half][3]);
        d_to[0] = Pack<T>(ds[half][0], ds[half][1]);
        d_to[kEightRows] = Pack<T>(ds[half][2], ds[half][3]);
      }
      uint32_t a[4];
      AsOperand<T>(ds[0], ds[1], a);
      MultiplyDown<T, kD>(a, keys + offset, lane, dq);
    }

    if (first + row < f.queries) {
      const Cell cell = AccumulatorCell(lane, 0);
      const int rows = Smaller(kWarpQueries, count - row);
      const int64_t at = (int64_t{picture} * f.queries + first + row) * width + head * kD;
      if (chunks > 1) {
        StorePartial<kD>(dq, f.scale, rows, lane,
                         p.dq_partial + chunk * (f.batch * f.queries * width) + at, width);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (cell.row + half * 8 >= rows) continue;
          T* to = static_cast<T*>(p.dq) + at + (cell.row + half * 8) * width + cell.column;
#pragma unroll
          for (int n = 0; n < kD / 8; ++n) {
            *reinterpret_cast<uint32_t*>(to + n * 8) =
                Pack<T>(dq[n][2 * half] * f.scale, dq[n][2 * half + 1] * f.scale);
          }
        }
      }
    }
    SyncBlock();

    // Each warp its 16 keys against all queries of the tile.
    MultiplyTransposed<T, kD>(probabilities, warp * 16, gradients, lane, dv);
    MultiplyTransposed<T, kD>(d_scores, warp * 16, queries, lane, dk);
  }

  const int row = first_key + warp * 16, count = key_count - warp * 16;
  float* to =
      p.dkv_partial + ((int64_t{split} * f.batch + picture) * f.keys + row) * 2 * width + head * kD;
  StorePartial<kD>(dk, f.scale, count, lane, to, 2 * width);
  StorePartial<kD>(dv, 1, count, lane, to + width, 2 * width);
}

// ---- f32 ----

// f32 rows to shared rows of kD + kPlainPad; zeros to the rows from `count` to `padded`.
template <int kD>
__device__ inline void PlainRowsToShared(const float* from, int64_t stride, int count, int padded,
                                         float* shared) {
  for (int i = threadIdx.x * 4; i < padded * kD; i += kThreads * 4) {
    const int row = i / kD, column = i % kD;
    float four[4] = {0, 0, 0, 0};
    if (row < count) Load4(from + row * stride + column, four);
    Store4(four, shared + row * (kD + kPlainPad) + column);
  }
}

// Each thread four queries by four keys of the products, then its share of the three gradients.
template <int kD>
__global__ void __launch_bounds__(kThreads, 2) PlainBackwardKernel(BackwardWork work) {
  constexpr int kStride = kD + kPlainPad, kScoreStride = kKeyChunk + kPlainPad;
  constexpr int kKeyLanes = kKeyChunk / 4, kColumns = kD / 4;
  constexpr int kKeysEach = kKeyChunk * kColumns / kThreads;      // rows of dk and dv of a thread
  constexpr int kQueriesEach = kPlainTile * kColumns / kThreads;  // rows of dq
  static_assert(kPlainTile / 4 * kKeyLanes == kThreads);
  const AttentionBackwardParams& p = work.p;
  const AttentionParams& f = p.forward;
  float* keys = reinterpret_cast<float*>(SharedMemory());
  float* values = keys + kKeyChunk * kStride;
  float* queries = values + kKeyChunk * kStride;
  float* gradients = queries + kPlainTile * kStride;
  float* probabilities = gradients + kPlainTile * kStride;  // [query][key]
  float* d_scores = probabilities + kPlainTile * kScoreStride;
  float* shifts = d_scores + kPlainTile * kScoreStride;
  float* inverses = shifts + kPlainTile;
  float* products = inverses + kPlainTile;

  const int chunks = KeyChunks(f.keys);
  const int split = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int head = blockIdx.y, picture = blockIdx.z;
  const int first_key = chunk * kKeyChunk, key_count = Smaller(kKeyChunk, f.keys - first_key);
  const int64_t width = int64_t{f.heads} * kD;
  const int64_t key_offset = picture * f.kv_batch + first_key * f.kv_row + head * kD;
  PlainRowsToShared<kD>(static_cast<const float*>(f.k) + key_offset, f.kv_row, key_count, kKeyChunk,
                        keys);
  PlainRowsToShared<kD>(static_cast<const float*>(f.v) + key_offset, f.kv_row, key_count, kKeyChunk,
                        values);

  const int column = threadIdx.x % kColumns * 4, slot = threadIdx.x / kColumns;
  float dk[kKeysEach][4] = {}, dv[kKeysEach][4] = {};
  const float to_exponent = f.scale * kLog2E;
  const int last_tile = Smaller(CeilDiv(f.queries, kPlainTile), (split + 1) * work.tiles_per_split);
  for (int tile = split * work.tiles_per_split; tile < last_tile; ++tile) {
    const int first = tile * kPlainTile, count = Smaller(kPlainTile, f.queries - first);
    SyncBlock();  // the last tile is read
    const int64_t out_offset = picture * f.out_batch + first * f.out_row + head * kD;
    const float* out = static_cast<const float*>(f.out) + out_offset;
    const float* d_out = static_cast<const float*>(p.d_out) + out_offset;
    PlainRowsToShared<kD>(
        static_cast<const float*>(f.q) + picture * f.q_batch + first * f.q_row + head * kD, f.q_row,
        count, kPlainTile, queries);
    PlainRowsToShared<kD>(d_out, f.out_row, count, kPlainTile, gradients);
    // Four neighbouring lanes a query.
    {
      const int row = threadIdx.x / 4;
      float product = 0;
      for (int i = threadIdx.x % 4 * 4; row < count && i < kD; i += 16) {
        float o[4], d[4];
        Load4(out + row * f.out_row + i, o);
        Load4(d_out + row * f.out_row + i, d);
        for (int j = 0; j < 4; ++j) product += o[j] * d[j];
      }
      product += ShuffleXor(product, 1);
      product += ShuffleXor(product, 2);
      if (threadIdx.x % 4 == 0) {
        products[row] = product;
        const float* softmax =
            f.softmax + ((int64_t{picture} * f.heads + head) * f.queries + first + row) * 2;
        shifts[row] = row < count ? softmax[0] : 0;
        inverses[row] = row < count ? softmax[1] : 0;
      }
    }
    SyncBlock();

    // Rows and keys of a thread lie apart, so that neighbouring lanes read neighbouring rows.
    const int query = threadIdx.x / kKeyLanes, key = threadIdx.x % kKeyLanes;
    float s[4][4] = {}, ds[4][4] = {};
    for (int i = 0; i < kD; i += 4) {
      float q[4][4], d[4][4];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        Load4(queries + (query + a * kPlainTile / 4) * kStride + i, q[a]);
        Load4(gradients + (query + a * kPlainTile / 4) * kStride + i, d[a]);
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        float k[4], v[4];
        Load4(keys + (key + b * kKeyLanes) * kStride + i, k);
        Load4(values + (key + b * kKeyLanes) * kStride + i, v);
#pragma unroll
        for (int a = 0; a < 4; ++a) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[a][b] += q[a][j] * k[j];
            ds[a][b] += d[a][j] * v[j];
          }
        }
      }
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int r = query + a * kPlainTile / 4;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int c = key + b * kKeyLanes;
        const float probability =
            c < key_count ? exp2f(s[a][b] * to_exponent - shifts[r]) * inverses[r] : 0;
        probabilities[r * kScoreStride + c] = probability;
        d_scores[r * kScoreStride + c] = probability * (ds[a][b] - products[r]);
      }
    }
    SyncBlock();

#pragma unroll
    for (int n = 0; n < kQueriesEach; ++n) {
      const int r = slot + n * (kThreads / kColumns);
      float dq[4] = {0, 0, 0, 0};
      for (int c = 0; c < key_count; ++c) {
        float k[4];
        Load4(keys + c * kStride + column, k);
        for (int j = 0; j < 4; ++j) dq[j] += d_scores[r * kScoreStride + c] * k[j];
      }
      if (r >= count) continue;
      for (int j = 0; j < 4; ++j) dq[j] *= f.scale;
      const int64_t at = (int64_t{picture} * f.queries + first + r) * width + head * kD + column;
      Store4(dq, (chunks > 1 ? p.dq_partial + chunk * (f.batch * f.queries * width)
                             : static_cast<float*>(p.dq)) +
                     at);
    }
#pragma unroll
    for (int n = 0; n < kKeysEach; ++n) {
      const int c = slot + n * (kThreads / kColumns);
      for (int r = 0; r < count; ++r) {
        float q[4], d[4];
        Load4(queries + r * kStride + column, q);
        Load4(gradients + r * kStride + column, d);
        const float probability = probabilities[r * kScoreStride + c];
        const float d_score = d_scores[r * kScoreStride + c];
        for (int j = 0; j < 4; ++j) {
          dv[n][j] += probability * d[j];
          dk[n][j] += d_score * q[j];
        }
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kKeysEach; ++n) {
    const int c = slot + n * (kThreads / kColumns);
    if (c >= key_count) continue;
    for (int j = 0; j < 4; ++j) dk[n][j] *= f.scale;
    float* to = p.dkv_partial +
                ((int64_t{split} * f.batch + picture) * f.keys + first_key + c) * 2 * width +
                head * kD + column;
    Store4(dk[n], to);
    Store4(dv[n], to + width);
  }
}

int LaunchFor(void (*kernel)(BackwardWork), int tile, int shared, const AttentionBackwardParams& p,
              void* stream) {
  const AttentionParams& f = p.forward;
  const int64_t both = int64_t{f.heads} * f.batch;
  const int splits = QuerySplits(f.queries, f.keys, both, tile);
  const BackwardWork work = {p, TilesPerSplit(f.queries, f.keys, both, tile)};
  const dim3 grid(splits * KeyChunks(f.keys), f.heads, f.batch);
  if (const int status = Launch(kernel, grid, shared, stream, work)) return status;
  if (const int status = LaunchSumPartials({.partial = p.dkv_partial,
                                            .out = p.dkv,
                                            .count = int64_t{f.batch} * f.keys * 2 * f.heads * f.d,
                                            .partials = splits,
                                            .type = f.type},
                                           stream)) {
    return status;
  }
  if (KeyChunks(f.keys) == 1) return 0;
  return LaunchSumPartials({.partial = p.dq_partial,
                            .out = p.dq,
                            .count = int64_t{f.batch} * f.queries * f.heads * f.d,
                            .partials = KeyChunks(f.keys),
                            .type = f.type},
                           stream);
}

template <typename T>
int LaunchTiled(const AttentionBackwardParams& p, void* stream) {
  return LaunchFor(
      p.forward.d == 32 ? AttentionBackwardKernel<T, 32> : AttentionBackwardKernel<T, 64>,
      kQueryTile, AttentionBackwardSharedBytes(p.forward.d), p, stream);
}

}  // namespace

int LaunchAttentionBackward(const AttentionBackwardParams& p, void* stream) {
  switch (p.forward.type) {
    case Scalar::kF16:
      return LaunchTiled<F16>(p, stream);
    case Scalar::kBf16:
      return LaunchTiled<Bf16>(p, stream);
    case Scalar::kF32:
      break;
  }
  return LaunchFor(p.forward.d == 32 ? PlainBackwardKernel<32> : PlainBackwardKernel<64>,
                   kPlainTile, PlainBackwardSharedBytes(p.forward.d), p, stream);
}

}  // namespace pyramid::kernels::cuda
