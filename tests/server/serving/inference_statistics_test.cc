#include "server/serving/inference_statistics.h"

#include <gtest/gtest.h>

#include "tests/testing/fake_classifier.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

TEST(InferenceStatisticsTest, StartsAtNothing) {
  const InferenceStatistics::Snapshot now = InferenceStatistics().Get();
  EXPECT_EQ(now.last, absl::InfinitePast());
  EXPECT_EQ(now.pictures, 0);
  EXPECT_EQ(now.executions, 0);
  EXPECT_EQ(now.success.count, 0);
  EXPECT_TRUE(now.batches.empty());
}

TEST(InferenceStatisticsTest, SumsAnswersAndFailures) {
  InferenceStatistics statistics;
  const InferenceStatistics::Times times{.total = absl::Milliseconds(10),
                                         .queue = absl::Milliseconds(1),
                                         .input = absl::Milliseconds(2),
                                         .infer = absl::Milliseconds(3),
                                         .output = absl::Milliseconds(4)};
  const absl::Time now = absl::FromUnixSeconds(100);
  statistics.AddAnswer(3, times, now - absl::Seconds(1));
  statistics.AddAnswer(1, times, now);
  statistics.AddFailure(absl::Milliseconds(7));
  const InferenceStatistics::Snapshot sums = statistics.Get();
  EXPECT_EQ(sums.last, now);
  EXPECT_EQ(sums.pictures, 4);
  EXPECT_EQ(sums.success.count, 2);
  EXPECT_EQ(sums.success.time, absl::Milliseconds(20));
  EXPECT_EQ(sums.queue.time, absl::Milliseconds(2));
  EXPECT_EQ(sums.input.time, absl::Milliseconds(4));
  EXPECT_EQ(sums.infer.time, absl::Milliseconds(6));
  EXPECT_EQ(sums.output.time, absl::Milliseconds(8));
  EXPECT_EQ(sums.fail.count, 1);
  EXPECT_EQ(sums.fail.time, absl::Milliseconds(7));
}

TEST(CountedClassifierTest, CountsPassesBySizeIfTheyWorked) {
  testing::FakeNetwork network;
  testing::FakeClassifier classifier(network, testing::FakeManifest());
  InferenceStatistics statistics;
  CountedClassifier counted(classifier, statistics);
  const std::vector<float> pixels(2 * 32 * 32);
  EXPECT_OK(counted.Forward(pixels, 2, 32, 32).status());
  EXPECT_OK(counted.Forward(std::span(pixels).subspan(1024), 1, 32, 32).status());
  EXPECT_OK(counted.Forward(pixels, 2, 32, 32).status());
  network.Fail(absl::InternalError("no"));
  EXPECT_FALSE(counted.Forward(pixels, 2, 32, 32).ok());
  const InferenceStatistics::Snapshot sums = statistics.Get();
  EXPECT_EQ(sums.executions, 3);
  EXPECT_EQ(sums.batches.at(1).count, 1);
  EXPECT_EQ(sums.batches.at(2).count, 2);
  EXPECT_EQ(counted.path(), classifier.path());
  EXPECT_EQ(counted.manifest().labels(0), "ankle boot");
}

}  // namespace
}  // namespace pyramid
