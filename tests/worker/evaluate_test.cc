#include "worker/evaluate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

EvalCounts Count(const std::vector<float>& logits, const std::vector<int64_t>& labels,
                 double smoothing = 0) {
  EvalCounts counts;
  CountBatch(logits, labels, smoothing, counts);
  return counts;
}

TEST(EvaluateTest, CountsTopOneAndTopFive) {
  const std::vector<float> logits = {0, 1, 2, 3, 4, 5, 6};
  for (int label = 0; label < 7; ++label) {
    const EvalCounts counts = Count(logits, {label});
    EXPECT_EQ(counts.top1, label == 6) << label;
    EXPECT_EQ(counts.top5, label >= 2) << label;
  }
}

TEST(EvaluateTest, AmongEqualsTheLowerIndexIsFirst) {
  const std::vector<float> logits = {1, 1, 0};
  EXPECT_EQ(Count(logits, {0}).top1, 1);
  EXPECT_EQ(Count(logits, {1}).top1, 0);
}

TEST(EvaluateTest, LossIsCrossEntropyWithSmoothing) {
  const std::vector<float> logits = {1.5f, -0.5f, 3.0f};
  const double log_sum = std::log(std::exp(1.5) + std::exp(-0.5) + std::exp(3.0));
  EXPECT_NEAR(Count(logits, {1}).loss_sum, log_sum + 0.5, 1e-12);
  const double uniform = log_sum - (1.5 - 0.5 + 3.0) / 3;
  EXPECT_NEAR(Count(logits, {1}, 0.1).loss_sum, 0.9 * (log_sum + 0.5) + 0.1 * uniform, 1e-12);
}

TEST(EvaluateTest, LogitsThatAreNoNumbersAreWrong) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const EvalCounts counts = Count({0, nan, 1, nan, 0, 1}, {2, 0});
  EXPECT_EQ(counts.top1, 0);
  EXPECT_EQ(counts.top5, 0);
  EXPECT_EQ(counts.images, 2);
}

TEST(EvaluateTest, CountsAnswersByClassAndConfidence) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EvalCounts counts = Count({9, 0, 0,     // class 0, nearly certain
                             0, 0, 0,     // equals: the first; a third
                             0, 0.5f, 0,  // class 1, 0.45
                             0, nan, 0},
                            {2, 2, 2, 2});
  CountBatch(std::vector<float>{0, 0, 9}, std::vector<int64_t>{0}, 0, counts);
  EXPECT_THAT(counts.classes, ::testing::ElementsAre(2, 1, 1));
  EXPECT_THAT(counts.confidence, ::testing::ElementsAre(0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 2));
}

TEST(EvaluateTest, CountsOfRanksAddUpAsNumbers) {
  EvalCounts mine = Count({9, 0, 0, 0, 0.5f, 0}, {0, 2});
  mine.interrupted = true;
  std::vector<double> sums = NumbersOf(mine, 3);
  const std::vector<double> nobodys = NumbersOf(EvalCounts(), 3);  // a rank without pictures
  ASSERT_EQ(nobodys.size(), sums.size());
  for (size_t i = 0; i < sums.size(); ++i) sums[i] = 2 * sums[i] + nobodys[i];
  const EvalCounts all = CountsFromNumbers(sums);
  EXPECT_EQ(all.images, 4);
  EXPECT_EQ(all.top1, 2);
  EXPECT_EQ(all.top5, 4);
  EXPECT_DOUBLE_EQ(all.loss_sum, 2 * mine.loss_sum);
  EXPECT_TRUE(all.interrupted);
  EXPECT_THAT(all.classes, ::testing::ElementsAre(2, 2, 0));
  EXPECT_EQ(all.confidence[5], 2);
  EXPECT_EQ(all.confidence[12], 2);
}

TEST(EvaluateTest, NothingCountedIsZero) {
  const EvalCounts counts;
  EXPECT_EQ(counts.Top1(), 0);
  EXPECT_EQ(counts.Loss(), 0);
}

TEST(EvaluateTest, StopsBetweenBatchesWhenAsked) {
  int64_t planned = 0;
  Loader loader(
      [&]() -> std::optional<BatchPlan> { return BatchPlan{.first_position = planned++}; },
      [](const BatchPlan&, Batch& batch) {
        batch.count = 2;
        batch.labels = {0, 1};
        batch.pixels = {1, 2};
        return absl::OkStatus();
      },
      1, 2);
  const auto logits = [](const Batch&) -> absl::StatusOr<std::vector<float>> {
    return std::vector<float>{1, 0, 0, 1};
  };
  ASSERT_OK_AND_ASSIGN(const EvalCounts counts,
                       Evaluate(loader, 0, logits, [](int64_t images) { return images >= 6; }));
  EXPECT_TRUE(counts.interrupted);
  EXPECT_EQ(counts.images, 6);
  EXPECT_EQ(counts.top1, 6);
}

}  // namespace
}  // namespace pyramid
