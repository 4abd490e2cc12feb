// LayerNorm of bf16 rows: AVX-512 with AVX512-BF16's conversion.
//
// 16 rows at a time. Sums and sums of squares are of the differences from the row's first element:
// its square is at most c times the variance plus the mean's, so that E[d²] - E[d]² loses a factor
// c at most, however far the mean is from 0. The 16 pairs of sums are reduced together by a tree
// whose order is the same for each row.
#include "model/kernels/amx_internal.h"

namespace pyramid::kernels::amx {
namespace {

constexpr int kRows = 16;

// [a0+a2.., b0+b2..]: first step of the tree, two rows in one vector.
inline __m512 Join(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

// Lane r of the result: the sum of row r, from 8 joined pairs.
inline __m512 Totals(const __m512 (&pairs)[8]) {
  __m512 fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
    fours[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return fold(fold(fours[0], fours[1]), fold(fours[2], fours[3]));
}

struct Sums {
  __m512 sum, squares;
};

inline Sums SumsOf(const uint16_t* row, int c) {
  int32_t first_two;
  __builtin_memcpy(&first_two, row, sizeof(first_two));
  const __m512 shift = Even(_mm512_set1_epi32(first_two));
  Sums sums = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int j = 0; j < c; j += 32) {
    const __m512i x = _mm512_loadu_si512(row + j);
    const __m512 even = _mm512_sub_ps(Even(x), shift);
    const __m512 odd = _mm512_sub_ps(Odd(x), shift);
    sums.sum = _mm512_add_ps(sums.sum, _mm512_add_ps(even, odd));
    sums.squares = _mm512_fmadd_ps(even, even, sums.squares);
    sums.squares = _mm512_fmadd_ps(odd, odd, sums.squares);
  }
  return sums;
}

// Of 16 rows: the mean, and 1 / sqrt(variance + eps).
struct alignas(64) Moments {
  float mean[kRows];
  float scale[kRows];
};

// `rows` of 1 to 16.
__attribute__((always_inline)) inline void Measure(const uint16_t* in, int rows,
                                                   const LayerNormParams& p, Moments& moments) {
  const int c = p.c;
  // Rows behind the last are the last again.
  const auto row = [=](int i) { return in + int64_t{i < rows ? i : rows - 1} * c; };
  alignas(64) uint32_t first[kRows];
  __m512 sums[kRows / 2], squares[kRows / 2];
#pragma GCC unroll 8
  for (int i = 0; i < kRows / 2; ++i) {
    const uint16_t* a_row = row(2 * i);
    const uint16_t* b_row = row(2 * i + 1);
    first[2 * i] = uint32_t{*a_row} << 16;
    first[2 * i + 1] = uint32_t{*b_row} << 16;
    const Sums a = SumsOf(a_row, c), b = SumsOf(b_row, c);
    sums[i] = Join(a.sum, b.sum);
    squares[i] = Join(a.squares, b.squares);
  }
  const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(c));
  const __m512 mean = _mm512_mul_ps(Totals(sums), share);  // of the differences
  const __m512 square = _mm512_mul_ps(Totals(squares), share);
  const __m512 variance = _mm512_max_ps(_mm512_fnmadd_ps(mean, mean, square), _mm512_setzero_ps());
  const __m512 v = _mm512_add_ps(variance, _mm512_set1_ps(p.eps));
  // 14 bits, doubled by a step of Newton's method.
  const __m512 r = _mm512_rsqrt14_ps(v);
  const __m512 half = _mm512_mul_ps(_mm512_mul_ps(v, r), _mm512_set1_ps(-0.5f));
  const __m512 better = _mm512_mul_ps(r, _mm512_fmadd_ps(half, r, _mm512_set1_ps(1.5f)));
  _mm512_store_ps(moments.scale, better);
  _mm512_store_ps(moments.mean, _mm512_add_ps(mean, _mm512_load_ps(first)));
}

__attribute__((always_inline)) inline void Normalise(const uint16_t* in, uint16_t* out, int rows,
                                                     const LayerNormParams& p,
                                                     const Moments& moments) {
  for (int j = 0; j < p.c; j += 32) {
    const __m512 gamma0 = _mm512_loadu_ps(p.gamma + j), gamma1 = _mm512_loadu_ps(p.gamma + j + 16);
    const __m512 beta0 = _mm512_loadu_ps(p.beta + j), beta1 = _mm512_loadu_ps(p.beta + j + 16);
    const __m512 gamma_even = EvenOf(gamma0, gamma1), gamma_odd = OddOf(gamma0, gamma1);
    const __m512 beta_even = EvenOf(beta0, beta1), beta_odd = OddOf(beta0, beta1);
    const auto finish = [&](int i) __attribute__((always_inline)) {
      const __m512i x = _mm512_loadu_si512(in + int64_t{i} * p.c + j);
      const __m512 mean = _mm512_set1_ps(moments.mean[i]);
      const __m512 scale = _mm512_set1_ps(moments.scale[i]);
      const auto norm = [&](__m512 y, __m512 gamma, __m512 beta) __attribute__((always_inline)) {
        return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(y, mean), scale), gamma, beta);
      };
      const __m512 even = norm(Even(x), gamma_even, beta_even);
      const __m512 odd = norm(Odd(x), gamma_odd, beta_odd);
      _mm512_storeu_si512(out + int64_t{i} * p.c + j, Interleave(even, odd));
    };
    if (rows == kRows) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) finish(i);
    } else {
      for (int i = 0; i < rows; ++i) finish(i);
    }
  }
}

}  // namespace

// The next 16 rows are measured before these are normalised: one doesn't wait for the other.
void LayerNorm(const LayerNormParams& p) {
  const uint16_t* in = static_cast<const uint16_t*>(p.in);
  uint16_t* out = static_cast<uint16_t*>(p.out);
  const auto rows_at = [&](int64_t r) {
    return p.rows - r < kRows ? static_cast<int>(p.rows - r) : kRows;
  };
  Moments moments[2];
  if (p.rows <= 0) return;
  Measure(in, rows_at(0), p, moments[0]);
  int turn = 0;
  for (int64_t r = 0; r < p.rows; r += kRows) {
    const int64_t next = r + kRows;
    if (next < p.rows) Measure(in + next * p.c, rows_at(next), p, moments[turn ^ 1]);
    Normalise(in + r * p.c, out + r * p.c, rows_at(r), p, moments[turn]);
    turn ^= 1;
  }
}

}  // namespace pyramid::kernels::amx
