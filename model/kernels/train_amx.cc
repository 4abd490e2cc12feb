// The training kernels of bf16: matrix products on AMX tiles, the rest f32 arithmetic on AVX-512.
//
// A tile product wants both operands' numbers in pairs along the summed dimension, which in a
// gradient is the rows of both: pairs of rows are interleaved for the right operand, and the left
// one is transposed beside.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "model/kernels/amx_internal.h"
#include "model/kernels/attention.h"
#include "model/kernels/train_table.h"

#define TRAIN_LANES 16
#define TRAIN_BF16 1
#include "model/kernels/train_kernels.inc"

namespace pyramid::kernels {
namespace {

using amx::LoadTile;
using amx::MultiplyTiles;
using amx::StoreTile;
using amx::ZeroTile;

constexpr int kTile = 512;  // bf16 numbers of a tile: 16 rows of 32

// Eight tiles of 16 rows of 64 bytes.
constexpr amx::TileConfig kFullTiles = {
    .palette = 1,
    .start_row = 0,
    .reserved = {},
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

// Two rows of 32 numbers → 16 pairs, the upper row's number first: of the columns that ColumnOf
// names. (The permutation that would take columns 0 to 15 and 16 to 31 is four times as slow.)
template <int kHalf>
TRAIN_INLINE __m512i Pairs(__m512i upper, __m512i lower) {
  return kHalf == 0 ? _mm512_unpacklo_epi16(upper, lower) : _mm512_unpackhi_epi16(upper, lower);
}
constexpr int ColumnOf(int half, int lane) { return lane / 4 * 8 + half * 4 + lane % 4; }

// 32 numbers in the columns' own order, from those in the order of pairs.
TRAIN_INLINE Pair FromPairs(Vec low, Vec high) {
  return {
      __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
      __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30,
                              31)};
}

TRAIN_INLINE __mmask32 FirstOf32(int count) {
  return count >= 32 ? 0xffffffffu : (1u << count) - 1u;
}
TRAIN_INLINE __mmask16 FirstOf16(int count) {
  return static_cast<__mmask16>(FirstOf32(count < 0 ? 0 : count));
}

// Up to 32 rows of up to 32 numbers; what isn't there is read as zeros.
struct Square {
  const uint16_t* at;
  int64_t stride;
  int rows;
  __mmask32 columns;

  // kWhole: 32 or more of both.
  template <bool kWhole>
  TRAIN_INLINE __m512i Row(int r) const {
    if constexpr (kWhole) return _mm512_loadu_si512(at + r * stride);
    return r < rows ? _mm512_maskz_loadu_epi16(columns, at + r * stride) : _mm512_setzero_si512();
  }
  TRAIN_INLINE bool Whole() const { return rows >= 32 && columns == 0xffffffffu; }
  TRAIN_INLINE Square Below(int r) const { return {at + r * stride, stride, rows - r, columns}; }
};

// The dwords of 16 rows, transposed.
TRAIN_INLINE void TransposePairs(__m512i (&rows)[16]) {
  Vec numbers[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) numbers[i] = reinterpret_cast<Vec>(rows[i]);
  Transpose(numbers);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = reinterpret_cast<__m512i>(numbers[i]);
}

// --- Linear ---

// A panel: the rows of dy and x that are brought into tiles at a time, and columns of the left
// operand. The left operand's part of it is kept, that of the right one goes by 32 columns.
constexpr int kPanelRows = 256;
constexpr int kLeftNumbers = 512 * 512;
// With no more than 32 columns on the left nothing is used twice, and fewer panels mean fewer
// additions to dw; the right operand's squares then take turns in the same memory.
constexpr int kNarrowPanelRows = 2048;
constexpr int kSteps = kPanelRows / 32;
constexpr int kAlways = 1 << 30;  // places enough for every square

// Adds the columns' sums of a tile of pairs to `sums`, 16 floats.
TRAIN_INLINE void AddPairs(const uint16_t* tile, float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  Vec sum[4] = {Load(sums), {}, {}, {}};
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512i pairs = _mm512_load_si512(tile + 32 * i);
    sum[i % 4] = _mm512_dpbf16_ps(sum[i % 4], (__m512bh)pairs, ones);
  }
  Store((sum[0] + sum[1]) + (sum[2] + sum[3]), sums);
}

// A square as two right tiles, columns in the order of pairs. `sums`: null, or 32 floats to which
// the columns' sums are added, in the same order. The 32 columns on the right come next; they are
// sent for. (With panels of 2048 rows 230 → 470 GFLOP/s for 12544 rows of 256 and 32 columns, which
// don't fit the second cache; not so with 8192, nor by looking further ahead.)
template <bool kWhole>
TRAIN_INLINE void PackRight(Square from, uint16_t* to, float* sums) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512i upper = from.Row<kWhole>(2 * i), lower = from.Row<kWhole>(2 * i + 1);
    _mm512_store_si512(to + 32 * i, Pairs<0>(upper, lower));
    _mm512_store_si512(to + kTile + 32 * i, Pairs<1>(upper, lower));
    if constexpr (kWhole) {
      _mm_prefetch(from.at + 2 * i * from.stride + 32, _MM_HINT_T1);
      _mm_prefetch(from.at + (2 * i + 1) * from.stride + 32, _MM_HINT_T1);
    }
  }
  if (sums != nullptr) {
    AddPairs(to, sums);
    AddPairs(to + kTile, sums + 16);
  }
}

// As two left tiles: transposed, columns as rows in their own order.
template <bool kWhole>
TRAIN_INLINE void PackLeft(Square from, uint16_t* to, float* sums) {
  alignas(64) uint16_t pairs[2 * kTile];
  PackRight<kWhole>(from, pairs, sums);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512i rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(pairs + half * kTile + 32 * i);
    TransposePairs(rows);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 32 * ColumnOf(half, i), rows[i]);
  }
}

// Up to 32 columns of an operand in a panel: where they come from and their squares' tiles.
struct Strip {
  Square from;
  uint16_t* tiles;
  int places;   // squares that `tiles` holds, a power of two: they take turns
  float* sums;  // as PackRight's
};

// square[32][32] = leftᵀ · right, columns in the order of pairs. What isn't packed yet is packed
// one step before it is multiplied, so that the vector unit and the tiles work at the same time.
template <bool kPackLeft, bool kPackRight>
void MultiplyStrips(Strip left, Strip right, int steps, float* square) {
  const auto place = [](const Strip& strip, int step) __attribute__((always_inline)) {
    return strip.tiles + (step & (strip.places - 1)) * (2 * kTile);
  };
  const auto pack = [&](int step) __attribute__((always_inline)) {
    if constexpr (kPackLeft) {
      const Square from = left.from.Below(32 * step);
      if (from.Whole()) {
        PackLeft<true>(from, place(left, step), left.sums);
      } else {
        PackLeft<false>(from, place(left, step), left.sums);
      }
    }
    if constexpr (kPackRight) {
      const Square from = right.from.Below(32 * step);
      if (from.Whole()) {
        PackRight<true>(from, place(right, step), right.sums);
      } else {
        PackRight<false>(from, place(right, step), right.sums);
      }
    }
  };
  ZeroTile<0>();
  ZeroTile<1>();
  ZeroTile<2>();
  ZeroTile<3>();
  pack(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) pack(step + 1);
    const uint16_t* a = place(left, step);
    const uint16_t* b = place(right, step);
    LoadTile<4>(a, 64);
    LoadTile<6>(b, 64);
    LoadTile<7>(b + kTile, 64);
    LoadTile<5>(a + kTile, 64);
    MultiplyTiles<0, 4, 6>();
    MultiplyTiles<1, 4, 7>();
    MultiplyTiles<2, 5, 6>();
    MultiplyTiles<3, 5, 7>();
  }
  StoreTile<0>(square, 128);
  StoreTile<1>(square + 16, 128);
  StoreTile<2>(square + 16 * 32, 128);
  StoreTile<3>(square + 16 * 32 + 16, 128);
}

TRAIN_INLINE void AddMasked(Vec x, __mmask16 mask, float* to) {
  _mm512_mask_storeu_ps(to, mask, _mm512_maskz_loadu_ps(mask, to) + x);
}

// to[i][j] += square[i][j], for i < rows and j < columns.
void AddSquare(const float* square, int rows, int columns, float* to, int64_t stride) {
  const __mmask16 low = FirstOf16(columns), high = FirstOf16(columns - 16);
  for (int i = 0; i < rows && i < 32; ++i) {
    const Pair row = FromPairs(Load(square + 32 * i), Load(square + 32 * i + 16));
    AddMasked(row.first, low, to + i * stride);
    AddMasked(row.second, high, to + i * stride + 16);
  }
}

// to[i][j] += square[j][i], the same.
void AddTurnedSquare(const float* square, int rows, int columns, float* to, int64_t stride) {
  for (int half = 0; half < 2; ++half) {
    for (int j = 0; j < columns && j < 32; j += 16) {
      Vec part[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) part[r] = Load(square + (j + r) * 32 + 16 * half);
      Transpose(part);
      const __mmask16 mask = FirstOf16(columns - j);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const int row = ColumnOf(half, r);
        if (row < rows) AddMasked(part[r], mask, to + row * stride + j);
      }
    }
  }
}

struct Operand {
  const uint16_t* at;
  int64_t stride;
  int columns;
};

int Rounded32(int n) { return (n + 31) / 32 * 32; }

// dw = dyᵀ·x with dy as the left operand, or its transpose, xᵀ·dy. Transposing an operand takes
// five times as long as interleaving it, turning the result costs per panel: the left one is the
// narrower where that saves more than turning costs.
void LinearGrad(const LinearGradParams& p) {
  alignas(64) uint16_t left_tiles[kLeftNumbers];
  alignas(64) uint16_t right_tiles[kPanelRows * 32];
  alignas(64) float square[32 * 32];
  amx::UseTiles(kFullTiles);
  const Operand dy = {static_cast<const uint16_t*>(p.dy), p.ldy, p.n};
  const Operand x = {static_cast<const uint16_t*>(p.x), p.ldx, p.k};
  const int64_t together = p.m < kPanelRows ? p.m : kPanelRows;
  const bool turned = (int64_t{p.n} - p.k) * together > int64_t{p.n} * p.k;
  const Operand left = turned ? x : dy, right = turned ? dy : x;
  const int most_rows = left.columns <= 32 ? kNarrowPanelRows : kPanelRows;
  const int panel_columns = left.columns <= 32 ? 32 : kLeftNumbers / kPanelRows;
  // As many panels as needed, of equal height.
  const int64_t panels = (p.m + most_rows - 1) / most_rows;
  const int panel_rows = Rounded32(static_cast<int>((p.m + panels - 1) / panels));

  // Columns `first` to `first` + 31 of an operand in rows m to m + rows.
  const auto part = [](const Operand& from, int64_t m, int rows, int first) {
    return Square{from.at + m * from.stride + first, from.stride, rows,
                  FirstOf32(from.columns - first)};
  };
  for (int64_t m = 0; m < p.m; m += panel_rows) {
    const int rows = static_cast<int>(p.m - m < panel_rows ? p.m - m : panel_rows);
    const int steps = Rounded32(rows) / 32;
    for (int i = 0; i < left.columns; i += panel_columns) {
      const int end = left.columns < i + panel_columns ? left.columns : i + panel_columns;
      for (int r = 0; r < right.columns; r += 32) {
        for (int l = i; l < end; l += 32) {
          const bool first_l = l == i, first_r = r == 0;
          const int n = turned ? r : l, k = turned ? l : r;
          // dy's columns are summed when they are packed for the first time.
          float sums[32] = {};
          const bool sum = p.db != nullptr && (turned ? first_l && i == 0 : first_r);
          const Strip left_strip = {part(left, m, rows, l),
                                    left_tiles + (l - i) / 32 * steps * int64_t{2 * kTile}, kAlways,
                                    sum && !turned ? sums : nullptr};
          const Strip right_strip = {part(right, m, rows, r), right_tiles,
                                     left.columns <= 32 ? 2 : kSteps,
                                     sum && turned ? sums : nullptr};
          const auto multiply =
              first_r ? (first_l ? MultiplyStrips<true, true> : MultiplyStrips<true, false>)
                      : (first_l ? MultiplyStrips<false, true> : MultiplyStrips<false, false>);
          multiply(left_strip, right_strip, steps, square);
          (turned ? AddTurnedSquare : AddSquare)(square, p.n - n, p.k - k,
                                                 p.dw + int64_t{n} * p.k + k, p.k);
          if (sum) {
            for (int lane = 0; lane < 32; ++lane) {
              const int column = ColumnOf(lane / 16, lane % 16);
              if (n + column < p.n) p.db[n + column] += sums[lane];
            }
          }
        }
      }
    }
  }
}

// --- Attention ---

// Queries go 32 at a time, in the lanes, keys down the rows: S = K·qᵀ and dP = V·dOᵀ come out so,
// softmax needs no sums across lanes, and P and dS are left operands of dV and dK as they stand.
// dV and dK wait for kQueryPanel queries: their tiles are loaded and stored once for these.
constexpr int kQueryPanel = 128;

// The scratch memory; keys rounded up to 32.
struct AttentionScratch {
  float *dk, *dv;      // [keys][d]
  float *scores, *dp;  // [keys][32]
  float* dq;           // [d][32], turned
  uint16_t *k, *v;     // [keys][d]; rows behind the last key are zeros
  uint16_t* k_turned;  // [d][keys]
  uint16_t *q, *dout;  // [2 tiles][d / 32][16 pairs of d][16 queries]: right operands of S, dP
  uint16_t *q_pairs, *dout_pairs;  // [kQueryPanel / 2][d] pairs of queries: of dK, dV
  uint16_t *p, *ds;                // [keys][kQueryPanel]
  uint16_t* ds_pairs;              // [keys / 2][32] pairs of keys: right operand of dq
  int64_t floats;                  // all of it

  AttentionScratch(float* at, int keys, int d) {
    float* const begin = at;
    const auto take = [&at](int64_t count) {
      float* const taken = at;
      at += count;
      return taken;
    };
    const auto take_bf16 = [&take](int64_t count) {
      return reinterpret_cast<uint16_t*>(take(count / 2));
    };
    const int64_t kd = int64_t{keys} * d;
    dk = take(kd);
    dv = take(kd);
    scores = take(keys * 32);
    dp = take(keys * 32);
    dq = take(d * 32);
    k = take_bf16(kd);
    v = take_bf16(kd);
    k_turned = take_bf16(kd);
    q = take_bf16(32 * d);
    dout = take_bf16(32 * d);
    q_pairs = take_bf16(kQueryPanel * d);
    dout_pairs = take_bf16(kQueryPanel * d);
    p = take_bf16(keys * kQueryPanel);
    ds = take_bf16(keys * kQueryPanel);
    ds_pairs = take_bf16(keys * 32);
    floats = at - begin;
  }
};

size_t AttentionGradScratchFloats(int keys, int d) {
  alignas(64) static float nowhere[1];
  return static_cast<size_t>(AttentionScratch(nowhere, Rounded32(keys), d).floats) + 16;
}

// Keys or values [count][d] without gaps, zeros behind them.
void CopyKeys(const uint16_t* from, int64_t ld, int count, int rounded, int d, uint16_t* to) {
  for (int key = 0; key < rounded; ++key) {
    for (int i = 0; i < d; i += 32) {
      _mm512_store_si512(to + key * d + i, key < count ? _mm512_loadu_si512(from + key * ld + i)
                                                       : _mm512_setzero_si512());
    }
  }
}

// [keys][d] → [d][keys].
void TurnKeys(const uint16_t* from, int keys, int d, uint16_t* to) {
  alignas(64) uint16_t tiles[2 * kTile];
  for (int key = 0; key < keys; key += 32) {
    for (int i = 0; i < d; i += 32) {
      PackLeft<true>({from + key * d + i, d, 32, 0xffffffffu}, tiles, nullptr);
      for (int r = 0; r < 32; ++r) {
        _mm512_store_si512(to + int64_t{i + r} * keys + key, _mm512_load_si512(tiles + 32 * r));
      }
    }
  }
}

// 32 rows of queries as right operands: `turned` for the sums over d, `pairs` for those over
// queries.
template <bool kWhole>
void PackQueries(const uint16_t* queries, int64_t ld, int count, int d, uint16_t* turned,
                 uint16_t* pairs) {
  for (int i = 0; i < d; i += 32) {
    const Square from = {queries + i, ld, count, 0xffffffffu};
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const __m512i upper = from.Row<kWhole>(2 * r), lower = from.Row<kWhole>(2 * r + 1);
      _mm512_store_si512(pairs + (r * d + i) * 2, Pairs<0>(upper, lower));
      _mm512_store_si512(pairs + (r * d + i + 16) * 2, Pairs<1>(upper, lower));
    }
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) rows[r] = from.Row<kWhole>(16 * half + r);
      TransposePairs(rows);
      uint16_t* tile = turned + (half * (d / 32) + i / 32) * kTile;
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) _mm512_store_si512(tile + 32 * r, rows[r]);
    }
  }
}

// to[keys][32] = keys[keys][d] · queries, which PackQueries has turned.
void KeysByQueries(const uint16_t* keys, int rows, int d, const uint16_t* queries, float* to) {
  const int steps = d / 32;
  for (int key = 0; key < rows; key += 32) {
    ZeroTile<0>();
    ZeroTile<1>();
    ZeroTile<2>();
    ZeroTile<3>();
    for (int step = 0; step < steps; ++step) {
      const uint16_t* left = keys + key * d + 32 * step;
      LoadTile<4>(left, 2 * d);
      LoadTile<6>(queries + step * kTile, 64);
      LoadTile<7>(queries + (steps + step) * kTile, 64);
      LoadTile<5>(left + 16 * d, 2 * d);
      MultiplyTiles<0, 4, 6>();
      MultiplyTiles<1, 4, 7>();
      MultiplyTiles<2, 5, 6>();
      MultiplyTiles<3, 5, 7>();
    }
    StoreTile<0>(to + key * 32, 128);
    StoreTile<1>(to + key * 32 + 16, 128);
    StoreTile<2>(to + (key + 16) * 32, 128);
    StoreTile<3>(to + (key + 16) * 32 + 16, 128);
  }
}

// Scores and dP of 32 queries → P and dS, columns 32 * part of their panels, and dS by pairs of
// keys. Rows behind the last key are zeros.
void Probabilities(const AttentionScratch& s, int keys, int rounded, int part) {
  Column column[2];
  for (int half = 0; half < 2; ++half) {
    column[half] = SoftmaxOfColumn(s.scores + 16 * half, s.dp + 16 * half, keys, 32);
  }
  const auto narrow = [](Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); };
  const Vec center[2] = {column[0].center * -kLn2, column[1].center * -kLn2};
  uint16_t* p = s.p + 32 * part;
  uint16_t* ds = s.ds + 32 * part;
  __m512i upper = {};
  for (int key = 0; key < rounded; ++key) {
    __m512i both_p = {}, both_ds = {};
    if (key < keys) {
      const float* scores = s.scores + key * 32;
      const float* dp = s.dp + key * 32;
      const Vec low = Load(scores) * column[0].scale, high = Load(scores + 16) * column[1].scale;
      both_p = narrow(low, high);
      both_ds =
          narrow(low * (Load(dp) * kLn2 + center[0]), high * (Load(dp + 16) * kLn2 + center[1]));
    }
    _mm512_store_si512(p + key * kQueryPanel, both_p);
    _mm512_store_si512(ds + key * kQueryPanel, both_ds);
    if (key % 2 == 0) {
      upper = both_ds;
    } else {
      _mm512_store_si512(s.ds_pairs + (key - 1) * 32, Pairs<0>(upper, both_ds));
      _mm512_store_si512(s.ds_pairs + key * 32, Pairs<1>(upper, both_ds));
    }
  }
}

// dq of up to 32 queries: Kᵀ·dS, turned back. Columns of dS are in the order of pairs.
void QueryGrad(const AttentionScratch& s, int rounded, int d, uint16_t* dq, int64_t ld, int count) {
  for (int i = 0; i < d; i += 32) {
    ZeroTile<0>();
    ZeroTile<1>();
    ZeroTile<2>();
    ZeroTile<3>();
    for (int key = 0; key < rounded; key += 32) {
      const uint16_t* left = s.k_turned + i * rounded + key;
      const uint16_t* right = s.ds_pairs + key * 32;
      LoadTile<4>(left, 2 * rounded);
      LoadTile<6>(right, 128);
      LoadTile<7>(right + 32, 128);
      LoadTile<5>(left + 16 * rounded, 2 * rounded);
      MultiplyTiles<0, 4, 6>();
      MultiplyTiles<1, 4, 7>();
      MultiplyTiles<2, 5, 6>();
      MultiplyTiles<3, 5, 7>();
    }
    float* turned = s.dq + i * 32;
    StoreTile<0>(turned, 128);
    StoreTile<1>(turned + 16, 128);
    StoreTile<2>(turned + 16 * 32, 128);
    StoreTile<3>(turned + 16 * 32 + 16, 128);
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        rows[r] = Narrow(Load(turned + 2 * r * 32 + 16 * half),
                         Load(turned + (2 * r + 1) * 32 + 16 * half));
      }
      TransposePairs(rows);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const int query = ColumnOf(half, r);
        if (query < count) _mm512_storeu_si512(dq + query * ld + i, rows[r]);
      }
    }
  }
}

// to[keys][d] += left[keys][queries] · right[queries][d] over `parts` times 32 queries.
void SumOverQueries(const uint16_t* left, const uint16_t* right, int rounded, int d, int parts,
                    float* to) {
  for (int key = 0; key < rounded; key += 32) {
    for (int i = 0; i < d; i += 32) {
      float* upper = to + key * d + i;
      float* lower = upper + 16 * d;
      LoadTile<0>(upper, 4 * d);
      LoadTile<1>(upper + 16, 4 * d);
      LoadTile<2>(lower, 4 * d);
      LoadTile<3>(lower + 16, 4 * d);
      for (int part = 0; part < parts; ++part) {
        const uint16_t* a = left + key * kQueryPanel + 32 * part;
        const uint16_t* b = right + (16 * part * d + i) * 2;
        LoadTile<4>(a, 2 * kQueryPanel);
        LoadTile<6>(b, 4 * d);
        LoadTile<7>(b + 32, 4 * d);
        LoadTile<5>(a + 16 * kQueryPanel, 2 * kQueryPanel);
        MultiplyTiles<0, 4, 6>();
        MultiplyTiles<1, 4, 7>();
        MultiplyTiles<2, 5, 6>();
        MultiplyTiles<3, 5, 7>();
      }
      StoreTile<0>(upper, 4 * d);
      StoreTile<1>(upper + 16, 4 * d);
      StoreTile<2>(lower, 4 * d);
      StoreTile<3>(lower + 16, 4 * d);
    }
  }
}

void AttentionGrad(const AttentionGradParams& p) {
  amx::UseTiles(kFullTiles);
  const int keys = p.keys, d = p.d, rounded = Rounded32(keys);
  float* const aligned =
      reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p.scratch) + 63) & ~uintptr_t{63});
  const AttentionScratch s(aligned, rounded, d);
  CopyKeys(static_cast<const uint16_t*>(p.k), p.ld_kv, keys, rounded, d, s.k);
  CopyKeys(static_cast<const uint16_t*>(p.v), p.ld_kv, keys, rounded, d, s.v);
  TurnKeys(s.k, rounded, d, s.k_turned);
  for (int i = 0; i < rounded * d; i += 16) {
    Store(Vec{}, s.dk + i);
    Store(Vec{}, s.dv + i);
  }
  for (int64_t begin = 0; begin < p.queries; begin += kQueryPanel) {
    int parts = 0;
    for (; parts < kQueryPanel / 32 && begin + 32 * parts < p.queries; ++parts) {
      const int64_t query = begin + 32 * parts;
      const int count = static_cast<int>(p.queries - query < 32 ? p.queries - query : 32);
      const auto pack = count == 32 ? PackQueries<true> : PackQueries<false>;
      pack(static_cast<const uint16_t*>(p.q) + query * p.ld, p.ld, count, d, s.q,
           s.q_pairs + 32 * parts * d);
      pack(static_cast<const uint16_t*>(p.dout) + query * p.ld, p.ld, count, d, s.dout,
           s.dout_pairs + 32 * parts * d);
      KeysByQueries(s.k, rounded, d, s.q, s.scores);
      KeysByQueries(s.v, rounded, d, s.dout, s.dp);
      Probabilities(s, keys, rounded, parts);
      QueryGrad(s, rounded, d, static_cast<uint16_t*>(p.dq) + query * p.ld, p.ld, count);
    }
    SumOverQueries(s.p, s.dout_pairs, rounded, d, parts, s.dv);
    SumOverQueries(s.ds, s.q_pairs, rounded, d, parts, s.dk);
  }
  for (int i = 0; i < keys * d; i += 32) {
    AddSquare(s.dk + i, 1, 32, p.dk + i, 32);
    AddSquare(s.dv + i, 1, 32, p.dv + i, 32);
  }
}

}  // namespace

const TrainKernels kAmxTrainKernels = {
    .name = "amx-f32math",
    .activation_bytes = sizeof(uint16_t),
    .linear_grad = LinearGrad,
    .layer_norm = LayerNorm,
    .layer_norm_grad = LayerNormGrad,
    .dwconv_grad_scratch_floats = DwconvGradScratchFloats,
    .dwconv_gelu_grad = DwconvGeluGrad,
    .gelu = GeluForward,
    .gelu_grad = GeluBackward,
    .pool = Pool,
    .pool_grad = PoolGrad,
    .attention_grad_scratch_floats = AttentionGradScratchFloats,
    .attention_grad = AttentionGrad,
    .adamw = AdamW,
    .add_scaled = AddScaled,
};

}  // namespace pyramid::kernels
