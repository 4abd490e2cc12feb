#include "model/fused_training.h"

#include <ATen/autocast_mode.h>
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

// What fused training replaces: f32, or bf16 where PyTorch's autocast says so.
Result Plain(const Setting& s, torch::ScalarType type) {
  const bool bf16 = type == torch::kBFloat16;
  at::autocast::set_autocast_dtype(torch::kCPU, torch::kBFloat16);
  at::autocast::set_autocast_enabled(torch::kCPU, bf16);
  PvtV2 network = Network(s);
  const Result result = Step(network, Pictures(s));
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(torch::kCPU, false);
  return result;
}

Result Fused(const Setting& s, const FusedOps& ops) {
  PvtV2 network = Network(s);
  network->Fuse(ops);
  return Step(network, Pictures(s));
}

// Errors against `exact`: of every parameter |a - b| / |b|, Euclidean; gradients that cancel to
// nothing against the whole count by the whole.
class Errors {
 public:
  Errors(const Result& actual, const Result& exact) {
    double squares = 0, all = 0;
    for (const auto& [name, gradient] : exact.gradients)
      all += gradient.pow(2).sum().item<double>();
    for (size_t i = 0; i < actual.gradients.size(); ++i) {
      const Tensor& expected = exact.gradients[i].second;
      const double difference = (actual.gradients[i].second - expected).norm().item<double>();
      squares += difference * difference;
      of_.push_back(difference / std::max(expected.norm().item<double>(), 1e-4 * std::sqrt(all)));
      // std::max would pass NaN over.
      if (!(of_.back() <= of_[largest_])) largest_ = i;
    }
    whole_ = std::sqrt(squares / all);
    where_ = actual.gradients[largest_].first;
  }
  double largest() const { return of_[largest_]; }
  const std::string& where() const { return where_; }  // the largest is
  double whole() const { return whole_; }              // all parameters as one vector

 private:
  std::vector<double> of_;
  size_t largest_ = 0;
  double whole_ = 0;
  std::string where_;
};

class FusedTrainingTest : public ::testing::TestWithParam<Setting> {};

TEST_P(FusedTrainingTest, GradientsAreAsExactAsThePlainOnes) {
  const Result exact = Plain64(GetParam());
  for (const char* dtype : {"fp32", "bf16"}) {
    ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps(dtype));
    const bool bf16 = ops.type == torch::kBFloat16;
    if (!bf16 && absl::string_view(dtype) == "bf16") continue;  // no AMX here
    const Result plain = Plain(GetParam(), ops.type);
    const Result fused = Fused(GetParam(), ops);
    const Errors ours(fused, exact), theirs(plain, exact);
    EXPECT_NEAR(fused.loss / plain.loss, 1, bf16 ? 0.02 : 1e-5) << dtype;
    EXPECT_LE(ours.largest(), 3 * theirs.largest()) << dtype << " " << ours.where();
    EXPECT_LE(ours.whole(), 3 * theirs.whole()) << dtype;
    // Were the plain ones wrong, that would say little.
    EXPECT_LE(ours.largest(), bf16 ? 0.15 : 1e-3) << dtype << " " << ours.where();
    RecordProperty(dtype, absl::StrCat(ours.largest(), " : ", theirs.largest(), ", whole ",
                                       ours.whole(), " : ", theirs.whole()));
    std::printf("%s largest %.2e : %.2e, whole %.2e : %.2e\n", dtype, ours.largest(),
                theirs.largest(), ours.whole(), theirs.whole());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Settings, FusedTrainingTest,
    ::testing::Values(
        Setting{}, Setting{.origin = "mindcv", .height = 75, .width = 61},
        Setting{.batch = 5, .height = 96, .width = 96, .drop_path = 0.5},
        Setting{.batch = 9, .channels = 1, .height = 32, .width = 32, .drop_path = 0.3},
        Setting{.batch = 2, .height = 29, .width = 130},
        Setting{.variant = "pvt_v2_b1", .batch = 2, .height = 64, .width = 96},
        // Maps of 24x24 to 3x3, of 57x57 to 8x8, and of one pixel.
        Setting{.variant = "pvt_v2_b2_li", .batch = 3, .height = 96, .width = 96, .drop_path = 0.5},
        Setting{.variant = "pvt_v2_b2_li", .batch = 1, .height = 225, .width = 225},
        Setting{
            .variant = "pvt_v2_b2_li", .origin = "mindcv", .batch = 5, .height = 13, .width = 40}),
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

std::vector<Tensor> Parameters(const PvtV2& network) { return network->parameters(); }

// Losses of training steps with AdamW; the weights stay in `network`.
std::vector<double> Train(PvtV2& network, const Setting& s, int steps) {
  torch::optim::AdamW optimizer(Parameters(network),
                                torch::optim::AdamWOptions(1e-3).weight_decay(0.05).eps(1e-8));
  std::vector<double> losses;
  for (int step = 0; step < steps; ++step) {
    network->set_drop_path_key({.seed = 7, .step = static_cast<uint64_t>(step), .first = 0});
    losses.push_back(Step(network, Pictures(s)).loss);
    optimizer.step();
  }
  return losses;
}

TEST(FusedTrainingTest, TheLinearVariantsFirstLossesAreThePlainOnes) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  const Setting s{.variant = "pvt_v2_b2_li", .batch = 4, .drop_path = 0.2};
  PvtV2 plain = Network(s), fused = Network(s);
  fused->Fuse(ops);
  const std::vector<double> expected = Train(plain, s, 3), losses = Train(fused, s, 3);
  for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(losses[i] / expected[i], 1, 1e-4) << i;
}

class Threads {
 public:
  explicit Threads(int count) : before_(at::get_num_threads()) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before_); }

 private:
  const int before_;
};

TEST(FusedTrainingTest, TheSameThreadsGiveTheSameBits) {
  const Threads threads(2);
  for (const char* variant : {"pvt_v2_b0", "pvt_v2_b2_li"}) {
    for (const char* dtype : {"fp32", "bf16"}) {
      ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps(dtype));
      const Setting s{.variant = variant, .batch = 6, .height = 32, .width = 64, .drop_path = 0.2};
      const auto run = [&](std::vector<Tensor>& state) {
        PvtV2 network = Network(s);
        network->Fuse(ops);
        state = Parameters(network);
        std::vector<Tensor> first, second;
        for (const Tensor& p : state) first.push_back(torch::zeros_like(p));
        for (const Tensor& p : state) second.push_back(torch::zeros_like(p));
        std::vector<double> losses;
        for (int step = 1; step <= 3; ++step) {
          losses.push_back(Step(network, Pictures(s)).loss);
          std::vector<Tensor> gradients;
          for (const Tensor& p : state) gradients.push_back(p.grad());
          const torch::NoGradGuard no_grad;
          FusedAdamW(ops, {.step = step, .learning_rate = 1e-3, .weight_decay = 0.05}, state,
                     gradients, first, second);
        }
        state.insert(state.end(), first.begin(), first.end());
        state.insert(state.end(), second.begin(), second.end());
        return losses;
      };
      std::vector<Tensor> one, other;
      EXPECT_EQ(run(one), run(other)) << variant << " " << dtype;
      ASSERT_EQ(one.size(), other.size());
      for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(one[i].equal(other[i])) << i;
    }
  }
}

TEST(FusedTrainingTest, ThreadsChangeNothingButTheOrderOfSums) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  for (const char* variant : {"pvt_v2_b0", "pvt_v2_b2_li"}) {
    const Setting s{.variant = variant, .batch = 5, .drop_path = 0.2};
    const auto with = [&](int count) {
      const Threads threads(count);
      return Fused(s, ops);
    };
    const Result one = with(1), three = with(3);
    EXPECT_EQ(one.loss, three.loss);
    const Errors errors(three, one);
    EXPECT_LE(errors.largest(), 1e-4) << errors.where();
  }
}

// Tensors for an optimizer: of sizes that no vector divides, one of them channels last.
struct Optimized {
  std::vector<Tensor> parameters, gradients, first, second;
};
Optimized SomeTensors() {
  torch::manual_seed(5);
  Optimized all;
  for (const std::vector<int64_t>& sizes :
       {std::vector<int64_t>{1}, {7, 3}, {5, 4, 3, 3}, {129, 65}, {4097}}) {
    Tensor p = torch::randn(sizes);
    if (sizes.size() == 4) p = p.contiguous(torch::MemoryFormat::ChannelsLast);
    all.parameters.push_back(p);
    all.gradients.push_back(torch::randn(sizes));
    all.first.push_back(torch::randn_like(p) * 0.1);
    all.second.push_back(torch::rand_like(p));
  }
  return all;
}

TEST(FusedAdamWTest, StepsEveryTensorAsLibTorchDoes) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  Optimized ours = SomeTensors(), theirs = SomeTensors();
  FusedAdamW(ops, {.step = 3, .learning_rate = 1e-2, .weight_decay = 0.05}, ours.parameters,
             ours.gradients, ours.first, ours.second);
  for (size_t i = 0; i < theirs.parameters.size(); ++i) {
    Tensor &p = theirs.parameters[i], &m = theirs.first[i], &v = theirs.second[i];
    const Tensor& g = theirs.gradients[i];
    p.mul_(1 - 1e-2 * 0.05);
    m.lerp_(g, 1 - 0.9);
    v.mul_(0.999).addcmul_(g, g, 1 - 0.999);
    p.sub_(m / (1 - std::pow(0.9, 3)) / ((v / (1 - std::pow(0.999, 3))).sqrt() + 1e-8) * 1e-2);
    EXPECT_TRUE(torch::allclose(ours.parameters[i], p, 1e-6, 1e-7)) << i;
    EXPECT_TRUE(torch::allclose(ours.first[i], m, 1e-6, 1e-7)) << i;
    EXPECT_TRUE(torch::allclose(ours.second[i], v, 1e-6, 1e-7)) << i;
  }
}

TEST(FusedAdamWTest, ThreadsChangeNoBit) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  const auto with = [&](int count) {
    const Threads threads(count);
    Optimized all = SomeTensors();
    FusedAdamW(ops, {.step = 1, .learning_rate = 1e-2}, all.parameters, all.gradients, all.first,
               all.second);
    return all.parameters;
  };
  const std::vector<Tensor> one = with(1), three = with(3);
  for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(one[i].equal(three[i])) << i;
}

TEST(FusedAdamWTest, WhatItCantTakeThrows) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  const auto step = [&](const Optimized& all) {
    FusedAdamW(ops, {}, all.parameters, all.gradients, all.first, all.second);
  };
  Optimized missing = SomeTensors(), wide = SomeTensors(), gaps = SomeTensors(),
            turned = SomeTensors();
  missing.first.pop_back();
  wide.gradients[1] = wide.gradients[1].to(torch::kFloat64);
  gaps.parameters[1] = torch::zeros({7, 4}).narrow(1, 0, 3);
  turned.second[1] = torch::zeros({3, 7}).t();
  for (const Optimized* all : {&missing, &wide, &gaps, &turned})
    EXPECT_THROW(step(*all), c10::Error);
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
