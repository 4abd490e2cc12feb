// The training kernels of bf16: matrix products on AMX tiles, the rest f32 arithmetic on AVX-512.
//
// A tile product wants both operands' numbers in pairs along the summed dimension, which in a
// gradient is the rows of both: pairs of rows are interleaved for the right operand, and the left
// one is transposed beside.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "model/kernels/attention.h"
#include "model/kernels/train_table.h"

#define TRAIN_LANES 16
#define TRAIN_BF16 1
#include "model/kernels/train_kernels.inc"

namespace pyramid::kernels {
namespace {

constexpr int kTile = 512;  // bf16 numbers of a tile: 16 rows of 32

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Eight tiles of 16 rows of 64 bytes. Others of the same thread may have configured them otherwise.
void ConfigureTiles() {
  const TileConfig config;
  asm volatile("" ::"r"(&config) : "memory");  // g++ 12 drops the stores otherwise
  _tile_loadconfig(&config);
}

alignas(64) constexpr uint16_t kPairsLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
alignas(64) constexpr uint16_t kPairsHigh[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21,
                                                 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                                 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};

// Two rows of 32 numbers → 16 pairs (upper row's number first) of columns 0 to 15, or 16 to 31.
template <int kHalf>
TRAIN_INLINE __m512i Pairs(__m512i upper, __m512i lower) {
  return _mm512_permutex2var_epi16(upper, _mm512_load_si512(kHalf == 0 ? kPairsLow : kPairsHigh),
                                   lower);
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

  TRAIN_INLINE __m512i Row(int r) const {
    return r < rows ? _mm512_maskz_loadu_epi16(columns, at + r * stride) : _mm512_setzero_si512();
  }
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

// Rows of dy and x that are brought into tiles at a time, and columns of the left operand.
constexpr int kPanelRows = 512;
constexpr int kPanelColumns = 512;

// Two tiles of a 32x32 square: row pairs, columns 0 to 15 and 16 to 31. `sums`: null, or 32 floats
// to which the columns' sums are added.
void PackRight(const Square& from, uint16_t* to, float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  Vec low_sum = {}, high_sum = {};
#pragma GCC unroll 4
  for (int i = 0; i < 16; ++i) {
    const __m512i upper = from.Row(2 * i), lower = from.Row(2 * i + 1);
    const __m512i low = Pairs<0>(upper, lower), high = Pairs<1>(upper, lower);
    _mm512_store_si512(to + 32 * i, low);
    _mm512_store_si512(to + kTile + 32 * i, high);
    if (sums != nullptr) {
      low_sum = _mm512_dpbf16_ps(low_sum, (__m512bh)low, ones);
      high_sum = _mm512_dpbf16_ps(high_sum, (__m512bh)high, ones);
    }
  }
  if (sums != nullptr) {
    Store(Load(sums) + low_sum, sums);
    Store(Load(sums + 16) + high_sum, sums + 16);
  }
}

// The same square transposed: two tiles, columns 0 to 15 and 16 to 31 as their rows.
template <int kHalf>
TRAIN_INLINE void PackLeftHalf(const Square& from, uint16_t* to, float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512i rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = Pairs<kHalf>(from.Row(2 * i), from.Row(2 * i + 1));
  if (sums != nullptr) {
    Vec sum[2] = {Load(sums + 16 * kHalf), {}};
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sum[i & 1] = _mm512_dpbf16_ps(sum[i & 1], (__m512bh)rows[i], ones);
    Store(sum[0] + sum[1], sums + 16 * kHalf);
  }
  TransposePairs(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + kHalf * kTile + 32 * i, rows[i]);
}
void PackLeft(const Square& from, uint16_t* to, float* sums) {
  PackLeftHalf<0>(from, to, sums);
  PackLeftHalf<1>(from, to, sums);
}

// c[32][32] (+)= left · right over `steps` squares, two tiles each.
void MultiplySquares(const uint16_t* left, const uint16_t* right, int steps, float* c,
                     int64_t c_stride, bool add) {
  const int64_t bytes = c_stride * static_cast<int64_t>(sizeof(float));
  float* const lower = c + 16 * c_stride;
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + 16, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kTile, 64);
    _tile_loadd(5, left + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    left += 2 * kTile;
    right += 2 * kTile;
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + 16, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + 16, bytes);
}

// to[i][j] += square[i][j] (or [j][i] if turned), for i < rows and j < columns, both up to 32.
void AddSquare(const float* square, bool turned, int rows, int columns, float* to, int64_t stride) {
  for (int i = 0; i < rows; i += 16) {
    for (int j = 0; j < columns; j += 16) {
      const float* corner = turned ? square + j * 32 + i : square + i * 32 + j;
      Vec part[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) part[r] = Load(corner + 32 * r);
      if (turned) Transpose(part);
      const __mmask16 mask = FirstOf16(columns - j);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        if (i + r >= rows) break;
        float* at = to + (i + r) * stride + j;
        _mm512_mask_storeu_ps(at, mask, _mm512_maskz_loadu_ps(mask, at) + part[r]);
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
// narrower where the saving is larger (factor measured: train_kernels_bench).
void LinearGrad(const LinearGradParams& p) {
  alignas(64) static thread_local uint16_t left_panel[kPanelRows * kPanelColumns];
  alignas(64) static thread_local uint16_t right_panel[kPanelRows * 32];
  alignas(64) float square[32 * 32];
  ConfigureTiles();
  const int64_t panel = p.m < kPanelRows ? p.m : kPanelRows;
  const bool turned = (int64_t{p.n} - p.k) * panel > 2 * int64_t{p.n} * p.k;
  const Operand dy = {static_cast<const uint16_t*>(p.dy), p.ldy, p.n};
  const Operand x = {static_cast<const uint16_t*>(p.x), p.ldx, p.k};
  const Operand left = turned ? x : dy, right = turned ? dy : x;

  // The part of an operand's columns from `first` on, 32 at most, in rows m to m + rows.
  const auto part = [](const Operand& from, int64_t m, int rows, int first) {
    return Square{from.at + m * from.stride + first, from.stride, rows,
                  FirstOf32(from.columns - first)};
  };

  for (int64_t m = 0; m < p.m; m += kPanelRows) {
    const int rows = static_cast<int>(p.m - m < kPanelRows ? p.m - m : kPanelRows);
    const int steps = Rounded32(rows) / 32;
    for (int i = 0; i < left.columns; i += kPanelColumns) {
      const int end = left.columns < i + kPanelColumns ? left.columns : i + kPanelColumns;
      for (int l = i; l < end; l += 32) {
        const Square from = part(left, m, rows, l);
        float sums[32] = {};
        float* const wanted = p.db != nullptr && !turned ? sums : nullptr;
        for (int step = 0; step < steps; ++step) {
          PackLeft(from.Below(32 * step),
                   left_panel + ((l - i) / 32 * steps + step) * int64_t{2 * kTile}, wanted);
        }
        if (wanted != nullptr) {
          for (int c = 0; c < 32 && l + c < p.n; ++c) p.db[l + c] += sums[c];
        }
      }
      for (int r = 0; r < right.columns; r += 32) {
        const Square from = part(right, m, rows, r);
        float sums[32] = {};
        float* const wanted = p.db != nullptr && turned && i == 0 ? sums : nullptr;
        for (int step = 0; step < steps; ++step) {
          PackRight(from.Below(32 * step), right_panel + step * 2 * kTile, wanted);
        }
        if (wanted != nullptr) {
          for (int c = 0; c < 32 && r + c < p.n; ++c) p.db[r + c] += sums[c];
        }
        for (int l = i; l < end; l += 32) {
          const uint16_t* from_left = left_panel + (l - i) / 32 * steps * int64_t{2 * kTile};
          const int n = turned ? r : l, k = turned ? l : r;
          float* dw = p.dw + int64_t{n} * p.k + k;
          if (!turned && n + 32 <= p.n && k + 32 <= p.k) {
            MultiplySquares(from_left, right_panel, steps, dw, p.k, true);
          } else {
            MultiplySquares(from_left, right_panel, steps, square, 32, false);
            AddSquare(square, turned, p.n - n < 32 ? p.n - n : 32, p.k - k < 32 ? p.k - k : 32, dw,
                      p.k);
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
      PackLeft({from + key * d + i, d, 32, 0xffffffffu}, tiles, nullptr);
      for (int r = 0; r < 32; ++r) {
        _mm512_store_si512(to + int64_t{i + r} * keys + key, _mm512_load_si512(tiles + 32 * r));
      }
    }
  }
}

// 32 rows of queries as right operands: `turned` for the sums over d, `pairs` for those over
// queries.
void PackQueries(const uint16_t* from, int64_t ld, int count, int d, uint16_t* turned,
                 uint16_t* pairs) {
  for (int i = 0; i < d; i += 32) {
    const Square square = {from + i, ld, count, 0xffffffffu};
#pragma GCC unroll 4
    for (int r = 0; r < 16; ++r) {
      const __m512i upper = square.Row(2 * r), lower = square.Row(2 * r + 1);
      _mm512_store_si512(pairs + (r * d + i) * 2, Pairs<0>(upper, lower));
      _mm512_store_si512(pairs + (r * d + i + 16) * 2, Pairs<1>(upper, lower));
    }
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) rows[r] = square.Row(16 * half + r);
      TransposePairs(rows);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        _mm512_store_si512(turned + (half * (d / 32) + i / 32) * kTile + 32 * r, rows[r]);
      }
    }
  }
}

// to[keys][32] = keys[keys][d] · queries, which PackQueries has turned.
void KeysByQueries(const uint16_t* keys, int rows, int d, const uint16_t* queries, float* to) {
  const int steps = d / 32;
  for (int key = 0; key < rows; key += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < steps; ++step) {
      const uint16_t* left = keys + key * d + 32 * step;
      _tile_loadd(4, left, 2 * d);
      _tile_loadd(6, queries + step * kTile, 64);
      _tile_loadd(7, queries + (steps + step) * kTile, 64);
      _tile_loadd(5, left + 16 * d, 2 * d);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to + key * 32, 128);
    _tile_stored(1, to + key * 32 + 16, 128);
    _tile_stored(2, to + (key + 16) * 32, 128);
    _tile_stored(3, to + (key + 16) * 32 + 16, 128);
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

// dq of up to 32 queries: Kᵀ·dS, turned back.
void QueryGrad(const AttentionScratch& s, int rounded, int d, uint16_t* dq, int64_t ld, int count) {
  for (int i = 0; i < d; i += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int key = 0; key < rounded; key += 32) {
      const uint16_t* left = s.k_turned + i * rounded + key;
      const uint16_t* right = s.ds_pairs + key * 32;
      _tile_loadd(4, left, 2 * rounded);
      _tile_loadd(6, right, 128);
      _tile_loadd(7, right + 32, 128);
      _tile_loadd(5, left + 16 * rounded, 2 * rounded);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* turned = s.dq + i * 32;
    _tile_stored(0, turned, 128);
    _tile_stored(1, turned + 16, 128);
    _tile_stored(2, turned + 16 * 32, 128);
    _tile_stored(3, turned + 16 * 32 + 16, 128);
    for (int half = 0; 16 * half < count; ++half) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        rows[r] = Narrow(Load(turned + 2 * r * 32 + 16 * half),
                         Load(turned + (2 * r + 1) * 32 + 16 * half));
      }
      TransposePairs(rows);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        if (16 * half + r < count) _mm512_storeu_si512(dq + (16 * half + r) * ld + i, rows[r]);
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
      _tile_loadd(0, upper, 4 * d);
      _tile_loadd(1, upper + 16, 4 * d);
      _tile_loadd(2, lower, 4 * d);
      _tile_loadd(3, lower + 16, 4 * d);
      for (int part = 0; part < parts; ++part) {
        const uint16_t* a = left + key * kQueryPanel + 32 * part;
        const uint16_t* b = right + (16 * part * d + i) * 2;
        _tile_loadd(4, a, 2 * kQueryPanel);
        _tile_loadd(6, b, 4 * d);
        _tile_loadd(7, b + 32, 4 * d);
        _tile_loadd(5, a + 16 * kQueryPanel, 2 * kQueryPanel);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, upper, 4 * d);
      _tile_stored(1, upper + 16, 4 * d);
      _tile_stored(2, lower, 4 * d);
      _tile_stored(3, lower + 16, 4 * d);
    }
  }
}

void AttentionGrad(const AttentionGradParams& p) {
  ConfigureTiles();
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
      PackQueries(static_cast<const uint16_t*>(p.q) + query * p.ld, p.ld, count, d, s.q,
                  s.q_pairs + 32 * parts * d);
      PackQueries(static_cast<const uint16_t*>(p.dout) + query * p.ld, p.ld, count, d, s.dout,
                  s.dout_pairs + 32 * parts * d);
      KeysByQueries(s.k, rounded, d, s.q, s.scores);
      KeysByQueries(s.v, rounded, d, s.dout, s.dp);
      Probabilities(s, keys, rounded, parts);
      QueryGrad(s, rounded, d, static_cast<uint16_t*>(p.dq) + query * p.ld, p.ld, count);
    }
    SumOverQueries(s.p, s.dout_pairs, rounded, d, parts, s.dv);
    SumOverQueries(s.ds, s.q_pairs, rounded, d, parts, s.dk);
  }
  for (int i = 0; i < keys * d; i += 16) {
    Store(Load(p.dk + i) + Load(s.dk + i), p.dk + i);
    Store(Load(p.dv + i) + Load(s.dv + i), p.dv + i);
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
    .attention_grad_scratch_floats = AttentionGradScratchFloats,
    .attention_grad = AttentionGrad,
    .adamw = AdamW,
    .add_scaled = AddScaled,
};

}  // namespace pyramid::kernels
