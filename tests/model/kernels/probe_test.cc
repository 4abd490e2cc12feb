#include "model/kernels/probe.h"

#include <gtest/gtest.h>

#include "model/kernels/cpu_kernels.h"

namespace pyramid::kernels {
namespace {

TEST(ProbeTest, MeasuresWhatTheMachineHas) {
  const CpuFeatures features = DetectCpu();
  const Probe probe = ProbeMachine(1);
  // Elsewhere than on x86-64 there is nothing to measure.
  EXPECT_EQ(probe.fma_gflops > 0, features.avx2 || features.avx512);
  EXPECT_EQ(probe.amx_gflops > 0, features.amx_bf16);
}

}  // namespace
}  // namespace pyramid::kernels
