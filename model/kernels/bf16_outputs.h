// How a linear layer's outputs are made of its sums. Included by the files of the bf16 kernel sets
// alone, as amx_internal.h.
#ifndef PYRAMID_MODEL_KERNELS_BF16_OUTPUTS_H_
#define PYRAMID_MODEL_KERNELS_BF16_OUTPUTS_H_

#include "model/kernels/amx_internal.h"

namespace pyramid::kernels::amx {
namespace {

constexpr int64_t kTile = 16;               // rows of a tile, and f32 columns
constexpr int64_t kBlock = 32;              // columns of a panel, and K of one step
constexpr int64_t kTileElements = 16 * 32;  // bf16 of a tile
constexpr int64_t kStepElements = 2 * kTileElements;

inline int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

// Packed: panels of 32 outputs, [step of K][two tiles], a tile [k / 2][16 outputs][2].
inline int64_t Steps(int k) { return (int64_t{k} + kBlock - 1) / kBlock; }
inline int64_t Panels(int n) { return (int64_t{n} + kBlock - 1) / kBlock; }
[[maybe_unused]] inline const uint16_t* PanelOf(const LinearParams& p, int64_t panel) {
  return static_cast<const uint16_t*>(p.weight) + panel * Steps(p.k) * kStepElements;
}

enum class Kind { kBf16, kFp16, kFloat };

// How outputs are made of sums.
template <Kind kKind, bool kRelu, bool kResidual>
struct Finish {
  static constexpr int64_t kBytes = kKind == Kind::kFloat ? 4 : 2;
  static constexpr bool kReads = kResidual;

  // One row of 32 sums; only the columns of `mask` are read and written if not kFull.
  template <bool kFull>
  static void Row(const float* sums, const uint16_t* residual, char* out, __mmask32 mask) {
    Row<kFull>(_mm512_load_ps(sums), _mm512_load_ps(sums + kTile), residual, out, mask);
  }
  template <bool kFull>
  static void Row(__m512 a, __m512 b, const uint16_t* residual, char* out, __mmask32 mask) {
    const __mmask16 low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    if constexpr (kRelu) {
      a = _mm512_max_ps(_mm512_setzero_ps(), a);
      b = _mm512_max_ps(_mm512_setzero_ps(), b);
    }
    if constexpr (kResidual) {
      const __m512i x =
          kFull ? _mm512_loadu_si512(residual) : _mm512_maskz_loadu_epi16(mask, residual);
      a = _mm512_add_ps(a, Widened(_mm512_castsi512_si256(x)));
      b = _mm512_add_ps(b, Widened(_mm512_extracti64x4_epi64(x, 1)));
    }
    if constexpr (kKind == Kind::kBf16) {
      if (kFull) {
        _mm512_storeu_si512(out, ToBf16(a, b));
      } else {
        _mm512_mask_storeu_epi16(out, mask, ToBf16(a, b));
      }
    } else if constexpr (kKind == Kind::kFp16) {
      const __m256i x = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m256i y = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      if (kFull) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), y);
      } else {
        _mm256_mask_storeu_epi16(out, low, x);
        _mm256_mask_storeu_epi16(out + 32, high, y);
      }
    } else if (kFull) {
      _mm512_storeu_ps(out, a);
      _mm512_storeu_ps(out + 64, b);
    } else {
      _mm512_mask_storeu_ps(out, low, a);
      _mm512_mask_storeu_ps(out + 64, high, b);
    }
  }

  static __m512 Widened(__m256i bf16) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16);
  }
};

// run(the Finish that `p` asks for).
template <Kind kKind, typename Function>
[[maybe_unused]] void WithFinish(const LinearParams& p, const Function& run) {
  if (p.residual == nullptr) {
    p.relu ? run(Finish<kKind, true, false>()) : run(Finish<kKind, false, false>());
  } else {
    p.relu ? run(Finish<kKind, true, true>()) : run(Finish<kKind, false, true>());
  }
}

}  // namespace
}  // namespace pyramid::kernels::amx

#endif  // PYRAMID_MODEL_KERNELS_BF16_OUTPUTS_H_
