#include "worker/saver.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "model/checkpoint.h"
#include "model/tensors.h"
#include "model/weights.h"
#include "tests/worker/trainer_fixture.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::StatusIs;

class SaverTest : public testing::TrainerFixture {
 protected:
  SaverOptions Options(const Recipe& recipe) {
    SaverOptions options{
        .folder = folder_ / "checkpoints", .recipe = recipe, .network = NetworkOf(recipe, 10)};
    options.labels = data_->classes();
    options.global_batch = recipe.global_batch();
    options.self_test_count = 2;
    options.self_test_pixels.assign(2 * recipe.image_resize * recipe.image_resize, 0.5f);
    fs::create_directories(options.folder);
    return options;
  }
  RunState At(int64_t step) { return {.step = step, .images = step * 8}; }
  std::vector<std::string> Names() {
    std::vector<std::string> names;
    for (const fs::path& path : ListCheckpoints(folder_ / "checkpoints"))
      names.push_back(path.filename());
    return names;
  }
  void Flip(const fs::path& file) {
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekg(fs::file_size(file) / 2);
    const int byte = stream.get();
    stream.seekp(fs::file_size(file) / 2);
    stream.put(static_cast<char>(byte ^ 1));
  }
  // Steps first..last-1.
  void Train(Trainer& trainer, const Recipe& recipe, int first, int last) {
    const auto loader = MakeLoader(recipe, first);
    for (int step = first; step < last; ++step)
      ASSERT_OK(trainer.RunStep(*loader, step, 1e-3, {}, false));
  }
};

// At 32 pixels one key per stage is left, in the linear variant 49; at 96 attention has nine to
// choose from.
TEST_F(SaverTest, AResumedRunGoesOnBitForBit) {
  const struct {
    const char *model, *amp_level;
    int side;
  } kRuns[] = {{"pvt_v2_b0", "O0", 32},
               {"pvt_v2_b0", "O0", 96},
               {"pvt_v2_b0", "O1", 32},
               {"pvt_v2_b2_li", "O1", 32}};
  for (const auto& [model, amp_level, side] : kRuns) {
    Recipe recipe = SmallRecipe(side);
    recipe.model = model;
    recipe.amp_level = amp_level;
    recipe.ckpt_save_policy = "none";
    const auto whole = MakeTrainer(recipe);
    Train(*whole, recipe, 0, 4);
    SaverOptions options = Options(recipe);
    options.folder = folder_ / absl::StrCat("checkpoints_", model, amp_level, side);
    fs::create_directories(options.folder);
    Saver saver(options);
    {
      const auto first = MakeTrainer(recipe);
      Train(*first, recipe, 0, 2);
      RunState state = At(2);
      state.position = 2 * recipe.batch_size;
      state.epoch_loss_sum = 1.25;
      state.best_top1 = 0.75;
      ASSERT_OK(saver.Save(*first, state, std::nullopt));
    }
    const auto second = MakeTrainer(recipe);
    ASSERT_OK_AND_ASSIGN(const std::optional<RunState> state, saver.Resume(*second));
    ASSERT_TRUE(state.has_value());
    EXPECT_EQ(state->step, 2);
    EXPECT_EQ(state->position, 2 * recipe.batch_size);
    EXPECT_EQ(state->epoch_loss_sum, 1.25);
    EXPECT_EQ(state->best_top1, 0.75);
    Train(*second, recipe, 2, 4);
    EXPECT_TRUE(SameWeights(*whole, *second)) << model << " " << amp_level << " " << side;
  }
}

TEST_F(SaverTest, WritesWhatTheManifestPromises) {
  const Recipe recipe = SmallRecipe();
  const auto trainer = MakeTrainer(recipe);
  EvalCounts counts{.images = 10, .top1 = 7, .top5 = 9, .loss_sum = 5, .classes = {4, 6}};
  counts.confidence[12] = 10;
  RunState state = At(8);
  state.epochs_done = 1;
  ASSERT_OK_AND_ASSIGN(const v1::Checkpoint checkpoint,
                       Saver(Options(recipe)).Save(*trainer, state, counts));
  EXPECT_EQ(checkpoint.id(), "step-00000008");
  EXPECT_TRUE(fs::path(checkpoint.path()).is_absolute());
  EXPECT_TRUE(checkpoint.validated());
  EXPECT_DOUBLE_EQ(checkpoint.val_top1(), 0.7);
  EXPECT_GT(checkpoint.bytes(), 3 * 13'000'000);
  EXPECT_GT(checkpoint.write_seconds(), 0);
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, VerifyCheckpoint(checkpoint.path()));
  EXPECT_EQ(manifest.network().variant(), "pvt_v2_b0");
  EXPECT_EQ(manifest.labels(9), "Ankle boot");
  EXPECT_EQ(manifest.preprocessing().pad().to(), 32);
  EXPECT_EQ(manifest.training().step(), 8);
  EXPECT_EQ(manifest.training().epochs_done(), 1);
  EXPECT_DOUBLE_EQ(manifest.training().val_loss(), 0.5);
  EXPECT_EQ(manifest.training().val_images(), 10);
  EXPECT_THAT(manifest.training().val_answers().classes(), ::testing::ElementsAre(4, 6));
  EXPECT_EQ(manifest.training().val_answers().confidence_size(),
            static_cast<int>(kConfidenceBuckets));
  EXPECT_EQ(manifest.training().val_answers().confidence(12), 10);
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe back, ParseRecipe(manifest.training().recipe()));
  EXPECT_EQ(RecipeToYaml(back.recipe), RecipeToYaml(recipe));
  // The self-test holds what this network answers.
  ASSERT_OK_AND_ASSIGN(const std::string bytes,
                       ReadCheckpointFile(checkpoint.path(), manifest, kSelfTestFile));
  ASSERT_OK_AND_ASSIGN(const NamedTensors tensors, TensorsFromSafetensors(bytes));
  ASSERT_EQ(tensors.size(), 2u);
  const std::vector<float> pixels(2 * 1024, 0.5f);
  ASSERT_OK_AND_ASSIGN(const std::vector<float> logits, trainer->Logits(pixels, 2, 32));
  for (const auto& [name, tensor] : tensors) {
    if (name == "logits")
      EXPECT_EQ(tensor[1][3].item<float>(), logits[13]);
    else
      EXPECT_EQ(tensor.numel(), 2048);
  }
}

TEST_F(SaverTest, ADamagedCheckpointIsPassedOver) {
  const Recipe recipe = SmallRecipe();
  const auto trainer = MakeTrainer(recipe);
  Saver saver(Options(recipe));
  ASSERT_OK(saver.Save(*trainer, At(1), std::nullopt));
  ASSERT_OK(saver.Save(*trainer, At(2), std::nullopt));
  ASSERT_OK(saver.Save(*trainer, At(3), std::nullopt));
  Flip(folder_ / "checkpoints/step-00000003" / std::string(kWeightsFile));
  Flip(folder_ / "checkpoints/step-00000002" / std::string(kStateFile));
  ASSERT_OK_AND_ASSIGN(const std::optional<RunState> state, saver.Resume(*trainer));
  ASSERT_TRUE(state.has_value());
  EXPECT_EQ(state->step, 1);
}

TEST_F(SaverTest, WithoutCheckpointsThereIsNothingToResume) {
  const auto trainer = MakeTrainer(SmallRecipe());
  ASSERT_OK_AND_ASSIGN(const std::optional<RunState> state,
                       Saver(Options(SmallRecipe())).Resume(*trainer));
  EXPECT_FALSE(state.has_value());
}

TEST_F(SaverTest, AnotherRunsCheckpointIsRefused) {
  const Recipe recipe = SmallRecipe();
  const auto trainer = MakeTrainer(recipe);
  ASSERT_OK(Saver(Options(recipe)).Save(*trainer, At(1), std::nullopt));
  Recipe other = recipe;
  other.seed = 7;
  EXPECT_THAT(Saver(Options(other)).Resume(*trainer),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("seed 42"), HasSubstr("ckpt_save_dir"))));
  other = recipe;
  other.batch_size = 16;
  EXPECT_THAT(Saver(Options(other)).Resume(*trainer),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("8 pictures a step")));
  other = recipe;
  other.model = "pvt_v2_b1";
  EXPECT_THAT(Saver(Options(other)).Resume(*trainer),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("pvt_v2_b0")));
}

TEST_F(SaverTest, TheSameStepIsReplaced) {
  const Recipe recipe = SmallRecipe();
  const auto trainer = MakeTrainer(recipe);
  Saver saver(Options(recipe));
  ASSERT_OK(saver.Save(*trainer, At(5), std::nullopt));
  ASSERT_OK_AND_ASSIGN(const v1::Checkpoint again,
                       saver.Save(*trainer, At(5), EvalCounts{.images = 2, .top1 = 1}));
  EXPECT_TRUE(ReadManifest(again.path())->training().validated());
  EXPECT_THAT(Names(), ElementsAre("step-00000005"));
}

TEST_F(SaverTest, LatestKeepsTheNewest) {
  Recipe recipe = SmallRecipe();
  recipe.keep_checkpoint_max = 2;
  const auto trainer = MakeTrainer(recipe);
  Saver saver(Options(recipe));
  for (int step = 1; step <= 4; ++step) ASSERT_OK(saver.Save(*trainer, At(step), std::nullopt));
  EXPECT_THAT(Names(), ElementsAre("step-00000003", "step-00000004"));
}

TEST_F(SaverTest, TopKeepsTheBestAndAlwaysTheNewest) {
  Recipe recipe = SmallRecipe();
  recipe.keep_checkpoint_max = 2;
  recipe.ckpt_save_policy = "top_k";
  const auto trainer = MakeTrainer(recipe);
  Saver saver(Options(recipe));
  const int right[] = {5, 9, 7, 1};
  for (int step = 1; step <= 4; ++step)
    ASSERT_OK(saver.Save(*trainer, At(step), EvalCounts{.images = 10, .top1 = right[step - 1]}));
  EXPECT_THAT(Names(), ElementsAre("step-00000002", "step-00000004"));
}

TEST_F(SaverTest, GoesOnFromAnotherRunsCheckpoint) {
  const Recipe recipe = SmallRecipe();
  const auto trainer = MakeTrainer(recipe);
  Train(*trainer, recipe, 0, 1);
  ASSERT_OK_AND_ASSIGN(const v1::Checkpoint checkpoint,
                       Saver(Options(recipe)).Save(*trainer, At(1), std::nullopt));
  const auto fresh = MakeTrainer(recipe);
  EXPECT_EQ(Saver(Options(recipe)).GoOnFrom(checkpoint.path(), *fresh)->step, 1);
  EXPECT_TRUE(SameWeights(*trainer, *fresh));

  SaverOptions other = Options(recipe);
  other.network = NetworkOf(recipe, 5);
  EXPECT_THAT(Saver(other).GoOnFrom(checkpoint.path(), *fresh),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("10 classes"), HasSubstr("5 classes"))));
  EXPECT_THAT(Saver(Options(recipe)).GoOnFrom(folder_ / "nowhere", *fresh),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nowhere")));
}

TEST_F(SaverTest, CheckpointsKeepTheOrigin) {
  const Recipe recipe = SmallRecipe();
  SaverOptions options = Options(recipe);
  options.origin = "mindcv";
  ASSERT_OK_AND_ASSIGN(const v1::Checkpoint checkpoint,
                       Saver(options).Save(*MakeTrainer(recipe), At(1), std::nullopt));
  EXPECT_EQ(ReadManifest(checkpoint.path())->origin(), "mindcv");
}

// As MindCV names its files: <model>-<epoch>_<steps of the epoch>.ckpt.
TEST_F(SaverTest, AnotherFormatLiesBesideEachCheckpoint) {
  Recipe recipe = SmallRecipe();
  recipe.ckpt_format = "mindspore";
  recipe.keep_checkpoint_max = 2;
  recipe.compat = "mindcv";
  SaverOptions options = Options(recipe);
  options.steps_per_epoch = 4;
  const auto trainer = MakeTrainer(recipe);
  Saver saver(options);
  for (const int step : {3, 4, 5}) ASSERT_OK(saver.Save(*trainer, At(step), std::nullopt));
  const fs::path folder = folder_ / "checkpoints";
  EXPECT_FALSE(fs::exists(folder / "pvt_v2_b0-1_3.ckpt")) << "its checkpoint was removed";
  EXPECT_TRUE(fs::exists(folder / "pvt_v2_b0-1_4.ckpt"));
  const fs::path newest = folder / "pvt_v2_b0-2_1.ckpt";
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Weights> weights, OpenWeights(newest));
  EXPECT_EQ(weights->manifest().network().numerics().gelu(), "tanh");
  EXPECT_EQ(weights->manifest().origin(), "pyramid");
  EXPECT_EQ(weights->manifest().preprocessing().pad().to(), 32);
  recipe.seed = 7;  // other weights at first
  const auto loaded = MakeTrainer(recipe);
  EXPECT_FALSE(SameWeights(*trainer, *loaded));
  ASSERT_OK(LoadWeightsInto(*loaded->network(), *weights));
  EXPECT_TRUE(SameWeights(*trainer, *loaded));

  // A run that died before it wrote the file writes it when it goes on.
  fs::remove(newest);
  ASSERT_OK(saver.Resume(*trainer));
  EXPECT_TRUE(fs::exists(newest));
}

TEST_F(SaverTest, ASafetensorsFileHasTheOfficialNames) {
  Recipe recipe = SmallRecipe();
  recipe.ckpt_format = "safetensors";
  ASSERT_OK(Saver(Options(recipe)).Save(*MakeTrainer(recipe), At(1), std::nullopt));
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       OpenWeightFile(folder_ / "checkpoints/pvt_v2_b0-1_1.safetensors"));
  EXPECT_EQ(file.format, WeightFormat::kSafetensors);
  EXPECT_EQ(file.tensors.front().name, "patch_embed1.proj.weight");
}

}  // namespace
}  // namespace pyramid
