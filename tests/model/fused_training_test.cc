#include "model/fused_training.h"

#include <torch/torch.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"
#include "tests/testing/formula.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::FormulaImage;
using ::pyramid::testing::FormulaParameter;
using torch::Tensor;

struct Setting {
  std::string variant = "pvt_v2_b0";
  std::string origin = "timm";
  int batch = 3;
  int channels = 3;
  int height = 64;
  int width = 64;
  double drop_path = 0;
};

void PrintTo(const Setting& s, std::ostream* out) { *out << s.variant << " " << s.origin; }

PvtV2 Network(const Setting& s) {
  v1::NetworkConfig config;
  config.set_variant(s.variant);
  config.set_num_classes(10);
  config.set_in_channels(s.channels);
  *config.mutable_numerics() = NumericsOf(s.origin);
  PvtV2 network = *MakePvtV2(config, s.drop_path);
  const torch::NoGradGuard no_grad;
  for (auto& item : network->named_parameters()) {
    std::vector<float> values = FormulaParameter(item.key(), item.value().sizes().vec());
    item.value().copy_(torch::from_blob(values.data(), item.value().sizes(), torch::kFloat32));
  }
  network->train();
  network->set_drop_path_key({.seed = 7, .step = 3, .first = 0});
  return network;
}

Tensor Pictures(const Setting& s) {
  std::vector<float> values = FormulaImage(s.batch, s.channels, s.height, s.width);
  return torch::from_blob(values.data(), {s.batch, s.channels, s.height, s.width}, torch::kFloat32)
      .clone();
}

struct Result {
  double loss = 0;
  std::vector<std::pair<std::string, Tensor>> gradients;  // f64
};

// Loss and gradients of one step.
Result Step(PvtV2& network, const Tensor& pictures) {
  network->zero_grad();
  const Tensor labels = torch::arange(pictures.size(0)) % 10;
  const Tensor loss = torch::cross_entropy_loss(network->forward(pictures), labels, {},
                                                at::Reduction::Mean, -100, 0.1);
  loss.backward();
  Result result{.loss = loss.item<double>(), .gradients = {}};
  for (const auto& item : network->named_parameters())
    result.gradients.emplace_back(item.key(), item.value().grad().to(torch::kFloat64).clone());
  return result;
}

Result Plain64(const Setting& s) {
  PvtV2 network = Network(s);
  network->to(torch::kFloat64);
  return Step(network, Pictures(s).to(torch::kFloat64));
}

Result Fused(const Setting& s, const FusedOps& ops) {
  PvtV2 network = Network(s);
  network->Fuse(ops);
  return Step(network, Pictures(s));
}

// Largest over the parameters of |a - b| / |b|, Euclidean. Gradients that cancel to nothing against
// the whole count by the whole.
double Distance(const Result& a, const Result& b, std::string* where) {
  double whole = 0;
  for (const auto& [name, gradient] : b.gradients) whole += gradient.pow(2).sum().item<double>();
  whole = std::sqrt(whole);
  double largest = 0;
  for (size_t i = 0; i < a.gradients.size(); ++i) {
    const Tensor& expected = b.gradients[i].second;
    const double difference = (a.gradients[i].second - expected).norm().item<double>();
    const double relative = difference / std::max(expected.norm().item<double>(), 1e-4 * whole);
    if (!(relative <= largest)) {
      largest = relative;
      *where = a.gradients[i].first;
    }
  }
  return largest;
}

class FusedTrainingTest : public ::testing::TestWithParam<Setting> {};

TEST_P(FusedTrainingTest, Fp32GradientsAreThePlainOnes) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  const Result expected = Plain64(GetParam());
  const Result fused = Fused(GetParam(), ops);
  EXPECT_NEAR(fused.loss / expected.loss, 1, 1e-5);
  std::string where;
  EXPECT_LE(Distance(fused, expected, &where), 1e-3) << where;
}

TEST_P(FusedTrainingTest, Bf16GradientsAreNear) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("bf16"));
  if (ops.type != torch::kBFloat16) GTEST_SKIP() << "no AMX here";
  const Result expected = Plain64(GetParam());
  const Result fused = Fused(GetParam(), ops);
  EXPECT_NEAR(fused.loss / expected.loss, 1, 0.02);
  std::string where;
  EXPECT_LE(Distance(fused, expected, &where), 0.15) << where;
}

INSTANTIATE_TEST_SUITE_P(
    Settings, FusedTrainingTest,
    ::testing::Values(Setting{}, Setting{.origin = "mindcv", .height = 75, .width = 61},
                      Setting{.batch = 5, .height = 96, .width = 96, .drop_path = 0.5},
                      Setting{
                          .batch = 9, .channels = 1, .height = 32, .width = 32, .drop_path = 0.3},
                      Setting{.batch = 2, .height = 29, .width = 130},
                      Setting{.variant = "pvt_v2_b1", .batch = 2, .height = 64, .width = 96}),
    [](const ::testing::TestParamInfo<Setting>& entry) {
      const Setting& s = entry.param;
      return absl::StrCat(s.variant, "_", s.origin, "_", s.batch, "x", s.channels, "x", s.height,
                          "x", s.width, s.drop_path > 0 ? "_drop" : "");
    });

TEST(FusedTrainingTest, TheFirstLossesAreTimms) {
  std::ifstream in(absl::StrCat(PYRAMID_SOURCE_DIR, "/tests/golden/train_b0_64.json"));
  const nlohmann::json golden = nlohmann::json::parse(in);
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  Setting s{.batch = 4};
  v1::NetworkConfig config;
  config.set_variant(s.variant);
  config.set_num_classes(1000);
  config.set_in_channels(3);
  *config.mutable_numerics() = NumericsOf("timm");
  PvtV2 network = *MakePvtV2(config);
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : network->named_parameters()) {
      std::vector<float> values = FormulaParameter(item.key(), item.value().sizes().vec());
      item.value().copy_(torch::from_blob(values.data(), item.value().sizes(), torch::kFloat32));
    }
  }
  network->train();
  network->Fuse(ops);
  torch::optim::AdamW optimizer(network->parameters(),
                                torch::optim::AdamWOptions(1e-3).weight_decay(0.05).eps(1e-8));
  const Tensor labels = torch::tensor(golden["labels"].get<std::vector<int64_t>>());
  const auto losses = golden["losses"].get<std::vector<double>>();
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    const Tensor loss = torch::cross_entropy_loss(network->forward(Pictures(s)), labels, {},
                                                  at::Reduction::Mean, -100, 0.1);
    EXPECT_NEAR(loss.item<double>() / losses[static_cast<size_t>(step)], 1, 1e-4) << step;
    loss.backward();
    optimizer.step();
  }
}

TEST(FusedTrainingTest, TheSameThreadsGiveTheSameBits) {
  for (const char* dtype : {"fp32", "bf16"}) {
    ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps(dtype));
    const Setting s{.batch = 6, .drop_path = 0.2};
    const Result first = Fused(s, ops), second = Fused(s, ops);
    EXPECT_EQ(first.loss, second.loss);
    for (size_t i = 0; i < first.gradients.size(); ++i)
      EXPECT_TRUE(first.gradients[i].second.equal(second.gradients[i].second))
          << first.gradients[i].first;
  }
}

TEST(FusedTrainingTest, ThreadsChangeNothingButTheOrderOfSums) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  const Setting s{.batch = 5, .drop_path = 0.2};
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const Result one = Fused(s, ops);
  at::set_num_threads(3);
  const Result three = Fused(s, ops);
  at::set_num_threads(before);
  std::string where;
  EXPECT_EQ(one.loss, three.loss);
  EXPECT_LE(Distance(three, one, &where), 1e-4) << where;
}

TEST(FusedTrainingTest, MoreKeysThanKernelsTakeGoThePlainWay) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  const Setting s{.batch = 1, .height = 544, .width = 512};  // 272 keys
  const torch::NoGradGuard no_grad;
  PvtV2 fused = Network(s), plain = Network(s);
  fused->Fuse(ops);
  EXPECT_TRUE(fused->forward(Pictures(s)).equal(plain->forward(Pictures(s))));
}

}  // namespace
}  // namespace pyramid
