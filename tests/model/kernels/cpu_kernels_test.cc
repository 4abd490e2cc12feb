#include "model/kernels/cpu_kernels.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace pyramid::kernels {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr CpuFeatures kNothing = {};
constexpr CpuFeatures kHaswell = {.avx2 = true};
constexpr CpuFeatures kSkylake = {.avx2 = true, .avx512 = true};
constexpr CpuFeatures kZen4 = {.avx2 = true, .avx512 = true, .avx512_bf16 = true};
constexpr CpuFeatures kNoFp16 = {
    .avx2 = true, .avx512 = true, .avx512_bf16 = true, .amx_bf16 = true};
constexpr CpuFeatures kAll = {
    .avx2 = true, .avx512 = true, .avx512_bf16 = true, .amx_bf16 = true, .avx512_fp16 = true};

struct Choice {
  CpuFeatures features;
  std::string dtype, forced, name;
};

#if defined(__x86_64__)

TEST(CpuKernelsTest, TheBestSetThatRunsIsChosen) {
  const std::vector<Choice> table = {
      {kNothing, "fp32", "", "portable"}, {kNothing, "bf16", "", "portable"},
      {kHaswell, "fp32", "", "avx2"},     {kHaswell, "bf16", "", "avx2"},
      {kSkylake, "fp32", "", "avx512"},   {kSkylake, "bf16", "", "avx512"},
      {kZen4, "fp32", "", "avx512"},      {kZen4, "bf16", "", "avx512-bf16"},
      {kNoFp16, "fp32", "", "avx512"},    {kNoFp16, "bf16", "", "amx-f32math"},
      {kAll, "fp32", "", "avx512"},       {kAll, "bf16", "", "amx"},
  };
  for (const Choice& row : table) {
    const auto chosen = ChooseCpuKernels(row.features, row.dtype, row.forced);
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ((*chosen)->name, row.name) << row.dtype;
  }
}

TEST(CpuKernelsTest, AnySetCanBeForced) {
  const std::vector<Choice> table = {
      {kAll, "bf16", "amx", "amx"},
      {kAll, "bf16", "amx-f32math", "amx-f32math"},
      {kAll, "bf16", "avx512-bf16", "avx512-bf16"},
      {kAll, "fp32", "avx512", "avx512"},
      {kAll, "bf16", "avx512", "avx512"},
      {kAll, "fp32", "avx2", "avx2"},
      {kAll, "bf16", "avx2", "avx2"},
      {kAll, "fp32", "portable", "portable"},
      {kAll, "bf16", "portable", "portable"},
      {kNothing, "fp32", "portable", "portable"},
  };
  for (const Choice& row : table) {
    const auto chosen = ChooseCpuKernels(row.features, row.dtype, row.forced);
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ((*chosen)->name, row.name) << row.dtype;
  }
}

TEST(CpuKernelsTest, EachTableHasItsOwnName) {
  EXPECT_STREQ(kPortableKernels.name, "portable");
  EXPECT_STREQ(kAvx2Kernels.name, "avx2");
  EXPECT_STREQ(kAvx512Kernels.name, "avx512");
  EXPECT_STREQ(kAmxKernels.name, "amx");
  EXPECT_STREQ(kAmxF32MathKernels.name, "amx-f32math");
  EXPECT_STREQ(kAvx512Bf16Kernels.name, "avx512-bf16");
}

TEST(CpuKernelsTest, AForcedSetThatTheMachineCannotRunIsRefusedByName) {
  const std::vector<Choice> table = {
      {kNoFp16, "bf16", "amx", "AVX512-FP16"},    {kSkylake, "bf16", "amx-f32math", "AMX-BF16"},
      {kZen4, "bf16", "amx-f32math", "AMX-BF16"}, {kSkylake, "bf16", "avx512-bf16", "AVX512-BF16"},
      {kHaswell, "fp32", "avx512", "AVX-512"},    {kNothing, "fp32", "avx2", "AVX2"},
  };
  for (const Choice& row : table) {
    const absl::Status status = ChooseCpuKernels(row.features, row.dtype, row.forced).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << row.forced;
    EXPECT_THAT(std::string(status.message()), HasSubstr("\"" + row.forced + "\""));
    EXPECT_THAT(std::string(status.message()), HasSubstr(row.name));
  }
}

TEST(CpuKernelsTest, TheListTellsWhatRunsAndWhatTheOthersNeed) {
  const auto running = [](const CpuFeatures& features) {
    std::vector<std::string> names;
    for (const CpuKernelSet& set : ListCpuKernels(features)) {
      if (set.runs) names.push_back(set.name);
    }
    return names;
  };
  EXPECT_THAT(running(kAll),
              ElementsAre("amx", "amx-f32math", "avx512-bf16", "avx512", "avx2", "portable"));
  EXPECT_THAT(running(kNoFp16),
              ElementsAre("amx-f32math", "avx512-bf16", "avx512", "avx2", "portable"));
  EXPECT_THAT(running(kZen4), ElementsAre("avx512-bf16", "avx512", "avx2", "portable"));
  EXPECT_THAT(running(kHaswell), ElementsAre("avx2", "portable"));
  EXPECT_THAT(running(kNothing), ElementsAre("portable"));

  const std::vector<CpuKernelSet> all = ListCpuKernels(kNothing);
  EXPECT_EQ(all[0].name, "amx");
  EXPECT_THAT(all[0].dtypes, ElementsAre("bf16"));
  EXPECT_THAT(all[0].needs, HasSubstr("AVX512-FP16"));
  EXPECT_THAT(all[4].dtypes, ElementsAre("fp32", "bf16"));
  EXPECT_EQ(all[4].needs, "AVX2 and FMA");
  EXPECT_EQ(all[5].needs, "");
}

TEST(CpuKernelsTest, AForcedBf16SetDoesNotServeFp32) {
  for (const std::string forced : {"amx", "amx-f32math", "avx512-bf16"}) {
    const absl::Status status = ChooseCpuKernels(kAll, "fp32", forced).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(forced));
  }
}

#else

TEST(CpuKernelsTest, OtherMachinesHaveThePortableSet) {
  for (const std::string dtype : {"fp32", "bf16"}) {
    const auto chosen = ChooseCpuKernels(DetectCpu(), dtype, "");
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_STREQ((*chosen)->name, "portable");
  }
  EXPECT_EQ(ChooseCpuKernels(kAll, "fp32", "avx2").status().code(),
            absl::StatusCode::kFailedPrecondition);
}

#endif

TEST(CpuKernelsTest, TheEnvironmentForces) {
  const std::string before = ForcedCpuKernels();
  setenv("PYRAMID_KERNELS", "portable", 1);
  EXPECT_EQ(ForcedCpuKernels(), "portable");
  unsetenv("PYRAMID_KERNELS");
  EXPECT_EQ(ForcedCpuKernels(), "");
  if (!before.empty()) setenv("PYRAMID_KERNELS", before.c_str(), 1);
}

TEST(CpuKernelsTest, UnknownNamesAreRefusedWithTheKnownOnes) {
  const absl::Status name = ChooseCpuKernels(kAll, "fp32", "avx1024").status();
  EXPECT_EQ(name.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(name.message()),
              HasSubstr("amx, amx-f32math, avx512-bf16, avx512, avx2, portable"));

  const absl::Status dtype = ChooseCpuKernels(kAll, "fp16", "").status();
  EXPECT_EQ(dtype.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(dtype.message()), HasSubstr("fp32 or bf16"));
}

TEST(CpuKernelsTest, DetectionAsksTwiceAndAnswersTheSame) {
  const CpuFeatures first = DetectCpu(), second = DetectCpu();
  EXPECT_EQ(first.avx2, second.avx2);
  EXPECT_EQ(first.avx512, second.avx512);
  EXPECT_EQ(first.amx_bf16, second.amx_bf16);
  EXPECT_EQ(first.avx512_fp16, second.avx512_fp16);
#if defined(__x86_64__)
  EXPECT_EQ(first.avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
  EXPECT_EQ(first.avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("avx512dq"));
#endif
}

TEST(CpuKernelsTest, EverySetThisMachineRunsGrantsItsThreads) {
  const CpuFeatures features = DetectCpu();
  for (const std::string dtype : {"fp32", "bf16"}) {
    const auto chosen = ChooseCpuKernels(features, dtype, "");
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_TRUE((*chosen)->prepare_thread());
    EXPECT_TRUE((*chosen)->prepare_thread());
  }
}

// Thread-local arrays lie on the stack of every thread. The metrics' HTTP server starts threads
// with 100 KiB: with more than that in such arrays they couldn't start.
TEST(CpuKernelsTest, ThreadsWithSmallStacksStart) {
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_attr_init(&attributes), 0);
  // aarch64's smallest is more.
  const size_t smallest = static_cast<size_t>(std::max(0l, sysconf(_SC_THREAD_STACK_MIN)));
  ASSERT_EQ(pthread_attr_setstacksize(&attributes, std::max<size_t>(102400, smallest)), 0);
  pthread_t thread;
  const int error = pthread_create(
      &thread, &attributes, [](void*) -> void* { return nullptr; }, nullptr);
  EXPECT_EQ(error, 0) << strerror(error);
  if (error == 0) pthread_join(thread, nullptr);
  pthread_attr_destroy(&attributes);
}

}  // namespace
}  // namespace pyramid::kernels
