// The tables of the three bf16 sets. Two multiply on AMX tiles; they differ in what lies between
// the two linear layers of an MLP: fp16 and its arithmetic, or bf16 and f32's. The third has no
// tiles.
#include <sys/syscall.h>
#include <unistd.h>

#include "model/kernels/amx_internal.h"

namespace pyramid::kernels {
namespace {

void FromFloat(const float* in, void* out, int64_t n) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t left = n - i;
    const __mmask16 mask =
        left >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << left) - 1);
    _mm256_mask_storeu_epi16(to + i, mask,
                             (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, in + i)));
  }
}

void ToFloat(const void* in, float* out, int64_t n) {
  const uint16_t* from = static_cast<const uint16_t*>(in);
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t left = n - i;
    const __mmask16 mask =
        left >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << left) - 1);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + i));
    _mm512_mask_storeu_ps(out + i, mask, (__m512)_mm512_slli_epi32(wide, 16));
  }
}

// Linux hands out the tile registers to processes that ask (Documentation/arch/x86/xstate.rst);
// each kernel call loads its own tile configuration.
bool PrepareThread() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Hidden rows are bf16; the sets differ in how they multiply.
constexpr CpuKernels WithF32Math(const char* name, void (*linear)(const LinearParams&),
                                 void (*attention)(const AttentionParams&),
                                 bool (*prepare_thread)()) {
  return {
      .name = name,
      .activation_bytes = 2,
      .hidden_bytes = 2,
      .packed_linear_bytes = amx::PackedLinearBytes,
      .pack_linear = amx::PackLinear,
      .linear = linear,
      .layer_norm = amx::LayerNorm,
      .packed_dwconv_bytes = amx::PackedDwconvBf16Bytes,
      .pack_dwconv = amx::PackDwconvBf16,
      .dwconv_gelu = amx::DwconvGeluBf16,
      .packed_keys_bytes = amx::PackedKeysBytes,
      .pack_keys = amx::PackKeys,
      .attention = attention,
      .from_float = FromFloat,
      .to_float = ToFloat,
      .prepare_thread = prepare_thread,
  };
}

}  // namespace

const CpuKernels kAmxKernels = {
    .name = "amx",
    .activation_bytes = 2,
    .hidden_bytes = 2,
    .packed_linear_bytes = amx::PackedLinearBytes,
    .pack_linear = amx::PackLinear,
    .linear = amx::LinearHiddenFp16,
    .layer_norm = amx::LayerNorm,
    .packed_dwconv_bytes = amx::PackedDwconvFp16Bytes,
    .pack_dwconv = amx::PackDwconvFp16,
    .dwconv_gelu = amx::DwconvGeluFp16,
    .packed_keys_bytes = amx::PackedKeysBytes,
    .pack_keys = amx::PackKeys,
    .attention = amx::Attention,
    .from_float = FromFloat,
    .to_float = ToFloat,
    .prepare_thread = PrepareThread,
};

const CpuKernels kAmxF32MathKernels =
    WithF32Math("amx-f32math", amx::LinearHiddenBf16, amx::Attention, PrepareThread);
const CpuKernels kAvx512Bf16Kernels =
    WithF32Math("avx512-bf16", amx::LinearByPairs, amx::AttentionByPairs, [] { return true; });

}  // namespace pyramid::kernels
