#include "model/fused_training.h"

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <array>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"
#include "tests/testing/formula_network.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::FormulaPictures;
using ::pyramid::testing::SetFormulaWeights;
using torch::Tensor;

struct Setting {
  std::string variant = "pvt_v2_b0";
  std::string origin = "timm";
  int batch = 3;
  int channels = 3;
  int height = 64;
  int width = 64;
  double drop_path = 0;
  // ReLUs are far on either side: no rounding turns one of them on or off.
  bool settled = false;

  // One ReLU that rounding turns changes gradients by more than all rounding otherwise does.
  bool HasKinks() const { return variant == "pvt_v2_b2_li" && !settled; }
};

void PrintTo(const Setting& s, std::ostream* out) { *out << s.variant << " " << s.origin; }

PvtV2 Network(const Setting& s) {
  v1::NetworkConfig config;
  config.set_variant(s.variant);
  config.set_num_classes(10);
  config.set_in_channels(s.channels);
  *config.mutable_numerics() = NumericsOf(s.origin);
  PvtV2 network = *MakePvtV2(config, s.drop_path);
  SetFormulaWeights(network);
  const torch::NoGradGuard no_grad;
  for (auto& item : network->named_parameters()) {
    if (s.settled && absl::EndsWith(item.key(), "fc1.bias")) {
      item.value().view({-1, 2}).select(1, 0).add_(6);
      item.value().view({-1, 2}).select(1, 1).sub_(6);
    }
  }
  network->train();
  network->set_drop_path_key({.seed = 7, .step = 3, .first = 0});
  return network;
}

Tensor Pictures(const Setting& s) {
  return FormulaPictures(s.batch, s.channels, s.height, s.width);
}

struct Result {
  double loss = 0;
  std::vector<std::pair<std::string, Tensor>> gradients;  // f64
};

// Leaves the gradients in the parameters.
double LossAndBackward(PvtV2& network, const Tensor& pictures) {
  network->zero_grad();
  const Tensor labels = torch::arange(pictures.size(0)) % 10;
  const Tensor loss = torch::cross_entropy_loss(network->forward(pictures), labels, {},
                                                at::Reduction::Mean, -100, 0.1);
  loss.backward();
  return loss.item<double>();
}

// Loss and gradients of one step.
Result Step(PvtV2& network, const Tensor& pictures) {
  Result result{.loss = LossAndBackward(network, pictures), .gradients = {}};
  for (const auto& item : network->named_parameters())
    result.gradients.emplace_back(item.key(), item.value().grad().to(torch::kFloat64).clone());
  return result;
}

Result Plain64(const Setting& s) {
  PvtV2 network = Network(s);
  network->to(torch::kFloat64);
  return Step(network, Pictures(s).to(torch::kFloat64));
}

// bf16 where PyTorch's autocast says so, as long as it lives.
class Autocast {
 public:
  explicit Autocast(bool enabled) {
    at::autocast::set_autocast_dtype(torch::kCPU, torch::kBFloat16);
    at::autocast::set_autocast_enabled(torch::kCPU, enabled);
  }
  ~Autocast() {
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(torch::kCPU, false);
  }
};

// What fused training replaces.
Result Plain(const Setting& s, torch::ScalarType type) {
  PvtV2 network = Network(s);
  const Autocast autocast(type == torch::kBFloat16);
  return Step(network, Pictures(s));
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
    const double kinks = GetParam().HasKinks() ? 1e-3 : 0;
    EXPECT_LE(ours.largest(), 3 * theirs.largest() + kinks) << dtype << " " << ours.where();
    EXPECT_LE(ours.whole(), 3 * theirs.whole() + kinks / 5) << dtype;
    // Were the plain ones wrong, that would say little.
    EXPECT_LE(ours.largest(), bf16 ? 0.15 : 2e-3) << dtype << " " << ours.where();
  }
}

INSTANTIATE_TEST_SUITE_P(
    Settings, FusedTrainingTest,
    ::testing::Values(Setting{}, Setting{.origin = "mindcv", .height = 75, .width = 61},
                      Setting{.batch = 5, .height = 96, .width = 96, .drop_path = 0.5},
                      Setting{
                          .batch = 9, .channels = 1, .height = 32, .width = 32, .drop_path = 0.3},
                      Setting{.batch = 2, .height = 29, .width = 130},
                      Setting{.variant = "pvt_v2_b1", .batch = 2, .height = 64, .width = 96},
                      // Maps of 24x24 to 3x3, of 57x57 to 8x8, and down to 1x2.
                      Setting{.variant = "pvt_v2_b2_li",
                              .batch = 3,
                              .height = 96,
                              .width = 96,
                              .drop_path = 0.5,
                              .settled = true},
                      Setting{.variant = "pvt_v2_b2_li", .batch = 1, .height = 225, .width = 225},
                      Setting{.variant = "pvt_v2_b2_li",
                              .origin = "mindcv",
                              .batch = 5,
                              .height = 13,
                              .width = 40,
                              .settled = true}),
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
  SetFormulaWeights(network);
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

// A function of named inputs, its gradients for sum(out * weights).
template <typename Fn>
Result GradientsOf(const std::vector<std::pair<std::string, Tensor>>& inputs,
                   torch::ScalarType type, const Fn& fn) {
  std::vector<Tensor> leaves;
  for (const auto& [name, value] : inputs)
    leaves.push_back(value.to(type).clone().requires_grad_());
  const Tensor out = fn(leaves).to(torch::kFloat64);
  const Tensor weights =
      torch::arange(out.numel(), torch::kFloat64).mul(0.7).sin().view(out.sizes());
  const Tensor sum = (out * weights).sum();
  sum.backward();
  Result result{.loss = sum.item<double>(), .gradients = {}};
  for (size_t i = 0; i < leaves.size(); ++i)
    result.gradients.emplace_back(inputs[i].first, leaves[i].grad().to(torch::kFloat64));
  return result;
}

// `plain` and `fused` take the inputs in the order given. Inputs named "x" are activations.
template <typename Plain, typename Fused>
void CheckFunction(std::vector<std::pair<std::string, Tensor>> inputs, const Plain& plain,
                   const Fused& fused) {
  for (auto& [name, value] : inputs) {
    if (name == "x") value = value.to(torch::kBFloat16).to(torch::kFloat32);
  }
  const Result exact = GradientsOf(inputs, torch::kFloat64, plain);
  for (const char* dtype : {"fp32", "bf16"}) {
    ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps(dtype));
    const bool bf16 = ops.type == torch::kBFloat16;
    if (!bf16 && absl::string_view(dtype) == "bf16") continue;  // no AMX here
    const Result ours = GradientsOf(inputs, torch::kFloat32,
                                    [&](const std::vector<Tensor>& in) { return fused(ops, in); });
    const Autocast autocast(bf16);
    const Errors error(ours, exact), theirs(GradientsOf(inputs, torch::kFloat32, plain), exact);
    EXPECT_LE(error.largest(), 3 * theirs.largest()) << dtype << " " << error.where();
    EXPECT_LE(error.whole(), 3 * theirs.whole()) << dtype;
    EXPECT_LE(error.whole(), bf16 ? 0.05 : 1e-5) << dtype;
  }
}

// Odd maps, one smaller than the key map.
constexpr std::array<MapSize, 3> kMaps = {{{7, 9}, {15, 20}, {2, 3}}};

// A path's scale in training: one of three pictures is dropped.
Tensor Scale() { return torch::tensor({1.0f, 0.0f, 1.25f}); }
Tensor AddPath(const Tensor& x, const Tensor& path) {
  return x + path.to(x.scalar_type()) * Scale().to(x.scalar_type()).view({3, 1, 1});
}

TEST(FusedMlpTest, BehindAReluGradientsAreAsExactAsThePlainOnes) {
  constexpr int64_t kC = 32, kWide = 64;
  for (const MapSize map : kMaps) {
    torch::manual_seed(11);
    const auto plain = [&](const std::vector<Tensor>& in) {
      const Tensor normed = torch::layer_norm(in[0], {kC}, in[1], in[2], 1e-6);
      const Tensor hidden = torch::linear(normed, in[3], in[4]).relu();  // [3, N, wide]
      const Tensor maps = hidden.transpose(1, 2).reshape({3, kWide, map.height, map.width});
      const Tensor conv = torch::conv2d(maps, in[5], in[6], 1, 1, 1, kWide);
      return AddPath(in[0],
                     torch::linear(torch::gelu(conv).flatten(2).transpose(1, 2), in[7], in[8]));
    };
    const auto fused = [&](const FusedOps& ops, const std::vector<Tensor>& in) {
      return FusedMlp(ops, in[0].to(ops.type), Scale(), {.size = map, .relu = true}, {in[1], in[2]},
                      {in[3], in[4]}, {in[5], in[6]}, {in[7], in[8]});
    };
    CheckFunction({{"x", torch::randn({3, map.height * map.width, kC})},
                   {"gamma", torch::randn({kC})},
                   {"beta", torch::randn({kC})},
                   {"fc1.weight", torch::randn({kWide, kC}) * 0.2},
                   {"fc1.bias", torch::randn({kWide})},
                   {"dwconv.weight", torch::randn({kWide, 1, 3, 3}) * 0.4},
                   {"dwconv.bias", torch::randn({kWide})},
                   {"fc2.weight", torch::randn({kC, kWide}) * 0.2},
                   {"fc2.bias", torch::randn({kC})}},
                  plain, fused);
  }
}

TEST(FusedAttentionTest, WithPooledKeysGradientsAreAsExactAsThePlainOnes) {
  constexpr int64_t kC = 64, kHeads = 2, kSide = 7;
  const auto heads = [](const Tensor& t) {
    return t.reshape({3, -1, kHeads, kC / kHeads}).transpose(1, 2);
  };
  for (const MapSize map : kMaps) {
    for (const bool tanh : {false, true}) {
      torch::manual_seed(12);
      const int64_t tokens = map.height * map.width;
      const auto plain = [&](const std::vector<Tensor>& in) {
        const Tensor normed = torch::layer_norm(in[0], {kC}, in[1], in[2], 1e-6);
        const Tensor maps = normed.transpose(1, 2).reshape({3, kC, map.height, map.width});
        const Tensor pooled = torch::adaptive_avg_pool2d(maps, {kSide, kSide});
        const Tensor rows = torch::conv2d(pooled, in[9], in[10]).flatten(2).transpose(1, 2);
        const Tensor source = torch::gelu(torch::layer_norm(rows, {kC}, in[11], in[12], 1e-5),
                                          tanh ? "tanh" : "none");
        const std::vector<Tensor> pair = torch::linear(source, in[5], in[6]).chunk(2, 2);
        const Tensor mixed = torch::scaled_dot_product_attention(
            heads(torch::linear(normed, in[3], in[4])), heads(pair[0]), heads(pair[1]));
        return AddPath(in[0],
                       torch::linear(mixed.transpose(1, 2).reshape({3, tokens, kC}), in[7], in[8]));
      };
      const auto fused = [&](const FusedOps& ops, const std::vector<Tensor>& in) {
        const FusedAttentionShape shape{
            .size = map, .heads = kHeads, .pooled_side = kSide, .gelu_tanh = tanh};
        return FusedAttention(ops, in[0].to(ops.type), Scale(), shape, {in[1], in[2]},
                              {in[3], in[4]}, {in[5], in[6]}, {in[7], in[8]}, {in[9], in[10]},
                              {in[11], in[12]});
      };
      const auto linear = [](int64_t n) { return torch::randn({n, kC}) * 0.2; };
      CheckFunction({{"x", torch::randn({3, tokens, kC})},
                     {"gamma", torch::randn({kC})},
                     {"beta", torch::randn({kC})},
                     {"q.weight", linear(kC)},
                     {"q.bias", torch::randn({kC})},
                     {"kv.weight", linear(2 * kC)},
                     {"kv.bias", torch::randn({2 * kC})},
                     {"proj.weight", linear(kC)},
                     {"proj.bias", torch::randn({kC})},
                     {"sr.weight", linear(kC).view({kC, kC, 1, 1})},
                     {"sr.bias", torch::randn({kC})},
                     {"norm.gamma", torch::randn({kC})},
                     {"norm.beta", torch::randn({kC})}},
                    plain, fused);
    }
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
    losses.push_back(LossAndBackward(network, Pictures(s)));
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

// As ChooseFusedOps, for so many threads.
FusedOps OpsFor(const char* dtype, int threads) {
  FusedOps ops = *ChooseFusedOps(dtype);
  ops.threads = threads;
  return ops;
}

TEST(FusedTrainingTest, TheSameThreadsGiveTheSameBits) {
  for (const char* variant : {"pvt_v2_b0", "pvt_v2_b2_li"}) {
    for (const char* dtype : {"fp32", "bf16"}) {
      const FusedOps ops = OpsFor(dtype, 2);
      const Setting s{.variant = variant, .batch = 4, .height = 32, .width = 32, .drop_path = 0.2};
      const auto run = [&](std::vector<Tensor>& state) {
        PvtV2 network = Network(s);
        network->Fuse(ops);
        state = Parameters(network);
        std::vector<Tensor> first, second;
        for (const Tensor& p : state) first.push_back(torch::zeros_like(p));
        for (const Tensor& p : state) second.push_back(torch::zeros_like(p));
        std::vector<double> losses;
        for (int step = 1; step <= 2; ++step) {
          losses.push_back(LossAndBackward(network, Pictures(s)));
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
  for (const char* variant : {"pvt_v2_b0", "pvt_v2_b2_li"}) {
    const Setting s{.variant = variant, .batch = 5, .drop_path = 0.2};
    const Result one = Fused(s, OpsFor("fp32", 1)), three = Fused(s, OpsFor("fp32", 3));
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
  const auto with = [&](int count) {
    Optimized all = SomeTensors();
    FusedAdamW(OpsFor("fp32", count), {.step = 1, .learning_rate = 1e-2}, all.parameters,
               all.gradients, all.first, all.second);
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
