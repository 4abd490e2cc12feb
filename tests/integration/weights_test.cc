// Weights from anywhere through the real programs: convert, inspect, classify, fine-tuning,
// validate.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "tests/integration/cluster.h"
#include "tests/testing/formula.h"
#include "tests/testing/idx_data.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/weight_file.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using testing::FormulaFile;
using testing::FormulaImage;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Process;
using testing::RunResult;
using testing::WriteFormulaFile;
using testing::WriteNpy;

using Rows = std::vector<std::vector<double>>;

double Largest(const Rows& a, const Rows& b) {
  if (a.empty() || a.size() != b.size() || a[0].size() != b[0].size())
    return std::numeric_limits<double>::infinity();
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < a[i].size(); ++j) {
      largest = std::max(largest, std::abs(a[i][j] - b[i][j]));
    }
  }
  return largest;
}

class WeightsTest : public ::testing::Test {
 protected:
  RunResult Pyramid(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), testing::Program("pyramid"));
    Process::Options options;
    options.folder = folder_.path();
    options.environment = {{"PYRAMID_WEIGHTS", (folder_ / "published").string()},
                           {"OMP_NUM_THREADS", "1"}};
    return Process(arguments, folder_ / absl::StrCat("run", ++runs_), options)
        .Wait(absl::Seconds(60));
  }
  void Convert(const std::vector<std::string>& arguments) {
    std::vector<std::string> command = {"convert"};
    command.insert(command.end(), arguments.begin(), arguments.end());
    const RunResult result = Pyramid(command);
    EXPECT_EQ(result.exit_code, 0) << result.err;
  }
  // Of formula pictures.
  Rows Logits(const std::string& weights, int channels = 3,
              const std::vector<std::string>& more = {}) {
    const std::string array = absl::StrCat("pictures", channels, ".npy");
    EXPECT_OK(WriteNpy(folder_ / array, {2, channels, 64, 64}, FormulaImage(2, channels, 64, 64)));
    std::vector<std::string> command = {"classify", "--ckpt_path", weights,
                                        "--logits", "--json",      array};
    command.insert(command.end(), more.begin(), more.end());
    const RunResult result = Pyramid(command);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    const auto json = nlohmann::json::parse(result.out, nullptr, false);
    return json.is_object() ? json.at("logits").get<Rows>() : Rows();
  }
  // Two steps of eight pictures.
  void WriteRecipe(const std::string& more) {
    testing::WriteIdxFolder(folder_ / "idx", 16, 16);
    ASSERT_OK(WriteFileAtomically(
        folder_ / "recipe.yaml",
        absl::StrCat("model: pvt_v2_b0\ndataset: fashion_mnist\ndata_dir: idx\nimage_resize: 32\n"
                     "image_pad: 32\ncolor_jitter: 0\nbatch_size: 8\nepoch_size: 1\nlr: 0.000001\n"
                     "warmup_epochs: 0\ndecay_epochs: 1\nckpt_save_dir: out\n",
                     more)));
  }
  RunResult Train(const std::vector<std::string>& more = {}) {
    std::vector<std::string> command = {"train", "-c", "recipe.yaml"};
    command.insert(command.end(), more.begin(), more.end());
    return Pyramid(command);
  }

  testing::TempFolder folder_;
  int runs_ = 0;
};

TEST_F(WeightsTest, EveryFormatAndNamingGivesTheSameLogits) {
  ASSERT_OK(WriteFormulaFile(folder_ / "in.safetensors"));
  const Rows expected = Logits("in.safetensors");
  Convert({"in.safetensors", "timm.safetensors", "--naming", "timm"});
  Convert({"timm.safetensors", "zip.pth"});
  Convert({"zip.pth", "there.ckpt"});
  Convert({"there.ckpt", "folder"});
  Convert({"folder", "back.safetensors"});
  for (const char* file : {"timm.safetensors", "zip.pth", "there.ckpt", "folder"}) {
    EXPECT_EQ(Largest(Logits(file), expected), 0) << file;
  }
  EXPECT_EQ(Largest(Logits("back.safetensors"), expected), 0);
  // Other numerics are another network.
  EXPECT_GT(Largest(Logits("in.safetensors", 3, {"--origin", "mindcv"}), expected), 1e-3);

  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, VerifyCheckpoint(folder_ / "folder"));
  EXPECT_EQ(manifest.files_size(), 2) << "weights and self-test";
  EXPECT_EQ(manifest.origin(), "official");
}

// The official code's own logits for these weights; tests/golden/README.md.
TEST_F(WeightsTest, AFileOfFormulaWeightsGivesTheGoldenLogits) {
  ASSERT_OK(WriteFormulaFile(folder_ / "in.safetensors", {.classes = 1000}));
  Convert({"in.safetensors", "in.ckpt"});
  ASSERT_OK_AND_ASSIGN(const std::string text, ReadFile(std::string(PYRAMID_SOURCE_DIR) +
                                                        "/tests/golden/logits_torch.json"));
  bool found = false;
  for (const auto& golden : nlohmann::json::parse(text)) {
    if (golden.at("variant") != "pvt_v2_b0" || golden.at("height") != 32) continue;
    found = true;
    const int batch = golden.at("batch").get<int>();
    ASSERT_OK(WriteNpy(folder_ / "golden.npy", {batch, 3, 32, 32}, FormulaImage(batch, 3, 32, 32)));
    const RunResult result =
        Pyramid({"classify", "--ckpt", "in.ckpt", "--logits", "--json", "golden.npy"});
    ASSERT_EQ(result.exit_code, 0) << result.err;
    EXPECT_LE(Largest(nlohmann::json::parse(result.out).at("logits").get<Rows>(),
                      golden.at("logits").get<Rows>()),
              2e-5);
  }
  EXPECT_TRUE(found);
}

TEST_F(WeightsTest, InspectKnowsAFileByItsContent) {
  ASSERT_OK(WriteFormulaFile(folder_ / "in.safetensors", {.naming = Naming::kMindCv}));
  Convert({"in.safetensors", "weights.ckpt"});
  fs::rename(folder_ / "weights.ckpt", folder_ / "weights.bin");
  const RunResult result = Pyramid({"inspect", "weights.bin", "--json"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json.at("format"), "MindSpore ckpt");
  EXPECT_EQ(json.at("origin"), "mindcv");
  EXPECT_EQ(json.at("manifest").at("network").at("numerics").at("gelu"), "tanh");
  EXPECT_EQ(json.at("parameters"), 3'412'330);
}

// MindCV's user: a .ckpt in, two steps, a .ckpt out.
TEST_F(WeightsTest, FineTuningKeepsTheOriginsNumericsOnTheWayBack) {
  ASSERT_OK(WriteFormulaFile(folder_ / "in.safetensors", {.naming = Naming::kMindCv}));
  Convert({"in.safetensors", "in.ckpt"});
  WriteRecipe("ckpt_path: in.ckpt\nckpt_format: mindspore\n");
  const RunResult train = Train();
  ASSERT_EQ(train.exit_code, 0) << train.out << train.err;
  EXPECT_THAT(
      train.out + train.err,
      AllOf(HasSubstr("Starting from in.ckpt (MindSpore ckpt, mindcv naming, origin "
                      "mindcv): "),
            HasSubstr("the weights go by mindcv's conventions"), Not(HasSubstr("head new"))));
  const std::string checkpoint = "out/step-00000002";
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, VerifyCheckpoint(folder_ / checkpoint));
  EXPECT_EQ(manifest.origin(), "mindcv");
  EXPECT_EQ(manifest.network().numerics().pad_style(), "same");

  const RunResult back = Pyramid({"convert", checkpoint, "back.ckpt"});
  ASSERT_EQ(back.exit_code, 0) << back.err;
  EXPECT_EQ(back.err, "") << "no warning: MindCV computes the same";
  const Rows expected = Logits(checkpoint);
  EXPECT_LE(Largest(Logits("back.ckpt"), expected), 1e-6);
  EXPECT_LE(Largest(Logits("out/pvt_v2_b0-1_2.ckpt"), expected), 1e-6) << "ckpt_format";
  const double moved = Largest(Logits("in.ckpt"), expected);
  EXPECT_GT(moved, 1e-4) << "training moved the weights";
  EXPECT_LT(moved, 0.1) << "it began with them: 0.01 here, 2.2 from fresh weights";

  // Going on needs the weights no more, and the numerics stay.
  fs::remove(folder_ / "in.ckpt");
  const RunResult more = Train({"--epoch-size", "2"});
  ASSERT_EQ(more.exit_code, 0) << more.err;
  EXPECT_EQ(ReadManifest(folder_ / "out/step-00000004")->network().numerics().gelu(), "tanh");
}

TEST_F(WeightsTest, AnotherClassAndChannelCountAdaptsOnEveryRank) {
  ASSERT_OK(
      WriteFormulaFile(folder_ / "in.safetensors", {.naming = Naming::kMindCv, .classes = 7}));
  WriteRecipe("ckpt_path: in.safetensors\nin_channels: 1\nbatch_size: 4\n");
  std::string recipe = *ReadFile(folder_ / "recipe.yaml");
  recipe.erase(recipe.find("batch_size: 8\n"), 14);
  ASSERT_OK(WriteFileAtomically(folder_ / "recipe.yaml", recipe));
  const RunResult train = Train({"--workers", "2"});
  ASSERT_EQ(train.exit_code, 0) << train.out << train.err;
  EXPECT_THAT(train.out + train.err, AllOf(HasSubstr("head new: 7 → 10 classes"),
                                           HasSubstr("first convolution adapted: 3 → 1 channels")));
  const std::string checkpoint = "out/step-00000002";
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, VerifyCheckpoint(folder_ / checkpoint));
  EXPECT_EQ(manifest.network().num_classes(), 10);
  EXPECT_EQ(manifest.network().in_channels(), 1);
  EXPECT_EQ(manifest.network().numerics().gelu(), "tanh");
  EXPECT_EQ(manifest.labels_size(), 10);
  Convert({checkpoint, "out.pth"});
  EXPECT_LE(Largest(Logits("out.pth", 1), Logits(checkpoint, 1)), 1e-6);
}

TEST_F(WeightsTest, PretrainedSaysWhichFileItMisses) {
  WriteRecipe("pretrained: True\n");
  const RunResult missing = Train();
  EXPECT_EQ(missing.exit_code, 3);
  EXPECT_THAT(missing.err, AllOf(HasSubstr("pvt_v2_b0.in1k.safetensors"),
                                 HasSubstr((folder_ / "published").string())));
  fs::create_directory(folder_ / "published");
  ASSERT_OK(WriteFormulaFile(folder_ / "published/pvt_v2_b0.in1k.safetensors",
                             {.naming = Naming::kTimm, .classes = 1000}));
  const RunResult found = Train();
  ASSERT_EQ(found.exit_code, 0) << found.err;
  EXPECT_THAT(found.out + found.err, HasSubstr("head new: 1000 → 10 classes"));
  EXPECT_EQ(ReadManifest(folder_ / "out/step-00000002")->origin(), "timm");
}

TEST_F(WeightsTest, ValidateTakesAFileAndSaysHowPicturesArePrepared) {
  ASSERT_OK(WriteFormulaFile(folder_ / "in.safetensors", {.channels = 1}));
  WriteRecipe("in_channels: 1\n");
  const RunResult own =
      Pyramid({"validate", "-c", "recipe.yaml", "--ckpt_path", "in.safetensors", "--json"});
  ASSERT_EQ(own.exit_code, 0) << own.err;
  EXPECT_EQ(nlohmann::json::parse(own.out).at("images"), 16);
  EXPECT_THAT(own.err, AllOf(HasSubstr("origin official"), HasSubstr("Pictures: resize to 256"),
                             HasSubstr("as what comes with the weights says")));
  const RunResult recipe = Pyramid({"validate", "-c", "recipe.yaml", "--ckpt_path",
                                    "in.safetensors", "--origin", "mindcv", "--pixels", "recipe"});
  ASSERT_EQ(recipe.exit_code, 0) << recipe.err;
  EXPECT_THAT(recipe.err, AllOf(HasSubstr("origin mindcv, padding same"),
                                HasSubstr("Pictures: pad to 32 with 0, crop 32"),
                                HasSubstr("as the recipe says")));
}

}  // namespace
}  // namespace pyramid
