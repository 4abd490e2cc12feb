#include "worker/job_data.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/testing/idx_data.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::StatusIs;

class JobDataTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::WriteIdxFolder(folder_.path(), 100, 20);
    recipe_.dataset = "fashion_mnist";
    recipe_.data_dir = folder_.path().string();
    recipe_.in_channels = 1;
    recipe_.image_resize = recipe_.image_pad = 32;
    recipe_.batch_size = 16;
    recipe_.epoch_size = 5;
  }
  testing::TempFolder folder_;
  Recipe recipe_;
};

TEST_F(JobDataTest, NumbersFollowFromRecipeAndData) {
  recipe_.workers = 2;
  ASSERT_OK_AND_ASSIGN(const JobData data, OpenJobData(recipe_));
  EXPECT_EQ(data.classes, 10);
  EXPECT_EQ(data.global_batch, 32);
  EXPECT_EQ(data.steps_per_epoch, 3);
  EXPECT_EQ(data.total_steps, 15);
  EXPECT_EQ(data.evaluations, 5);
  recipe_.num_samples = 64;
  recipe_.num_classes = 12;
  ASSERT_OK_AND_ASSIGN(const JobData fewer, OpenJobData(recipe_));
  EXPECT_EQ(fewer.used, 64);
  EXPECT_EQ(fewer.steps_per_epoch, 2);
  EXPECT_EQ(fewer.labels[11], "11");
}

TEST_F(JobDataTest, ValidatesAtMindCvsEpochsAndAfterTheLast) {
  recipe_.val_interval = 3;
  ASSERT_OK_AND_ASSIGN(const JobData data, OpenJobData(recipe_));
  EXPECT_TRUE(data.ValidatesAfter(recipe_, 1));
  EXPECT_FALSE(data.ValidatesAfter(recipe_, 2));
  EXPECT_TRUE(data.ValidatesAfter(recipe_, 4));
  EXPECT_TRUE(data.ValidatesAfter(recipe_, 5));
  EXPECT_EQ(data.evaluations, 3);
}

TEST_F(JobDataTest, AStepLargerThanTheDataIsInvalid) {
  recipe_.batch_size = 101;
  EXPECT_THAT(OpenJobData(recipe_), StatusIs(absl::StatusCode::kInvalidArgument,
                                             AllOf(HasSubstr("101"), HasSubstr("there are 100"))));
  recipe_.drop_remainder = false;
  EXPECT_EQ(OpenJobData(recipe_)->steps_per_epoch, 1);
}

TEST_F(JobDataTest, AMissingValidationSplitSaysTheWayOut) {
  recipe_.val_split = "dev";
  EXPECT_THAT(OpenJobData(recipe_),
              StatusIs(absl::StatusCode::kNotFound,
                       AllOf(HasSubstr("val_while_train: False"), HasSubstr("train, val"))));
  recipe_.val_while_train = false;
  EXPECT_EQ(OpenJobData(recipe_)->val, nullptr);
}

TEST_F(JobDataTest, FewerClassesThanLabelsIsInvalid) {
  recipe_.num_classes = 3;
  EXPECT_THAT(OpenJobData(recipe_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3 classes")));
}

TEST_F(JobDataTest, PreparesTheFirstPictures) {
  ASSERT_OK_AND_ASSIGN(const JobData data, OpenJobData(recipe_));
  ASSERT_OK_AND_ASSIGN(const PreparedPictures some,
                       PrepareFirst(*data.val, EvalPreprocessingOf(recipe_), 16));
  EXPECT_EQ(some.count, 16);
  EXPECT_EQ(some.pixels.size(), 16u * 1024);
  EXPECT_EQ(PrepareFirst(*data.val, EvalPreprocessingOf(recipe_), 99)->count, 20);
}

}  // namespace
}  // namespace pyramid
