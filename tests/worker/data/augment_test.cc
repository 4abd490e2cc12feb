#include "worker/data/augment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

RgbImage Picture(int width, int height, int channels) {
  RgbImage image{.width = width, .height = height, .channels = channels};
  image.pixels.resize(size_t{1} * width * height * channels);
  for (size_t i = 0; i < image.pixels.size(); ++i)
    image.pixels[i] = static_cast<uint8_t>(i * 37 % 251 + 1);
  return image;
}

// Pixels come out as they are: mean 0, std 255.
Recipe PadRecipe() {
  Recipe recipe;
  recipe.in_channels = 1;
  recipe.image_resize = 32;
  recipe.image_pad = 32;
  recipe.mean = {0};
  recipe.std = {255};
  recipe.hflip = 0;
  recipe.color_jitter = 0;
  return recipe;
}

std::vector<float> Apply(const Recipe& recipe, const RgbImage& image, int64_t epoch = 0,
                         int64_t position = 0) {
  std::vector<float> out(size_t{1} * recipe.in_channels * recipe.image_resize * recipe.image_resize,
                         -7);
  EXPECT_THAT(Augmenter(recipe).Apply(image, epoch, position, out.data()), IsOk());
  return out;
}

int Pixel(const std::vector<float>& out, int x, int y) {
  return static_cast<int>(std::lround(out[y * 32 + x] * 255));
}

TEST(AugmentTest, IsAFunctionOfSeedEpochAndPosition) {
  Recipe recipe = PadRecipe();
  recipe.in_channels = 3;
  recipe.mean = recipe.std = {};
  recipe.image_pad = 0;
  recipe.hflip = 0.5;
  recipe.color_jitter = 0.4;
  recipe.re_prob = 1;
  recipe.re_value = "random";
  const RgbImage image = Picture(50, 40, 3);
  const std::vector<float> once = Apply(recipe, image, 1, 2);
  EXPECT_EQ(Apply(recipe, image, 1, 2), once);
  EXPECT_NE(Apply(recipe, image, 1, 3), once);
  EXPECT_NE(Apply(recipe, image, 2, 2), once);
  recipe.seed = 43;
  EXPECT_NE(Apply(recipe, image, 1, 2), once);
}

TEST(AugmentTest, WithoutShiftPadsLikeEvaluation) {
  const RgbImage image = Picture(28, 28, 1);
  const Recipe recipe = PadRecipe();
  ASSERT_OK_AND_ASSIGN(const std::vector<float> expected,
                       Preprocess(image, EvalPreprocessingOf(recipe)));
  EXPECT_EQ(Apply(recipe, image), expected);
}

TEST(AugmentTest, ShiftsByUpToThePadding) {
  Recipe recipe = PadRecipe();
  recipe.crop_padding = 2;
  RgbImage dot{.width = 28, .height = 28, .channels = 1};
  dot.pixels.assign(784, 0);
  dot.pixels[14 * 28 + 14] = 200;
  std::set<std::pair<int, int>> places;
  for (int position = 0; position < 400; ++position) {
    const std::vector<float> out = Apply(recipe, dot, 0, position);
    const int at = static_cast<int>(std::max_element(out.begin(), out.end()) - out.begin());
    places.insert({at % 32 - 16, at / 32 - 16});
  }
  EXPECT_EQ(places.size(), 25u);
  EXPECT_EQ(*places.begin(), std::pair(-2, -2));
  EXPECT_EQ(*places.rbegin(), std::pair(2, 2));
}

TEST(AugmentTest, FlipsMirrorThePicture) {
  const RgbImage image = Picture(28, 28, 1);
  Recipe recipe = PadRecipe();
  const std::vector<float> plain = Apply(recipe, image);
  recipe.hflip = 1;
  const std::vector<float> flipped = Apply(recipe, image);
  recipe.vflip = 1;
  const std::vector<float> both = Apply(recipe, image);
  for (int y = 0; y < 32; ++y) {
    for (int x = 0; x < 32; ++x) {
      ASSERT_EQ(Pixel(flipped, x, y), Pixel(plain, 31 - x, y));
      ASSERT_EQ(Pixel(both, x, y), Pixel(plain, 31 - x, 31 - y));
    }
  }
}

TEST(AugmentTest, APictureLargerThanThePadIsInvalid) {
  std::vector<float> out(1024);
  EXPECT_THAT(Augmenter(PadRecipe()).Apply(Picture(33, 20, 1), 0, 0, out.data()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("33x20")));
}

TEST(AugmentTest, ErasesARectangleWithTheConstant) {
  Recipe recipe = PadRecipe();
  recipe.re_prob = 1;
  recipe.re_value = "5";
  recipe.re_scale = {0.1, 0.2};
  const std::vector<float> plain = Apply(PadRecipe(), Picture(28, 28, 1));
  const std::vector<float> out = Apply(recipe, Picture(28, 28, 1));
  int erased = 0;
  for (int i = 0; i < 1024; ++i) {
    if (out[i] == 5.0f)
      ++erased;
    else
      ASSERT_EQ(out[i], plain[i]);
  }
  EXPECT_GE(erased, 90);
  EXPECT_LE(erased, 220);
}

TEST(AugmentTest, CropsStayWithinThePicture) {
  Recipe recipe = PadRecipe();
  recipe.image_pad = 0;
  RgbImage flat{.width = 61, .height = 47, .channels = 1};
  flat.pixels.assign(61 * 47, 100);
  for (int position = 0; position < 50; ++position) {
    for (const float value : Apply(recipe, flat, 0, position)) ASSERT_NEAR(value * 255, 100, 1);
  }
  // Narrower than any aspect allowed: the centre.
  RgbImage strip{.width = 400, .height = 2, .channels = 1};
  strip.pixels.assign(800, 50);
  for (const float value : Apply(recipe, strip)) ASSERT_NEAR(value * 255, 50, 1);
}

TEST(AugmentTest, JitterMovesColoursButNotGreyPictures) {
  Recipe recipe = PadRecipe();
  recipe.color_jitter = 0.4;
  const RgbImage grey = Picture(28, 28, 1);
  EXPECT_EQ(Apply(recipe, grey), Apply(PadRecipe(), grey));
  recipe.in_channels = 3;
  recipe.mean = {0, 0, 0};
  recipe.std = {255, 255, 255};
  const RgbImage rgb = Picture(28, 28, 3);
  const std::vector<float> jittered = Apply(recipe, rgb);
  recipe.color_jitter = 0;
  const std::vector<float> plain = Apply(recipe, rgb);
  double difference = 0;
  for (size_t i = 0; i < plain.size(); ++i) difference += std::abs(jittered[i] - plain[i]);
  EXPECT_GT(difference / static_cast<double>(plain.size()), 0.001);
  for (const float value : jittered) ASSERT_TRUE(value >= 0 && value <= 1);
}

}  // namespace
}  // namespace pyramid
