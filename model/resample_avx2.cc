// Compiled with -mavx2. See resample_loops.h for what may stand here.
//
// Sums of Pillow's 22-bit weights are made of 16-bit products: with weight = high * 2^15 + low, two
// taps at a time (vpmaddwd), the two partial sums are joined at the end. They may wrap around on
// the way; the joined sum is the exact one because that fits into 32 bits.
#include <immintrin.h>

#include <cstdint>

#include "model/resample_loops.h"

namespace pyramid::resample {
namespace {

inline __m256i LoadTwice(const void* at) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(at)));
}

// Of a group of `halves`: the pairs of taps 0, 1 in all places of the lower lane, of 2, 3 in the
// upper.
inline __m256i PickPairs(int first_byte) {
  const __m256i within = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6,
                                          7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  return _mm256_add_epi8(within, _mm256_set1_epi8(static_cast<char>(first_byte)));
}

// Of four RGB pixels: R0 R1 G0 G1 B0 B1 - - and R2 R3 G2 G3 B2 B3 - -, 16 bits each.
inline __m256i PickRgb() {
  return _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                          6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
}

// The first four bytes of four rows as 16 bits each, a row after the other.
inline __m256i LoadGrey(const uint8_t* const* rows, ptrdiff_t at) {
  int32_t four[kRowGroup];
  for (int r = 0; r < kRowGroup; ++r) __builtin_memcpy(&four[r], rows[r] + at, sizeof four[r]);
  return _mm256_cvtepu8_epi16(_mm_setr_epi32(four[0], four[1], four[2], four[3]));
}

inline __m256i Join(__m256i low, __m256i high) {
  return _mm256_add_epi32(low, _mm256_slli_epi32(high, kHalfBits));
}

inline __m128i LanesAdded(__m256i v) {
  return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

// Sums of four rows with R G B in each, or of one value of four rows, to bytes.
inline __m128i Rounded(__m128i sum) {
  return _mm_srai_epi32(_mm_add_epi32(sum, _mm_set1_epi32(1 << (kPillowBits - 1))), kPillowBits);
}

void PillowAcrossRgb(const Across& p) {
  const __m256i rgb = PickRgb();
  const __m256i lows = PickPairs(0);
  const __m256i highs = PickPairs(8);
  const int16_t* halves = p.halves;
  for (int i = 0; i < p.count; ++i) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(p.first[i]) * 3;
    const uint8_t* r0 = p.rows[0] + at;
    const uint8_t* r1 = p.rows[1] + at;
    const uint8_t* r2 = p.rows[2] + at;
    const uint8_t* r3 = p.rows[3] + at;
    __m256i low0 = _mm256_setzero_si256(), high0 = low0, low1 = low0, high1 = low0;
    __m256i low2 = low0, high2 = low0, low3 = low0, high3 = low0;
    for (int k = 0; k < p.taps; k += kTapGroup, halves += 2 * kTapGroup) {
      const __m256i weights = LoadTwice(halves);
      const __m256i low = _mm256_shuffle_epi8(weights, lows);
      const __m256i high = _mm256_shuffle_epi8(weights, highs);
      const auto add = [&](const uint8_t* row, __m256i& low_sum, __m256i& high_sum) {
        const __m256i pixels = _mm256_shuffle_epi8(LoadTwice(row + 3 * k), rgb);
        low_sum = _mm256_add_epi32(low_sum, _mm256_madd_epi16(pixels, low));
        high_sum = _mm256_add_epi32(high_sum, _mm256_madd_epi16(pixels, high));
      };
      add(r0, low0, high0);
      add(r1, low1, high1);
      add(r2, low2, high2);
      add(r3, low3, high3);
    }
    const __m128i top = _mm_packs_epi32(Rounded(LanesAdded(Join(low0, high0))),
                                        Rounded(LanesAdded(Join(low1, high1))));
    const __m128i bottom = _mm_packs_epi32(Rounded(LanesAdded(Join(low2, high2))),
                                           Rounded(LanesAdded(Join(low3, high3))));
    alignas(16) uint32_t bytes[kRowGroup];  // R G B - of each row; the fourth byte is overwritten
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm_packus_epi16(top, bottom));
    for (int r = 0; r < kRowGroup; ++r) {
      __builtin_memcpy(static_cast<uint8_t*>(p.out[r]) + 3 * static_cast<ptrdiff_t>(i), &bytes[r],
                       sizeof bytes[r]);
    }
  }
}

void PillowAcrossGrey(const Across& p) {
  const int16_t* halves = p.halves;
  for (int i = 0; i < p.count; ++i) {
    __m256i low_sum = _mm256_setzero_si256();
    __m256i high_sum = low_sum;
    for (int k = 0; k < p.taps; k += kTapGroup, halves += 2 * kTapGroup) {
      const __m256i weights = LoadTwice(halves);
      const __m256i pixels = LoadGrey(p.rows, p.first[i] + static_cast<ptrdiff_t>(k));
      low_sum = _mm256_add_epi32(
          low_sum, _mm256_madd_epi16(pixels, _mm256_unpacklo_epi64(weights, weights)));
      high_sum = _mm256_add_epi32(
          high_sum, _mm256_madd_epi16(pixels, _mm256_unpackhi_epi64(weights, weights)));
    }
    const __m256i sums = Join(low_sum, high_sum);  // two for each row, side by side
    const __m128i four =
        _mm_hadd_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i words = _mm_packs_epi32(Rounded(four), Rounded(four));
    const auto bytes = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_packus_epi16(words, words)));
    for (int r = 0; r < kRowGroup; ++r) {
      static_cast<uint8_t*>(p.out[r])[i] = static_cast<uint8_t>(bytes >> (8 * r));
    }
  }
}

void PillowAcross(const Across& p) { p.channels == 3 ? PillowAcrossRgb(p) : PillowAcrossGrey(p); }

void OpenCvAcrossRgb(const Across& p) {
  const __m256i rgb = PickRgb();
  const __m256i lows = PickPairs(0);
  for (int i = 0; i < p.count; ++i) {
    const __m256i weights =
        _mm256_shuffle_epi8(LoadTwice(p.halves + static_cast<ptrdiff_t>(i) * 2 * kTapGroup), lows);
    for (int r = 0; r < kRowGroup; ++r) {
      const __m256i pixels =
          _mm256_shuffle_epi8(LoadTwice(p.rows[r] + static_cast<ptrdiff_t>(p.first[i]) * 3), rgb);
      // The fourth value is overwritten by the next pixel.
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<int32_t*>(p.out[r]) +
                                                  static_cast<ptrdiff_t>(i) * 3),
                       LanesAdded(_mm256_madd_epi16(pixels, weights)));
    }
  }
}

void OpenCvAcrossGrey(const Across& p) {
  for (int i = 0; i < p.count; ++i) {
    const __m256i weights = LoadTwice(p.halves + static_cast<ptrdiff_t>(i) * 2 * kTapGroup);
    const __m256i sums =
        _mm256_madd_epi16(LoadGrey(p.rows, p.first[i]), _mm256_unpacklo_epi64(weights, weights));
    alignas(16) int32_t four[kRowGroup];
    _mm_store_si128(
        reinterpret_cast<__m128i*>(four),
        _mm_hadd_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)));
    for (int r = 0; r < kRowGroup; ++r) static_cast<int32_t*>(p.out[r])[i] = four[r];
  }
}

// `taps` is kTapGroup: OpenCV's kernels are no wider.
void OpenCvAcross(const Across& p) { p.channels == 3 ? OpenCvAcrossRgb(p) : OpenCvAcrossGrey(p); }

inline void Store(uint8_t* out, size_t count, __m128i bytes, size_t size) {
  alignas(16) uint8_t all[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(all), bytes);
  for (size_t i = 0; i < size && i < count; ++i) out[i] = all[i];
}

void PillowDown(const Down& p) {
  const __m256i half = _mm256_set1_epi32(1 << (kPillowBits - 1));
  for (size_t i = 0; i < p.count; i += 16) {
    // Values 0..3 and 8..11 of the 16, and 4..7 and 12..15: as unpacking leaves them and packing
    // wants them.
    __m256i low0 = _mm256_setzero_si256(), high0 = low0, low1 = low0, high1 = low0;
    for (int k = 0; k < p.taps; k += 2) {
      const auto load = [&](int tap) {
        return _mm256_cvtepu8_epi16(_mm_loadu_si128(
            reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(p.rows[tap]) + i)));
      };
      const __m256i a = load(k);
      const __m256i b = load(k + 1);
      const __m256i first = _mm256_unpacklo_epi16(a, b);
      const __m256i second = _mm256_unpackhi_epi16(a, b);
      const int32_t wa = p.weights[k];
      const int32_t wb = p.weights[k + 1];
      constexpr int32_t kLow = (1 << kHalfBits) - 1;
      const __m256i low = _mm256_set1_epi32((wa & kLow) | (wb & kLow) << 16);
      const __m256i high =
          _mm256_set1_epi32(static_cast<int32_t>((static_cast<uint32_t>(wa >> kHalfBits) & 0xffff) |
                                                 static_cast<uint32_t>(wb >> kHalfBits) << 16));
      low0 = _mm256_add_epi32(low0, _mm256_madd_epi16(first, low));
      high0 = _mm256_add_epi32(high0, _mm256_madd_epi16(first, high));
      low1 = _mm256_add_epi32(low1, _mm256_madd_epi16(second, low));
      high1 = _mm256_add_epi32(high1, _mm256_madd_epi16(second, high));
    }
    const __m256i first = _mm256_srai_epi32(_mm256_add_epi32(Join(low0, high0), half), kPillowBits);
    const __m256i second =
        _mm256_srai_epi32(_mm256_add_epi32(Join(low1, high1), half), kPillowBits);
    const __m256i words = _mm256_packs_epi32(first, second);
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (i + 16 <= p.count) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p.out + i), bytes);
    } else {
      Store(p.out + i, p.count - i, bytes, 16);
    }
  }
}

inline __m256i LoadSums(const Down& p, int tap, size_t i) {
  return _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(static_cast<const int32_t*>(p.rows[tap]) + i));
}

// Eight values to eight bytes.
inline void StoreEight(const Down& p, size_t i, __m256i values) {
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
  if (i + 8 <= p.count) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p.out + i), bytes);
  } else {
    Store(p.out + i, p.count - i, bytes, 8);
  }
}

void OpenCvCubicDown(const Down& p) {
  const __m256i half = _mm256_set1_epi32(1 << (2 * kOpenCvBits - 1));
  const __m256i w0 = _mm256_set1_epi32(p.weights[0]);
  const __m256i w1 = _mm256_set1_epi32(p.weights[1]);
  const __m256i w2 = _mm256_set1_epi32(p.weights[2]);
  const __m256i w3 = _mm256_set1_epi32(p.weights[3]);
  for (size_t i = 0; i < p.count; i += 8) {
    const __m256i outer = _mm256_add_epi32(_mm256_mullo_epi32(LoadSums(p, 0, i), w0),
                                           _mm256_mullo_epi32(LoadSums(p, 3, i), w3));
    const __m256i inner = _mm256_add_epi32(_mm256_mullo_epi32(LoadSums(p, 1, i), w1),
                                           _mm256_mullo_epi32(LoadSums(p, 2, i), w2));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(outer, inner), half);
    StoreEight(p, i, _mm256_srai_epi32(sum, 2 * kOpenCvBits));
  }
}

void OpenCvLinearDown(const Down& p) {
  const auto product = [&](int tap, size_t i) {
    return _mm256_srai_epi32(_mm256_mullo_epi32(_mm256_srai_epi32(LoadSums(p, tap, i), 4),
                                                _mm256_set1_epi32(p.weights[tap])),
                             16);
  };
  for (size_t i = 0; i < p.count; i += 8) {
    const __m256i sum =
        _mm256_add_epi32(_mm256_add_epi32(product(0, i), product(1, i)), _mm256_set1_epi32(2));
    StoreEight(p, i, _mm256_srai_epi32(sum, 2));
  }
}

}  // namespace

extern const Loops kAvx2Loops;
const Loops kAvx2Loops = {.name = "avx2",
                          .pillow_across = PillowAcross,
                          .pillow_down = PillowDown,
                          .opencv_across = OpenCvAcross,
                          .opencv_cubic_down = OpenCvCubicDown,
                          .opencv_linear_down = OpenCvLinearDown};

}  // namespace pyramid::resample
