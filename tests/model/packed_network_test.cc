#include "model/packed_network.h"

#include <gmock/gmock.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>

#include "absl/strings/str_cat.h"
#include "model/kernels/cpu_kernels.h"
#include "model/recipe.h"
#include "model/variants.h"
#include "tests/testing/formula.h"
#include "tests/testing/scattered.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using kernels::CpuKernels;
using ::pyramid::testing::FormulaImage;
using ::pyramid::testing::FormulaParameter;
using ::pyramid::testing::StatusIs;
using Json = nlohmann::json;

v1::NetworkConfig Config(const std::string& variant, absl::string_view origin = "timm",
                         int classes = 1000, int channels = 3) {
  v1::NetworkConfig config;
  config.set_variant(variant);
  config.set_num_classes(classes);
  config.set_in_channels(channels);
  *config.mutable_numerics() = NumericsOf(origin);
  return config;
}

std::unique_ptr<const PackedNetwork> FormulaNetwork(const v1::NetworkConfig& config,
                                                    const CpuKernels& kernels) {
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const ParameterShape& p :
       ParametersOf(*FindVariant(config.variant()), config.in_channels(), config.num_classes()))
    shapes[p.name] = p.shape;
  auto network = PackedNetwork::Create(
      config, kernels, [&](const std::string& name, std::span<float> out) -> absl::Status {
        const auto shape = shapes.find(name);
        if (shape == shapes.end()) return absl::NotFoundError(name);
        const std::vector<float> values = FormulaParameter(name, shape->second);
        if (values.size() != out.size()) return absl::InvalidArgumentError(name);
        std::copy(values.begin(), values.end(), out.begin());
        return absl::OkStatus();
      });
  if (!network.ok()) throw std::runtime_error(std::string(network.status().message()));
  return *std::move(network);
}

std::vector<float> Answer(const PackedNetwork& network, int batch, int height, int width,
                          int threads, int classes = 1000, int channels = 3) {
  const std::vector<float> pixels = FormulaImage(batch, channels, height, width);
  std::vector<float> logits(static_cast<size_t>(batch * classes), NAN);
  network.Forward(pixels, batch, height, width, threads, logits);
  return logits;
}

// What this machine can run.
std::vector<const CpuKernels*> Sets() {
  std::vector<const CpuKernels*> sets;
  for (const kernels::CpuKernelSet& one : kernels::ListCpuKernels(kernels::DetectCpu())) {
    const auto set = kernels::ChooseCpuKernels(kernels::DetectCpu(), one.dtypes.front(), one.name);
    if (set.ok()) sets.push_back(*set);
  }
  return sets;
}

struct GoldenCase {
  const CpuKernels* kernels;
  Json json;
};

std::vector<GoldenCase> GoldenCases() {
  std::vector<GoldenCase> cases;
  for (const char* file : {"logits_torch.json", "logits_mindcv.json"}) {
    std::ifstream in(absl::StrCat(PYRAMID_SOURCE_DIR, "/tests/golden/", file));
    for (const Json& json : Json::parse(in)) {
      for (const CpuKernels* set : Sets()) {
        // The slow set proves itself on the small networks.
        const std::string variant = json["variant"];
        if (set->name == std::string("portable") && variant != "pvt_v2_b0") continue;
        cases.push_back({set, json});
      }
    }
  }
  return cases;
}

class PackedGoldenTest : public ::testing::TestWithParam<GoldenCase> {};

TEST_P(PackedGoldenTest, Agrees) {
  const Json& golden = GetParam().json;
  const int batch = golden["batch"];
  const auto network =
      FormulaNetwork(Config(golden["variant"], golden["origin"] == "mindcv" ? "mindcv" : "timm"),
                     *GetParam().kernels);
  const std::vector<float> logits = Answer(*network, batch, golden["height"], golden["width"], 2);
  double largest = 0, squared = 0, expected_squared = 0;
  for (int b = 0; b < batch; ++b) {
    const auto expected = golden["logits"][static_cast<size_t>(b)].get<std::vector<double>>();
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = logits[static_cast<size_t>(b) * 1000 + i] - expected[i];
      largest = std::max(largest, std::abs(error));
      squared += error * error;
      expected_squared += expected[i] * expected[i];
    }
  }
  const double relative = std::sqrt(squared / expected_squared);
  RecordProperty("max_error", absl::StrCat(largest));
  RecordProperty("relative_rms", absl::StrCat(relative));
  if (GetParam().kernels->activation_bytes == 4) {
    EXPECT_LE(largest, 3e-5);
  } else {
    EXPECT_LE(relative, 0.03) << "bf16; its bound against autocast is in tests/bench/bf16_accuracy";
  }
}

INSTANTIATE_TEST_SUITE_P(All, PackedGoldenTest, ::testing::ValuesIn(GoldenCases()),
                         [](const ::testing::TestParamInfo<GoldenCase>& entry) {
                           const Json& json = entry.param.json;
                           std::string name = absl::StrCat(
                               json["variant"].get<std::string>(), "_", json["height"].get<int>(),
                               "x", json["width"].get<int>(), "_",
                               json["origin"].get<std::string>(), "_", entry.param.kernels->name,
                               "_", entry.index);
                           for (char& c : name)
                             if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
                           return name;
                         });

class PackedNetworkTest : public ::testing::TestWithParam<const CpuKernels*> {};

TEST_P(PackedNetworkTest, ThreadsDontChangeTheAnswer) {
  const auto network = FormulaNetwork(Config("pvt_v2_b0"), *GetParam());
  for (const auto& [height, width] : {std::pair(224, 224), {75, 110}}) {
    for (const int batch : {1, 3}) {
      const std::vector<float> one = Answer(*network, batch, height, width, 1);
      for (const int threads : {2, 3, 5}) {
        EXPECT_EQ(Answer(*network, batch, height, width, threads), one)
            << batch << " pictures of " << height << "x" << width << " on " << threads;
      }
    }
  }
}

TEST_P(PackedNetworkTest, ThePicturesBesideDontChangeTheAnswer) {
  const auto network = FormulaNetwork(Config("pvt_v2_b0"), *GetParam());
  const int side = 96, batch = 7;
  const std::vector<float> pixels = FormulaImage(batch, 3, side, side);
  std::vector<float> all(batch * 1000), alone(1000);
  network->Forward(pixels, batch, side, side, 2, all);
  const size_t picture = size_t{3} * side * side;
  for (size_t i = 0; i < batch; ++i) {
    network->Forward(std::span(pixels).subspan(i * picture, picture), 1, side, side, 2, alone);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), all.begin() + static_cast<int>(i) * 1000))
        << "picture " << i;
  }
}

TEST_P(PackedNetworkTest, EveryBatchGivesEachPictureTheSameAnswer) {
  const auto network = FormulaNetwork(Config("pvt_v2_b0", "timm", 10), *GetParam());
  const int side = 32, most = 33;
  const std::vector<float> pixels = FormulaImage(most, 3, side, side);
  std::vector<float> all(most * 10);
  network->Forward(pixels, most, side, side, 1, all);
  for (int batch = 1; batch < most; ++batch) {
    std::vector<float> some(static_cast<size_t>(batch) * 10);
    network->Forward(std::span(pixels).first(size_t{3} * side * side * static_cast<size_t>(batch)),
                     batch, side, side, 1, some);
    EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin())) << batch << " pictures";
  }
}

TEST_P(PackedNetworkTest, PicturesMayLieAnywhere) {
  const auto network = FormulaNetwork(Config("pvt_v2_b0", "timm", 10), *GetParam());
  for (const auto& [height, width] : {std::pair(64, 64), {35, 700}}) {
    for (const int batch : {1, 3, 5}) {  // alone, shared by the team, and both
      const std::vector<float> pixels = FormulaImage(batch, 3, height, width);
      const size_t each = pixels.size() / static_cast<size_t>(batch);
      std::vector<float> expected(static_cast<size_t>(batch) * 10);
      network->Forward(pixels, batch, height, width, 2, expected);
      for (const size_t longest : {size_t{50}, size_t{20'000}, size_t{1} << 30}) {
        std::vector<testing::Scattered> scattered;
        std::vector<Pieces> pictures;
        for (int i = 0; i < batch; ++i) {
          scattered.emplace_back(std::span(pixels).subspan(static_cast<size_t>(i) * each, each),
                                 static_cast<size_t>(i), longest, static_cast<unsigned>(i));
        }
        for (const testing::Scattered& one : scattered) pictures.push_back(one.pieces());
        std::vector<float> logits(expected.size());
        std::vector<uint8_t> finite(static_cast<size_t>(batch), 1);
        network->Forward(pictures, height, width, 2, logits, finite);
        EXPECT_EQ(logits, expected)
            << batch << " of " << height << "x" << width << " in pieces of " << longest;
        EXPECT_THAT(finite, ::testing::Each(1));
      }
    }
  }
}

TEST_P(PackedNetworkTest, TellsOfPicturesThatArentFiniteAndTheOthersDontNotice) {
  const auto network = FormulaNetwork(Config("pvt_v2_b0", "timm", 10), *GetParam());
  const int side = 64, batch = 7;
  const size_t each = size_t{3} * side * side;
  const std::vector<float> good = FormulaImage(batch, 3, side, side);
  std::vector<float> expected(batch * 10);
  network->Forward(good, batch, side, side, 2, expected);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const size_t place : {size_t{0}, each / 2, each - 1}) {
      std::vector<float> pixels = good;
      for (const size_t i : {1UL, 6UL}) pixels[i * each + place] = bad;  // 6: shared by the team
      std::vector<float> logits(batch * 10);
      std::vector<uint8_t> finite(batch, 1);
      network->Forward(PiecesOf(pixels, batch), side, side, 2, logits, finite);
      EXPECT_THAT(finite, ::testing::ElementsAre(1, 0, 1, 1, 1, 1, 0)) << bad << " at " << place;
      for (const size_t i : {0UL, 2UL, 3UL, 4UL, 5UL}) {
        EXPECT_TRUE(std::equal(logits.begin() + static_cast<int>(i) * 10,
                               logits.begin() + static_cast<int>(i) * 10 + 10,
                               expected.begin() + static_cast<int>(i) * 10))
            << "picture " << i;
      }
    }
  }
}

TEST_P(PackedNetworkTest, SeveralCallersAtOnceGetTheSameAnswers) {
  const auto network = FormulaNetwork(Config("pvt_v2_b0", "mindcv", 10), *GetParam());
  const std::vector<float> expected = Answer(*network, 2, 64, 64, 1, 10);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&] {
      for (int i = 0; i < 5; ++i) wrong += Answer(*network, 2, 64, 64, 2, 10) != expected;
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST_P(PackedNetworkTest, AllKindsOfInputsAgreeWithTheFirstSet) {
  struct Case {
    const char* variant;
    const char* origin;
    int height, width, channels;
  };
  for (const Case& c : {Case{"pvt_v2_b0", "timm", 29, 29, 3},
                        {"pvt_v2_b0", "mindcv", 29, 31, 3},
                        {"pvt_v2_b0", "timm", 32, 96, 1},
                        {"pvt_v2_b2_li", "timm", 33, 70, 3},
                        {"pvt_v2_b2_li", "timm", 8, 5, 1},
                        {"pvt_v2_b0", "mindcv", 225, 130, 4},
                        {"pvt_v2_b5", "mindcv", 64, 64, 3}}) {
    const v1::NetworkConfig config = Config(c.variant, c.origin, 7, c.channels);
    const auto reference = FormulaNetwork(config, kernels::kPortableKernels);
    const std::vector<float> expected = Answer(*reference, 2, c.height, c.width, 1, 7, c.channels);
    const auto network = FormulaNetwork(config, *GetParam());
    const std::vector<float> logits = Answer(*network, 2, c.height, c.width, 2, 7, c.channels);
    const double tolerance = GetParam()->activation_bytes == 4 ? 2e-5 : 0.15;
    for (size_t i = 0; i < logits.size(); ++i) {
      EXPECT_NEAR(logits[i], expected[i], tolerance)
          << c.variant << " " << c.height << "x" << c.width << " logit " << i;
    }
  }
}

TEST_P(PackedNetworkTest, AChangeOfSizeLeavesNothingBehind) {
  const auto network = FormulaNetwork(Config("pvt_v2_b0", "mindcv"), *GetParam());
  const std::vector<float> before = Answer(*network, 1, 61, 83, 2);
  Answer(*network, 1, 224, 200, 2);
  EXPECT_EQ(Answer(*network, 1, 61, 83, 2), before);
}

INSTANTIATE_TEST_SUITE_P(All, PackedNetworkTest, ::testing::ValuesIn(Sets()),
                         [](const ::testing::TestParamInfo<const CpuKernels*>& entry) {
                           std::string name = entry.param->name;
                           for (char& c : name)
                             if (c == '-') c = '_';
                           return name;
                         });

TEST(PackedNetworkLimitsTest, TakesUpTo256Keys) {
  const auto network = FormulaNetwork(Config("pvt_v2_b0"), kernels::kPortableKernels);
  EXPECT_TRUE(network->Takes(29, 29));
  EXPECT_TRUE(network->Takes(512, 512));  // 256 keys
  EXPECT_FALSE(network->Takes(512, 544));
  const auto linear = FormulaNetwork(Config("pvt_v2_b2_li"), kernels::kPortableKernels);
  EXPECT_TRUE(linear->Takes(512, 544)) << "always 49";
}

TEST(PackedNetworkLimitsTest, PassesOnWhatReadingReturns) {
  EXPECT_THAT(PackedNetwork::Create(Config("pvt_v2_b0"), kernels::kPortableKernels,
                                    [](const std::string& name, std::span<float>) {
                                      return absl::DataLossError(name);
                                    }),
              StatusIs(absl::StatusCode::kDataLoss, "patch_embed1.proj.weight"));
  EXPECT_THAT(
      PackedNetwork::Create(Config("pvt_v2_b9"), kernels::kPortableKernels,
                            [](const std::string&, std::span<float>) { return absl::OkStatus(); }),
      StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr("pvt_v2_b9")));
}

TEST(PackedNetworkLimitsTest, AProfileAccountsForTheTime) {
  const auto network = FormulaNetwork(Config("pvt_v2_b0"), *Sets().back());
  const std::vector<float> pixels = FormulaImage(2, 3, 64, 64);
  std::vector<float> logits(2000);
  ForwardProfile profile;
  network->Forward(pixels, 2, 64, 64, 1, logits, &profile);
  for (int stage = 0; stage < 4; ++stage) {
    EXPECT_GT(
        profile.seconds[static_cast<size_t>(stage * ForwardProfile::kParts + ForwardProfile::kMlp)],
        0);
  }
  EXPECT_LT(std::accumulate(profile.seconds.begin(), profile.seconds.end(), 0.0), 60);
}

}  // namespace
}  // namespace pyramid
