#include "worker/schedule.h"

#include <gtest/gtest.h>

namespace pyramid {
namespace {

// MindCV's own scheduler gave these (its pvt_v2 recipes, 1251 steps an epoch).
Recipe B0() {
  Recipe recipe;
  recipe.lr = 0.001;
  recipe.min_lr = 1e-5;
  recipe.warmup_epochs = 10;
  recipe.decay_epochs = 490;
  recipe.epoch_size = 500;
  recipe.lr_epoch_stair = true;
  return recipe;
}

TEST(ScheduleTest, B0RecipeInWholeEpochs) {
  const Recipe recipe = B0();
  const auto rate = [&](int epoch) { return LearningRate(recipe, int64_t{epoch} * 1251, 1251); };
  EXPECT_EQ(rate(0), 0);
  EXPECT_NEAR(rate(1), 1e-4, 1e-15);
  EXPECT_NEAR(rate(9), 9e-4, 1e-15);
  EXPECT_NEAR(rate(10), 1e-3, 1e-15);
  EXPECT_NEAR(rate(11), 9.999898262e-4, 1e-13);
  EXPECT_NEAR(rate(100), 9.198536121e-4, 5e-13);
  EXPECT_NEAR(rate(255), 5.05e-4, 1e-13);
  EXPECT_NEAR(rate(499), 1.001017376e-5, 1e-14);
  EXPECT_EQ(LearningRate(recipe, 1251 + 700, 1251), rate(1)) << "constant within an epoch";
}

TEST(ScheduleTest, B2RecipeStepByStep) {
  Recipe recipe = B0();
  recipe.lr_epoch_stair = false;
  recipe.min_lr = 1e-6;
  recipe.warmup_epochs = 20;
  recipe.decay_epochs = 530;
  recipe.epoch_size = 550;
  const auto rate = [&](int64_t step) { return LearningRate(recipe, step, 1251); };
  EXPECT_EQ(rate(0), 0);
  EXPECT_NEAR(rate(1), 3.996802558e-8, 1e-17);
  EXPECT_NEAR(rate(1251), 5e-5, 1e-15);
  EXPECT_NEAR(rate(25019), 9.999600320e-4, 1e-13);
  EXPECT_NEAR(rate(25020), 1e-3, 1e-15);
  EXPECT_NEAR(rate(356535), 5.005e-4, 1e-13);
  EXPECT_NEAR(rate(688049), 1.000000006e-6, 1e-15);
  recipe.lr = 0.002;  // b3, b4
  EXPECT_NEAR(rate(1251), 1e-4, 1e-15);
  EXPECT_NEAR(rate(25020), 2e-3, 1e-15);
  EXPECT_NEAR(rate(356535), 1.0005e-3, 1e-13);
  EXPECT_NEAR(rate(688049), 1.00000001e-6, 1e-14);
}

TEST(ScheduleTest, WarmupStartsAtTheFactor) {
  Recipe recipe = B0();
  recipe.warmup_factor = 0.01;
  EXPECT_NEAR(LearningRate(recipe, 0, 10), 1e-5, 1e-18);
}

TEST(ScheduleTest, AfterTheDecayStaysAtTheMinimum) {
  const Recipe recipe = B0();
  EXPECT_EQ(LearningRate(recipe, 500 * 1251, 1251), 1e-5);
  EXPECT_EQ(LearningRate(recipe, 9999 * 1251, 1251), 1e-5);
}

TEST(ScheduleTest, CyclesBeginAtALowerPeak) {
  Recipe recipe = B0();
  recipe.warmup_epochs = 0;
  recipe.decay_epochs = 10;
  recipe.num_cycles = 2;
  recipe.cycle_decay = 0.5;
  EXPECT_NEAR(LearningRate(recipe, 0, 1), 1e-3, 1e-15);
  EXPECT_NEAR(LearningRate(recipe, 10, 1), 5e-4, 1e-15);
  EXPECT_EQ(LearningRate(recipe, 20, 1), 1e-5);
}

TEST(ScheduleTest, ConstantStaysAfterWarmup) {
  Recipe recipe = B0();
  recipe.scheduler = "constant";
  EXPECT_EQ(LearningRate(recipe, 10 * 1251, 1251), 1e-3);
  EXPECT_EQ(LearningRate(recipe, 499 * 1251, 1251), 1e-3);
}

}  // namespace
}  // namespace pyramid
