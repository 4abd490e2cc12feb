// softmax(q·kᵀ)·v of bf16 on AMX tiles, 16 queries at a time.
//
// Scores are f32. Probabilities are bf16, rounded towards zero; the sum they are divided by is
// computed from the same rounded numbers by a column of ones beside v, so that the rounding has no
// bias. A whole number added to a row's scores changes nothing but exponents: one is subtracted
// only if scores are beyond [-31, 32), and a row's result doesn't depend on its neighbours.
//
// Keys come in blocks of 32, two tiles of scores; a row of probabilities of a block holds key j and
// key 16 + j side by side, and v is packed alike. 49 keys, PVT v2's at 224 x 224, are one block, a
// tile and a tile that is one key wide: 16 queries' scores of it are one vector.
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

// 2^x of 32 numbers at once, to the 8 bits of a bf16: x becomes a 16-bit integer of 1/512ths, which
// but for a correction looked up for each eighth fraction is 2^x's exponent and mantissa
// (Schraudolph, "A fast, compact approximation of the exponential function", 1999), 512 (2^f - 1 -
// f) + 48 here (tests/bench/fit_bf16.py). Relative error 8e-4 rms before rounding towards zero.
// Tried and lost: reduce, a cubic and scalef in f32 (two times the instructions).
constexpr float kFractions = 512.0f;
constexpr float kExponentOffset = 96.0f;  // of the smallest probability, to bf16's 127
constexpr int kMostCorrection = 48;
constexpr float kLeast = -kExponentOffset + kMostCorrection / kFractions;  // all below become 0
constexpr float kLimit = 32.0f;  // from -31 to here x fits, whatever it is among its neighbours
struct alignas(64) Corrections {
  uint8_t of[64];
};
constexpr Corrections kCorrections = {
    {33, 31, 29, 28, 26, 24, 22, 21, 19, 18, 16, 15, 14, 12, 11, 10, 9,  8,  8,  7,  6,  6,
     5,  5,  4,  4,  4,  4,  4,  4,  4,  5,  5,  5,  6,  7,  7,  8,  9,  10, 11, 12, 14, 15,
     17, 18, 20, 22, 24, 26, 28, 30, 33, 35, 38, 40, 43, 46, 47, 45, 42, 40, 38, 36}};

// An addition that rounds to whole numbers, 1.5 * 2^23, and what the integer begins at.
constexpr float kRound = 12582912.0f;
constexpr float kBegin = kRound + kExponentOffset * kFractions - kMostCorrection;
constexpr int32_t kBits = 0x4b408000;  // of a sum within the limits, but for its last 15

inline __m512i Fixed(__m512 x) {
  return (__m512i)_mm512_fmadd_ps(x, _mm512_set1_ps(kFractions), _mm512_set1_ps(kBegin));
}
// Bits that differ from those of a number within the limits, onto those of others.
inline __m512i Excess(__m512i so_far, __m512i fixed) {
  return _mm512_ternarylogic_epi32(so_far, fixed, _mm512_set1_epi32(kBits), 0xf6);  // a | (b ^ c)
}
inline bool Any(__m512i excess) {
  return _mm512_test_epi32_mask(excess, _mm512_set1_epi32(static_cast<int32_t>(0xffff8000))) != 0;
}
// bf16 of 32 fixed numbers; those without a bit in `mask` are 0.
inline __m512i Powers(__m512i fixed, __mmask32 mask) {
  const __m512i correction = _mm512_maskz_permutexvar_epi8(
      0x5555555555555555, _mm512_srli_epi16(fixed, 3), _mm512_load_si512(kCorrections.of));
  return _mm512_maskz_srli_epi16(mask, _mm512_add_epi16(fixed, correction), 2);
}

constexpr __mmask32 kLowHalves = 0x55555555;  // of double words

// One call's constants. Scores of 16 queries: [block][16 queries][32], then (thin) [16] of the last
// key; probabilities: [block][16 queries][16][2].
struct Keys {
  const uint16_t* k;
  const uint16_t* v;
  int blocks;            // of 32
  __mmask32 last;        // the last block's keys, if not thin
  __mmask32 last_pairs;  // the same in the order of probabilities
};

inline Keys KeysOf(const void* packed, int keys, int d) {
  const uint16_t* k = static_cast<const uint16_t*>(packed);
  const int blocks = Blocks(keys), in_last = keys - (blocks - 1) * kBlock;
  __mmask32 last = 0, last_pairs = 0;
  for (int j = 0; j < in_last; ++j) {
    last |= __mmask32{1} << j;
    last_pairs |= __mmask32{1} << (j % 16 * 2 + j / 16);
  }
  return {.k = k,
          .v = k + int64_t{blocks} * kBlock * d,
          .blocks = blocks,
          .last = last,
          .last_pairs = last_pairs};
}

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

  // Scores → probabilities, each row with a factor of its own. False: scores beyond the limits.
  static inline bool Probabilities(const float* scores, const Keys& keys, uint32_t* out) {
    __m512i excess = _mm512_setzero_si512();
    for (int b = 0; b < Full(keys); ++b) {
      const __mmask32 mask = kThin || b + 1 < Full(keys) ? ~__mmask32{0} : keys.last_pairs;
#pragma GCC unroll 16
      for (int i = 0; i < kQueries; ++i) {
        const __m512i low = Fixed(_mm512_load_ps(scores + i * kBlock));
        const __m512i high = Fixed(_mm512_load_ps(scores + i * kBlock + 16));
        excess = Excess(Excess(excess, low), high);
        const __m512i pairs = _mm512_mask_blend_epi16(kLowHalves, _mm512_slli_epi32(high, 16), low);
        _mm512_store_si512(out + i * 16, Powers(pairs, mask));
      }
      scores += kScores;
      out += kQueries * 16;
    }
    if (!kThin) return !Any(excess);
    alignas(64) uint32_t thin[16];
    const __m512i last = Fixed(_mm512_load_ps(scores + kScores));
    excess = Excess(excess, last);
    _mm512_store_si512(thin, _mm512_slli_epi32(last, 16));
#pragma GCC unroll 16
    for (int i = 0; i < kQueries; ++i) {
      const __m512i low = Fixed(_mm512_load_ps(scores + i * kBlock));
      excess = Excess(excess, low);
      const __m512i high = _mm512_zextsi128_si512(_mm_loadu_si32(thin + i));
      const __m512i pairs = _mm512_mask_blend_epi16(kLowHalves, high, low);
      _mm512_store_si512(out + i * 16, Powers(pairs, kLowHalves | 2));
    }
    return !Any(excess);
  }

  // Calls visit(vector of scores, query, its keys) for all of query's scores but the thin one.
  template <typename Visit>
  static inline void ForRow(float* scores, const Keys& keys, int query, const Visit& visit) {
    for (int b = 0; b < Full(keys); ++b) {
      float* at = scores + b * kScores + query * kBlock;
      const __mmask32 mask = kThin || b + 1 < Full(keys) ? ~__mmask32{0} : keys.last;
      visit(at, static_cast<__mmask16>(mask));
      visit(at + 16, static_cast<__mmask16>(mask >> 16));
    }
    if (kThin) visit(scores + Full(keys) * kScores + query * kBlock, __mmask16{0xffff});
  }

  // Moves each row's scores by a whole number, so that the largest is just within the limits; what
  // is too small then is 0. 1/512ths are rounded before: rows that were within keep their bits.
  // Returns the rows that have a NaN or positive infinity.
  static __attribute__((noinline)) __mmask16 MoveIntoLimits(float* scores, const Keys& keys) {
    float* thin = scores + Full(keys) * kScores + kScores;
    __mmask16 broken = 0;
    for (int i = 0; i < kQueries; ++i) {
      __m512 most = _mm512_set1_ps(-3.40282347e38f);
      __mmask16 bad = 0;
      ForRow(scores, keys, i, [&](const float* at, __mmask16 mask) {
        const __m512 x = _mm512_load_ps(at);
        most = _mm512_mask_max_ps(most, mask, most, x);
        bad |= _mm512_mask_fpclass_ps_mask(mask, x, 0x89);  // NaN, +∞
      });
      float largest = _mm512_reduce_max_ps(most);
      if (kThin) {
        largest = thin[i] > largest ? thin[i] : largest;
        bad |= _mm512_fpclass_ps_mask(_mm512_set1_ps(thin[i]), 0x89);
      }
      if (bad != 0) broken |= static_cast<__mmask16>(1 << i);
      const __m512 down = _mm512_set1_ps((__builtin_floorf(largest) - (kLimit - 1)) * kFractions);
      const auto moved = [&](__m512 x) {
        const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kFractions)),
                                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 y = _mm512_mul_ps(_mm512_sub_ps(whole, down), _mm512_set1_ps(1 / kFractions));
        return _mm512_max_ps(y, _mm512_set1_ps(kLeast));
      };
      ForRow(scores, keys, i, [&](float* at, __mmask16 mask) {
        _mm512_mask_store_ps(at, mask, moved(_mm512_load_ps(at)));
      });
      if (kThin) thin[i] = _mm512_cvtss_f32(moved(_mm512_set1_ps(thin[i])));
    }
    return broken;
  }

  static inline void Softmax(float* scores, const Keys& keys, uint32_t* out) {
    if (Probabilities(scores, keys, out)) return;
    const __mmask16 broken = MoveIntoLimits(scores, keys);
    Probabilities(scores, keys, out);
    for (int i = 0; i < kQueries; ++i) {
      if (broken >> i & 1) out[i * 16] |= 0x7fc0;  // NaN
    }
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
    alignas(64) uint32_t probabilities[2][kMostBlocks * kQueries * 16];
    alignas(64) float sums[kQueries * kD], totals[kQueries];
    alignas(64) uint16_t few[kQueries * kD];
    const Keys keys = KeysOf(p.packed, p.keys, kD);
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

    // A group's probabilities are multiplied while the next group's are computed.
    Scores(q, stride, keys, scores[0]);
    int turn = 0;
    for (int64_t at = 0; at < p.queries; at += kQueries) {
      if (at > 0) Values(probabilities[turn ^ 1], keys, sums, totals);
      Softmax(scores[turn], keys, probabilities[turn]);
      if (at + kQueries < p.queries) {
        Scores(q + first_of(at + kQueries) * (stride / 2), stride, keys, scores[turn ^ 1]);
      }
      if (at > 0) Write(sums, totals, out + (at - kQueries) * p.ld, p.ld, 0, kQueries);
      turn ^= 1;
    }
    const int64_t written = (p.queries - 1) / kQueries * kQueries;
    Values(probabilities[turn ^ 1], keys, sums, totals);
    Write(sums, totals, out + first_of(written) * p.ld, p.ld,
          static_cast<int>(written - first_of(written)), behind);
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
