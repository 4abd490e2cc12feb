// Hundreds of reloads under load: no error, flat memory. Prints its numbers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>

#include "tests/integration/cluster.h"
#include "tests/integration/reload_under_load.h"
#include "tests/testing/sanitized.h"

namespace pyramid {
namespace {

// What is allocated at the moment of a look makes steps of up to 2 %, up and down: over hundred
// reloads one step is more than what may grow, over three hundred a leak shows beside it.
constexpr int kReloads = 300;
double GrowthOfAHundred(const testing::ReloadReport& report) {
  return report.growth * 100 / kReloads;
}

TEST(ReloadSlowTest, HundredsOfReloadsUnderLoadMakeNoErrorsAndKeepNoMemory) {
  testing::Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const v1::Job job = cluster.Get(testing::TrainTwoCheckpoints(cluster));
  ASSERT_GE(job.checkpoints_size(), 2);
  const testing::ReloadReport report = testing::ReloadUnderLoad(cluster, job, kReloads);
  std::printf(
      "answers %ld, errors %zu, p99 steady %.2f ms, while reloading %.2f ms, %.2f s a reload\n"
      "resident MB after reload 1, 5, 10, 100, 300: %.1f %.1f %.1f %.1f %.1f; growth after the "
      "first five %.2f %% a hundred\n",
      static_cast<long>(report.answers), report.errors.size(), report.steady_p99_ms,
      report.reload_p99_ms, report.seconds_per_reload, report.memory_mb.at(0),
      report.memory_mb.at(4), report.memory_mb.at(9), report.memory_mb.at(99),
      report.memory_mb.at(299), 100 * GrowthOfAHundred(report));
  EXPECT_THAT(report.errors, ::testing::IsEmpty());
  if (!testing::kSanitized) {
    EXPECT_LE(GrowthOfAHundred(report), 0.01) << ::testing::PrintToString(report.memory_mb);
  }
}

TEST(ReloadSlowTest, HundredsOfRoundsOfUnloadAndLoadKeepNoMemory) {
  testing::Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const v1::Job job = cluster.Get(testing::TrainTwoCheckpoints(cluster));
  const testing::ReloadReport report = testing::UnloadAndLoad(cluster, job, kReloads);
  std::printf(
      "%.2f s a round; resident MB after round 1, 10, 100, 300: %.1f %.1f %.1f %.1f; growth "
      "after the first five %.2f %% a hundred\n",
      report.seconds_per_reload, report.memory_mb.at(0), report.memory_mb.at(9),
      report.memory_mb.at(99), report.memory_mb.at(299), 100 * GrowthOfAHundred(report));
  EXPECT_THAT(report.errors, ::testing::IsEmpty());
  if (!testing::kSanitized) {
    EXPECT_LE(GrowthOfAHundred(report), 0.01) << ::testing::PrintToString(report.memory_mb);
  }
}

}  // namespace
}  // namespace pyramid
