#include "model/kernels/cpu_kernels.h"

#include <array>
#include <cstdlib>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyramid::kernels {
namespace {

// A set, and what it needs. Best first: the first that serves the dtype and that the machine can
// run is taken.
struct Set {
  absl::string_view name;
  const CpuKernels* kernels;  // null: not in this build
  bool bf16;                  // serves "bf16" only; the others serve both
  bool CpuFeatures::*needs[2];
  absl::string_view needs_text;
};

#if defined(__x86_64__)
constexpr const CpuKernels* kAmx = &kAmxKernels;
constexpr const CpuKernels* kAmxF32Math = &kAmxF32MathKernels;
constexpr const CpuKernels* kAvx512Bf16 = &kAvx512Bf16Kernels;
constexpr const CpuKernels* kAvx512 = &kAvx512Kernels;
constexpr const CpuKernels* kAvx2 = &kAvx2Kernels;
#else
constexpr const CpuKernels* kAmx = nullptr;
constexpr const CpuKernels* kAmxF32Math = nullptr;
constexpr const CpuKernels* kAvx512Bf16 = nullptr;
constexpr const CpuKernels* kAvx512 = nullptr;
constexpr const CpuKernels* kAvx2 = nullptr;
#endif

constexpr std::array<Set, 6> kSets = {{
    {"amx",
     kAmx,
     true,
     {&CpuFeatures::amx_bf16, &CpuFeatures::avx512_fp16},
     "AMX-BF16, AVX512-BF16 and AVX512-FP16"},
    {"amx-f32math",
     kAmxF32Math,
     true,
     {&CpuFeatures::amx_bf16, &CpuFeatures::avx512},
     "AMX-BF16 and AVX512-BF16"},
    {"avx512-bf16",
     kAvx512Bf16,
     true,
     {&CpuFeatures::avx512_bf16, &CpuFeatures::avx512},
     "AVX512-BF16 and VBMI"},
    {"avx512",
     kAvx512,
     false,
     {&CpuFeatures::avx512, &CpuFeatures::avx512},
     "AVX-512 F, BW, VL and DQ"},
    {"avx2", kAvx2, false, {&CpuFeatures::avx2, &CpuFeatures::avx2}, "AVX2 and FMA"},
    {"portable", &kPortableKernels, false, {nullptr, nullptr}, ""},
}};

bool Runs(const Set& set, const CpuFeatures& features) {
  if (set.kernels == nullptr) return false;
  for (const auto need : set.needs) {
    if (need != nullptr && !(features.*need)) return false;
  }
  return true;
}

std::string Names() {
  std::string names;
  for (const Set& set : kSets) absl::StrAppend(&names, names.empty() ? "" : ", ", set.name);
  return names;
}

#if defined(__x86_64__)

bool Bit(unsigned int word, int bit) { return (word >> bit & 1) != 0; }

// Which register states the system saves (XCR0).
uint64_t SavedStates() {
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Linux hands out the tile registers to processes that ask (Documentation/arch/x86/xstate.rst).
bool AskForTiles() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

}  // namespace

CpuFeatures DetectCpu() {
  CpuFeatures features;
#if defined(__x86_64__)
  unsigned int a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return features;
  const bool fma = Bit(c, 12), xgetbv = Bit(c, 27), avx = Bit(c, 28);
  if (!fma || !xgetbv || !avx) return features;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return features;
  const unsigned int leaves = a;
  constexpr uint64_t kAvxStates = 0x6, kAvx512States = 0xe6, kTileStates = 0x60000;
  const uint64_t saved = SavedStates();
  const auto saves = [saved](uint64_t states) { return (saved & states) == states; };

  features.avx2 = Bit(b, 5) && saves(kAvxStates);
  features.avx512 =
      features.avx2 && Bit(b, 16) && Bit(b, 30) && Bit(b, 31) && Bit(b, 17) && saves(kAvx512States);
  features.avx512_fp16 = features.avx512 && Bit(d, 23);
  const bool tiles = Bit(d, 22) && Bit(d, 24) && saves(kTileStates);
  const bool vbmi = Bit(c, 1);
  if (!features.avx512 || !vbmi || leaves < 1) return features;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0) return features;
  features.avx512_bf16 = Bit(a, 5);
  features.amx_bf16 = features.avx512_bf16 && tiles && AskForTiles();
#endif
  return features;
}

absl::StatusOr<const CpuKernels*> ChooseCpuKernels(const CpuFeatures& features,
                                                   absl::string_view dtype,
                                                   absl::string_view forced) {
  if (dtype != "fp32" && dtype != "bf16") {
    return absl::InvalidArgumentError(
        absl::StrCat("dtype is \"", dtype, "\"; the CPU's kernels compute in fp32 or bf16"));
  }
  const bool bf16 = dtype == "bf16";
  for (const Set& set : kSets) {
    if (forced.empty()) {
      if (Runs(set, features) && (bf16 || !set.bf16)) return set.kernels;
      continue;
    }
    if (set.name != forced) continue;
    if (set.bf16 && !bf16) {
      return absl::InvalidArgumentError(
          absl::StrCat("PYRAMID_KERNELS is \"", forced,
                       "\", which computes in bf16, but dtype is fp32; ask for dtype bf16, or for "
                       "avx512, avx2 or portable"));
    }
    if (!Runs(set, features)) {
      return absl::FailedPreconditionError(
          absl::StrCat("PYRAMID_KERNELS is \"", forced, "\", which needs ", set.needs_text,
                       "; this machine (or its system, or this build) hasn't all of it. Unset it "
                       "to take the best there is"));
    }
    return set.kernels;
  }
  return absl::InvalidArgumentError(absl::StrCat("PYRAMID_KERNELS is \"", forced,
                                                 "\"; the sets of kernels are ", Names(),
                                                 ", or nothing for the best there is"));
}

std::string ForcedCpuKernels() {
  const char* forced = std::getenv("PYRAMID_KERNELS");
  return forced == nullptr ? "" : forced;
}

std::vector<CpuKernelSet> ListCpuKernels(const CpuFeatures& features) {
  std::vector<CpuKernelSet> list;
  for (const Set& set : kSets) {
    CpuKernelSet one{.name = std::string(set.name), .needs = std::string(set.needs_text)};
    if (!set.bf16) one.dtypes.emplace_back("fp32");
    one.dtypes.emplace_back("bf16");
    one.runs = Runs(set, features);
    list.push_back(std::move(one));
  }
  return list;
}

}  // namespace pyramid::kernels
