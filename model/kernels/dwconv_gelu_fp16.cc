// Depthwise 3x3 + GELU in fp16 arithmetic (AVX512-FP16): fp16 hidden rows in, bf16 out.
//
// Two output rows a pass share the rows between them. GELU is a table of 32 lines (tests/bench/
// fit_bf16.py); the conversion to bf16 is integer arithmetic. Numbers below fp16's smallest
// normal, 6.1e-5, become 0. Sums that are infinite or NaN stay so, minus infinity too, though
// GELU's limit there is 0: it means a number in front was beyond fp16, and that has to show in the
// result. Tried and lost: a polynomial in fp16 (slower, and its tails don't cancel), conversion
// through f32.
#include "model/kernels/amx_internal.h"

namespace pyramid::kernels::amx {
namespace {

constexpr int kLanes = 32;

// gelu(x) = max(x, 0) - m (c0[i] + c1[i] m), m = min(|x|, 3.875), i = round(8 m); fp16 bits.
struct alignas(64) Lines {
  uint16_t c0[kLanes], c1[kLanes];
};
constexpr Lines kErfLines = {
    {0x3800, 0x37ff, 0x37f8, 0x37e5, 0x37c1, 0x378b, 0x373e, 0x36de, 0x366a, 0x35e7, 0x355a,
     0x34c5, 0x342f, 0x3337, 0x321f, 0x311c, 0x3031, 0x2ec3, 0x2d60, 0x2c30, 0x2a6d, 0x28d9,
     0x2734, 0x2540, 0x2389, 0x2153, 0x1f62, 0x1d0c, 0x1ac9, 0x187c, 0x15d3, 0x0000},
    {0xb661, 0xb654, 0xb62f, 0xb5f3, 0xb5a1, 0xb541, 0xb4d1, 0xb45b, 0xb3be, 0xb2c8, 0xb1da,
     0xb0f7, 0xb026, 0xaed2, 0xad86, 0xac68, 0xaaec, 0xa959, 0xa814, 0xa61a, 0xa480, 0xa289,
     0xa0ae, 0x9e94, 0x9c8f, 0x9a3a, 0x982d, 0x9587, 0x9334, 0x909e, 0x8dd2, 0x0000}};
constexpr Lines kTanhLines = {
    {0x3800, 0x37ff, 0x37f8, 0x37e5, 0x37c1, 0x378a, 0x373d, 0x36dc, 0x366a, 0x35e8, 0x355a,
     0x34c7, 0x3431, 0x333e, 0x3227, 0x3124, 0x3038, 0x2ece, 0x2d67, 0x2c34, 0x2a6c, 0x28d1,
     0x2717, 0x251c, 0x2335, 0x20fc, 0x1ebc, 0x1c73, 0x19bd, 0x1736, 0x146e, 0x0000},
    {0xb661, 0xb654, 0xb62f, 0xb5f3, 0xb5a1, 0xb53f, 0xb4cf, 0xb458, 0xb3bd, 0xb2c8, 0xb1d9,
     0xb0f9, 0xb028, 0xaeda, 0xad8f, 0xac71, 0xaafa, 0xa965, 0xa81c, 0xa625, 0xa484, 0xa286,
     0xa0a1, 0x9e70, 0x9c63, 0x99de, 0x97ac, 0x94e9, 0x9224, 0x8f7c, 0x8c77, 0x0000}};

inline __m512h All(float x) { return _mm512_set1_ph(static_cast<_Float16>(x)); }

inline __m512h GeluOf(__m512h x, __m512h c0, __m512h c1) {
  const __m512h m = _mm512_min_ph(_mm512_abs_ph(x), All(3.875f));
  // Between 128 and 256 an fp16 is a multiple of 1/8: the sum's low bits are round(8 m).
  const __m512i index = (__m512i)_mm512_add_ph(m, All(128.0f));
  const __m512h missing = _mm512_fmadd_ph(m, (__m512h)_mm512_permutexvar_epi16(index, (__m512i)c1),
                                          (__m512h)_mm512_permutexvar_epi16(index, (__m512i)c0));
  // max keeps its second operand if one is NaN.
  return _mm512_fnmadd_ph(m, missing, _mm512_max_ph(_mm512_setzero_ph(), x));
}

// The sign, the exponent in its new place and 7 rounded bits (a carry goes into the exponent), then
// the exponent's new bias, 127 - 15. Not for infinities and NaN.
inline __m512i FiniteToBf16(__m512h x) {
  const __m512i bits = (__m512i)x;
  const __mmask32 normal = _mm512_test_epi16_mask(bits, _mm512_set1_epi16(0x7c00));
  const __m512i rounded = _mm512_srai_epi16(_mm512_add_epi16(bits, _mm512_set1_epi16(4)), 3);
  const __m512i moved = _mm512_and_si512(rounded, _mm512_set1_epi16(static_cast<int16_t>(0x8fff)));
  return _mm512_maskz_add_epi16(normal, moved, _mm512_set1_epi16(112 << 7));
}

// The same for infinities and NaN too.
inline __m512i ToBf16Exactly(__m512h x) {
  const __mmask32 special = _mm512_fpclass_ph_mask(x, 0x99);
  const __m512i shifted = _mm512_slli_epi16((__m512i)x, 3);  // of the mantissa, a quiet NaN's top
  const __m512i kept = _mm512_or_si512(
      _mm512_and_si512((__m512i)x, _mm512_set1_epi16(static_cast<int16_t>(0x8000))),
      _mm512_or_si512(_mm512_set1_epi16(0x7f80),
                      _mm512_and_si512(_mm512_srli_epi16(shifted, 6), _mm512_set1_epi16(0x7f))));
  return _mm512_mask_mov_epi16(FiniteToBf16(x), special, kept);
}

// kRows output rows of 32 channels. Returns whether the sums are finite; if not, the rows are to be
// computed again with kExact.
template <int kRows, bool kExact>
inline bool Group(const _Float16* const* rows, const _Float16* weight, int64_t c, int width,
                  uint16_t* out, __m512h c0, __m512h c1) {
  __m512h tap[9];
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) tap[i] = _mm512_loadu_ph(weight + i * c);
  const __m512h bias = _mm512_loadu_ph(weight + 9 * c);
  const _Float16* from[kRows + 2];
  __m512h left[kRows + 2], here[kRows + 2], right[kRows + 2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows + 2; ++r) {
    from[r] = rows[r];
    left[r] = _mm512_setzero_ph();
    here[r] = _mm512_loadu_ph(from[r]);
  }
  const int64_t out_row = width * c;
  __m512h finite = _mm512_setzero_ph();
  const auto column = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      // Two chains, so that one waits for the other less.
      __m512h a = _mm512_fmadd_ph(left[r], tap[0], bias);
      __m512h b = _mm512_mul_ph(here[r + 1], tap[4]);
      a = _mm512_fmadd_ph(here[r], tap[1], a);
      b = _mm512_fmadd_ph(left[r + 1], tap[3], b);
      a = _mm512_fmadd_ph(right[r], tap[2], a);
      b = _mm512_fmadd_ph(right[r + 1], tap[5], b);
      a = _mm512_fmadd_ph(left[r + 2], tap[6], a);
      b = _mm512_fmadd_ph(here[r + 2], tap[7], b);
      a = _mm512_fmadd_ph(right[r + 2], tap[8], a);
      const __m512h x = _mm512_add_ph(a, b);
      const __m512h y = GeluOf(x, c0, c1);
      if (kExact) {
        const __mmask32 below = _mm512_fpclass_ph_mask(x, 0x10);  // -∞
        _mm512_storeu_si512(out + r * out_row, ToBf16Exactly(_mm512_mask_blend_ph(below, y, x)));
      } else {
        finite = _mm512_fmadd_ph(x, _mm512_setzero_ph(), finite);  // NaN once x isn't
        _mm512_storeu_si512(out + r * out_row, FiniteToBf16(y));
      }
    }
    out += c;
#pragma GCC unroll 4
    for (int r = 0; r < kRows + 2; ++r) {
      left[r] = here[r];
      here[r] = right[r];
    }
  };
  for (int x = 0; x + 1 < width; ++x) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows + 2; ++r) right[r] = _mm512_loadu_ph(from[r] += c);
    column();
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows + 2; ++r) right[r] = _mm512_setzero_ph();
  column();
  return _mm512_cmp_ph_mask(finite, finite, _CMP_UNORD_Q) == 0;
}

template <int kRows>
void OutputRows(const void* const* rows, const DwconvGeluParams& p, uint16_t* out) {
  const Lines& lines = p.gelu == Gelu::kErf ? kErfLines : kTanhLines;
  const __m512h c0 = _mm512_loadu_ph(lines.c0), c1 = _mm512_loadu_ph(lines.c1);
  const _Float16* weight = static_cast<const _Float16*>(p.weight);
  for (int j = 0; j < p.c; j += kLanes) {
    const _Float16* from[kRows + 2];
    for (int r = 0; r < kRows + 2; ++r) from[r] = static_cast<const _Float16*>(rows[r]) + j;
    if (Group<kRows, false>(from, weight + j, p.c, p.width, out + j, c0, c1)) continue;
    Group<kRows, true>(from, weight + j, p.c, p.width, out + j, c0, c1);
  }
}

}  // namespace

size_t PackedDwconvFp16Bytes(int c) { return static_cast<size_t>(c) * 10 * sizeof(_Float16); }

void PackDwconvFp16(const float* weight, const float* bias, int c, void* packed) {
  _Float16* to = static_cast<_Float16*>(packed);
  for (int tap = 0; tap < 9; ++tap) {
    for (int i = 0; i < c; ++i) *to++ = static_cast<_Float16>(weight[int64_t{i} * 9 + tap]);
  }
  for (int i = 0; i < c; ++i) *to++ = static_cast<_Float16>(bias[i]);
}

void DwconvGeluFp16(const DwconvGeluParams& p) {
  uint16_t* out = static_cast<uint16_t*>(p.out);
  const int64_t out_row = int64_t{p.width} * p.c;
  int y = 0;
  for (; y + 2 <= p.count; y += 2) OutputRows<2>(p.rows + y, p, out + y * out_row);
  if (y < p.count) OutputRows<1>(p.rows + y, p, out + y * out_row);
}

}  // namespace pyramid::kernels::amx
