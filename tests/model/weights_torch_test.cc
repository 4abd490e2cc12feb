// Weights from real files into the network: golden logits through every format and naming.
#include <malloc.h>
#include <torch/torch.h>

#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "model/classifier.h"
#include "model/formats/safetensors.h"
#include "model/pvt_v2.h"
#include "model/tensors.h"
#include "model/weights.h"
#include "proto/base/file.h"
#include "tests/testing/formula_weights.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::pyramid::testing::FormulaImage;
using ::pyramid::testing::FormulaParameter;
using ::pyramid::testing::FormulaWeights;
using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

constexpr auto kInvalidArgument = absl::StatusCode::kInvalidArgument;

v1::NetworkConfig Config(const std::string& variant, int classes, int channels = 3) {
  return FormulaWeights(variant, "timm", classes, channels).manifest().network();
}

TEST(ParametersOfTest, AreTheNetworksOwnInItsOrder) {
  for (const Variant& variant : Variants()) {
    absl::StatusOr<PvtV2> network = MakePvtV2(Config(std::string(variant.name), 7, 1));
    ASSERT_OK(network);
    const NamedTensors state = StateOf(**network);
    const std::vector<ParameterShape> parameters = ParametersOf(variant, 1, 7);
    ASSERT_EQ(parameters.size(), state.size());
    for (size_t i = 0; i < state.size(); ++i) {
      EXPECT_EQ(parameters[i].name, state[i].first);
      EXPECT_EQ(parameters[i].shape, state[i].second.sizes().vec()) << state[i].first;
    }
  }
}

// ---- Golden logits through real files ----

std::vector<Json> GoldenEntries(const std::string& variant, const std::string& origin) {
  std::vector<Json> entries;
  for (const char* file : {"logits_torch.json", "logits_mindcv.json", "logits_more.json"}) {
    std::ifstream in(absl::StrCat(PYRAMID_SOURCE_DIR, "/tests/golden/", file));
    for (Json& json : Json::parse(in)) {
      std::string own = json["origin"];
      if (own == "torch" || own == "timm") own = "official";
      if (json["variant"] == variant && own == origin) entries.push_back(std::move(json));
    }
  }
  return entries;
}

// Of any logit of the entries.
double MaxError(Classifier& classifier, const std::vector<Json>& entries) {
  double worst = 0;
  for (const Json& golden : entries) {
    const int batch = golden["batch"], height = golden["height"], width = golden["width"];
    const std::vector<float> pixels = FormulaImage(batch, 3, height, width);
    const auto logits = classifier.Forward(pixels, batch, height, width);
    if (!logits.ok()) {
      ADD_FAILURE() << logits.status();
      return INFINITY;
    }
    size_t i = 0;
    for (const Json& row : golden["logits"]) {
      for (const Json& expected : row) {
        worst = std::max(worst, std::abs(expected.get<double>() - (*logits)[i++]));
      }
    }
    EXPECT_EQ(i, logits->size());
  }
  return worst;
}

struct Network {
  const char* variant;
  const char* origin;
};

class GoldenFilesTest : public ::testing::TestWithParam<Network> {};

TEST_P(GoldenFilesTest, AgreeWithin2e5InEveryFormatAndNaming) {
  const auto [variant, origin] = GetParam();
  const std::vector<Json> entries = GoldenEntries(variant, origin);
  ASSERT_FALSE(entries.empty());
  const FormulaWeights weights(variant, origin);
  const Naming own = weights.manifest().origin() == "mindcv" ? Naming::kMindCv : Naming::kOfficial;
  const std::tuple<const char*, OutputFormat, Naming> files[] = {
      {"official.safetensors", OutputFormat::kSafetensors, Naming::kOfficial},
      {"timm.safetensors", OutputFormat::kSafetensors, Naming::kTimm},
      {"mindcv.safetensors", OutputFormat::kSafetensors, Naming::kMindCv},
      {"own.pth", OutputFormat::kTorchZip, own},
      {"mindcv.ckpt", OutputFormat::kMindSpore, Naming::kMindCv},
  };
  for (const auto& [name, format, naming] : files) {
    const TempFolder folder;
    ASSERT_OK(WriteWeights(weights, folder / name, format, naming));
    ASSERT_OK_AND_ASSIGN(const auto classifier, LoadClassifier(folder / name, {}));
    EXPECT_LE(MaxError(*classifier, entries), 2e-5) << name;
    EXPECT_EQ(classifier->manifest().origin(), origin) << name;
    EXPECT_EQ(classifier->manifest().labels(0), "tench, Tinca tinca");
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, GoldenFilesTest,
    ::testing::Values(Network{"pvt_v2_b0", "official"}, Network{"pvt_v2_b1", "official"},
                      Network{"pvt_v2_b2", "official"}, Network{"pvt_v2_b2_li", "official"},
                      Network{"pvt_v2_b3", "official"}, Network{"pvt_v2_b4", "official"},
                      Network{"pvt_v2_b5", "official"}, Network{"pvt_v2_b0", "mindcv"},
                      Network{"pvt_v2_b2", "mindcv"}),
    [](const auto& test) { return absl::StrCat(test.param.variant, "_", test.param.origin); });

// A file of b0 with 1000 classes that says nothing of itself: naming alone tells whose it is.
void WriteForeign(const fs::path& path, Naming naming) {
  std::vector<std::pair<std::string, std::vector<int64_t>>> headers;
  std::vector<std::vector<float>> values;
  for (const ParameterShape& parameter : ParametersOf(*FindVariant("pvt_v2_b0"), 3, 1000)) {
    const std::vector<float> all = FormulaParameter(parameter.name, parameter.shape);
    const std::string name = FromOfficial(parameter.name, naming);
    if (!name.empty()) {
      headers.emplace_back(name, parameter.shape);
      values.push_back(all);
      continue;
    }
    // transformers' keys and values.
    for (const int part : {0, 1}) {
      std::string stem =
          FromOfficial(absl::StrCat(parameter.name.substr(0, 8), ".attn.q.weight"), naming);
      stem.resize(stem.rfind("query"));
      std::vector<int64_t> shape = parameter.shape;
      shape[0] /= 2;
      const size_t half = all.size() / 2;
      headers.emplace_back(absl::StrCat(stem, part == 0 ? "key" : "value",
                                        parameter.name.substr(parameter.name.rfind('.'))),
                           shape);
      values.emplace_back(all.begin() + part * half, all.begin() + (part + 1) * half);
    }
  }
  std::vector<TensorBytes> tensors;
  for (size_t i = 0; i < headers.size(); ++i) {
    tensors.push_back({headers[i].first,
                       "F32",
                       headers[i].second,
                       {reinterpret_cast<const char*>(values[i].data()), values[i].size() * 4}});
  }
  ASSERT_OK(WriteFileSynced(path, *SerializeSafetensors(tensors)));
}

class ForeignFilesTest : public ::testing::Test {
 protected:
  TempFolder folder_;
  const fs::path file_ = folder_ / "w.safetensors";
};

TEST_F(ForeignFilesTest, AnswerAsAtHomeByTheirNamesAlone) {
  for (const auto& [naming, origin] : {std::pair(Naming::kOfficial, "official"),
                                       {Naming::kTimm, "official"},
                                       {Naming::kMindCv, "mindcv"},
                                       {Naming::kTransformers, "transformers"}}) {
    WriteForeign(file_, naming);
    ASSERT_OK_AND_ASSIGN(const auto classifier, LoadClassifier(file_, {}));
    EXPECT_LE(MaxError(*classifier, GoldenEntries("pvt_v2_b0", origin)), 2e-5)
        << NamingName(naming);
  }
}

TEST_F(ForeignFilesTest, AMindCvFileReadAsTimmsIsFarOff) {
  WriteForeign(file_, Naming::kMindCv);
  ClassifierOptions options;
  options.weights.origin = "timm";
  ASSERT_OK_AND_ASSIGN(const auto classifier, LoadClassifier(file_, options));
  EXPECT_GT(MaxError(*classifier, GoldenEntries("pvt_v2_b0", "mindcv")), 1);
}

TEST_F(ForeignFilesTest, TransformersFileReadAsOfficialHasTheTrainingsEpsilon) {
  // Its PvtV2 has 1e-6 in every norm, where the published weights were trained with 1e-5.
  WriteForeign(file_, Naming::kTransformers);
  ClassifierOptions options;
  options.weights.origin = "official";
  ASSERT_OK_AND_ASSIGN(const auto classifier, LoadClassifier(file_, options));
  EXPECT_LE(MaxError(*classifier, GoldenEntries("pvt_v2_b0", "official")), 2e-5);
}

// ---- Checkpoints made of files ----

TEST_F(ForeignFilesTest, ASelfTestIsMadeTheSameTwiceAndPasses) {
  WriteForeign(file_, Naming::kMindCv);
  ASSERT_OK_AND_ASSIGN(const auto classifier, LoadClassifier(file_, {}));
  ASSERT_OK_AND_ASSIGN(const std::string self_test, MakeSelfTest(*classifier, 2));
  ASSERT_OK_AND_ASSIGN(const std::string again, MakeSelfTest(*classifier, 2));
  EXPECT_EQ(self_test, again);
  EXPECT_THAT(MakeSelfTest(*classifier, 0),
              StatusIs(kInvalidArgument, HasSubstr("pictures is 0; use 1 or more")));
  ASSERT_OK_AND_ASSIGN(const NamedTensors tensors, TensorsFromSafetensors(self_test));
  const torch::Tensor pixels = tensors.at(0).second;
  EXPECT_EQ(pixels.sizes(), torch::IntArrayRef({2, 3, 224, 224}));
  EXPECT_FALSE(torch::equal(pixels[0], pixels[1]));
  EXPECT_GT(pixels.std().item<double>(), 0.3);

  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_));
  const fs::path checkpoint = folder_ / "checkpoint";
  ASSERT_OK(WriteWeightsAsCheckpoint(*weights, checkpoint, self_test));
  ASSERT_OK_AND_ASSIGN(const auto served, LoadClassifier(checkpoint, {}));
  ASSERT_OK_AND_ASSIGN(const SelfTestResult result, RunSelfTest(*served, checkpoint, {}));
  EXPECT_TRUE(result.available);
  EXPECT_EQ(result.pictures, 2);
  EXPECT_LE(result.max_error, 1e-6);
  EXPECT_LE(MaxError(*served, GoldenEntries("pvt_v2_b0", "mindcv")), 2e-5);

  // Under other numerics the stored logits aren't met.
  ClassifierOptions erf;
  erf.weights.pad_style = "torch";
  ASSERT_OK_AND_ASSIGN(const auto wrong, LoadClassifier(checkpoint, erf));
  EXPECT_THAT(RunSelfTest(*wrong, checkpoint, erf),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("off by")));
}

TEST_F(ForeignFilesTest, ACheckpointWithoutPreprocessingIsRefused) {
  FormulaWeights weights("pvt_v2_b0", "timm", 3);
  weights.mutable_manifest().clear_preprocessing();
  ASSERT_OK(WriteWeightsAsCheckpoint(weights, folder_ / "checkpoint", ""));
  EXPECT_THAT(LoadClassifier(folder_ / "checkpoint", {}),
              StatusIs(kInvalidArgument, HasSubstr("preprocessing")));
}

TEST_F(ForeignFilesTest, AClassifierCantBeLoadedWithANewHead) {
  ASSERT_OK(WriteWeights(FormulaWeights("pvt_v2_b0", "timm", 3), file_, OutputFormat::kSafetensors,
                         Naming::kTimm));
  ClassifierOptions options;
  options.weights.head = "new";
  options.weights.num_classes = 5;
  EXPECT_THAT(LoadClassifier(file_, options),
              StatusIs(kInvalidArgument, HasSubstr("trained first")));
  options.weights = {.in_channels = 4};
  EXPECT_THAT(LoadClassifier(file_, options), StatusIs(kInvalidArgument, HasSubstr("channels")));
  options.weights = {.in_channels = 1};
  ASSERT_OK_AND_ASSIGN(const auto grey, LoadClassifier(file_, options));
  EXPECT_OK(grey->Forward(FormulaImage(1, 1, 32, 32), 1, 32, 32));
}

// ---- Into a network ----

TEST_F(ForeignFilesTest, FreshParametersKeepTheirInitialisation) {
  WriteForeign(file_, Naming::kTimm);
  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_, {.head = "new", .num_classes = 7}));
  ASSERT_OK_AND_ASSIGN(PvtV2 network, MakePvtV2(weights->manifest().network()));
  network->Initialize(3);
  const torch::Tensor head = network->named_parameters()["head.weight"].detach().clone();
  ASSERT_OK(LoadWeightsInto(*network, *weights));
  EXPECT_TRUE(torch::equal(network->named_parameters()["head.weight"], head));
  std::vector<float> expected = FormulaParameter("block3.1.attn.kv.weight", {320, 160});
  EXPECT_TRUE(torch::equal(network->named_parameters()["block3.1.attn.kv.weight"],
                           torch::from_blob(expected.data(), {320, 160})));
  EXPECT_TRUE(network->named_parameters()["norm1.weight"].requires_grad());
}

TEST_F(ForeignFilesTest, OtherTypesOfNetworksAreConvertedInto) {
  const FormulaWeights weights("pvt_v2_b0", "timm", 3);
  for (const auto dtype : {torch::kFloat64, torch::kBFloat16}) {
    ASSERT_OK_AND_ASSIGN(PvtV2 network, MakePvtV2(weights.manifest().network()));
    network->to(dtype);
    ASSERT_OK(LoadWeightsInto(*network, weights));
    std::vector<float> expected = FormulaParameter("head.weight", {3, 256});
    EXPECT_TRUE(torch::equal(network->named_parameters()["head.weight"],
                             torch::from_blob(expected.data(), {3, 256}).to(dtype)));
  }
}

TEST_F(ForeignFilesTest, AnotherNetworkIsLeftAlone) {
  const FormulaWeights weights("pvt_v2_b0", "timm", 3);
  ASSERT_OK_AND_ASSIGN(PvtV2 network, MakePvtV2(Config("pvt_v2_b0", 4)));
  network->Initialize(3);
  const torch::Tensor before = network->named_parameters()["norm1.bias"].detach().clone();
  EXPECT_THAT(LoadWeightsInto(*network, weights),
              StatusIs(kInvalidArgument,
                       AllOf(HasSubstr("2 misshapen"), HasSubstr("head.weight is [3, 256], not "
                                                                 "[4, 256]"))));
  EXPECT_TRUE(torch::equal(network->named_parameters()["norm1.bias"], before));
  ASSERT_OK_AND_ASSIGN(PvtV2 larger, MakePvtV2(Config("pvt_v2_b2", 3)));
  EXPECT_THAT(LoadWeightsInto(*larger, weights), StatusIs(kInvalidArgument, HasSubstr("missing")));
}

// Peak of resident memory since the last call, kilobytes.
int64_t PeakKilobytes(bool reset) {
  if (reset) std::ofstream("/proc/self/clear_refs") << "5";
  std::ifstream status("/proc/self/status");
  const std::string field = reset ? "VmRSS:" : "VmHWM:";
  for (std::string word; status >> word;) {
    int64_t kilobytes = 0;
    if (word == field && status >> kilobytes) return kilobytes;
  }
  return -1;
}

class LoadingMemoryTest : public ::testing::TestWithParam<const char*> {};

TEST_P(LoadingMemoryTest, IsThatOfTheTensorsAndLittleMore) {
  // 100,000 classes: 117 MB, most of it one tensor. A GB by hand: PYRAMID_TEST_CLASSES=1000000.
  const char* asked = std::getenv("PYRAMID_TEST_CLASSES");
  const int classes = asked == nullptr ? 100'000 : std::atoi(asked);
  const absl::string_view suffix = GetParam();
  const TempFolder folder;
  const fs::path path = folder / absl::StrCat("w.", suffix);
  {
    const FormulaWeights weights("pvt_v2_b0", "timm", classes);
    ASSERT_OK(WriteWeights(weights, path,
                           suffix == "pth"    ? OutputFormat::kTorchZip
                           : suffix == "ckpt" ? OutputFormat::kMindSpore
                                              : OutputFormat::kSafetensors,
                           Naming::kTimm));
  }
  { ASSERT_OK(LoadClassifier(path, {})); }  // code and LibTorch's own memory
  malloc_trim(0);
  const int64_t before = PeakKilobytes(/*reset=*/true);
  ASSERT_OK_AND_ASSIGN(const auto classifier, LoadClassifier(path, {}));
  const int64_t peak = PeakKilobytes(/*reset=*/false);
  const auto tensors = static_cast<int64_t>(fs::file_size(path) / 1024);
  std::printf("tensors %lld MB, peak %lld MB\n", static_cast<long long>(tensors / 1024),
              static_cast<long long>((peak - before) / 1024));
  ASSERT_GT(before, 0);
  EXPECT_LE(peak - before, tensors + 64 * 1024);
}

INSTANTIATE_TEST_SUITE_P(Formats, LoadingMemoryTest,
                         ::testing::Values("safetensors", "pth", "ckpt"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace pyramid
