#include "worker/loss.h"

#include <gtest/gtest.h>

namespace pyramid {
namespace {

TEST(LossTest, IsTheCrossEntropyOfSmoothedTargets) {
  torch::manual_seed(1);
  const torch::Tensor logits = torch::randn({5, 7}, torch::kDouble);
  const torch::Tensor labels = torch::tensor({0, 3, 6, 2, 2}, torch::kLong);
  const double smoothing = 0.1;
  const torch::Tensor target =
      torch::one_hot(labels, 7).to(torch::kDouble) * (1 - smoothing) + smoothing / 7;
  const double expected = -(target * torch::log_softmax(logits, 1)).sum().item<double>();
  EXPECT_NEAR(SmoothedCrossEntropySum(logits, labels, smoothing).item<double>(), expected, 1e-12);
}

TEST(LossTest, NarrowLogitsAreWidenedFirst) {
  const torch::Tensor logits = torch::randn({4, 10}).to(torch::kBFloat16);
  const torch::Tensor labels = torch::tensor({1, 2, 3, 4}, torch::kLong);
  const torch::Tensor loss = SmoothedCrossEntropySum(logits, labels, 0);
  EXPECT_EQ(loss.scalar_type(), torch::kFloat);
  EXPECT_EQ(loss.item<float>(),
            SmoothedCrossEntropySum(logits.to(torch::kFloat), labels, 0).item<float>());
}

}  // namespace
}  // namespace pyramid
