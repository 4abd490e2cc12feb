// Depthwise 3x3 + GELU in f32 arithmetic (AVX-512): bf16 hidden rows in, bf16 out. For machines
// without AVX512-FP16, networks whose hidden numbers are beyond fp16, and training.
//
// 32 channels are two vectors: those at even places and those at odd places, so that bf16 becomes
// f32 by a shift and a mask.
#include "model/kernels/amx_internal.h"

namespace pyramid::kernels::amx {
namespace {

// asm("" : "+v"(x)) as in GeluOfAll; loads are what there is least of.

// 32 channels of a column of kRows rows.
template <int kRows>
struct Column {
  __m512 even[kRows], odd[kRows];
};

template <int kRows>
inline Column<kRows> Load(const uint16_t* const* rows, int64_t at) {
  Column<kRows> column;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __m512i x = _mm512_loadu_si512(rows[r] + at);
    asm("" : "+v"(x));
    column.even[r] = Even(x);
    column.odd[r] = Odd(x);
  }
  return column;
}

template <int kRows>
inline Column<kRows> Bias(const float* weight, int64_t c) {
  Column<kRows> sums;
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    sums.even[r] = _mm512_loadu_ps(weight + 9 * c);
    sums.odd[r] = _mm512_loadu_ps(weight + 9 * c + 16);
  }
  return sums;
}

// What a column of the input gives to the output column that has it as its kx-th.
template <int kRows>
inline void Add(const Column<kRows + 2>& x, const float* weight, int64_t c, int kx,
                Column<kRows>& sums) {
#pragma GCC unroll 3
  for (int ky = 0; ky < 3; ++ky) {
    const float* tap = weight + (3 * ky + kx) * c;
    __m512 even = _mm512_loadu_ps(tap), odd = _mm512_loadu_ps(tap + 16);
    asm("" : "+v"(even), "+v"(odd));
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      sums.even[r] = _mm512_fmadd_ps(x.even[r + ky], even, sums.even[r]);
      sums.odd[r] = _mm512_fmadd_ps(x.odd[r + ky], odd, sums.odd[r]);
    }
  }
}

template <int kRows, const auto& kGelu>
inline void Store(const Column<kRows>& sums, uint16_t* out, int64_t out_row) {
  __m512 all[2 * kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    all[2 * r] = sums.even[r];
    all[2 * r + 1] = sums.odd[r];
  }
  GeluOfAll<kGelu>(all);
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_si512(out + r * out_row, Interleave(all[2 * r], all[2 * r + 1]));
  }
}

// Each column of the input is loaded once: it goes into the sums of three columns of the output, of
// which the first is complete then. Loading it for each of the three took a third longer.
template <int kRows, const auto& kGelu>
void OutputRows(const void* const* pointers, const DwconvGeluParams& p, uint16_t* out) {
  const uint16_t* rows[kRows + 2];
  for (int r = 0; r < kRows + 2; ++r) rows[r] = static_cast<const uint16_t*>(pointers[r]);
  const int64_t c = p.c, out_row = p.width * c;
  for (int64_t j = 0; j < c; j += 32) {
    const float* weight = static_cast<const float*>(p.weight) + j;
    uint16_t* to = out + j;
    int64_t at = j;
    Column<kRows + 2> x = Load<kRows + 2>(rows, at);
    Column<kRows> here = Bias<kRows>(weight, c), next = here;
    Add<kRows>(x, weight, c, 1, here);
    Add<kRows>(x, weight, c, 0, next);
    for (int i = 1; i < p.width; ++i) {
      x = Load<kRows + 2>(rows, at += c);
      Add<kRows>(x, weight, c, 2, here);
      Store<kRows, kGelu>(here, to, out_row);
      to += c;
      here = next;
      next = Bias<kRows>(weight, c);
      Add<kRows>(x, weight, c, 1, here);
      Add<kRows>(x, weight, c, 0, next);
    }
    Store<kRows, kGelu>(here, to, out_row);
  }
}

template <const auto& kGelu>
void AllRows(const DwconvGeluParams& p) {
  uint16_t* out = static_cast<uint16_t*>(p.out);
  const int64_t out_row = int64_t{p.width} * p.c;
  int y = 0;
  for (; y + 2 <= p.count; y += 2) OutputRows<2, kGelu>(p.rows + y, p, out + y * out_row);
  if (y < p.count) OutputRows<1, kGelu>(p.rows + y, p, out + y * out_row);
}

}  // namespace

size_t PackedDwconvBf16Bytes(int c) { return static_cast<size_t>(c) * 10 * sizeof(float); }

// Of each 32 channels first those at even places.
void PackDwconvBf16(const float* weight, const float* bias, int c, void* packed) {
  float* to = static_cast<float*>(packed);
  for (int tap = 0; tap < 10; ++tap) {
    for (int i = 0; i < c; ++i) {
      const int64_t channel = i / 32 * 32 + i % 16 * 2 + i % 32 / 16;
      *to++ = tap < 9 ? weight[channel * 9 + tap] : bias[channel];
    }
  }
}

void DwconvGeluBf16(const DwconvGeluParams& p) {
  p.gelu == Gelu::kErf ? AllRows<kErfGelu>(p) : AllRows<kTanhGelu>(p);
}

}  // namespace pyramid::kernels::amx
