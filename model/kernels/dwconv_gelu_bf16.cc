// Depthwise 3x3 + GELU in f32 arithmetic (AVX-512): bf16 hidden rows in, bf16 out. For machines
// without AVX512-FP16, networks whose hidden numbers are beyond fp16, and training.
//
// 32 channels are two vectors: those at even places and those at odd places, so that bf16 becomes
// f32 by a shift and a mask.
#include "model/kernels/amx_internal.h"

namespace pyramid::kernels::amx {
namespace {

// One column of kRows output rows, 32 channels; kLeft, kRight: there are columns on these sides.
template <int kRows, bool kLeft, bool kRight, const auto& kGelu>
inline void Column(const uint16_t* const* rows, int64_t at, const float* weight, int64_t c,
                   uint16_t* out, int64_t out_row) {
  __m512 even[kRows], odd[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    even[r] = _mm512_loadu_ps(weight + 9 * c);
    odd[r] = _mm512_loadu_ps(weight + 9 * c + 16);
  }
#pragma GCC unroll 4
  for (int from = 0; from < kRows + 2; ++from) {
#pragma GCC unroll 3
    for (int kx = kLeft ? 0 : 1; kx < (kRight ? 3 : 2); ++kx) {
      const __m512i x = _mm512_loadu_si512(rows[from] + at + (kx - 1) * c);
      const __m512 x_even = Even(x), x_odd = Odd(x);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const int ky = from - r;
        if (ky < 0 || ky > 2) continue;
        const float* tap = weight + (3 * ky + kx) * c;
        even[r] = _mm512_fmadd_ps(x_even, _mm512_loadu_ps(tap), even[r]);
        odd[r] = _mm512_fmadd_ps(x_odd, _mm512_loadu_ps(tap + 16), odd[r]);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_si512(out + r * out_row,
                        Interleave(GeluOf<kGelu>(even[r]), GeluOf<kGelu>(odd[r])));
  }
}

template <int kRows, const auto& kGelu>
void OutputRows(const void* const* pointers, const DwconvGeluParams& p, uint16_t* out) {
  const uint16_t* rows[kRows + 2];
  for (int r = 0; r < kRows + 2; ++r) rows[r] = static_cast<const uint16_t*>(pointers[r]);
  const int64_t c = p.c, out_row = p.width * c;
  for (int64_t j = 0; j < c; j += 32) {
    const float* weight = static_cast<const float*>(p.weight) + j;
    uint16_t* to = out + j;
    int64_t at = j;
    if (p.width == 1) {
      Column<kRows, false, false, kGelu>(rows, at, weight, c, to, out_row);
      continue;
    }
    Column<kRows, false, true, kGelu>(rows, at, weight, c, to, out_row);
    for (int x = 1; x + 1 < p.width; ++x) {
      Column<kRows, true, true, kGelu>(rows, at += c, weight, c, to += c, out_row);
    }
    Column<kRows, true, false, kGelu>(rows, at + c, weight, c, to + c, out_row);
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
