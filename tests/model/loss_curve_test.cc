// Fifty training steps at 224x224 pixels (49 keys), fused beside plain: rounding may grow from step
// to step, learning must not differ. Prints the curves. Label slow: some minutes.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "model/fused_training.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using torch::Tensor;

constexpr int kSteps = 50, kClasses = 4, kPictures = 40, kSide = 224;

struct Data {
  Tensor pictures, labels;
};

// Each class has a wave of its own; noise twice as strong lies over it.
Data MadeUpData() {
  torch::manual_seed(9);
  const Tensor labels = torch::arange(kPictures) % kClasses;
  const Tensor along = torch::arange(kSide, torch::kFloat32) / kSide * 6.2831853f;
  std::vector<Tensor> pictures;
  for (int i = 0; i < kPictures; ++i) {
    const int wave = i % kClasses + 2;
    const Tensor shape =
        (along * wave).sin().view({1, -1, 1}) * (along * wave).cos().view({1, 1, -1});
    pictures.push_back(shape + 2 * torch::randn({3, kSide, kSide}));
  }
  return {torch::stack(pictures), labels};
}

std::vector<double> Curve(absl::string_view variant, int batch, const Data& data,
                          const FusedOps* ops) {
  v1::NetworkConfig config;
  config.set_variant(std::string(variant));
  config.set_num_classes(kClasses);
  config.set_in_channels(3);
  *config.mutable_numerics() = NumericsOf("timm");
  PvtV2 network = *MakePvtV2(config, /*drop_path_rate=*/0.1);
  network->Initialize(42);
  network->train();
  if (ops != nullptr) network->Fuse(*ops);
  torch::optim::AdamW optimizer(network->parameters(),
                                torch::optim::AdamWOptions(2e-4).weight_decay(0.05).eps(1e-8));
  std::vector<double> losses;
  for (int step = 0; step < kSteps; ++step) {
    const int64_t first = int64_t{step} * batch % kPictures;
    network->set_drop_path_key({.seed = 1, .step = static_cast<uint64_t>(step), .first = 0});
    optimizer.zero_grad();
    const Tensor loss = torch::cross_entropy_loss(
        network->forward(data.pictures.narrow(0, first, batch)),
        data.labels.narrow(0, first, batch), {}, at::Reduction::Mean, -100, 0.1);
    loss.backward();
    optimizer.step();
    losses.push_back(loss.item<double>());
  }
  return losses;
}

double MeanOf(const std::vector<double>& losses, int first, int last) {
  double sum = 0;
  for (int i = first; i < last; ++i) sum += losses[static_cast<size_t>(i)];
  return sum / (last - first);
}

struct Case {
  const char* variant;
  int batch;
};

class LossCurveTest : public ::testing::TestWithParam<Case> {};

TEST_P(LossCurveTest, FusedTrainingLearnsAsThePlainOneDoes) {
  const auto [variant, batch] = GetParam();
  const Data data = MadeUpData();
  ASSERT_OK_AND_ASSIGN(const FusedOps fp32, ChooseFusedOps("fp32"));
  ASSERT_OK_AND_ASSIGN(const FusedOps bf16, ChooseFusedOps("bf16"));
  const std::vector<double> plain = Curve(variant, batch, data, nullptr);
  const std::vector<double> curves[] = {Curve(variant, batch, data, &fp32),
                                        Curve(variant, batch, data, &bf16)};
  std::printf("%s, batch %d: plain, %s, %s\n", variant, batch, fp32.forward->name,
              bf16.forward->name);
  for (int step = 0; step < kSteps; step += step < 5 ? 1 : 5) {
    const auto i = static_cast<size_t>(step);
    std::printf("  step %2d  %.6f  %.6f  %.6f\n", step + 1, plain[i], curves[0][i], curves[1][i]);
  }
  EXPECT_LT(MeanOf(plain, kSteps - 10, kSteps), 0.9 * MeanOf(plain, 0, 10))
      << "nothing was learned";
  double largest[2] = {};
  for (int which = 0; which < 2; ++which) {
    for (size_t i = 0; i < kSteps; ++i)
      largest[which] = std::max(largest[which], std::abs(curves[which][i] / plain[i] - 1));
    std::printf("  largest difference %.2e, mean of the last ten %.4f (plain %.4f)\n",
                largest[which], MeanOf(curves[which], kSteps - 10, kSteps),
                MeanOf(plain, kSteps - 10, kSteps));
  }
  for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(curves[0][i] / plain[i], 1, 1e-4) << i;
  EXPECT_LE(largest[0], 0.005);
  EXPECT_LE(largest[1], 0.1);
  for (const std::vector<double>& curve : curves) {
    EXPECT_NEAR(MeanOf(curve, kSteps - 10, kSteps) / MeanOf(plain, kSteps - 10, kSteps), 1, 0.02);
  }
}

INSTANTIATE_TEST_SUITE_P(Variants, LossCurveTest,
                         ::testing::Values(Case{"pvt_v2_b0", 4}, Case{"pvt_v2_b2_li", 2}),
                         [](const ::testing::TestParamInfo<Case>& entry) {
                           return std::string(entry.param.variant);
                         });

}  // namespace
}  // namespace pyramid
