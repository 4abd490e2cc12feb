#include "model/pvt_v2.h"

#include <torch/torch.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/recipe.h"
#include "tests/testing/formula_network.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::FormulaPictures;
using ::pyramid::testing::SetFormulaWeights;
using ::pyramid::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Values;
using ::testing::ValuesIn;
using Json = nlohmann::ordered_json;

constexpr auto kInvalidArgument = absl::StatusCode::kInvalidArgument;

v1::NetworkConfig Config(const std::string& variant, int classes = 1000, int channels = 3,
                         absl::string_view origin = "timm") {
  v1::NetworkConfig config;
  config.set_variant(variant);
  config.set_num_classes(classes);
  config.set_in_channels(channels);
  *config.mutable_numerics() = NumericsOf(origin);
  return config;
}

// In eval mode.
PvtV2 Make(const v1::NetworkConfig& config, double drop_path_rate = 0) {
  absl::StatusOr<PvtV2> network = MakePvtV2(config, drop_path_rate);
  if (!network.ok()) throw std::runtime_error(std::string(network.status().message()));
  (*network)->eval();
  return *network;
}

torch::Tensor Answer(PvtV2& network, const torch::Tensor& x) {
  torch::NoGradGuard no_grad;
  return network(x);
}

double MaxError(const torch::Tensor& a, const torch::Tensor& b) {
  return (a.to(torch::kFloat64) - b.to(torch::kFloat64)).abs().max().item<double>();
}

Json Golden(const std::string& file) {
  std::ifstream in(absl::StrCat(PYRAMID_SOURCE_DIR, "/tests/golden/", file));
  return Json::parse(in);
}

// ---- Golden data ----

struct GoldenEntry {
  std::string origin;
  Json json;
};

std::vector<GoldenEntry> GoldenEntries() {
  std::vector<GoldenEntry> entries;
  for (const char* file : {"logits_torch.json", "logits_mindcv.json"}) {
    for (Json& json : Golden(file)) {
      const std::string origin = json["origin"] == "mindcv" ? "mindcv" : "official";
      entries.push_back({origin, std::move(json)});
    }
  }
  return entries;
}

class GoldenLogitsTest : public ::testing::TestWithParam<GoldenEntry> {};

TEST_P(GoldenLogitsTest, AgreeWithin2e5) {
  const Json& golden = GetParam().json;
  const int batch = golden["batch"];
  PvtV2 network = Make(Config(golden["variant"], 1000, 3, GetParam().origin));
  SetFormulaWeights(network);
  const torch::Tensor logits =
      Answer(network, FormulaPictures(batch, 3, golden["height"], golden["width"]));
  ASSERT_EQ(logits.sizes(), torch::IntArrayRef({batch, 1000}));
  double error = 0;
  for (int b = 0; b < batch; ++b) {
    const auto expected = golden["logits"][b].get<std::vector<double>>();
    error = std::max(error, MaxError(logits[b], torch::tensor(expected, torch::kFloat64)));
  }
  RecordProperty("max_error", absl::StrCat(error));
  EXPECT_LE(error, 2e-5);
}

INSTANTIATE_TEST_SUITE_P(All, GoldenLogitsTest, ValuesIn(GoldenEntries()), [](const auto& entry) {
  const Json& json = entry.param.json;
  return absl::StrCat(json["variant"].get<std::string>(), "_", json["height"].get<int>(), "x",
                      json["width"].get<int>(), "_", entry.param.origin);
});

TEST(GoldenTrainingTest, FirstLossesAndAllGradientNormsAgree) {
  const Json golden = Golden("train_b0_64.json");
  PvtV2 network = Make(Config("pvt_v2_b0"));
  SetFormulaWeights(network);
  network->to(torch::kFloat64);
  network->train();
  const torch::Tensor x = FormulaPictures(4, 3, 64, 64).to(torch::kFloat64);
  const torch::Tensor labels = torch::tensor(golden["labels"].get<std::vector<int64_t>>());
  const auto losses = golden["losses"].get<std::vector<double>>();

  torch::optim::AdamW optimizer(
      network->parameters(),
      torch::optim::AdamWOptions(1e-3).betas({0.9, 0.999}).eps(1e-8).weight_decay(0.05));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    const torch::Tensor loss = torch::nn::functional::cross_entropy(
        network(x), labels, torch::nn::functional::CrossEntropyFuncOptions().label_smoothing(0.1));
    EXPECT_NEAR(loss.item<double>() / losses[step], 1, 1e-6) << "step " << step;
    loss.backward();
    if (step == 0) {
      const Json& norms = golden["grad_norms"];
      const auto parameters = network->named_parameters();
      ASSERT_EQ(parameters.size(), norms.size());
      double total = 0;
      for (const auto& item : parameters) {
        const double norm = item.value().grad().norm().item<double>();
        total += norm * norm;
        const double expected = norms.at(item.key());
        // A key's bias moves all scores of a query alike, so part of kv.bias has no gradient; none
        // is 0 as a whole.
        EXPECT_NEAR(norm / expected, 1, 1e-6) << item.key();
      }
      EXPECT_NEAR(std::sqrt(total) / golden["total_grad_norm"].get<double>(), 1, 1e-6);
    }
    optimizer.step();
  }
}

// ---- Structure ----

TEST(PvtV2Test, ParametersHaveTheOfficialNamesInTheOfficialOrder) {
  const Json norms = Golden("train_b0_64.json")["grad_norms"];
  std::vector<std::string> expected, names;
  for (const auto& [name, norm] : norms.items()) expected.push_back(name);
  for (const auto& item : Make(Config("pvt_v2_b0"))->named_parameters())
    names.push_back(item.key());
  EXPECT_EQ(names, expected);
}

struct Count {
  const char* variant;
  int64_t parameters;
  size_t tensors;
};

class VariantTest : public ::testing::TestWithParam<Count> {};

TEST_P(VariantTest, HasThePublishedParameterCount) {
  int64_t parameters = 0;
  PvtV2 network = Make(Config(GetParam().variant));
  for (const torch::Tensor& parameter : network->parameters()) parameters += parameter.numel();
  EXPECT_EQ(parameters, GetParam().parameters);
  EXPECT_EQ(network->parameters().size(), GetParam().tensors);
  EXPECT_TRUE(network->buffers().empty());
}

INSTANTIATE_TEST_SUITE_P(
    All, VariantTest,
    Values(Count{"pvt_v2_b0", 3'666'760, 178}, Count{"pvt_v2_b1", 14'009'000, 178},
           Count{"pvt_v2_b2_li", 22'553'512, 346}, Count{"pvt_v2_b2", 25'362'856, 334},
           Count{"pvt_v2_b3", 45'238'696, 574}, Count{"pvt_v2_b4", 62'556'072, 834},
           Count{"pvt_v2_b5", 81'956'008, 1054}),
    [](const auto& count) { return std::string(count.param.variant); });

TEST(PvtV2Test, EveryVariantOfTheRecipeExistsAndNoOther) {
  for (const std::string& name : VariantNames()) {
    ASSERT_NE(FindVariant(name), nullptr) << name;
    EXPECT_EQ(FindVariant(name)->name, name);
  }
  EXPECT_EQ(VariantNames().size(), 7u);
  EXPECT_EQ(FindVariant("pvt_v2_b6"), nullptr);
}

TEST(PvtV2Test, TakesAnyChannelAndClassCount) {
  for (const auto& [channels, classes] : {std::pair(1, 1), {1, 7}, {5, 1}, {5, 7}}) {
    PvtV2 network = Make(Config("pvt_v2_b0", classes, channels));
    network->Initialize(1);
    const torch::Tensor logits = Answer(network, FormulaPictures(2, channels, 32, 32));
    EXPECT_EQ(logits.sizes(), torch::IntArrayRef({2, classes}));
    EXPECT_TRUE(torch::isfinite(logits).all().item<bool>());
    EXPECT_THROW(Answer(network, FormulaPictures(2, channels + 1, 32, 32)), c10::Error);
  }
}

TEST(PvtV2Test, RefusesConfigurationsThatCantWork) {
  v1::NetworkConfig config = Config("pvt_v2_b9");
  EXPECT_THAT(MakePvtV2(config),
              StatusIs(kInvalidArgument, AllOf(HasSubstr("network.variant is \"pvt_v2_b9\""),
                                               HasSubstr("pvt_v2_b0, pvt_v2_b1"))));
  EXPECT_THAT(MakePvtV2(Config("pvt_v2_b0", 0)),
              StatusIs(kInvalidArgument, HasSubstr("num_classes is 0")));
  EXPECT_THAT(MakePvtV2(Config("pvt_v2_b0", 10, 0)),
              StatusIs(kInvalidArgument, HasSubstr("in_channels is 0")));
  config = Config("pvt_v2_b0");
  config.mutable_numerics()->set_pad_style("valid");
  EXPECT_THAT(MakePvtV2(config), StatusIs(kInvalidArgument, HasSubstr("pad_style is \"valid\"")));
  config = Config("pvt_v2_b0");
  config.mutable_numerics()->set_gelu("");
  EXPECT_THAT(MakePvtV2(config), StatusIs(kInvalidArgument, HasSubstr("gelu is \"\"")));
  config = Config("pvt_v2_b0");
  config.mutable_numerics()->set_eps_outer(0);
  EXPECT_THAT(MakePvtV2(config), StatusIs(kInvalidArgument, HasSubstr("eps_outer is 0")));
  config = Config("pvt_v2_b0");
  config.mutable_numerics()->set_eps_block(NAN);
  EXPECT_THAT(MakePvtV2(config), StatusIs(kInvalidArgument, HasSubstr("eps_block is nan")));
  for (const double rate : {-0.1, 1.0}) {
    EXPECT_THAT(MakePvtV2(Config("pvt_v2_b0"), rate),
                StatusIs(kInvalidArgument, HasSubstr("drop_path_rate")));
  }
}

// ---- Sizes ----

TEST(PvtV2SizeTest, ConvolutionalVariantsStartAt29Pixels) {
  for (const char* origin : {"timm", "mindcv"}) {
    PvtV2 network = Make(Config("pvt_v2_b0", 10, 3, origin));
    network->Initialize(3);
    for (const auto& [height, width] :
         {std::pair(29, 29), {30, 45}, {31, 100}, {61, 33}, {96, 96}}) {
      const torch::Tensor logits = Answer(network, FormulaPictures(1, 3, height, width));
      EXPECT_TRUE(torch::isfinite(logits).all().item<bool>())
          << origin << " " << height << "x" << width;
    }
    for (const auto& [height, width] : {std::pair(28, 64), {64, 28}, {1, 1}}) {
      try {
        Answer(network, FormulaPictures(1, 3, height, width));
        ADD_FAILURE() << height << "x" << width << " was taken";
      } catch (const c10::Error& e) {
        EXPECT_THAT(e.what_without_backtrace(), HasSubstr("29x29 pixels or more"));
      }
    }
  }
}

TEST(PvtV2SizeTest, TheLinearVariantTakesAnySize) {
  PvtV2 network = Make(Config("pvt_v2_b2_li", 10));
  network->Initialize(3);
  for (const auto& [height, width] : {std::pair(1, 1), {5, 40}, {28, 28}}) {
    EXPECT_TRUE(
        torch::isfinite(Answer(network, FormulaPictures(1, 3, height, width))).all().item<bool>());
  }
}

TEST(PvtV2SizeTest, EdgePixelsThatFillNoTileStillCountAsQueries) {
  // At 33 pixels the first map is 9x9 and the reduction's 8x8 tile leaves out a row and a column of
  // keys, not of queries.
  PvtV2 network = Make(Config("pvt_v2_b0"));
  SetFormulaWeights(network);
  torch::Tensor x = FormulaPictures(1, 3, 33, 33);
  const torch::Tensor before = Answer(network, x);
  x.narrow(3, 32, 1).fill_(0);
  EXPECT_GT(MaxError(before, Answer(network, x)), 1e-3);
}

TEST(PvtV2Test, WithAndWithoutGradientsAgree) {
  PvtV2 network = Make(Config("pvt_v2_b0"));
  SetFormulaWeights(network);
  network->to(torch::kFloat64);
  for (const auto& [height, width] :
       {std::pair(32, 32), {64, 32}, {33, 70}}) {  // last maps 1x1, 2x1, 2x3
    const torch::Tensor x = FormulaPictures(2, 3, height, width).to(torch::kFloat64);
    EXPECT_LE(MaxError(network(x).detach(), Answer(network, x)), 1e-12);
  }
}

TEST(PvtV2Test, GradientsAgreeWithFiniteDifferences) {
  // 70x65 pixels: 2x2 keys in every reduced stage, whose tiles leave out edges (timm) or are padded
  // (MindCV).
  for (const char* origin : {"timm", "mindcv"}) {
    PvtV2 network = Make(Config("pvt_v2_b0", 4, 3, origin));
    SetFormulaWeights(network);
    network->to(torch::kFloat64);
    const torch::Tensor x = FormulaPictures(2, 3, 70, 65).to(torch::kFloat64);
    const auto loss = [&] { return network(x).pow(2).sum(); };
    loss().backward();
    for (const char* name :
         {"patch_embed1.proj.weight", "patch_embed3.proj.weight", "block1.0.attn.sr.weight",
          "block2.1.attn.q.weight", "block3.0.mlp.dwconv.dwconv.weight", "block4.1.attn.kv.weight",
          "block4.0.mlp.dwconv.dwconv.weight"}) {
      torch::Tensor parameter = network->named_parameters()[name];
      const torch::Tensor direction = torch::sign(parameter.grad());
      const double slope = (parameter.grad() * direction).sum().item<double>();
      const double step = 1e-6;
      torch::NoGradGuard no_grad;
      parameter.add_(direction, step);
      const double above = loss().item<double>();
      parameter.add_(direction, -2 * step);
      const double below = loss().item<double>();
      parameter.add_(direction, step);
      EXPECT_NEAR((above - below) / (2 * step) / slope, 1, 1e-3) << origin << " " << name;
    }
  }
}

TEST(PvtV2Test, RunsInBf16AndInDouble) {
  PvtV2 network = Make(Config("pvt_v2_b0"));
  SetFormulaWeights(network);
  const torch::Tensor x = FormulaPictures(1, 3, 64, 64);
  const torch::Tensor single = Answer(network, x);
  network->to(torch::kFloat64);
  EXPECT_LE(MaxError(single, Answer(network, x.to(torch::kFloat64))), 2e-5);
  network->to(torch::kBFloat16);
  const torch::Tensor half = Answer(network, x);
  EXPECT_EQ(half.scalar_type(), torch::kBFloat16);
  EXPECT_LE(MaxError(single, half), 0.15);
}

// ---- Initialisation ----

TEST(PvtV2InitializeTest, FollowsTheOfficialDistributions) {
  PvtV2 network = Make(Config("pvt_v2_b0"));
  network->Initialize(5);
  for (const auto& item : network->named_parameters()) {
    const torch::Tensor w = item.value().detach().to(torch::kFloat64);
    if (absl::EndsWith(item.key(), ".bias")) {
      EXPECT_EQ(w.abs().max().item<double>(), 0) << item.key();
    } else if (w.dim() == 1) {
      EXPECT_TRUE(torch::equal(w, torch::ones_like(w))) << item.key();
    } else {
      // Kernel area times outputs per group: 49·32 for patch_embed1, 9 for a depthwise convolution.
      double deviation = 0.02;
      if (absl::StrContains(item.key(), "dwconv")) {
        deviation = std::sqrt(2.0 / 9);
      } else if (w.dim() == 4) {
        deviation = std::sqrt(2.0 / static_cast<double>(w.size(0) * w.size(2) * w.size(3)));
      }
      const double n = static_cast<double>(w.numel());
      EXPECT_NEAR(w.mean().item<double>(), 0, 5 * deviation / std::sqrt(n)) << item.key();
      EXPECT_NEAR(w.std().item<double>() / deviation, 1, 5 / std::sqrt(2 * n)) << item.key();
      // A normal, not a uniform or a clipped one: its fourth moment is 3.
      const double kurtosis = (w / deviation).pow(4).mean().item<double>();
      EXPECT_NEAR(kurtosis, 3, 6 * std::sqrt(96 / n)) << item.key();
    }
  }
  EXPECT_NEAR(network->named_parameters()["patch_embed1.proj.weight"].std().item<double>(),
              std::sqrt(2.0 / (49 * 32)), 2e-3);
}

TEST(PvtV2InitializeTest, IsAFunctionOfTheSeedAlone) {
  PvtV2 a = Make(Config("pvt_v2_b0", 10)), b = Make(Config("pvt_v2_b0", 10));
  a->Initialize(7);
  torch::rand({100});  // LibTorch's generator has no part in it
  b->Initialize(7);
  for (size_t i = 0; i < a->parameters().size(); ++i) {
    EXPECT_TRUE(torch::equal(a->parameters()[i], b->parameters()[i]));
  }
  b->Initialize(8);
  const torch::Tensor q7 = a->named_parameters()["block1.0.attn.q.weight"];
  const torch::Tensor q8 = b->named_parameters()["block1.0.attn.q.weight"];
  EXPECT_GT(MaxError(q7, q8), 0.01);
  EXPECT_GT(MaxError(q7, a->named_parameters()["block1.1.attn.q.weight"]), 0.01);
}

// ---- Stochastic depth ----

class DropPathTest : public ::testing::Test {
 protected:
  DropPathTest() {
    network_->Initialize(11);
    network_->to(torch::kFloat64);
    network_->train();
  }
  torch::Tensor Train(const torch::Tensor& x, const DropPathKey& key) {
    network_->set_drop_path_key(key);
    return Answer(network_, x);
  }

  PvtV2 network_ = Make(Config("pvt_v2_b0", 10, 1), 0.5);
  torch::Tensor x_ = FormulaPictures(6, 1, 32, 32).to(torch::kFloat64);
};

TEST_F(DropPathTest, IsKeyedByThePositionInTheGlobalBatch) {
  const torch::Tensor whole = Train(x_, {.seed = 1, .step = 2, .first = 0});
  const torch::Tensor left = Train(x_.narrow(0, 0, 2), {.seed = 1, .step = 2, .first = 0});
  const torch::Tensor right = Train(x_.narrow(0, 2, 4), {.seed = 1, .step = 2, .first = 2});
  EXPECT_LE(MaxError(whole, torch::cat({left, right})), 1e-12);
}

TEST_F(DropPathTest, ChangesWithSeedStepAndPosition) {
  const torch::Tensor first = Train(x_, {.seed = 1, .step = 2, .first = 0});
  EXPECT_EQ(MaxError(first, Train(x_, {.seed = 1, .step = 2, .first = 0})), 0);
  EXPECT_GT(MaxError(first, Train(x_, {.seed = 2, .step = 2, .first = 0})), 1e-6);
  EXPECT_GT(MaxError(first, Train(x_, {.seed = 1, .step = 3, .first = 0})), 1e-6);
  EXPECT_GT(MaxError(first, Train(x_, {.seed = 1, .step = 2, .first = 6})), 1e-6);
}

TEST_F(DropPathTest, DoesNothingInEvalMode) {
  PvtV2 plain = Make(Config("pvt_v2_b0", 10, 1));
  plain->Initialize(11);
  plain->to(torch::kFloat64);
  network_->eval();
  EXPECT_EQ(MaxError(Answer(plain, x_), Answer(network_, x_)), 0);
}

TEST_F(DropPathTest, DropsTheLastBlockAtTheGivenRateAndScalesWhatStays) {
  // All paths silent but the last block's attention, which has the full rate 0.5: each picture's
  // answer is that of the network without the path or with it doubled.
  torch::NoGradGuard no_grad;
  for (auto& item : network_->named_parameters()) {
    if (absl::StrContains(item.key(), "attn.proj") || absl::StrContains(item.key(), "mlp.fc2"))
      item.value().zero_();
  }
  torch::Tensor last = network_->named_parameters()["block4.1.attn.proj.weight"];
  const torch::Tensor path = torch::eye(256, torch::kFloat64);
  const torch::Tensor one = x_.narrow(0, 0, 1);
  network_->eval();
  const torch::Tensor without = network_(one);
  last.copy_(2 * path);
  const torch::Tensor doubled = network_(one);
  ASSERT_GT(MaxError(without, doubled), 1e-3);

  last.copy_(path);
  network_->train();
  constexpr int kPictures = 500;
  const torch::Tensor answers =
      Train(one.expand({kPictures, 1, 32, 32}), {.seed = 3, .step = 4, .first = 5});
  int dropped = 0;
  for (int i = 0; i < kPictures; ++i) {
    const bool is_without = MaxError(answers[i], without[0]) < 1e-12;
    ASSERT_TRUE(is_without || MaxError(answers[i], doubled[0]) < 1e-12) << "picture " << i;
    dropped += is_without ? 1 : 0;
  }
  EXPECT_NEAR(dropped, kPictures / 2, 56);  // five standard deviations
}

TEST_F(DropPathTest, GrowsLinearlyFromTheFirstBlockToTheLast) {
  // Block k of 8 has rate 0.5·k/7. Only block k's MLP speaks.
  const std::vector<std::string> blocks = {"block1.0", "block1.1", "block2.0", "block2.1",
                                           "block3.0", "block3.1", "block4.0", "block4.1"};
  const torch::Tensor one = x_.narrow(0, 0, 1);
  torch::NoGradGuard no_grad;
  for (size_t k = 0; k < blocks.size(); ++k) {
    network_->Initialize(12);
    for (auto& item : network_->named_parameters()) {
      if (absl::StrContains(item.key(), "attn.proj") || absl::StrContains(item.key(), "mlp.fc2"))
        item.value().zero_();
    }
    torch::Tensor speaking = network_->named_parameters()[blocks[k] + ".mlp.fc2.bias"];
    network_->eval();
    const torch::Tensor without = network_(one);
    speaking.copy_(torch::arange(speaking.numel(),
                                 torch::kFloat64));  // a constant alone is taken out by the norm
    network_->train();
    constexpr int kPictures = 150;
    const torch::Tensor answers = Train(one.expand({kPictures, 1, 32, 32}), {.seed = 3, .step = k});
    const double dropped =
        ((answers - without).abs().amax(1) < 1e-12).sum().item<double>() / kPictures;
    const double rate = 0.5 * static_cast<double>(k) / 7;
    EXPECT_NEAR(dropped, rate, 5 * std::sqrt(rate * (1 - rate) / kPictures)) << blocks[k];
  }
}

}  // namespace
}  // namespace pyramid
