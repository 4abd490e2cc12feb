// softmax(q·kᵀ)·v of bf16 on AMX tiles, 16 queries at a time.
//
// Scores are f32. Probabilities are bf16, rounded towards zero; the sum they are divided by is
// computed from the same rounded numbers by a column of ones beside v, so that the rounding has no
// bias. Base-2 exponents below 30 in size need no maximum subtracted: bf16 has f32's range.
// Beyond, the whole part of the row's maximum is subtracted from the exponents, which changes
// nothing but the exponents: the result doesn't depend on a row's neighbours.
//
// Keys come in blocks of 32, two tiles of scores; a row of probabilities of a block holds key j and
// key 16 + j side by side, and v is packed alike. 49 keys, PVT v2's at 224 x 224, are one block, a
// tile and a tile that is one key wide: 16 queries' scores of it are one vector.
// The next queries' scores are multiplied while exponentials are computed.
#include "model/kernels/amx_internal.h"

namespace pyramid::kernels::amx {
namespace {

constexpr int kQueries = 16;
constexpr int kBlock = 32;            // keys
constexpr int kTileElements = 512;    // bf16
constexpr int kScores = 16 * kBlock;  // of a block

// Tiles 3 and 6 are one number (f32, or two bf16) wide.
constexpr TileConfig Config() {
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = t == 3 || t == 6 ? 4 : 64;
    config.rows[t] = 16;
  }
  return config;
}
constexpr TileConfig kConfig = Config();

struct alignas(64) Ones {
  uint32_t pairs[16];  // bf16 1, 1
};
constexpr uint32_t kOne = 0x3f803f80;
constexpr Ones kOnes = {{kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne,
                         kOne, kOne, kOne, kOne}};

inline bool Thin(int keys) { return keys > kBlock && keys % kBlock == 17; }
inline int Blocks(int keys) { return (keys + kBlock - 1) / kBlock; }

// ------------------------------------------------------------------------------------- packing

// 16 x 16 double words.
inline void Transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // x[4 g + c], lane l, holds column 4 l + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
    const __m512i e = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
    y[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    y[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    y[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    y[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Packed: [block][step of d][two tiles of keys], a tile [d / 2][16 keys][2]; then v,
// [block][d / 16], a tile [16 keys][16 of d][key j and 16 + j]. Of a thin block the second tile of
// keys is one key, [d / 2][2].
void PackK(const PackKeysParams& p, uint16_t* to) {
  for (int first = 0; first < Blocks(p.keys) * kBlock; first += 16) {
    const int count = p.keys - first;
    const bool thin = Thin(p.keys) && count == 1;
    for (int e = 0; e < p.d; e += 32) {
      const int64_t tile = int64_t{first / 32 * (p.d / 32) + e / 32} * 2 + first / 16 % 2;
      const uint16_t* k = static_cast<const uint16_t*>(p.k) + first * p.ld + e;
      if (thin) {
        _mm512_store_si512(to + tile * kTileElements, _mm512_loadu_si512(k));
        continue;
      }
      __m512i rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        rows[i] = i < count ? _mm512_loadu_si512(k + i * p.ld) : _mm512_setzero_si512();
      }
      Transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(to + tile * kTileElements + i * 32, rows[i]);
      }
    }
  }
}

void PackV(const PackKeysParams& p, uint16_t* to) {
  const auto row = [&](int key, int e) {
    const uint16_t* v = static_cast<const uint16_t*>(p.v) + key * p.ld + e;
    return _mm512_cvtepu16_epi32(key < p.keys
                                     ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))
                                     : _mm256_setzero_si256());
  };
  for (int first = 0; first < p.keys; first += kBlock) {
    for (int e = 0; e < p.d; e += 16) {
      for (int j = 0; j < 16; ++j) {
        const __m512i high = _mm512_slli_epi32(row(first + 16 + j, e), 16);
        _mm512_store_si512(to, _mm512_or_si512(row(first + j, e), high));
        to += 32;
      }
    }
  }
}

// ------------------------------------------------------------------------------------- softmax

// 2^f on [0, 1), relative error 7.5e-5 (tests/bench/fit_gelu_bf16.py): bf16 has 2e-3.
inline __m512 Fraction(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - ⌊x⌋
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0780244920f), _mm512_set1_ps(0.226067578f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695833181f));
  return _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999925277f));
}

inline __m512i Exp2(__m512 x) { return (__m512i)_mm512_scalef_ps(Fraction(x), x); }

// 2^(x - n), n whole.
inline __m512i Exp2(__m512 x, __m512 n) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (__m512i)_mm512_scalef_ps(Fraction(x), _mm512_sub_ps(whole, n));
}

// The first halves of `low` and `high` side by side.
inline __m512i Pairs(__m512i low, __m512i high) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, mask, 0xf8);  // a | (b & c)
}

constexpr float kPlainExponent = 30.0f;
// The larger one in size of each lane.
inline __m512 Larger(__m512 a, __m512 b) { return _mm512_range_ps(a, b, 0xb); }
inline bool AnyLarge(__m512 size) {
  return _mm512_cmp_ps_mask(size, _mm512_set1_ps(kPlainExponent), _CMP_GE_OQ) != 0;
}

// One call's constants. Scores of 16 queries: [block][16 queries][32], then (thin) [16] of the last
// key; probabilities: [block][16 queries][16][2].
struct Keys {
  const uint16_t* k;
  const uint16_t* v;
  int blocks;      // of 32
  __mmask32 last;  // the last block's keys; a thin block's are all there
};

template <int kD, int kBlocks, bool kThin>
struct Attend {
  static constexpr int kMostBlocks = kBlocks > 0 ? kBlocks + kThin : kMostKeys / kBlock;
  static constexpr int kScoresSize = kMostBlocks * kScores + 16;
  static constexpr int64_t kBlockElements = kD * kBlock;  // of k, and of v

  static inline int Full(const Keys& keys) {
    return kBlocks > 0 ? kBlocks : keys.blocks - (kThin ? 1 : 0);
  }

  static inline void Scores(const uint16_t* q, int64_t stride, const Keys& keys, float* scores) {
    const uint16_t* k = keys.k;
    for (int b = 0; b < Full(keys); ++b) {
      ZeroTile<0>();
      ZeroTile<1>();
      for (int e = 0; e < kD / 32; ++e) {
        LoadTile<4>(q + e * 32, stride);
        LoadTile<5>(k, 64);
        LoadTile<7>(k + kTileElements, 64);
        MultiplyTiles<0, 4, 5>();
        MultiplyTiles<1, 4, 7>();
        k += 2 * kTileElements;
      }
      StoreTile<0>(scores, kBlock * 4);
      StoreTile<1>(scores + 16, kBlock * 4);
      scores += kScores;
    }
    if (!kThin) return;
    ZeroTile<2>();
    ZeroTile<3>();
    for (int e = 0; e < kD / 32; ++e) {
      LoadTile<4>(q + e * 32, stride);
      LoadTile<5>(k, 64);
      LoadTile<6>(k + kTileElements, 4);
      MultiplyTiles<2, 4, 5>();
      MultiplyTiles<3, 4, 6>();
      k += 2 * kTileElements;
    }
    StoreTile<2>(scores, kBlock * 4);
    StoreTile<3>(scores + kScores, 4);
  }

  // exp(score, query): kRow, the function of one vector of scores. Whether a score was large.
  template <typename Exp>
  static inline bool Probabilities(const float* scores, const Keys& keys, uint32_t* out,
                                   const Exp& exp) {
    __m512 size = _mm512_setzero_ps();
    const __mmask16 low = static_cast<__mmask16>(keys.last);
    const __mmask16 high = static_cast<__mmask16>(keys.last >> 16);
    for (int b = 0; b < Full(keys); ++b) {
      const bool masked = !kThin && b + 1 == Full(keys);
#pragma GCC unroll 16
      for (int i = 0; i < kQueries; ++i) {
        const __m512 x = _mm512_load_ps(scores + i * kBlock);
        const __m512 y = _mm512_load_ps(scores + i * kBlock + 16);
        __m512i pairs = Pairs(exp(x, i), exp(y, i));
        if (masked) {
          pairs = Pairs(_mm512_maskz_mov_epi32(low, exp(x, i)),
                        _mm512_maskz_mov_epi32(high, exp(y, i)));
        }
        size = Larger(size, Larger(x, y));
        _mm512_store_si512(out + i * 16, pairs);
      }
      scores += kScores;
      out += kQueries * 16;
    }
    if (!kThin) return AnyLarge(size);
    alignas(64) uint32_t thin[16];
    const __m512 last = _mm512_load_ps(scores + kScores);
    size = Larger(size, last);
    _mm512_store_si512(
        thin, _mm512_and_si512(exp(last, -1), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
#pragma GCC unroll 16
    for (int i = 0; i < kQueries; ++i) {
      const __m512 x = _mm512_load_ps(scores + i * kBlock);
      const __m512i low_half = _mm512_srli_epi32(exp(x, i), 16);
      size = Larger(size, x);
      _mm512_store_si512(
          out + i * 16,
          _mm512_or_si512(low_half, _mm512_zextsi128_si512(_mm_loadu_si32(thin + i))));
    }
    return AnyLarge(size);
  }

  // For each query the whole part of its largest score.
  static void Largest(const float* scores, const Keys& keys, float* out) {
    __m512 thin = _mm512_set1_ps(-__builtin_inff());
    if (kThin) thin = _mm512_load_ps(scores + Full(keys) * kScores + kScores);
    alignas(64) float last[16];
    _mm512_store_ps(last, thin);
    for (int i = 0; i < kQueries; ++i) {
      __m512 most = _mm512_set1_ps(-3.40282347e38f);
      for (int b = 0; b < Full(keys); ++b) {
        const float* at = scores + b * kScores + i * kBlock;
        const __mmask32 mask = b + 1 == Full(keys) && !kThin ? keys.last : ~__mmask32{0};
        most = _mm512_mask_max_ps(most, static_cast<__mmask16>(mask), most, _mm512_load_ps(at));
        most = _mm512_mask_max_ps(most, static_cast<__mmask16>(mask >> 16), most,
                                  _mm512_load_ps(at + 16));
      }
      if (kThin) {
        const float* at = scores + Full(keys) * kScores + i * kBlock;
        most = _mm512_max_ps(most, _mm512_load_ps(at));
        most = _mm512_max_ps(most, _mm512_set1_ps(last[i]));
      }
      out[i] = __builtin_floorf(_mm512_reduce_max_ps(most));
    }
  }

  static inline void Softmax(const float* scores, const Keys& keys, uint32_t* out) {
    const auto plain = [](__m512 x, int) __attribute__((always_inline)) { return Exp2(x); };
    if (!Probabilities(scores, keys, out, plain)) return;
    alignas(64) float most[kQueries];
    Largest(scores, keys, most);
    Probabilities(scores, keys, out, [&](__m512 x, int i) {
      return Exp2(x, i < 0 ? _mm512_load_ps(most) : _mm512_set1_ps(most[i]));
    });
  }

  // sums [16 queries, kD], and of the probabilities themselves [16].
  static inline void Values(const uint32_t* probabilities, const Keys& keys, float* sums,
                            float* totals) {
    const uint16_t* v = keys.v;
    ZeroTile<0>();
    ZeroTile<1>();
    ZeroTile<3>();
    if (kD == 64) {
      ZeroTile<2>();
      ZeroTile<7>();
    }
    LoadTile<6>(kOnes.pairs, 4);
    const int blocks = Full(keys) + kThin;
    for (int b = 0; b < blocks; ++b) {
      LoadTile<4>(probabilities + b * kQueries * 16, 64);
      MultiplyTiles<3, 4, 6>();
      LoadTile<5>(v, 64);
      MultiplyTiles<0, 4, 5>();
      LoadTile<5>(v + kTileElements, 64);
      MultiplyTiles<1, 4, 5>();
      if (kD == 64) {
        LoadTile<5>(v + 2 * kTileElements, 64);
        MultiplyTiles<2, 4, 5>();
        LoadTile<5>(v + 3 * kTileElements, 64);
        MultiplyTiles<7, 4, 5>();
      }
      v += kBlockElements;
    }
    StoreTile<3>(totals, 4);
    StoreTile<0>(sums, kD * 4);
    StoreTile<1>(sums + 16, kD * 4);
    if (kD == 64) {
      StoreTile<2>(sums + 32, kD * 4);
      StoreTile<7>(sums + 48, kD * 4);
    }
  }

  // Queries [first, 16).
  static inline void Write(const float* sums, const float* totals, uint16_t* out, int64_t ld,
                           int first, int behind) {
    alignas(64) float share[kQueries];
    const __m512 total = _mm512_load_ps(totals);
    const __mmask16 some = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_store_ps(share, _mm512_maskz_rcp14_ps(some, total));
    const auto row = [&](int i) __attribute__((always_inline)) {
      const __m512 r = _mm512_set1_ps(share[i]);
#pragma GCC unroll 2
      for (int e = 0; e < kD; e += 32) {
        const __m512 a = _mm512_mul_ps(_mm512_load_ps(sums + i * kD + e), r);
        const __m512 b = _mm512_mul_ps(_mm512_load_ps(sums + i * kD + e + 16), r);
        _mm512_storeu_si512(out + i * ld + e, ToBf16(a, b));
      }
    };
    if (first == 0 && behind == kQueries) {
#pragma GCC unroll 16
      for (int i = 0; i < kQueries; ++i) row(i);
    } else {
      for (int i = first; i < behind; ++i) row(i);
    }
  }

  static void Run(const AttentionParams& p) {
    alignas(64) float scores[2][kScoresSize];
    alignas(64) uint32_t probabilities[kMostBlocks * kQueries * 16];
    alignas(64) float sums[kQueries * kD], totals[kQueries];
    alignas(64) uint16_t few[kQueries * kD];
    const int in_last = p.keys - (Blocks(p.keys) - 1) * kBlock;
    const uint16_t* packed = static_cast<const uint16_t*>(p.packed);
    const Keys keys = {.k = packed,
                       .v = packed + Blocks(p.keys) * kBlockElements,
                       .blocks = Blocks(p.keys),
                       .last = in_last == kBlock ? ~__mmask32{0} : (__mmask32{1} << in_last) - 1};
    const uint16_t* q = static_cast<const uint16_t*>(p.q);
    int64_t stride = p.ld * 2;
    if (p.queries < kQueries) {  // zeros behind
      for (int64_t i = 0; i < kQueries * (kD / 32); ++i) {
        const int64_t row = i / (kD / 32), e = i % (kD / 32) * 32;
        _mm512_store_si512(few + row * kD + e, row < p.queries
                                                   ? _mm512_loadu_si512(q + row * p.ld + e)
                                                   : _mm512_setzero_si512());
      }
      q = few;
      stride = kD * 2;
    }
    // The last 16 queries may overlap those before: what was written isn't written again.
    const int64_t last = p.queries < kQueries ? 0 : p.queries - kQueries;
    const auto first_of = [last](int64_t at) { return at < last ? at : last; };
    uint16_t* out = static_cast<uint16_t*>(p.out);
    const int behind = static_cast<int>(p.queries < kQueries ? p.queries : kQueries);

    Scores(q, stride, keys, scores[0]);
    int turn = 0;
    for (int64_t at = 0; at < p.queries; at += kQueries) {
      if (at + kQueries < p.queries) {
        Scores(q + first_of(at + kQueries) * (stride / 2), stride, keys, scores[turn ^ 1]);
      }
      Softmax(scores[turn], keys, probabilities);
      Values(probabilities, keys, sums, totals);
      const int64_t first = first_of(at);
      Write(sums, totals, out + first * p.ld, p.ld, static_cast<int>(at - first), behind);
      turn ^= 1;
    }
  }
};

template <int kD>
void RunAny(const AttentionParams& p) {
  if (p.keys == 49) {
    Attend<kD, 1, true>::Run(p);
  } else if (Thin(p.keys)) {
    Attend<kD, 0, true>::Run(p);
  } else {
    Attend<kD, 0, false>::Run(p);
  }
}

}  // namespace

size_t PackedKeysBytes(int keys, int d) {
  return static_cast<size_t>(Blocks(keys)) * kBlock * d * 2 * sizeof(uint16_t);
}

void PackKeys(const PackKeysParams& p) {
  uint16_t* packed = static_cast<uint16_t*>(p.packed);
  PackK(p, packed);
  PackV(p, packed + int64_t{Blocks(p.keys)} * kBlock * p.d);
}

void Attention(const AttentionParams& p) {
  if (p.queries <= 0) return;
  UseTiles(kConfig);
  p.d == 32 ? RunAny<32>(p) : RunAny<64>(p);
}

}  // namespace pyramid::kernels::amx
