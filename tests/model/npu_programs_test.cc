// What the programs use, on the fake NPU: the trainer takes the CPU's steps there, the classifier
// gives the CPU's logits.
#include <torch/torch.h>

#include <cstdio>
#include <string>
#include <vector>

#include "model/checkpoint.h"
#include "model/classifier.h"
#include "model/tensors.h"
#include "tests/testing/fake_npu.h"
#include "tests/testing/formula.h"
#include "tests/worker/trainer_fixture.h"

namespace pyramid {
namespace {

using testing::FakeFusionAttention;

constexpr int kBlocks = 8;  // of b0

class NpuProgramsTest : public testing::TrainerFixture {};

TEST_F(NpuProgramsTest, TheTrainerTakesTheCpusSteps) {
  for (const bool bf16 : {false, true}) {
    SCOPED_TRACE(bf16);
    Recipe recipe = SmallRecipe(96);
    recipe.amp_level = bf16 ? "O1" : "O0";
    recipe.mode = "F";
    ASSERT_OK_AND_ASSIGN(const auto on_cpu,
                         Trainer::Create(recipe, NetworkOf(recipe, 10), "cpu", *collective_));
    recipe.mode = "G";
    const FakeFusionAttention op;
    ASSERT_OK_AND_ASSIGN(const auto on_npu,
                         Trainer::Create(recipe, NetworkOf(recipe, 10), "npu:0", *collective_));
    EXPECT_EQ(on_npu->path(), "fused npu");
    const auto loader_a = MakeLoader(recipe), loader_b = MakeLoader(recipe);
    for (int step = 0; step < 2; ++step) {
      ASSERT_OK_AND_ASSIGN(const StepReport a, on_cpu->RunStep(*loader_a, step, 1e-3, {}, true));
      ASSERT_OK_AND_ASSIGN(const StepReport b, on_npu->RunStep(*loader_b, step, 1e-3, {}, true));
      EXPECT_NEAR(b.loss / a.loss, 1, bf16 ? 1e-2 : 1e-5) << step;
      EXPECT_NEAR(b.grad_norm / a.grad_norm, 1, bf16 ? 1e-1 : 1e-4) << step;
      EXPECT_EQ(op.calls().forward, kBlocks * (step + 1));
      EXPECT_EQ(op.calls().backward, kBlocks * (step + 1));
      EXPECT_EQ(op.calls().type, bf16 ? torch::kBFloat16 : torch::kFloat32);
      std::printf("%s step %d: loss %.7f, CPU's %.7f; gradient norm %.6f, CPU's %.6f\n",
                  bf16 ? "bf16" : "fp32", step, b.loss, a.loss, b.grad_norm, a.grad_norm);
    }
  }
}

TEST_F(NpuProgramsTest, ModeFTrainsWithoutTheOperator) {
  Recipe recipe = SmallRecipe();
  recipe.mode = "F";
  const FakeFusionAttention op;
  ASSERT_OK_AND_ASSIGN(const auto trainer,
                       Trainer::Create(recipe, NetworkOf(recipe, 10), "npu:0", *collective_));
  EXPECT_EQ(trainer->path(), "plain");
  EXPECT_OK(trainer->RunStep(*MakeLoader(recipe), 0, 1e-3, {}, false));
  EXPECT_EQ(op.calls().forward, 0);
}

TEST_F(NpuProgramsTest, TheClassifierGivesTheCpusLogits) {
  constexpr int kSide = 96, kPictures = 2;
  Recipe recipe = SmallRecipe(kSide);
  v1::Manifest manifest;
  *manifest.mutable_network() = NetworkOf(recipe, 10);
  *manifest.mutable_preprocessing() = EvalPreprocessingOf(recipe);
  manifest.set_origin("pyramid");
  PvtV2 network = *MakePvtV2(manifest.network());
  network->Initialize(3);
  ASSERT_OK_AND_ASSIGN(const std::string weights, TensorsToSafetensors(StateOf(*network)));
  const auto path = folder_ / "step-00000001";
  ASSERT_OK(WriteCheckpoint(path, manifest, {{std::string(kWeightsFile), weights}}));

  const FakeFusionAttention op;
  const std::vector<float> pixels = testing::FormulaImage(kPictures, 1, kSide, kSide);
  const auto logits = [&](const ClassifierOptions& options) {
    const auto classifier = LoadClassifier(path, options);
    EXPECT_OK(classifier.status());
    return *(*classifier)->Forward(pixels, kPictures, kSide, kSide);
  };
  const std::vector<float> expected = logits({.plain = true, .threads = 1});
  EXPECT_EQ(op.calls().forward, 0);
  const std::vector<float> fp32 = logits({.device = "npu:1", .threads = 1});
  EXPECT_EQ(op.calls().forward, kBlocks);
  EXPECT_EQ(op.calls().type, torch::kFloat32);
  const std::vector<float> bf16 = logits({.device = "npu:1", .dtype = "bf16", .threads = 1});
  EXPECT_EQ(op.calls().forward, 2 * kBlocks);
  EXPECT_EQ(op.calls().type, torch::kBFloat16);
  const std::vector<float> plain = logits({.plain = true, .device = "npu:1", .threads = 1});
  EXPECT_EQ(op.calls().forward, 2 * kBlocks);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(fp32[i], expected[i], 1e-5) << i;
    EXPECT_NEAR(plain[i], expected[i], 1e-5) << i;
    EXPECT_NEAR(bf16[i], expected[i], 0.05) << i;
  }
}

}  // namespace
}  // namespace pyramid
