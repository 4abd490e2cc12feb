// What the files of the bf16 kernel sets share. Included by them alone: everything inline has
// internal linkage, because it is compiled for instructions that not every machine has.
#ifndef PYRAMID_MODEL_KERNELS_AMX_INTERNAL_H_
#define PYRAMID_MODEL_KERNELS_AMX_INTERNAL_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "model/kernels/kernel_table.h"

namespace pyramid::kernels::amx {

// The functions of the three tables, by file.
size_t PackedLinearBytes(int n, int k);  // amx_linear.cc
void PackLinear(const PackLinearParams& p);
void LinearHiddenFp16(const LinearParams& p);
void LinearHiddenBf16(const LinearParams& p);
void LayerNorm(const LayerNormParams& p);  // bf16_layer_norm.cc
size_t PackedDwconvFp16Bytes(int c);       // dwconv_gelu_fp16.cc
void PackDwconvFp16(const float* weight, const float* bias, int c, void* packed);
void DwconvGeluFp16(const DwconvGeluParams& p);
size_t PackedDwconvBf16Bytes(int c);  // dwconv_gelu_bf16.cc
void PackDwconvBf16(const float* weight, const float* bias, int c, void* packed);
void DwconvGeluBf16(const DwconvGeluParams& p);
size_t PackedKeysBytes(int keys, int d);  // amx_attention.cc
void PackKeys(const PackKeysParams& p);
void Attention(const AttentionParams& p);
void AttentionByPairs(const AttentionParams& p);  // avx512bf16_attention.cc
void LinearByPairs(const LinearParams& p);        // avx512bf16_linear.cc

namespace {

// palette 1 of Intel's SDM, volume 1, chapter 18: up to 16 rows of up to 64 bytes a tile.
struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Configures this thread's tiles. Comparing costs 5 ns, loading 44 ns (and zeroes the tiles);
// others in the process (oneDNN) may have loaded theirs since the last call.
[[maybe_unused]] inline void UseTiles(const TileConfig& wanted) {
  TileConfig current;
  _tile_storeconfig(&current);
  const __m512i difference =
      _mm512_xor_si512(_mm512_load_si512(&current), _mm512_load_si512(&wanted));
  if (_mm512_test_epi32_mask(difference, difference) == 0) return;
  asm volatile("" ::"r"(&wanted) : "memory");  // g++ 12 drops the stores to `wanted` otherwise
  _tile_loadconfig(&wanted);
}

// The tile instructions with tiles as template arguments (the compiler's macros take literals only)
// and with their memory traffic told to the compiler. Strides are bytes.
template <int kTile>
[[maybe_unused]] inline void LoadTile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
[[maybe_unused]] inline void StoreTile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kTile>
[[maybe_unused]] inline void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// kSum [rows, 16] f32 += kA [rows, 32] bf16 times kB [16 pairs, 16, 2] bf16.
template <int kSum, int kA, int kB>
[[maybe_unused]] inline void MultiplyTiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// bf16, rounded to nearest even; denormal numbers become zero.
[[maybe_unused]] inline uint16_t ToBf16(float x) {
  const __m256bh all = _mm512_cvtneps_pbh(_mm512_set1_ps(x));
  uint16_t first[16];
  __builtin_memcpy(first, &all, sizeof(first));
  return first[0];
}

[[maybe_unused]] inline __m512i ToBf16(__m512 first16, __m512 last16) {
  return (__m512i)_mm512_cvtne2ps_pbh(last16, first16);
}

// 32 bf16 as two vectors: those at even and those at odd places. And back.
[[maybe_unused]] inline __m512 Even(__m512i x) { return (__m512)_mm512_slli_epi32(x, 16); }
[[maybe_unused]] inline __m512 Odd(__m512i x) {
  return (__m512)_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}
[[maybe_unused]] inline __m512i Interleave(__m512 even, __m512 odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, ToBf16(even, odd));
}

// 32 floats in two vectors, in order → those at even and those at odd places.
[[maybe_unused]] inline __m512 EvenOf(__m512 first16, __m512 last16) {
  const __m512i places =
      _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_permutex2var_ps(first16, places, last16);
}
[[maybe_unused]] inline __m512 OddOf(__m512 first16, __m512 last16) {
  const __m512i places =
      _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_ps(first16, places, last16);
}

// gelu(x) = max(x, 0) - m (1/2 - m p(m²)), m = min(|x|, 4): error at most 1.3e-4 (erf) and 7e-5
// (tests/bench/fit_bf16.py); from 4 on 4 p is 1/2, so that large numbers come out as they are.
[[maybe_unused]] constexpr float kErfGelu[] = {0.39818871f,      -0.0650675744f,  0.00904163718f,
                                               -0.000883277855f, 5.74628684e-05f, -2.31473246e-06f,
                                               5.07091826e-08f,  -4.40824849e-10f};
[[maybe_unused]] constexpr float kTanhGelu[] = {0.398479313f,    -0.0658530071f,  0.00950894225f,
                                                -0.00100304163f, 7.35213325e-05f, -3.49460606e-06f,
                                                9.5722875e-08f,  -1.13829701e-09f};

// Of all numbers step by step: a chain at a time would wait for itself. asm("" : "+v"(x)) means
// that x is in a register from there on: GCC 12 reads it from memory for each use otherwise.
template <const auto& kCoefficients, int kCount>
[[maybe_unused]] inline void GeluOfAll(__m512 (&x)[kCount]) {
  __m512 m[kCount], t[kCount], p[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    m[i] = _mm512_range_ps(x[i], _mm512_set1_ps(4.0f), 0b1010);  // the smaller magnitude
    t[i] = _mm512_mul_ps(m[i], m[i]);
    p[i] = _mm512_set1_ps(kCoefficients[7]);
  }
#pragma GCC unroll 7
  for (int c = 6; c >= 0; --c) {
    __m512 coefficient = _mm512_set1_ps(kCoefficients[c]);
    asm("" : "+v"(coefficient));
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) p[i] = _mm512_fmadd_ps(p[i], t[i], coefficient);
  }
  __m512 half = _mm512_set1_ps(0.5f);
  asm("" : "+v"(half));
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const __m512 missing = _mm512_fnmadd_ps(m[i], p[i], half);
    // max keeps its second operand if one is NaN.
    x[i] = _mm512_fnmadd_ps(m[i], missing, _mm512_max_ps(_mm512_setzero_ps(), x[i]));
  }
}

template <const auto& kCoefficients>
[[maybe_unused]] inline __m512 GeluOf(__m512 x) {
  __m512 one[1] = {x};
  GeluOfAll<kCoefficients>(one);
  return one[0];
}

// 16 x 16 double words, transposed.
[[maybe_unused]] inline void Transpose(__m512i (&x)[16]) {
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

}  // namespace
}  // namespace pyramid::kernels::amx

#endif  // PYRAMID_MODEL_KERNELS_AMX_INTERNAL_H_
