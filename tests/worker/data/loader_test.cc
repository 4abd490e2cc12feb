#include "worker/data/loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "model/preprocess.h"
#include "proto/base/file.h"
#include "tests/testing/images.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"
#include "worker/data/dataset.h"
#include "worker/data/order.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

// Pictures whose every pixel is their index; some can't be read.
class FakeDataset final : public Dataset {
 public:
  explicit FakeDataset(int64_t size, std::vector<int64_t> bad = {})
      : size_(size), bad_(std::move(bad)) {}
  int64_t size() const override { return size_; }
  const std::vector<std::string>& classes() const override { return classes_; }
  int label(int64_t index) const override { return static_cast<int>(index % 10); }
  absl::StatusOr<RgbImage> Read(int64_t index, int channels, bool /*apply_exif*/) const override {
    if (std::find(bad_.begin(), bad_.end(), index) != bad_.end())
      return absl::InvalidArgumentError(NameOf(index) + ": cut off");
    RgbImage image{.width = 28, .height = 28, .channels = channels};
    image.pixels.assign(784 * channels, static_cast<uint8_t>(index));
    return image;
  }
  absl::StatusOr<std::string> ReadEncoded(int64_t) const override {
    return absl::UnimplementedError("no files");
  }
  std::string Extension(int64_t) const override { return ".png"; }
  std::string NameOf(int64_t index) const override { return absl::StrCat("picture ", index); }

 private:
  int64_t size_;
  std::vector<int64_t> bad_;
  std::vector<std::string> classes_ = std::vector<std::string>(10, "x");
};

Recipe SmallRecipe() {
  Recipe recipe;
  recipe.in_channels = 1;
  recipe.image_resize = 32;
  recipe.image_pad = 32;
  recipe.crop_padding = 2;
  recipe.batch_size = 8;
  recipe.epoch_size = 2;
  return recipe;
}

v1::Preprocessing ColourPreprocessing() {
  v1::Preprocessing p;
  p.set_channels(3);
  v1::Resize& resize = *p.mutable_resize();
  resize.set_side(64);
  resize.set_kernel("bicubic");
  resize.set_antialias("pillow");
  resize.set_other_side("floor");
  p.set_crop(56);
  for (const double value : {0.485, 0.456, 0.406}) p.add_mean(value);
  for (const double value : {0.229, 0.224, 0.225}) p.add_std(value);
  return p;
}

// What validation sees is what the endpoint sees, also where files are turned or not RGB.
TEST(EvalLoaderTest, PicturesAreTheEndpoints) {
  testing::TempFolder folder;
  const std::vector<std::string> names = {"cmyk.jpg", "exif_6.jpg", "gray.jpg", "rgba.png"};
  std::filesystem::create_directories(folder / "val/a");
  for (const std::string& name : names) {
    ASSERT_OK(WriteFileAtomically(folder / "val/a" / name, testing::GoldenImage(name)));
  }
  ASSERT_OK_AND_ASSIGN(const auto data, OpenDataset("imagenet", folder.path(), "val"));
  for (const char* exif : {"apply", "ignore"}) {
    EvalLoaderOptions options{.batch = 4, .begin = 0, .end = data->size()};
    options.preprocessing = ColourPreprocessing();
    options.preprocessing.set_exif(exif);
    BadPictures bad(data->size());
    const auto loader = MakeEvalLoader(*data, options, bad);
    ASSERT_OK_AND_ASSIGN(const Batch* batch, loader->Take());
    ASSERT_EQ(batch->count, 4);
    std::vector<float> expected;
    for (const std::string& name : names) {
      ASSERT_OK_AND_ASSIGN(const std::vector<float> pixels,
                           DecodeAndPreprocess(testing::GoldenImage(name), options.preprocessing));
      expected.insert(expected.end(), pixels.begin(), pixels.end());
    }
    EXPECT_EQ(batch->pixels, expected) << exif;
  }
}

struct Seen {
  std::vector<float> pixels;
  int64_t label;
  bool operator==(const Seen& other) const {
    return pixels == other.pixels && label == other.label;
  }
};
// By (step, position in the global batch).
using SeenByPlace = std::map<std::pair<int64_t, int64_t>, Seen>;

SeenByPlace Collect(const Dataset& data, TrainLoaderOptions options) {
  SeenByPlace seen;
  for (options.rank = 0; options.rank < options.world; ++options.rank) {
    BadPictures bad(data.size());
    const auto loader = MakeTrainLoader(data, options, bad);
    int64_t step = options.first_step;
    while (true) {
      const absl::StatusOr<const Batch*> taken = loader->Take();
      EXPECT_OK(taken.status());
      const Batch* batch = *taken;
      if (batch == nullptr) break;
      for (int64_t i = 0; i < batch->count && !batch->plan.weightless; ++i) {
        const bool is_new =
            seen.emplace(
                    std::pair(step, batch->plan.first_in_batch + i),
                    Seen{{batch->pixels.begin() + i * 1024, batch->pixels.begin() + (i + 1) * 1024},
                         batch->labels[i]})
                .second;
        EXPECT_TRUE(is_new) << "step " << step << " place " << batch->plan.first_in_batch + i;
      }
      if (batch->plan.last_of_step) ++step;
    }
  }
  return seen;
}

TEST(LoaderTest, WorldSizeDoesNotChangeWhatAStepHolds) {
  const FakeDataset data(100);
  for (const bool drop_remainder : {true, false}) {
    Recipe recipe = SmallRecipe();
    recipe.drop_remainder = drop_remainder;
    const SeenByPlace one = Collect(data, {.recipe = recipe});
    EXPECT_EQ(one.size(), drop_remainder ? 2u * 96 : 2u * 100);
    recipe.batch_size = 4;
    EXPECT_EQ(Collect(data, {.recipe = recipe, .world = 2}), one);
    recipe.batch_size = 2;
    EXPECT_EQ(Collect(data, {.recipe = recipe, .world = 4}), one);
    recipe.gradient_accumulation_steps = 2;
    EXPECT_EQ(Collect(data, {.recipe = recipe, .world = 2, .threads = 3}), one);
  }
}

TEST(LoaderTest, EveryPictureComesOnceAnEpoch) {
  const FakeDataset data(100);
  Recipe recipe = SmallRecipe();
  recipe.drop_remainder = false;
  BadPictures bad(100);
  const auto loader = MakeTrainLoader(data, {.recipe = recipe}, bad);
  std::map<std::pair<int64_t, int64_t>, int> times;
  while (true) {
    ASSERT_OK_AND_ASSIGN(const Batch* batch, loader->Take());
    if (batch == nullptr) break;
    for (const int64_t index : batch->plan.indices) ++times[{batch->plan.epoch, index}];
  }
  EXPECT_EQ(times.size(), 200u);
  for (const auto& [key, count] : times) EXPECT_EQ(count, 1);
}

TEST(LoaderTest, StartsInTheMiddleAsIfItHadRunThere) {
  const FakeDataset data(100);
  const SeenByPlace all = Collect(data, {.recipe = SmallRecipe()});
  SeenByPlace expected;
  for (const auto& [place, seen] : all) {
    if (place.first >= 15) expected[place] = seen;
  }
  EXPECT_EQ(Collect(data, {.recipe = SmallRecipe(), .first_step = 15}), expected);
}

TEST(LoaderTest, ARankWithoutPicturesInTheLastBatchComputesAlong) {
  const FakeDataset data(17);
  Recipe recipe = SmallRecipe();
  recipe.batch_size = 4;
  recipe.epoch_size = 1;
  recipe.drop_remainder = false;
  BadPictures bad(17);
  const auto loader = MakeTrainLoader(data, {.recipe = recipe, .rank = 0, .world = 4}, bad);
  ASSERT_OK(loader->Take());
  ASSERT_OK_AND_ASSIGN(const Batch* last, loader->Take());
  EXPECT_TRUE(last->plan.weightless);
  EXPECT_EQ(last->count, 1);
  EXPECT_EQ(last->plan.step_pictures, 1);
}

TEST(LoaderTest, BatchesComeInOrderFromManyThreads) {
  int64_t planned = 0;
  Loader loader(
      [&planned]() -> std::optional<BatchPlan> {
        if (planned == 200) return std::nullopt;
        return BatchPlan{.first_position = planned++};
      },
      [](const BatchPlan& plan, Batch&) {
        if (plan.first_position % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        return absl::OkStatus();
      },
      4, 6);
  for (int64_t i = 0; i < 200; ++i) {
    ASSERT_OK_AND_ASSIGN(const Batch* batch, loader.Take());
    ASSERT_NE(batch, nullptr);
    EXPECT_EQ(batch->plan.first_position, i);
  }
  EXPECT_EQ(*loader.Take(), nullptr);
  EXPECT_EQ(*loader.Take(), nullptr);
  EXPECT_GT(loader.waited_seconds(), 0);
}

TEST(LoaderTest, RunsAheadOnlyAsFarAsTheQueue) {
  std::atomic<int64_t> planned{0};
  Loader loader(
      [&planned]() -> std::optional<BatchPlan> { return BatchPlan{.first_position = planned++}; },
      [](const BatchPlan&, Batch&) { return absl::OkStatus(); }, 2, 4);
  ASSERT_OK(loader.Take());
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(planned, 4);
}

TEST(LoaderTest, AnErrorComesInItsPlace) {
  int64_t planned = 0;
  Loader loader(
      [&planned]() -> std::optional<BatchPlan> { return BatchPlan{.first_position = planned++}; },
      [](const BatchPlan& plan, Batch&) -> absl::Status {
        if (plan.first_position == 3) return absl::DataLossError("broken");
        return absl::OkStatus();
      },
      2, 4);
  for (int i = 0; i < 3; ++i) ASSERT_OK(loader.Take());
  EXPECT_THAT(loader.Take(), StatusIs(absl::StatusCode::kDataLoss, "broken"));
  EXPECT_THAT(loader.Take(), StatusIs(absl::StatusCode::kDataLoss, "broken"));
}

TEST(LoaderTest, AnUndecodablePictureIsReplacedBySeededRuleAndCounted) {
  const FakeDataset good(100);
  const FakeDataset holed(100, {17});
  BadPictures bad(100);
  const auto read = [&](const Dataset& data) {
    const auto loader = MakeTrainLoader(data, {.recipe = SmallRecipe()}, bad);
    std::vector<std::vector<int64_t>> labels;
    while (true) {
      const Batch* batch = *loader->Take();
      if (batch == nullptr) return labels;
      labels.push_back(batch->labels);
    }
  };
  const auto once = read(holed);
  EXPECT_EQ(bad.count(), 1);
  EXPECT_EQ(read(holed), once);
  EXPECT_EQ(bad.count(), 1) << "a picture counts once";
  const auto whole = read(good);
  EXPECT_EQ(whole.size(), once.size());
}

TEST(LoaderTest, TooManyUndecodablePicturesAreDataLoss) {
  const FakeDataset data(100, {1, 2, 3, 4, 5});
  BadPictures bad(100);
  const auto loader = MakeTrainLoader(data, {.recipe = SmallRecipe()}, bad);
  absl::Status status;
  while (status.ok()) {
    const absl::StatusOr<const Batch*> batch = loader->Take();
    status = batch.status();
    if (status.ok() && *batch == nullptr) break;
  }
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kDataLoss, HasSubstr("0.1 %")));
}

TEST(LoaderTest, EvaluationLeavesUndecodablePicturesOut) {
  const FakeDataset data(50, {7});
  BadPictures bad(50);
  const auto loader = MakeEvalLoader(
      data,
      {.preprocessing = EvalPreprocessingOf(SmallRecipe()), .batch = 8, .begin = 5, .end = 25},
      bad);
  std::vector<int64_t> labels;
  while (true) {
    ASSERT_OK_AND_ASSIGN(const Batch* batch, loader->Take());
    if (batch == nullptr) break;
    EXPECT_EQ(batch->pixels.size(), batch->count * 1024u);
    labels.insert(labels.end(), batch->labels.begin(), batch->labels.end());
  }
  std::vector<int64_t> expected;
  for (int i = 5; i < 25; ++i) {
    if (i != 7) expected.push_back(i % 10);
  }
  EXPECT_EQ(labels, expected);
  EXPECT_EQ(bad.count(), 1);
}

TEST(LoaderTest, ThreadsAreAtLeastOneAndAtMostTheRecipes) {
  Recipe recipe;
  recipe.num_parallel_workers = 1;
  EXPECT_EQ(LoaderThreads(recipe, 1), 1);
  recipe.num_parallel_workers = 8;
  EXPECT_EQ(LoaderThreads(recipe, 1000), 1);
}

}  // namespace
}  // namespace pyramid
