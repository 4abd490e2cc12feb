#include "model/classifier.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"
#include "model/tensors.h"
#include "tests/testing/formula.h"
#include "tests/testing/scattered.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::pyramid::testing::FormulaImage;
using ::pyramid::testing::FormulaParameter;
using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kSide = 64;  // pixels
constexpr int kClasses = 10;
constexpr auto kInvalidArgument = absl::StatusCode::kInvalidArgument;

v1::Manifest ExampleManifest() {
  Recipe recipe;
  recipe.in_channels = 1;
  recipe.image_resize = kSide;
  v1::Manifest manifest;
  *manifest.mutable_network() = NetworkOf(recipe, kClasses);
  *manifest.mutable_preprocessing() = EvalPreprocessingOf(recipe);
  manifest.set_origin("pyramid");
  return manifest;
}

NamedTensors FormulaState(const v1::NetworkConfig& config) {
  NamedTensors state;
  for (const auto& [name, tensor] : StateOf(**MakePvtV2(config))) {
    std::vector<float> values = FormulaParameter(name, tensor.sizes().vec());
    state.emplace_back(name,
                       torch::from_blob(values.data(), tensor.sizes(), torch::kFloat32).clone());
  }
  return state;
}

std::vector<float> Logits(const v1::NetworkConfig& config, const NamedTensors& state, int batch) {
  PvtV2 network = *MakePvtV2(config);
  EXPECT_OK(LoadState(*network, state));
  network->eval();
  torch::NoGradGuard no_grad;
  std::vector<float> pixels = FormulaImage(batch, 1, kSide, kSide);
  const torch::Tensor logits = network(torch::from_blob(pixels.data(), {batch, 1, kSide, kSide}));
  return {logits.const_data_ptr<float>(), logits.const_data_ptr<float>() + logits.numel()};
}

// A checkpoint of b0 with formula weights; tests change its parts before Write.
class ClassifierTest : public ::testing::Test {
 protected:
  static constexpr int kStored = 3;  // self-test pictures

  void Write() {
    const std::string weights = TensorsToSafetensors(state_).value();
    std::vector<CheckpointFile> files = {{std::string(kWeightsFile), weights}};
    std::string self_test;
    if (!self_test_.empty()) {
      self_test = TensorsToSafetensors(self_test_).value();
      files.push_back({std::string(kSelfTestFile), self_test});
    }
    ASSERT_OK(WriteCheckpoint(path_, manifest_, files));
  }

  void AddSelfTest(float shift) {
    std::vector<float> pixels = FormulaImage(kStored, 1, kSide, kSide);
    std::vector<float> logits = Logits(manifest_.network(), state_, kStored);
    logits[kClasses + 3] += shift;
    self_test_ = {{"pixels", torch::from_blob(pixels.data(), {kStored, 1, kSide, kSide}).clone()},
                  {"logits", torch::from_blob(logits.data(), {kStored, kClasses}).clone()}};
  }

  absl::StatusOr<std::unique_ptr<Classifier>> Load(const std::string& dtype = "fp32") {
    options_.dtype = dtype;
    return LoadClassifier(path_, options_);
  }

  void ExpectF32ArithmeticTakesOver() {
    Write();
    ASSERT_OK_AND_ASSIGN(const auto classifier, Load("bf16"));
    EXPECT_NE(classifier->path(), "packed amx") << "fp16 is still in use";
    ASSERT_OK_AND_ASSIGN(const std::vector<float> logits,
                         classifier->Forward(pixels_, 2, kSide, kSide));
    EXPECT_THAT(logits,
                ::testing::Each(::testing::Truly([](float x) { return std::isfinite(x); })));
  }

  // 0-based byte of a file, one bit turned.
  void Flip(absl::string_view name, std::streamoff at) {
    std::fstream file(path_ / std::string(name), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(at);
    const char byte = static_cast<char>(file.get() ^ 4);
    file.seekp(at);
    file.put(byte);
  }

  TempFolder folder_;
  fs::path path_ = folder_ / "step-00000001";
  v1::Manifest manifest_ = ExampleManifest();
  NamedTensors state_ = FormulaState(manifest_.network());
  NamedTensors self_test_;
  ClassifierOptions options_{.threads = 1};
  std::vector<float> pixels_ = FormulaImage(2, 1, kSide, kSide);
};

TEST_F(ClassifierTest, ThePackedNetworkAnswersAsThePlainOneDoes) {
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  EXPECT_THAT(classifier->path(), ::testing::StartsWith("packed "));
  ASSERT_OK_AND_ASSIGN(const std::vector<float> logits,
                       classifier->Forward(pixels_, 2, kSide, kSide));
  const std::vector<float> expected = Logits(manifest_.network(), state_, 2);
  EXPECT_THAT(logits, ::testing::Pointwise(::testing::FloatNear(3e-5f), expected));
}

TEST_F(ClassifierTest, InputsWithMoreKeysThanKernelsTakeGoThePlainWay) {
  Write();
  ASSERT_OK_AND_ASSIGN(const auto packed, Load());
  options_.plain = true;
  ASSERT_OK_AND_ASSIGN(const auto plain, Load());
  const int height = 520, width = 544;  // 65 x 68 keys in the first stage
  const std::vector<float> pixels(size_t{1} * manifest_.network().in_channels() * height * width,
                                  0.5f);
  ASSERT_OK_AND_ASSIGN(const std::vector<float> a, packed->Forward(pixels, 1, height, width));
  ASSERT_OK_AND_ASSIGN(const std::vector<float> b, plain->Forward(pixels, 1, height, width));
  EXPECT_EQ(a, b);
}

TEST_F(ClassifierTest, Fp16OverflowHandsOverToF32Arithmetic) {
  // fc1 of the first block so large that its outputs leave fp16's range, fc2 as much smaller.
  for (auto& [name, tensor] : state_) {
    if (name == "block1.0.mlp.fc1.weight" || name == "block1.0.mlp.fc1.bias") tensor = tensor * 1e6;
    if (name == "block1.0.mlp.fc2.weight") tensor = tensor * 1e-6;
  }
  ExpectF32ArithmeticTakesOver();
}

TEST_F(ClassifierTest, Fp16OverflowBelowHandsOverToo) {
  // One hidden channel far below fp16's range. GELU makes 0 of it, so nothing infinite would
  // follow.
  for (auto& [name, tensor] : state_) {
    if (name == "block1.0.mlp.fc1.bias") tensor[0] = -1e6;
    if (name == "block1.0.mlp.dwconv.dwconv.weight") tensor[0] = tensor[0].abs() + 0.1;
  }
  ExpectF32ArithmeticTakesOver();
}

// Otherwise one caller could slow down all the others, and change the last digits of their answers.
TEST_F(ClassifierTest, NumbersThatNoFileHasChangeNothingForOthers) {
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load("bf16"));
  const std::string path = classifier->path();
  ASSERT_OK_AND_ASSIGN(const std::vector<float> expected,
                       classifier->Forward(pixels_, 2, kSide, kSide));
  for (const float huge : {1e6f, 1e36f}) {
    std::vector<float> three(pixels_);
    three.insert(three.end(), kSide * kSide, huge);
    ASSERT_OK_AND_ASSIGN(const std::vector<float> logits,
                         classifier->Forward(three, 3, kSide, kSide));
    EXPECT_EQ(std::vector<float>(logits.begin(), logits.begin() + 2 * kClasses), expected);
    EXPECT_EQ(classifier->path(), path);
  }
  EXPECT_EQ(classifier->Forward(pixels_, 2, kSide, kSide).value(), expected);
}

TEST_F(ClassifierTest, PicturesInPiecesHaveTheSameAnswers) {
  Write();
  std::vector<float> good(pixels_);
  good.insert(good.end(), kSide * kSide, 0.5f);
  std::vector<float> three(good);
  three[2 * kSide * kSide + 77] = std::numeric_limits<float>::quiet_NaN();
  for (const bool plain : {false, true}) {
    for (const char* dtype : {"fp32", "bf16"}) {
      options_.plain = plain;
      ASSERT_OK_AND_ASSIGN(const auto classifier, Load(dtype));
      const std::string path = classifier->path();
      ASSERT_OK_AND_ASSIGN(const std::vector<float> expected,
                           classifier->Forward(good, 3, kSide, kSide));
      std::vector<testing::Scattered> scattered;
      std::vector<Pieces> pictures;
      for (size_t i = 0; i < 3; ++i) {
        scattered.emplace_back(std::span(three).subspan(i * kSide * kSide, kSide * kSide), i, 333,
                               static_cast<unsigned>(i));
      }
      for (const testing::Scattered& one : scattered) pictures.push_back(one.pieces());
      std::vector<float> memory;
      std::vector<uint8_t> finite;
      ASSERT_OK_AND_ASSIGN(const std::vector<float> logits,
                           classifier->ForwardPieces(pictures, kSide, kSide, &finite, memory));
      EXPECT_THAT(finite, ::testing::ElementsAre(1, 1, 0));
      ASSERT_EQ(logits.size(), 3 * kClasses);
      EXPECT_TRUE(std::equal(logits.begin(), logits.begin() + 2 * kClasses, expected.begin()));
      EXPECT_EQ(classifier->path(), path) << "no overflow of the network's";
      EXPECT_OK(classifier->ForwardPieces(pictures, kSide, kSide, nullptr, memory).status());

      pictures[1] = pictures[1].Sub(0, pictures[1].size() - sizeof(float));
      EXPECT_THAT(classifier->ForwardPieces(pictures, kSide, kSide, &finite, memory),
                  StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_));
    }
  }
}

TEST_F(ClassifierTest, ThePlainPathAnswersAsTheNetworkDoes) {
  Write();
  options_.plain = true;
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  EXPECT_EQ(classifier->path(), "plain");
  ASSERT_OK_AND_ASSIGN(const std::vector<float> logits,
                       classifier->Forward(pixels_, 2, kSide, kSide));
  EXPECT_EQ(logits, Logits(manifest_.network(), state_, 2));
  EXPECT_EQ(classifier->manifest().network().variant(), "pvt_v2_b0");
  EXPECT_EQ(classifier->manifest().files_size(), 1);
}

TEST_F(ClassifierTest, TakesOtherSizesAndShapes) {
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  ASSERT_OK_AND_ASSIGN(const std::vector<float> logits,
                       classifier->Forward(FormulaImage(3, 1, 29, 50), 3, 29, 50));
  EXPECT_EQ(logits.size(), 3u * kClasses);
}

TEST_F(ClassifierTest, RefusesSizesThatDontFit) {
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  EXPECT_THAT(classifier->Forward(pixels_, 3, kSide, kSide),
              StatusIs(kInvalidArgument,
                       AllOf(HasSubstr("pixels has 8192 numbers"), HasSubstr("[3, 1, 64, 64]"))));
  EXPECT_THAT(classifier->Forward(pixels_, 0, kSide, kSide),
              StatusIs(kInvalidArgument, HasSubstr("batch is 0")));
  EXPECT_THAT(classifier->Forward(pixels_, 2147483647, 2147483647, 2147483647),
              StatusIs(kInvalidArgument, HasSubstr("pixels has")));
  EXPECT_THAT(classifier->Forward(std::vector<float>(28 * 64), 1, 28, 64),
              StatusIs(kInvalidArgument, HasSubstr("64x28 pixels; pvt_v2_b0 takes 29x29 or more")));
  EXPECT_THAT(classifier->Forward(pixels_, 1, -64, 64),
              StatusIs(kInvalidArgument, HasSubstr("or more")));
}

TEST_F(ClassifierTest, SeveralThreadsGetTheSameAnswer) {
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  ASSERT_OK_AND_ASSIGN(const std::vector<float> expected,
                       classifier->Forward(pixels_, 2, kSide, kSide));
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 10; ++i) {
        const auto logits = classifier->Forward(pixels_, 2, kSide, kSide);
        if (!logits.ok() || *logits != expected) ++wrong[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4));
}

TEST_F(ClassifierTest, UsesTheNumberOfThreadsAskedFor) {
  Write();
  options_.plain = true;
  options_.threads = 2;
  ASSERT_OK(Load());
  options_.threads = 1;
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  int threads = 0;
  std::thread([&] {
    at::set_num_threads(2);  // whatever this thread had before
    EXPECT_OK(classifier->Forward(pixels_, 2, kSide, kSide));
    threads = at::get_num_threads();
  }).join();
  EXPECT_EQ(threads, 1);
  options_.threads = -1;
  EXPECT_THAT(Load(), StatusIs(kInvalidArgument, HasSubstr("threads is -1")));
}

TEST_F(ClassifierTest, Bf16IsCloseToFp32) {
  Write();
  ASSERT_OK_AND_ASSIGN(const auto single, Load());
  ASSERT_OK_AND_ASSIGN(const auto half, Load("bf16"));
  ASSERT_OK_AND_ASSIGN(const std::vector<float> a, single->Forward(pixels_, 2, kSide, kSide));
  ASSERT_OK_AND_ASSIGN(const std::vector<float> b, half->Forward(pixels_, 2, kSide, kSide));
  double error = 0;
  for (size_t i = 0; i < a.size(); ++i)
    error = std::max(error, std::abs(double{a[i]} - double{b[i]}));
  RecordProperty("max_error", absl::StrCat(error));
  if (!absl::StrContains(half->path(), "computed in f32")) {
    EXPECT_GT(error, 0) << half->path();  // it is another computation
  }
  EXPECT_LE(error, 0.05);
}

TEST_F(ClassifierTest, ListsMissingUnusedAndMisshapenTensors) {
  state_[0].second = torch::zeros({32, 1, 3, 3});
  state_.back().first = "classifier.bias";
  Write();
  EXPECT_THAT(
      Load(),
      StatusIs(kInvalidArgument,
               AllOf(HasSubstr("1 missing (head.bias)"), HasSubstr("1 unused (classifier.bias)"),
                     HasSubstr("patch_embed1.proj.weight is [32, 1, 3, 3], not [32, 1, 7, 7]"))));
}

TEST_F(ClassifierTest, RefusesAnUnknownVariant) {
  manifest_.mutable_network()->set_variant("pvt_v3");
  Write();
  EXPECT_THAT(Load(), StatusIs(kInvalidArgument, HasSubstr("network.variant is \"pvt_v3\"")));
}

TEST_F(ClassifierTest, RefusesUnusablePreprocessing) {
  manifest_.mutable_preprocessing()->set_crop(0);
  Write();
  EXPECT_THAT(Load(), StatusIs(kInvalidArgument, HasSubstr("crop")));
}

TEST_F(ClassifierTest, RefusesPreprocessingOfOtherChannels) {
  Recipe recipe;
  *manifest_.mutable_preprocessing() = EvalPreprocessingOf(recipe);  // RGB
  Write();
  EXPECT_THAT(Load(), StatusIs(kInvalidArgument,
                               HasSubstr("preprocessing.channels is 3, the network takes 1")));
}

TEST_F(ClassifierTest, RefusesUnknownDtypesAndDevices) {
  Write();
  EXPECT_THAT(Load("fp8"),
              StatusIs(kInvalidArgument, HasSubstr("dtype is \"fp8\"; use fp32 or bf16")));
  options_.device = "gpu";
  EXPECT_THAT(Load(), StatusIs(kInvalidArgument, HasSubstr("device is \"gpu\"")));
  options_.device = "npu:0";
  EXPECT_THAT(Load(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("npu:0 isn't there")));
}

TEST_F(ClassifierTest, NoCheckpointIsNotFound) {
  EXPECT_THAT(Load(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("step-00000001")));
}

TEST_F(ClassifierTest, AFlippedBitAnywhereIsDataLoss) {
  AddSelfTest(0);
  Write();
  ASSERT_OK(Load());
  for (const absl::string_view name : {kWeightsFile, kSelfTestFile}) {
    const auto size = static_cast<std::streamoff>(fs::file_size(path_ / std::string(name)));
    for (const std::streamoff at : {std::streamoff{0}, std::streamoff{9}, size / 2, size - 1}) {
      Flip(name, at);
      EXPECT_THAT(Load(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(std::string(name))))
          << at;
      Flip(name, at);
    }
  }
  ASSERT_OK(Load());
}

TEST_F(ClassifierTest, ATruncatedFileIsDataLoss) {
  Write();
  fs::resize_file(path_ / std::string(kWeightsFile), 1000);
  EXPECT_THAT(Load(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(std::string(kWeightsFile))));
}

TEST_F(ClassifierTest, TheSelfTestPasses) {
  AddSelfTest(0);
  Write();
  for (const auto& [dtype, tolerance] : {std::pair("fp32", 1e-4), {"bf16", 0.25}}) {
    ASSERT_OK_AND_ASSIGN(const auto classifier, Load(dtype));
    ASSERT_OK_AND_ASSIGN(const SelfTestResult result, RunSelfTest(*classifier, path_, options_));
    EXPECT_TRUE(result.available);
    EXPECT_EQ(result.pictures, kStored);
    EXPECT_EQ(result.tolerance, tolerance);
    EXPECT_LE(result.max_error, tolerance);
  }
}

TEST_F(ClassifierTest, TheSelfTestFailsWithNumbers) {
  AddSelfTest(0.01f);
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  EXPECT_THAT(
      RunSelfTest(*classifier, path_, options_),
      StatusIs(absl::StatusCode::kFailedPrecondition,
               AllOf(HasSubstr("off by 0.0"), HasSubstr("allowed is 0.0001 (fp32 on cpu)"))));
}

TEST_F(ClassifierTest, TheSelfTestFailsOnWeightsThatGiveNoNumbers) {
  AddSelfTest(0);
  state_.back().second[2] = NAN;
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  EXPECT_THAT(
      RunSelfTest(*classifier, path_, options_),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("logit 2 of picture 0 is nan")));
}

TEST_F(ClassifierTest, ACheckpointWithoutASelfTestSaysSo) {
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  ASSERT_OK_AND_ASSIGN(const SelfTestResult result, RunSelfTest(*classifier, path_, options_));
  EXPECT_FALSE(result.available);
}

TEST_F(ClassifierTest, ASelfTestOfAnotherShapeIsDataLoss) {
  self_test_ = {{"pixels", torch::zeros({2, 1, kSide, kSide})}, {"logits", torch::zeros({2, 3})}};
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  EXPECT_THAT(RunSelfTest(*classifier, path_, options_),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("logits [N, 10]")));
}

TEST_F(ClassifierTest, ASelfTestWithoutLogitsIsDataLoss) {
  self_test_ = {{"pixels", torch::zeros({2, 1, kSide, kSide})}};
  Write();
  ASSERT_OK_AND_ASSIGN(const auto classifier, Load());
  EXPECT_THAT(RunSelfTest(*classifier, path_, options_),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("has no tensor logits")));
}

}  // namespace
}  // namespace pyramid
