// A hundred reloads under load: no error, flat memory. Prints its numbers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>

#include "tests/integration/cluster.h"
#include "tests/integration/reload_under_load.h"
#include "tests/testing/sanitized.h"

namespace pyramid {
namespace {

TEST(ReloadSlowTest, AHundredReloadsUnderLoadMakeNoErrorsAndKeepNoMemory) {
  testing::Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const v1::Job job = cluster.Get(testing::TrainTwoCheckpoints(cluster));
  ASSERT_GE(job.checkpoints_size(), 2);
  const testing::ReloadReport report = testing::ReloadUnderLoad(cluster, job, 100);
  std::printf(
      "answers %ld, errors %zu, p99 steady %.2f ms, while reloading %.2f ms, %.2f s a reload\n"
      "resident MB after reload 1, 5, 10, 50, 100: %.1f %.1f %.1f %.1f %.1f; growth after the "
      "first five %.2f %%\n",
      static_cast<long>(report.answers), report.errors.size(), report.steady_p99_ms,
      report.reload_p99_ms, report.seconds_per_reload, report.memory_mb.at(0),
      report.memory_mb.at(4), report.memory_mb.at(9), report.memory_mb.at(49),
      report.memory_mb.at(99), 100 * report.growth);
  EXPECT_THAT(report.errors, ::testing::IsEmpty());
  if (!testing::kSanitized) {
    EXPECT_LE(report.growth, 0.01);
  }
}

TEST(ReloadSlowTest, AHundredRoundsOfUnloadAndLoadKeepNoMemory) {
  testing::Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const v1::Job job = cluster.Get(testing::TrainTwoCheckpoints(cluster));
  const testing::ReloadReport report = testing::UnloadAndLoad(cluster, job, 100);
  std::printf(
      "%.2f s a round; resident MB after round 1, 10, 50, 100: %.1f %.1f %.1f %.1f; growth "
      "after the first five %.2f %%\n",
      report.seconds_per_reload, report.memory_mb.at(0), report.memory_mb.at(9),
      report.memory_mb.at(49), report.memory_mb.at(99), 100 * report.growth);
  EXPECT_THAT(report.errors, ::testing::IsEmpty());
  if (!testing::kSanitized) {
    EXPECT_LE(report.growth, 0.01);
  }
}

}  // namespace
}  // namespace pyramid
