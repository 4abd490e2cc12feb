// Small data and recipes for tests of the engine.
#ifndef PYRAMID_TESTS_WORKER_TRAINER_FIXTURE_H_
#define PYRAMID_TESTS_WORKER_TRAINER_FIXTURE_H_

#include <memory>
#include <utility>

#include "tests/testing/idx_data.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"
#include "worker/collective.h"
#include "worker/data/loader.h"
#include "worker/trainer.h"

namespace pyramid::testing {

class TrainerFixture : public ::testing::Test {
 protected:
  void SetUp() override {
    WriteIdxFolder(folder_.path(), 64, 16);
    data_ = *OpenDataset("fashion_mnist", folder_.path(), "train");
    collective_ = *Collective::Join({});
    at::set_num_threads(1);
  }

  // 32: one key per stage at the end; 96: nine, so attention takes part.
  Recipe SmallRecipe(int side = 32) {
    Recipe recipe;
    recipe.in_channels = 1;
    recipe.image_resize = side;
    recipe.image_pad = side;
    recipe.crop_padding = 2;
    recipe.color_jitter = 0;
    recipe.batch_size = side > 32 ? 4 : 8;
    recipe.epoch_size = 4;
    recipe.drop_path_rate = 0.1;
    recipe.label_smoothing = 0.1;
    recipe.weight_decay = 0.05;
    return recipe;
  }

  std::unique_ptr<Trainer> MakeTrainer(const Recipe& recipe) {
    absl::StatusOr<std::unique_ptr<Trainer>> trainer =
        Trainer::Create(recipe, NetworkOf(recipe, 10), "cpu", *collective_);
    EXPECT_OK(trainer.status());
    return *std::move(trainer);
  }

  std::unique_ptr<Loader> MakeLoader(const Recipe& recipe, int64_t first_step = 0) {
    return MakeTrainLoader(*data_, {.recipe = recipe, .first_step = first_step}, bad_);
  }

  static bool SameWeights(Trainer& a, Trainer& b) {
    const NamedTensors left = StateOf(*a.network());
    const NamedTensors right = StateOf(*b.network());
    for (size_t i = 0; i < left.size(); ++i) {
      if (!torch::equal(left[i].second, right[i].second)) return false;
    }
    return left.size() == right.size();
  }

  TempFolder folder_;
  std::unique_ptr<Dataset> data_;
  std::unique_ptr<Collective> collective_;
  BadPictures bad_{64};
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_WORKER_TRAINER_FIXTURE_H_
