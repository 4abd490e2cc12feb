// Promotion with proof, aliases, shared traffic, rollback, loading and unloading.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "model/thread_limit.h"
#include "server/serving/model_state.h"
#include "tests/server/serving/registry_fixture.h"
#include "tests/testing/metrics_text.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::testing::_;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using testing::FakeManifest;
using testing::HasSeries;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Sample;
using testing::StatusIs;
using testing::WriteFakeCheckpoint;

v1::Manifest Validated(double top1) {
  v1::Manifest manifest = FakeManifest();
  manifest.mutable_training()->set_validated(true);
  manifest.mutable_training()->set_val_top1(top1);
  manifest.mutable_training()->set_job_id("j-000007");
  manifest.mutable_training()->set_step(940);
  return manifest;
}

class ModelChangesTest : public testing::RegistryFixture {
 protected:
  // The version that a request gets; 0: none.
  int64_t VersionFor(absl::string_view model, absl::string_view key = "") {
    const auto found = registry_->Get(model, 0, [key] { return RouteKeyOf(key); });
    return found.ok() ? (*found)->version() : 0;
  }
  std::vector<v1::ModelEvent> Events() {
    const auto events = registry_->EventsOf("fashion", 100);
    return events.ok() ? *events : std::vector<v1::ModelEvent>();
  }
  std::vector<std::string> Actions() {
    std::vector<std::string> lines;
    for (const v1::ModelEvent& event : Events()) {
      lines.push_back(absl::StrCat(event.actor(), " ", event.action(), " ", event.alias(), " ",
                                   event.previous_version(), ">", event.version(),
                                   event.code() == 0 ? "" : " refused"));
    }
    return lines;
  }
  // The self-test's pictures and what the checkpoint answers: for `same` of four, as every fake
  // network does.
  void AgreeOn(int same) {
    SelfTestResult result{.available = true, .pictures = 4, .tolerance = 1e-4};
    result.height = result.width = 32;
    result.pixels.assign(size_t{4} * 32 * 32, 0);
    for (int i = 0; i < 4; ++i) {
      const std::vector<float> one =
          i < same ? std::vector<float>{3, 2, 1} : std::vector<float>{1, 2, 3};
      result.logits.insert(result.logits.end(), one.begin(), one.end());
    }
    self_test_ = std::move(result);
  }
  bool SoonWithout(const std::string& series) {
    for (int i = 0; i < 5000 && HasSeries(*metrics_, series); ++i) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    return !HasSeries(*metrics_, series);
  }
};

const auto kRefused = absl::StatusCode::kFailedPrecondition;

TEST_F(ModelChangesTest, TooLowATop1IsRefusedBeforeAnythingIsLoaded) {
  ASSERT_EQ(Promote(1), 1);
  loads_.clear();
  EXPECT_THAT(
      registry_->Promote(Checkpoint(2, Validated(0.71)), "fashion",
                         {.limits = {.min_top1 = 0.9}, .actor = "ann"}),
      StatusIs(kRefused, HasSubstr("promoting as fashion: gate top-1: 0.7100, wanted ≥ 0.9")));
  EXPECT_THAT(loads_, IsEmpty());
  EXPECT_FALSE(fs::exists(VersionFolder("fashion", 2)));
  EXPECT_EQ(BiasOf("fashion"), 1);
  const v1::ModelEvent event = Events().back();
  EXPECT_EQ(event.code(), static_cast<int>(kRefused));
  EXPECT_EQ(event.actor(), "ann");
  EXPECT_EQ(event.job_id(), "j-000007");
  EXPECT_EQ(event.step(), 940);
  EXPECT_THAT(event.error(), HasSubstr("top-1"));
  ASSERT_EQ(event.gates_size(), 1);
  EXPECT_DOUBLE_EQ(event.gates(0).value(), 0.71);
  EXPECT_DOUBLE_EQ(event.gates(0).limit(), 0.9);
}

TEST_F(ModelChangesTest, TooLittleAgreementKeepsTheOldVersion) {
  AgreeOn(4);
  ASSERT_EQ(Promote(1), 1);
  AgreeOn(3);
  const fs::path second = Checkpoint(2);
  EXPECT_THAT(registry_->Promote(second, "fashion", {.limits = {.min_agreement = 0.9}}),
              StatusIs(kRefused, HasSubstr("gate agreement: 0.7500 of 4 pictures with version 1, "
                                           "wanted ≥ 0.9")));
  EXPECT_EQ(BiasOf("fashion"), 1);
  EXPECT_FALSE(fs::exists(VersionFolder("fashion", 2)));
  EXPECT_TRUE(SoonWithout(R"(pyramid_serving_images_total{model="fashion",version="2"})"));
  ASSERT_OK_AND_ASSIGN(const auto promoted,
                       registry_->Promote(second, "fashion", {.limits = {.min_agreement = 0.75}}));
  EXPECT_THAT(Texts(promoted.gates),
              Contains("agreement: 0.7500 of 4 pictures with version 1, wanted ≥ 0.75"));
  EXPECT_EQ(promoted.previous, 1);
}

TEST_F(ModelChangesTest, AgreementWithoutASelfTestOrWithOtherClassesIsntAvailable) {
  ASSERT_EQ(Promote(1), 1);
  self_test_ = SelfTestResult{};
  EXPECT_THAT(
      registry_->Promote(Checkpoint(2), "fashion", {.limits = {.min_agreement = 0.5}}),
      StatusIs(kRefused, HasSubstr("agreement: not available (the checkpoint has no self")));
  AgreeOn(4);
  v1::Manifest other = FakeManifest();
  other.set_labels(0, "sandal");
  EXPECT_THAT(
      registry_->Promote(Checkpoint(3, other), "fashion", {.limits = {.min_agreement = 0.5}}),
      StatusIs(kRefused, HasSubstr("agreement: not available (the stable version has other")));
  EXPECT_THAT(registry_->Promote(Checkpoint(4), "new", {.limits = {.min_agreement = 0.5}}),
              StatusIs(kRefused, HasSubstr("agreement: not available (nothing is stable yet)")));
}

TEST_F(ModelChangesTest, TooSlowIsRefusedWithBatchAndTimes) {
  ASSERT_EQ(Promote(1), 1);
  network_.OnForward([] { absl::SleepFor(absl::Milliseconds(3)); });
  EXPECT_THAT(
      registry_->Promote(Checkpoint(2), "fashion",
                         {.limits = {.max_latency = absl::Milliseconds(1), .latency_batch = 4}}),
      StatusIs(kRefused, AllOf(HasSubstr("gate latency: "), HasSubstr(" ms at batch 4"),
                               HasSubstr("wanted ≤ 1 ms"))));
  EXPECT_EQ(BiasOf("fashion"), 1);
  ASSERT_OK_AND_ASSIGN(
      const auto promoted,
      registry_->Promote(Checkpoint(3), "fashion", {.limits = {.max_latency = absl::Seconds(9)}}));
  EXPECT_THAT(Texts(promoted.gates), Contains(HasSubstr("ms at batch 1, wanted ≤ 9e+03 ms")));
}

TEST_F(ModelChangesTest, ARequiredSelfTestMustBeThere) {
  self_test_ = SelfTestResult{};
  EXPECT_THAT(registry_->Promote(Checkpoint(1), "fashion", {.limits = {.require_self_test = true}}),
              StatusIs(kRefused, HasSubstr("self-test: not available")));
}

TEST_F(ModelChangesTest, TheServersGatesHoldWhereTheRequestIsSilent) {
  options_.gates = {.min_top1 = 0.8, .min_agreement = 0.5};
  AgreeOn(4);
  Restart();
  EXPECT_THAT(registry_->Promote(Checkpoint(1, Validated(0.7)), "fashion", ""),
              StatusIs(kRefused, HasSubstr("top-1")));
  EXPECT_OK(registry_->Promote(Checkpoint(1, Validated(0.85)), "fashion", ""));
  AgreeOn(1);
  EXPECT_THAT(registry_->Promote(Checkpoint(2, Validated(0.85)), "fashion", ""),
              StatusIs(kRefused, HasSubstr("agreement: 0.2500")));
  EXPECT_OK(registry_->Promote(Checkpoint(2, Validated(0.7)), "fashion",
                               {.limits = {.min_top1 = 0.0, .min_agreement = 0.0}}));
}

TEST_F(ModelChangesTest, SenselessRequestsAreInvalid) {
  const fs::path checkpoint = Checkpoint(1);
  const auto invalid = [](const char* text) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text));
  };
  EXPECT_THAT(registry_->Promote(checkpoint, "fashion", {.alias = "a@b"}), invalid("alias"));
  EXPECT_THAT(registry_->Promote(checkpoint, "fashion", {.limits = {.min_top1 = 2.0}}),
              invalid("min_top1 is 2"));
  EXPECT_THAT(registry_->Promote(checkpoint, "fashion", {.limits = {.latency_batch = 9}}),
              invalid("latency_batch is 9"));
  EXPECT_THAT(
      registry_->Promote(checkpoint, "fashion", {.alias = "canary", .traffic_percent = 101.0}),
      invalid("traffic_percent is 101"));
  EXPECT_THAT(registry_->Promote(checkpoint, "fashion", {.traffic_percent = 10.0}),
              invalid("stable"));
  EXPECT_THAT(registry_->StateOf("fashion"), StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_F(ModelChangesTest, LoadingAndTestingHappenOnAThreadOfTheirOwnWithALimit) {
  ASSERT_EQ(Promote(1), 1);
  const std::thread::id caller = std::this_thread::get_id();
  std::set<int> limits;
  std::set<bool> mine;
  network_.OnForward([&] {
    limits.insert(ThreadLimit::Of(64));
    mine.insert(std::this_thread::get_id() == caller);
  });
  AgreeOn(4);
  ASSERT_EQ(Promote(2), 2);
  network_.OnForward(nullptr);
  EXPECT_THAT(limits, ElementsAre(1));
  EXPECT_THAT(mine, ElementsAre(false));
}

TEST_F(ModelChangesTest, ACanaryAnswersOnlyThoseWhoNameIt) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2, {.alias = "canary"}), 2);
  EXPECT_EQ(VersionFor("fashion"), 1);
  EXPECT_EQ(VersionFor("fashion@stable"), 1);
  EXPECT_EQ(VersionFor("fashion@canary"), 2);
  EXPECT_EQ(VersionFor("fashion:2"), 2);
  EXPECT_EQ(VersionFor("@canary"), 0);
  EXPECT_NE(registry_->MetricsOf("fashion@canary"), nullptr);
  EXPECT_THAT(registry_->Find("fashion@shadow", 0),
              StatusIs(absl::StatusCode::kNotFound,
                       HasSubstr("no alias \"shadow\" of fashion; there is canary, stable")));
  EXPECT_THAT(registry_->Find("fashion@canary", 2),
              StatusIs(absl::StatusCode::kInvalidArgument, _));
  EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_alias_version{alias="canary",model="fashion"})"),
            2);
}

TEST_F(ModelChangesTest, ACanaryAloneIsNotInService) {
  ASSERT_EQ(Promote(1, {.alias = "canary"}), 1);
  EXPECT_FALSE(registry_->Readiness().at("fashion"));
  EXPECT_TRUE(registry_->Answers()) << "nothing has failed";
  EXPECT_THAT(registry_->Find("fashion", 0),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no stable version")));
  EXPECT_EQ(VersionFor("fashion@canary"), 1);
  EXPECT_THAT(registry_->SetTraffic("fashion", "canary", 10, ""),
              StatusIs(kRefused, HasSubstr("no stable version")));
  for (int i = 0; i < 2; ++i) {
    EXPECT_TRUE(registry_->Answers());
    Restart();
  }
  ASSERT_OK(registry_->RemoveAlias("fashion", "canary", ""));
  for (int i = 0; i < 2; ++i) {
    EXPECT_TRUE(registry_->Answers()) << "no alias names a version that should answer";
    Restart();
  }
}

TEST_F(ModelChangesTest, TrafficIsSharedByKeyAndTheSameKeyGoesTheSameWay) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2, {.alias = "canary", .traffic_percent = 25.0}), 2);
  const auto share = [&] {
    int in = 0;
    for (int i = 0; i < 1000; ++i) {
      const std::string key = absl::StrCat("r", i);
      const int64_t version = VersionFor("fashion", key);
      EXPECT_EQ(VersionFor("fashion", key), version);
      in += version == 2 ? 1 : 0;
    }
    return in / 10.0;
  };
  EXPECT_NEAR(share(), 25, 7);
  EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_traffic_ratio{alias="canary",model="fashion"})"),
            0.25);
  // Naming one is stronger, and without a key nobody is moved.
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(VersionFor("fashion@stable", absl::StrCat("r", i)), 1);
    EXPECT_EQ(VersionFor("fashion:1", absl::StrCat("r", i)), 1);
  }
  EXPECT_EQ(registry_->Find("fashion", 0).value()->version(), 1);

  ASSERT_OK(registry_->SetTraffic("fashion", "", 100, "ann"));
  EXPECT_EQ(share(), 100);
  ASSERT_OK(registry_->SetTraffic("fashion", "canary", 0, "ann"));
  EXPECT_EQ(share(), 0);
  EXPECT_FALSE(
      HasSeries(*metrics_, R"(pyramid_serving_traffic_ratio{alias="canary",model="fashion"})"));
}

TEST_F(ModelChangesTest, TrafficForWhatIsntThereIsRefused) {
  ASSERT_EQ(Promote(1), 1);
  EXPECT_THAT(registry_->SetTraffic("fashion", "canary", 10, ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no alias \"canary\"")));
  EXPECT_THAT(registry_->SetTraffic("fashion", "stable", 10, ""),
              StatusIs(absl::StatusCode::kInvalidArgument, _));
  EXPECT_THAT(registry_->SetTraffic("fashion", "canary", -1, ""),
              StatusIs(absl::StatusCode::kInvalidArgument, _));
  EXPECT_THAT(registry_->SetTraffic("nosuch", "canary", 10, ""),
              StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_F(ModelChangesTest, PromotingTheCanaryEndsTheSharing) {
  ASSERT_EQ(Promote(1), 1);
  const fs::path second = Checkpoint(2);
  ASSERT_OK(registry_->Promote(second, "fashion", {.alias = "canary", .traffic_percent = 50.0}));
  loads_.clear();
  ASSERT_OK_AND_ASSIGN(const auto promoted, registry_->Promote(second, "fashion", ""));
  EXPECT_EQ(promoted.version, 2);
  EXPECT_TRUE(promoted.existed);
  EXPECT_THAT(loads_, IsEmpty());  // it is loaded already
  EXPECT_DOUBLE_EQ(registry_->StateOf("fashion")->traffic_percent(), 0);
  for (int i = 0; i < 50; ++i) EXPECT_EQ(VersionFor("fashion", absl::StrCat(i)), 2);
}

TEST_F(ModelChangesTest, TheListTellsAliasesAndShares) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2), 2);
  ASSERT_EQ(Promote(3, {.dtype = "bf16", .alias = "canary", .traffic_percent = 10.0}), 3);
  std::vector<std::string> lines;
  for (const v1::ModelVersion& version : registry_->List()) {
    lines.push_back(absl::StrCat(version.version(), version.serving() ? " serving" : "",
                                 version.loaded() ? " loaded " : " ", version.traffic_percent(),
                                 " ", version.dtype()));
    for (const std::string& alias : version.aliases()) absl::StrAppend(&lines.back(), " ", alias);
  }
  EXPECT_THAT(
      lines, ElementsAre("1 0 fp32", "2 serving loaded 90 fp32 stable", "3 loaded 10 bf16 canary"));
}

TEST_F(ModelChangesTest, AVersionThatNoAliasNamesIsFreedWithItsSeries) {
  ASSERT_EQ(Promote(1), 1);
  const std::string series = R"(pyramid_serving_batches_total{model="fashion",version="1"})";
  EXPECT_TRUE(HasSeries(*metrics_, series));
  ASSERT_EQ(Promote(2), 2);
  EXPECT_TRUE(SoonWithout(series));
  EXPECT_FALSE(HasSeries(
      *metrics_, R"(pyramid_serving_requests_total{code="OK",model="fashion",version="1"})"));
}

TEST_F(ModelChangesTest, AnAliasMovesAndGoes) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2), 2);
  ASSERT_OK_AND_ASSIGN(const v1::ModelState state, registry_->SetAlias("fashion", "old", 1, "ann"));
  EXPECT_EQ(VersionOfAlias(state, "old"), 1);
  EXPECT_EQ(VersionFor("fashion@old"), 1);
  ASSERT_OK(registry_->SetAlias("fashion", "", 1, "ann"));
  EXPECT_EQ(VersionFor("fashion"), 1);
  ASSERT_OK(registry_->RemoveAlias("fashion", "old", "bob"));
  EXPECT_EQ(VersionFor("fashion@old"), 0);
  EXPECT_EQ(VersionFor("fashion"), 1);
  EXPECT_THAT(registry_->RemoveAlias("fashion", "stable", ""), StatusIs(kRefused, _));
  EXPECT_THAT(registry_->RemoveAlias("fashion", "old", ""),
              StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(registry_->SetAlias("fashion", "old", 9, ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("there is 1, 2")));
  EXPECT_THAT(registry_->SetAlias("fashion", "a b", 1, ""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("alias \"a b\"")));
  EXPECT_THAT(Actions(), ElementsAre(" promote stable 0>1", " promote stable 1>2",
                                     "ann alias old 0>1", "ann alias stable 2>1",
                                     "bob remove-alias old 1>0", " remove-alias stable 0>0 refused",
                                     " remove-alias old 0>0 refused", " alias old 0>9 refused"));
}

TEST_F(ModelChangesTest, AnAliasForADamagedVersionIsDataLoss) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2), 2);
  Damage(VersionFolder("fashion", 1) / std::string(kWeightsFile));
  EXPECT_THAT(registry_->SetAlias("fashion", "stable", 1, ""),
              StatusIs(absl::StatusCode::kDataLoss, _));
  EXPECT_EQ(BiasOf("fashion"), 2);
}

TEST_F(ModelChangesTest, RollsBackToWhatWasStableStepByStep) {
  for (int bias = 1; bias <= 3; ++bias) ASSERT_EQ(Promote(bias), bias);
  ASSERT_OK(registry_->Rollback("fashion", "ann"));
  EXPECT_EQ(BiasOf("fashion"), 2);
  ASSERT_OK(registry_->Rollback("fashion", "ann"));
  EXPECT_EQ(BiasOf("fashion"), 1);
  EXPECT_THAT(registry_->Rollback("fashion", "ann"),
              StatusIs(kRefused, HasSubstr("fashion has no earlier stable version")));
  EXPECT_EQ(BiasOf("fashion"), 1);
  EXPECT_THAT(registry_->Rollback("nosuch", "ann"), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_EQ(Actions().at(3), "ann rollback stable 3>2");
  // What was rolled back from can be promoted again, and that can be rolled back.
  ASSERT_EQ(Promote(4), 4);
  ASSERT_OK(registry_->Rollback("fashion", "ann"));
  EXPECT_EQ(BiasOf("fashion"), 1);
}

TEST_F(ModelChangesTest, ARollbackThatFailsLeavesTheOldVersion) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2), 2);
  Damage(VersionFolder("fashion", 1) / std::string(kWeightsFile));
  EXPECT_THAT(registry_->Rollback("fashion", ""), StatusIs(absl::StatusCode::kDataLoss, _));
  EXPECT_EQ(BiasOf("fashion"), 2);
  EXPECT_EQ(registry_->StateOf("fashion")->earlier_stable_size(), 1);
}

TEST_F(ModelChangesTest, AReloadSwapsTheSameVersionAndHoldersKeepTheirs) {
  ASSERT_EQ(Promote(1), 1);
  const auto held = registry_->Find("fashion", 0).value();
  loads_.clear();
  ASSERT_OK(registry_->Load("fashion", "ann"));
  EXPECT_THAT(loads_, ElementsAre("1 fp32"));
  const auto now = registry_->Find("fashion", 0).value();
  EXPECT_NE(now, held);
  EXPECT_EQ(now->version(), 1);
  EXPECT_EQ(Bias(*held), 1);
  EXPECT_EQ(Bias(*now), 1);
  EXPECT_TRUE(HasSeries(*metrics_, R"(pyramid_serving_images_total{model="fashion",version="1"})"));
}

TEST_F(ModelChangesTest, AFailedReloadLeavesTheOldVersion) {
  ASSERT_EQ(Promote(1), 1);
  const auto before = registry_->Find("fashion", 0).value();
  self_test_ = absl::FailedPreconditionError("self-test: a logit is off by 3");
  EXPECT_THAT(registry_->Load("fashion", ""), StatusIs(kRefused, HasSubstr("off by 3")));
  self_test_ = SelfTestResult{};
  Damage(VersionFolder("fashion", 1) / std::string(kWeightsFile));
  EXPECT_THAT(registry_->Load("fashion", ""), StatusIs(absl::StatusCode::kDataLoss, _));
  EXPECT_EQ(registry_->Find("fashion", 0).value(), before);
  EXPECT_EQ(BiasOf("fashion"), 1);
}

TEST_F(ModelChangesTest, UnloadedModelsAreUnavailableAlsoAfterARestart) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2, {.alias = "canary"}), 2);
  ASSERT_OK(registry_->Unload("fashion", "ann"));
  const auto unavailable =
      StatusIs(absl::StatusCode::kUnavailable, HasSubstr("fashion is unloaded"));
  EXPECT_THAT(registry_->Find("fashion", 0), unavailable);
  EXPECT_THAT(registry_->Get("fashion:2", 0), unavailable);
  EXPECT_THAT(registry_->Get("fashion@canary", 0), unavailable);
  EXPECT_TRUE(SoonWithout(R"(pyramid_serving_images_total{model="fashion",version="1"})"));
  EXPECT_TRUE(SoonWithout(R"(pyramid_serving_images_total{model="fashion",version="2"})"));
  EXPECT_THAT(testing::MetricsText(*metrics_),
              ::testing::Not(HasSubstr("pyramid_serving_model_info{")));
  loads_.clear();
  Restart();
  EXPECT_THAT(loads_, IsEmpty());
  EXPECT_THAT(registry_->Find("fashion", 0), unavailable);
  for (const v1::ModelVersion& version : registry_->List()) {
    EXPECT_TRUE(version.unloaded());
    EXPECT_FALSE(version.serving());
    EXPECT_FALSE(version.loaded());
  }
  ASSERT_OK(registry_->Load("fashion", "ann"));
  EXPECT_EQ(VersionFor("fashion"), 1);
  EXPECT_EQ(VersionFor("fashion@canary"), 2);
  EXPECT_THAT(registry_->Unload("nosuch", ""), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(registry_->Load("nosuch", ""), StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_F(ModelChangesTest, RequestsInProgressAreAnsweredThoughTheModelIsUnloaded) {
  ASSERT_EQ(Promote(1), 1);
  const auto held = registry_->Find("fashion", 0).value();
  ASSERT_OK(registry_->Unload("fashion", ""));
  EXPECT_EQ(Bias(*held), 1);
}

// A balancer that goes by readiness sends nothing that could load the rest.
TEST_F(ModelChangesTest, APartBringsAnUnloadedModelBackAsAWhole) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2), 2);
  ASSERT_EQ(Promote(3, {.alias = "canary", .traffic_percent = 100.0}), 3);
  const auto unload = [&] {
    ASSERT_OK(registry_->Unload("fashion", ""));
    EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_model_ready{model="fashion"})"), 0);
    loads_.clear();
  };
  const auto is_back = [&](int64_t stable, int64_t canary) {
    EXPECT_TRUE(registry_->Answers());
    EXPECT_TRUE(registry_->Readiness().at("fashion"));
    EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_model_ready{model="fashion"})"), 1);
    EXPECT_THAT(testing::MetricsText(*metrics_), HasSubstr("pyramid_serving_model_info{"));
    loads_.clear();
    EXPECT_EQ(VersionFor("fashion@stable"), stable);
    EXPECT_EQ(VersionFor("fashion@canary"), canary);
    EXPECT_EQ(VersionFor("fashion", "k"), canary) << "has its share at once";
    EXPECT_THAT(loads_, IsEmpty()) << "nothing is left for a request to load";
  };
  unload();
  ASSERT_OK(registry_->SetAlias("fashion", "canary", 3, ""));
  is_back(2, 3);
  unload();
  ASSERT_EQ(Promote(4, {.alias = "canary"}), 4);
  is_back(2, 4);
  unload();
  ASSERT_OK(registry_->Rollback("fashion", ""));
  is_back(1, 4);
  unload();
  ASSERT_OK(registry_->SetAlias("fashion", "stable", 2, ""));
  EXPECT_THAT(loads_, ElementsAre("2 fp32", "4 fp32"));
  is_back(2, 4);
  unload();
  ASSERT_EQ(Promote(5), 5);
  is_back(5, 4);
}

TEST_F(ModelChangesTest, APartDoesntBringBackAModelWhoseOtherPartCantBeLoaded) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2), 2);
  ASSERT_EQ(Promote(3, {.alias = "canary"}), 3);
  ASSERT_OK(registry_->Unload("fashion", ""));
  Damage(VersionFolder("fashion", 2) / std::string(kWeightsFile));
  Damage(VersionFolder("fashion", 3) / std::string(kWeightsFile));
  EXPECT_THAT(registry_->SetAlias("fashion", "stable", 1, ""),
              StatusIs(absl::StatusCode::kDataLoss,
                       AllOf(HasSubstr("fashion is unloaded and comes back with all its aliases; "
                                       "let canary name another version than 3, or remove it: "),
                             HasSubstr("weights"))));
  EXPECT_THAT(
      registry_->Promote(Checkpoint(4), "fashion", {.alias = "canary"}),
      StatusIs(absl::StatusCode::kDataLoss, HasSubstr("let stable name another version than 2: ")));
  EXPECT_FALSE(fs::exists(VersionFolder("fashion", 4)));
  EXPECT_TRUE(registry_->StateOf("fashion")->unloaded());
  Restart();
  fs::remove(VersionFolder("fashion", 3) / std::string(kManifestFile));
  Restart();
  EXPECT_THAT(registry_->Rollback("fashion", ""),
              StatusIs(absl::StatusCode::kDataLoss,
                       AllOf(HasSubstr("let canary name another version than 3"),
                             HasSubstr("version 3 of fashion can't be used"))));
  // What the text says is a way out.
  ASSERT_OK(registry_->RemoveAlias("fashion", "canary", ""));
  ASSERT_OK(registry_->SetAlias("fashion", "stable", 1, ""));
  EXPECT_EQ(VersionFor("fashion"), 1);
}

TEST_F(ModelChangesTest, AliasesTrafficAndHistorySurviveARestart) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2), 2);
  ASSERT_EQ(Promote(3, {.dtype = "bf16", .alias = "canary", .traffic_percent = 100.0}), 3);
  const std::vector<std::string> before = Actions();
  Restart();
  EXPECT_EQ(VersionFor("fashion@stable"), 2);
  EXPECT_EQ(VersionFor("fashion@canary"), 3);
  EXPECT_EQ(VersionFor("fashion", "any"), 3);
  EXPECT_EQ(registry_->Find("fashion@canary", 0).value()->dtype(), "bf16");
  EXPECT_EQ(Actions(), before);
  ASSERT_OK(registry_->Rollback("fashion", ""));
  EXPECT_EQ(VersionFor("fashion@stable"), 1);
  Restart();
  EXPECT_EQ(VersionFor("fashion@stable"), 1);
}

TEST_F(ModelChangesTest, AtStartAnEarlierStableStandsInNeverTheCanary) {
  for (int bias = 1; bias <= 3; ++bias) ASSERT_EQ(Promote(bias), bias);
  ASSERT_EQ(Promote(4, {.alias = "canary"}), 4);
  Damage(VersionFolder("fashion", 3) / std::string(kWeightsFile));
  Restart();
  EXPECT_EQ(VersionFor("fashion"), 2);
  EXPECT_EQ(VersionFor("fashion@canary"), 4);
  Damage(VersionFolder("fashion", 2) / std::string(kWeightsFile));
  Damage(VersionFolder("fashion", 1) / std::string(kWeightsFile));
  Restart();
  EXPECT_EQ(VersionFor("fashion"), 0);
  EXPECT_EQ(VersionFor("fashion@canary"), 4);
}

TEST_F(ModelChangesTest, WithoutAWorkingCanaryAllGoToStable) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2, {.alias = "canary", .traffic_percent = 100.0}), 2);
  EXPECT_EQ(VersionFor("fashion", "k"), 2);
  Damage(VersionFolder("fashion", 2) / std::string(kWeightsFile));
  Restart();
  EXPECT_EQ(VersionFor("fashion", "k"), 1);
  EXPECT_EQ(VersionFor("fashion@canary"), 0);
}

TEST_F(ModelChangesTest, EventsHaveTimeActorDigestAndEveryNumber) {
  AgreeOn(4);
  const absl::Time before = absl::Now() - absl::Seconds(1);
  ASSERT_OK(registry_->Promote(Checkpoint(1, Validated(0.91)), "fashion", {.actor = "ann@desk"}));
  ASSERT_OK(registry_->Promote(Checkpoint(2, Validated(0.92)), "fashion",
                               {.dtype = "bf16",
                                .alias = "canary",
                                .limits = {.min_top1 = 0.9,
                                           .max_latency = absl::Seconds(5),
                                           .latency_batch = 2,
                                           .min_agreement = 0.9},
                                .traffic_percent = 5.0,
                                .actor = "bob"}));
  const std::vector<v1::ModelEvent> events = Events();
  ASSERT_EQ(events.size(), 2u);
  const v1::ModelEvent& event = events[1];
  EXPECT_EQ(events[0].actor(), "ann@desk");
  EXPECT_EQ(event.actor(), "bob");
  EXPECT_GE(event.time().seconds(), absl::ToUnixSeconds(before));
  EXPECT_EQ(event.digest(), ReadManifest(VersionFolder("fashion", 2))->digest());
  EXPECT_EQ(event.dtype(), "bf16");
  EXPECT_DOUBLE_EQ(event.traffic_percent(), 5);
  std::vector<std::string> gates;
  for (const v1::GateResult& gate : event.gates()) {
    gates.push_back(gate.name());
    EXPECT_TRUE(gate.asked() && gate.available() && gate.passed()) << gate.text();
  }
  EXPECT_THAT(gates, ElementsAre("top-1", "self-test", "agreement", "latency"));
  EXPECT_THAT(registry_->EventsOf("nosuch", 10), StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_F(ModelChangesTest, WhatCantBeRecordedDoesntHappen) {
  ASSERT_EQ(Promote(1), 1);
  fs::remove(folder_ / "models/fashion/promotions.jsonl");
  fs::create_directories(folder_ / "models/fashion/promotions.jsonl");
  EXPECT_FALSE(registry_->Promote(Checkpoint(2), "fashion", "").ok());
  EXPECT_FALSE(registry_->Unload("fashion", "").ok());
  EXPECT_EQ(BiasOf("fashion"), 1);
  EXPECT_FALSE(fs::exists(VersionFolder("fashion", 2)));
}

TEST_F(ModelChangesTest, ThereIsATimeWithoutChanges) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2), 2);
  registry_->StopChanges();
  const auto refused =
      StatusIs(absl::StatusCode::kUnavailable, HasSubstr("the server is shutting down"));
  EXPECT_THAT(registry_->Rollback("fashion", "ann"), refused);
  EXPECT_THAT(registry_->Load("fashion", "ann"), refused);
  EXPECT_THAT(registry_->Unload("fashion", "ann"), refused);
  EXPECT_THAT(registry_->SetAlias("fashion", "canary", 1, "ann"), refused);
  EXPECT_THAT(registry_->Promote(folder_ / "checkpoint", "fashion", ""), refused);
  EXPECT_EQ(BiasOf("fashion"), 2);
  EXPECT_EQ(Actions().size(), 2u);
}

TEST_F(ModelChangesTest, AStateThatCantBeWrittenChangesNothing) {
  ASSERT_EQ(Promote(1), 1);
  ASSERT_EQ(Promote(2), 2);
  fs::remove(folder_ / "models/fashion/state.json");
  fs::create_directories(folder_ / "models/fashion/state.json/in the way");
  EXPECT_FALSE(registry_->Rollback("fashion", "ann").ok());
  EXPECT_EQ(BiasOf("fashion"), 2);
  // The record was there before the state; the refusal takes it back.
  const std::vector<std::string> actions = Actions();
  ASSERT_EQ(actions.size(), 4u);
  EXPECT_EQ(actions[2], "ann rollback stable 2>1");
  EXPECT_EQ(actions[3], "ann rollback stable 2>1 refused");
  EXPECT_THAT(Events()[3].error(),
              AllOf(HasSubstr("nothing has changed"),
                    HasSubstr("the line of promotions.jsonl before this refusal's is void")));
}

TEST_F(ModelChangesTest, AFirstPromotionWhoseStateCantBeWrittenIsRecordedAsRefused) {
  fs::create_directories(folder_ / "models/fashion/state.json/in the way");
  EXPECT_FALSE(registry_->Promote(Checkpoint(1), "fashion", {.actor = "ann"}).ok());
  EXPECT_THAT(registry_->StateOf("fashion"), StatusIs(absl::StatusCode::kNotFound, _));
  ASSERT_OK_AND_ASSIGN(const auto events, ReadModelEvents(folder_ / "models/fashion", 10));
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].code(), 0);
  EXPECT_NE(events[1].code(), 0);
  EXPECT_THAT(events[1].error(), HasSubstr("before this refusal's is void"));
}

TEST_F(ModelChangesTest, ReloadsRollbacksAndPromotionsUnderLoadMakeNoErrors) {
  ASSERT_EQ(Promote(1), 1);
  std::atomic<bool> stop{false};
  std::atomic<int> answered{0}, wrong{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t) {
    callers.emplace_back([&, t] {
      for (int i = 0; !stop; ++i) {
        const auto version =
            registry_->Get("fashion", 0, [&] { return RouteKeyOf(absl::StrCat(t, "-", i)); });
        // Checkpoint n has bias n and becomes version n.
        if (!version.ok() || Bias(**version) != static_cast<float>((*version)->version())) ++wrong;
        ++answered;
      }
    });
  }
  for (int bias = 2; bias <= 16; bias += 2) {
    EXPECT_EQ(Promote(bias), bias);
    EXPECT_OK(registry_->Load("fashion", ""));
    EXPECT_EQ(Promote(bias + 1, {.alias = "canary", .traffic_percent = 50.0}), bias + 1);
    EXPECT_OK(registry_->Rollback("fashion", ""));
  }
  stop = true;
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
  EXPECT_GT(answered.load(), 0);
}

}  // namespace
}  // namespace pyramid
