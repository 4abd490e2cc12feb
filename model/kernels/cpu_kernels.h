// Which of the CPU's kernel tables this process computes with, chosen once at run time.
#ifndef PYRAMID_MODEL_KERNELS_CPU_KERNELS_H_
#define PYRAMID_MODEL_KERNELS_CPU_KERNELS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/kernels/kernel_table.h"

namespace pyramid::kernels {

struct CpuFeatures {
  bool avx2 = false;         // with FMA
  bool avx512 = false;       // F, BW, VL, DQ
  bool avx512_bf16 = false;  // with VBMI
  bool amx_bf16 = false;     // with AVX512-BF16, granted by the system
  bool avx512_fp16 = false;
};
CpuFeatures DetectCpu();

// Pure. `dtype`: "fp32" | "bf16". `forced`: "" or a set's name (PYRAMID_KERNELS). bf16 without
// AVX512-BF16 is computed in f32 by the best f32 set: more exact, and `name` says so.
//   InvalidArgument     unknown dtype or name, or a forced bf16 set with dtype fp32
//   FailedPrecondition  the forced set needs what this machine hasn't
absl::StatusOr<const CpuKernels*> ChooseCpuKernels(const CpuFeatures& features,
                                                   absl::string_view dtype,
                                                   absl::string_view forced);

// PYRAMID_KERNELS of the environment; "": not set.
std::string ForcedCpuKernels();

// A set by name, whether or not it can run: what a person asks about a machine.
struct CpuKernelSet {
  std::string name;
  std::vector<std::string> dtypes;  // it may be chosen for
  std::string needs;                // "AVX2 and FMA"; empty: nothing
  bool runs = false;                // in this build on these features
};

// Pure. All sets, best first.
std::vector<CpuKernelSet> ListCpuKernels(const CpuFeatures& features);

}  // namespace pyramid::kernels

#endif  // PYRAMID_MODEL_KERNELS_CPU_KERNELS_H_
