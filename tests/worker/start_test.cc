#include "worker/start.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "model/checkpoint.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"
#include "tests/testing/weight_file.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::FormulaFile;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::StatusIs;
using testing::WriteFormulaFile;

class StartTest : public ::testing::Test {
 protected:
  void Write(const std::string& name, const FormulaFile& file = {}) {
    ASSERT_OK(WriteFormulaFile(folder_ / name, file));
    recipe_.ckpt_path = (folder_ / name).string();
  }
  absl::StatusOr<Start> Find(int classes) {
    return FindStart(recipe_, classes, folder_ / "checkpoints");
  }
  static int64_t Fresh(const Start& start) {
    return std::count_if(start.weights->parameters().begin(), start.weights->parameters().end(),
                         [](const WeightParameter& parameter) { return parameter.fresh; });
  }

  testing::TempFolder folder_;
  Recipe recipe_;
};

TEST_F(StartTest, WithoutWeightsCompatDecides) {
  recipe_.compat = "mindcv";
  ASSERT_OK_AND_ASSIGN(const Start start, Find(7));
  EXPECT_EQ(start.network.num_classes(), 7);
  EXPECT_EQ(start.network.numerics().gelu(), "tanh");
  EXPECT_EQ(start.origin, "pyramid");
  EXPECT_EQ(start.weights, nullptr);
  EXPECT_THAT(start.lines, IsEmpty());
}

TEST_F(StartTest, WeightsBringTheirNumericsAndOrigin) {
  Write("a.safetensors", {.naming = Naming::kMindCv});
  ASSERT_OK_AND_ASSIGN(const Start start, Find(10));
  EXPECT_EQ(start.origin, "mindcv");
  EXPECT_EQ(start.network.numerics().pad_style(), "same");
  EXPECT_EQ(Fresh(start), 0);
  EXPECT_THAT(start.lines,
              ElementsAre(AllOf(HasSubstr("a.safetensors (safetensors, mindcv naming, origin "
                                          "mindcv): "),
                                HasSubstr(" tensors loaded")),
                          AllOf(HasSubstr("compat is timm, but the weights go by mindcv's"),
                                HasSubstr("padding same, GELU tanh"))));
}

TEST_F(StartTest, AWishForOtherNumericsIsWarnedOf) {
  Write("a.safetensors");
  recipe_.compat = "mindcv";
  ASSERT_OK_AND_ASSIGN(const Start start, Find(10));
  EXPECT_EQ(start.network.numerics().gelu(), "erf");
  EXPECT_EQ(start.origin, "official");
  ASSERT_EQ(start.lines.size(), 2u);
  EXPECT_THAT(start.lines[1], HasSubstr("WARNING: compat is mindcv, but the weights go by timm's"));
}

TEST_F(StartTest, AnotherClassCountGetsANewHead) {
  Write("a.safetensors", {.naming = Naming::kTimm, .classes = 1000});
  ASSERT_OK_AND_ASSIGN(const Start start, Find(10));
  EXPECT_EQ(start.network.num_classes(), 10);
  EXPECT_EQ(Fresh(start), 2);  // weight and bias
  EXPECT_THAT(start.lines, ElementsAre(HasSubstr("head new: 1000 → 10 classes")));
  const auto loaded = static_cast<int64_t>(start.weights->parameters().size()) - 2;
  EXPECT_THAT(start.lines[0], HasSubstr(": " + std::to_string(loaded) + " tensors loaded, "));
}

TEST_F(StartTest, AnotherChannelCountAdaptsTheFirstConvolution) {
  Write("a.safetensors");
  recipe_.in_channels = 1;
  ASSERT_OK_AND_ASSIGN(const Start start, Find(10));
  EXPECT_EQ(start.network.in_channels(), 1);
  EXPECT_EQ(Fresh(start), 0);
  EXPECT_THAT(start.lines, ElementsAre(HasSubstr("first convolution adapted: 3 → 1 channels")));
}

TEST_F(StartTest, ABackboneGetsAHead) {
  Write("a.safetensors", {.classes = 0});
  ASSERT_OK_AND_ASSIGN(const Start start, Find(4));
  EXPECT_EQ(start.network.num_classes(), 4);
  EXPECT_EQ(Fresh(start), 2);
  EXPECT_THAT(start.lines, ElementsAre(HasSubstr("head new: none → 4 classes")));
}

TEST_F(StartTest, AnotherVariantIsRefused) {
  Write("a.safetensors");
  recipe_.model = "pvt_v2_b1";
  EXPECT_THAT(Find(10), StatusIs(absl::StatusCode::kInvalidArgument,
                                 AllOf(HasSubstr("is a pvt_v2_b0, this job trains a pvt_v2_b1"),
                                       HasSubstr("set model: pvt_v2_b0"))));
}

TEST_F(StartTest, WeightsThatAreNotThereAreNamed) {
  recipe_.ckpt_path = (folder_ / "nowhere.pth").string();
  EXPECT_THAT(Find(10), StatusIs(absl::StatusCode::kNotFound, HasSubstr("nowhere.pth")));
}

TEST_F(StartTest, WhatIsNoPvtIsRefused) {
  ASSERT_OK_AND_ASSIGN(const std::string bytes,
                       SerializeSafetensors({{"fc.bias", "F32", {1}, "four"}}));
  ASSERT_OK(WriteFileAtomically(folder_ / "a.safetensors", bytes));
  recipe_.ckpt_path = (folder_ / "a.safetensors").string();
  EXPECT_THAT(Find(10), StatusIs(absl::StatusCode::kInvalidArgument,
                                 AllOf(HasSubstr("recipe.ckpt_path"), HasSubstr("not a PVT v2"))));
}

TEST_F(StartTest, AFileHasNoOptimizersState) {
  Write("a.safetensors");
  recipe_.resume_opt = true;
  EXPECT_THAT(Find(10), StatusIs(absl::StatusCode::kInvalidArgument,
                                 AllOf(HasSubstr("resume_opt"), HasSubstr("is a file"))));
}

TEST_F(StartTest, PretrainedComesFromTheWeightsFolder) {
  setenv("PYRAMID_WEIGHTS", folder_.path().c_str(), 1);
  recipe_.pretrained = true;
  EXPECT_THAT(Find(10), StatusIs(absl::StatusCode::kNotFound,
                                 AllOf(HasSubstr("pvt_v2_b0"), HasSubstr(folder_.path().string()),
                                       HasSubstr("pvt_v2_b0.in1k.safetensors"))));
  ASSERT_OK(WriteFormulaFile(folder_ / "pvt_v2_b0.in1k.safetensors",
                             {.naming = Naming::kTimm, .classes = 1000}));
  ASSERT_OK_AND_ASSIGN(const Start start, Find(10));
  unsetenv("PYRAMID_WEIGHTS");
  EXPECT_EQ(start.origin, "timm");
  EXPECT_EQ(Fresh(start), 2);
}

// The file may be gone when a job starts again.
TEST_F(StartTest, CheckpointsOfTheRunDecideWithoutTheWeights) {
  v1::Manifest manifest;
  manifest.set_origin("mindcv");
  *manifest.mutable_network() = NetworkOf(recipe_, 10);
  *manifest.mutable_network()->mutable_numerics() = NumericsOf("mindcv");
  ASSERT_OK(WriteCheckpoint(folder_ / "checkpoints" / CheckpointName(3), manifest,
                            {{std::string(kWeightsFile), "weights"}}));
  recipe_.ckpt_path = (folder_ / "gone.ckpt").string();
  ASSERT_OK_AND_ASSIGN(const Start start, Find(10));
  EXPECT_EQ(start.origin, "mindcv");
  EXPECT_EQ(start.network.numerics().gelu(), "tanh");
  EXPECT_EQ(start.weights, nullptr);
  // Without weights in the recipe its compat holds, and the checkpoint is compared with it.
  recipe_.ckpt_path.clear();
  EXPECT_EQ(Find(10)->network.numerics().gelu(), "erf");
}

TEST_F(StartTest, AMindSporeFileOfOtherNumericsIsWarnedOf) {
  recipe_.ckpt_format = "mindspore";
  ASSERT_OK_AND_ASSIGN(const Start timm, Find(10));
  EXPECT_THAT(timm.lines, ElementsAre(AllOf(HasSubstr("WARNING: ckpt_format is mindspore"),
                                            HasSubstr("MindCV with padding same"))));
  recipe_.compat = "mindcv";
  EXPECT_THAT(Find(10)->lines, IsEmpty());
}

}  // namespace
}  // namespace pyramid
