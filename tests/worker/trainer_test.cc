#include "worker/trainer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/trainer_fixture.h"
#include "worker/failure.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;
using testing::StatusIs;

class TrainerTest : public testing::TrainerFixture {
 protected:
  // `whole` has six pictures a step.
  void ExpectAccumulationEqualsTheLargerBatch(const Recipe& whole) {
    Recipe parts = whole;
    parts.batch_size = 2;
    parts.gradient_accumulation_steps = 3;
    const auto a = MakeTrainer(whole);
    const auto b = MakeTrainer(parts);
    const auto loader_a = MakeLoader(whole);
    const auto loader_b = MakeLoader(parts);
    for (int step = 0; step < 3; ++step) {
      ASSERT_OK_AND_ASSIGN(const StepReport one, a->RunStep(*loader_a, step, 1e-3, {}, true));
      ASSERT_OK_AND_ASSIGN(const StepReport three, b->RunStep(*loader_b, step, 1e-3, {}, true));
      EXPECT_EQ(three.images, 6);
      EXPECT_NEAR(three.loss / one.loss, 1, 2e-6) << step;
      EXPECT_NEAR(three.grad_norm / one.grad_norm, 1, 2e-5) << step;
    }
  }
};

TEST_F(TrainerTest, LearnsTheMadeUpData) {
  const Recipe recipe = SmallRecipe();
  const auto trainer = MakeTrainer(recipe);
  const auto loader = MakeLoader(recipe);
  double first = 0;
  double last = 0;
  for (int step = 0; step < 24; ++step) {
    ASSERT_OK_AND_ASSIGN(const StepReport report, trainer->RunStep(*loader, step, 1e-3, {}, true));
    EXPECT_EQ(report.images, 8);
    EXPECT_GT(report.grad_norm, 0);
    if (step < 4) first += report.loss;
    if (step >= 20) last += report.loss;
  }
  EXPECT_NEAR(first / 4, 2.3, 0.4);  // ln 10
  EXPECT_LT(last, 0.85 * first);
}

TEST_F(TrainerTest, TheSameRunGivesTheSameNumbers) {
  for (const char* amp_level : {"O0", "O1"}) {
    Recipe recipe = SmallRecipe();
    recipe.amp_level = amp_level;
    const auto a = MakeTrainer(recipe);
    const auto b = MakeTrainer(recipe);
    EXPECT_THAT(std::string(a->path()), StartsWith("fused "));
    const auto loader_a = MakeLoader(recipe);
    const auto loader_b = MakeLoader(recipe);
    for (int step = 0; step < 3; ++step) {
      EXPECT_EQ(a->RunStep(*loader_a, step, 1e-3, {}, false)->loss,
                b->RunStep(*loader_b, step, 1e-3, {}, false)->loss);
    }
    EXPECT_TRUE(SameWeights(*a, *b)) << amp_level;
  }
}

// The same numbers, at first, as with mode F.
TEST_F(TrainerTest, TheFusedPathTakesThePlainSteps) {
  for (const char* model : {"pvt_v2_b0", "pvt_v2_b2_li"}) {
    Recipe recipe = SmallRecipe();
    recipe.model = model;
    recipe.clip_grad = true;
    recipe.clip_value = 1;
    const auto fused = MakeTrainer(recipe);
    recipe.mode = "F";
    const auto plain = MakeTrainer(recipe);
    EXPECT_THAT(std::string(fused->path()), StartsWith("fused "));
    EXPECT_EQ(plain->path(), "plain");
    const auto loader_a = MakeLoader(recipe);
    const auto loader_b = MakeLoader(recipe);
    for (int step = 0; step < 3; ++step) {
      ASSERT_OK_AND_ASSIGN(const StepReport a, fused->RunStep(*loader_a, step, 1e-3, {}, true));
      ASSERT_OK_AND_ASSIGN(const StepReport b, plain->RunStep(*loader_b, step, 1e-3, {}, true));
      EXPECT_NEAR(a.loss / b.loss, 1, 1e-4) << model << " " << step;
      EXPECT_NEAR(a.grad_norm / b.grad_norm, 1, 1e-3) << model << " " << step;
    }
  }
}

TEST_F(TrainerTest, AccumulationEqualsTheLargerBatch) {
  Recipe whole = SmallRecipe(96);
  whole.batch_size = 6;
  Recipe linear = SmallRecipe();
  linear.model = "pvt_v2_b2_li";
  linear.batch_size = 6;
  for (const Recipe& recipe : {whole, linear}) ExpectAccumulationEqualsTheLargerBatch(recipe);
}

TEST_F(TrainerTest, ASmallLastBatchIsWeightedByItsPictures) {
  Recipe recipe = SmallRecipe();
  recipe.batch_size = 48;  // 64 pictures: 48 and 16
  recipe.drop_remainder = false;
  const auto trainer = MakeTrainer(recipe);
  const auto loader = MakeLoader(recipe);
  EXPECT_EQ(trainer->RunStep(*loader, 0, 1e-3, {}, false)->images, 48);
  ASSERT_OK_AND_ASSIGN(const StepReport last, trainer->RunStep(*loader, 1, 1e-3, {}, false));
  EXPECT_EQ(last.images, 16);
  EXPECT_NEAR(last.loss, 2.3, 1.0);
}

TEST_F(TrainerTest, ALossThatIsNoNumberStopsBeforeTheUpdate) {
  const Recipe recipe = SmallRecipe();
  const auto trainer = MakeTrainer(recipe);
  const auto twin = MakeTrainer(recipe);
  Loader loader([]() -> std::optional<BatchPlan> { return BatchPlan{.step_pictures = 1}; },
                [](const BatchPlan&, Batch& batch) {
                  batch.count = 1;
                  batch.labels = {1};
                  batch.pixels.assign(1024, std::numeric_limits<float>::infinity());
                  return absl::OkStatus();
                },
                1, 2);
  const auto result = trainer->RunStep(loader, 0, 1e-3, {}, false);
  EXPECT_THAT(result, StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("step 1")));
  EXPECT_EQ(FailureOf(result.status()), v1::NOT_A_NUMBER);
  EXPECT_TRUE(SameWeights(*trainer, *twin));
}

TEST_F(TrainerTest, TheEndOfTheDataIsAnError) {
  const Recipe recipe = SmallRecipe();
  const auto trainer = MakeTrainer(recipe);
  Loader loader([]() -> std::optional<BatchPlan> { return std::nullopt; },
                [](const BatchPlan&, Batch&) { return absl::OkStatus(); }, 1, 2);
  EXPECT_THAT(trainer->RunStep(loader, 0, 1e-3, {}, false),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("no data for step 0")));
}

TEST_F(TrainerTest, Bf16StaysNearFp32) {
  Recipe recipe = SmallRecipe();
  const auto fp32 = MakeTrainer(recipe);
  recipe.amp_level = "O1";
  const auto bf16 = MakeTrainer(recipe);
  const auto loader_a = MakeLoader(recipe);
  const auto loader_b = MakeLoader(recipe);
  for (int step = 0; step < 2; ++step) {
    ASSERT_OK_AND_ASSIGN(const StepReport wide, fp32->RunStep(*loader_a, step, 1e-3, {}, false));
    ASSERT_OK_AND_ASSIGN(const StepReport narrow, bf16->RunStep(*loader_b, step, 1e-3, {}, false));
    EXPECT_NEAR(narrow.loss, wide.loss, 0.05);
    // A processor without bf16 units computes both in the same way.
    if (bf16->path() != fp32->path()) {
      EXPECT_NE(narrow.loss, wide.loss) << bf16->path();
    }
  }
}

TEST_F(TrainerTest, LogitsDontDependOnTheBatch) {
  const Recipe recipe = SmallRecipe();
  const auto trainer = MakeTrainer(recipe);
  std::vector<float> pixels(2 * 1024);
  for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<float>(i % 17) / 17;
  ASSERT_OK_AND_ASSIGN(const std::vector<float> both, trainer->Logits(pixels, 2, 32));
  ASSERT_OK_AND_ASSIGN(const std::vector<float> second,
                       trainer->Logits(std::span<const float>(pixels).subspan(1024), 1, 32));
  ASSERT_EQ(both.size(), 20u);
  for (int c = 0; c < 10; ++c) EXPECT_NEAR(both[10 + c], second[c], 1e-5);
}

TEST_F(TrainerTest, AnUnknownVariantIsInvalid) {
  Recipe recipe = SmallRecipe();
  recipe.model = "pvt_v9";
  EXPECT_THAT(Trainer::Create(recipe, NetworkOf(recipe, 10), "cpu", *collective_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("pvt_v9")));
}

TEST_F(TrainerTest, ADeviceThatIsntThereIsUnavailable) {
  const Recipe recipe = SmallRecipe();
  EXPECT_THAT(Trainer::Create(recipe, NetworkOf(recipe, 10), "npu:0", *collective_),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("usable: cpu")));
}

TEST(ClassifyTest, GlooMessagesAreCommunicationFailures) {
  const absl::Status lost = ClassifyTorch(
      absl::InternalError("training: [gloo/transport/tcp/pair.cc:534] Connection closed by peer"));
  EXPECT_EQ(lost.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(FailureOf(lost), v1::COMM);
  EXPECT_EQ(ClassifyTorch(absl::InternalError("shape mismatch")).code(),
            absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace pyramid
