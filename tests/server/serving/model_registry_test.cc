#include "server/serving/model_registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "model/checkpoint.h"
#include "proto/base/file.h"
#include "tests/server/serving/registry_fixture.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::FakeManifest;
using testing::FakeNetwork;
using testing::HasSeries;
using ::testing::HasSubstr;
using testing::Sample;
using testing::StatusIs;
using testing::WriteFakeCheckpoint;

class ModelRegistryTest : public testing::RegistryFixture {};

TEST_F(ModelRegistryTest, PromotesACheckpointAsVersionOne) {
  ASSERT_OK_AND_ASSIGN(const auto promoted, registry_->Promote(Checkpoint(5), "fashion", ""));
  EXPECT_EQ(promoted.version, 1);
  EXPECT_FALSE(promoted.existed);
  EXPECT_EQ(promoted.previous, 0);
  EXPECT_THAT(Texts(promoted.gates),
              ElementsAre("top-1: not available (the checkpoint isn't validated)",
                          "self-test: max error 1e-06, wanted ≤ 0.0001",
                          "agreement: not available (nothing is stable yet)"));
  EXPECT_EQ(promoted.digest, ReadManifest(VersionFolder("fashion", 1))->digest());
  EXPECT_EQ(BiasOf("fashion"), 5);
  EXPECT_EQ(
      Sample(*metrics_,
             absl::StrCat(
                 R"(pyramid_serving_model_info{digest=")", promoted.digest,
                 R"(",dtype="fp32",job="",model="fashion",variant="pvt_v2_b0",version="1"})")),
      1);
}

TEST_F(ModelRegistryTest, TheNextCheckpointTakesOver) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  ASSERT_OK_AND_ASSIGN(const auto promoted, registry_->Promote(Checkpoint(2), "fashion", ""));
  EXPECT_EQ(promoted.version, 2);
  EXPECT_EQ(BiasOf("fashion"), 2);
}

TEST_F(ModelRegistryTest, TheTrainingStateStaysBehind) {
  const fs::path folder = folder_ / "with-state";
  ASSERT_OK(
      WriteCheckpoint(folder, FakeManifest(),
                      {{std::string(kWeightsFile), "1"}, {std::string(kStateFile), "optimizer"}}));
  ASSERT_OK(registry_->Promote(folder, "fashion", ""));
  EXPECT_TRUE(fs::exists(VersionFolder("fashion", 1) / std::string(kWeightsFile)));
  EXPECT_FALSE(fs::exists(VersionFolder("fashion", 1) / std::string(kStateFile)));
}

TEST_F(ModelRegistryTest, TheSameDigestIsTheSameVersion) {
  const fs::path checkpoint = Checkpoint(1);
  ASSERT_OK(registry_->Promote(checkpoint, "fashion", ""));
  ASSERT_OK_AND_ASSIGN(const auto again, registry_->Promote(checkpoint, "fashion", ""));
  EXPECT_EQ(again.version, 1);
  EXPECT_TRUE(again.existed);
  EXPECT_THAT(Texts(again.gates), ::testing::Contains(HasSubstr("self-test: max error")));
  EXPECT_THAT(loads_, ElementsAre("1 fp32"));
}

TEST_F(ModelRegistryTest, TheSameDigestUnderAnotherNameIsANewModel) {
  const fs::path checkpoint = Checkpoint(1);
  ASSERT_OK(registry_->Promote(checkpoint, "fashion", ""));
  ASSERT_OK_AND_ASSIGN(const auto other, registry_->Promote(checkpoint, "other", ""));
  EXPECT_EQ(other.version, 1);
  EXPECT_FALSE(other.existed);
}

TEST_F(ModelRegistryTest, AnOlderDigestGoesBackIntoServiceAsItsVersion) {
  const fs::path first = Checkpoint(1);
  ASSERT_OK(registry_->Promote(first, "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  ASSERT_OK_AND_ASSIGN(const auto again, registry_->Promote(first, "fashion", ""));
  EXPECT_EQ(again.version, 1);
  EXPECT_TRUE(again.existed);
  EXPECT_EQ(BiasOf("fashion"), 1);
  Restart();
  EXPECT_EQ(registry_->Get("fashion", 0).value()->version(), 1);
}

TEST_F(ModelRegistryTest, ADamagedCopyIsNotReused) {
  const fs::path checkpoint = Checkpoint(1);
  ASSERT_OK(registry_->Promote(checkpoint, "fashion", ""));
  Damage(VersionFolder("fashion", 1) / std::string(kWeightsFile));
  ASSERT_OK_AND_ASSIGN(const auto again, registry_->Promote(checkpoint, "fashion", ""));
  EXPECT_EQ(again.version, 2);
  EXPECT_FALSE(again.existed);
  const auto damaged = registry_->ListDamaged();
  ASSERT_EQ(damaged.size(), 1U);
  EXPECT_EQ(damaged[0].version, 1);
}

TEST_F(ModelRegistryTest, ADamagedCopyThatIsLoadedAnswersUntilItIsLetGo) {
  const fs::path checkpoint = Checkpoint(1);
  ASSERT_OK(registry_->Promote(checkpoint, "fashion", ""));
  Damage(VersionFolder("fashion", 1) / std::string(kWeightsFile));
  ASSERT_OK_AND_ASSIGN(const auto canary,
                       registry_->Promote(checkpoint, "fashion", {.alias = "canary"}));
  EXPECT_EQ(canary.version, 2) << "a fresh copy";
  EXPECT_EQ(BiasOf("fashion"), 1);
  const auto lines = [&] {
    std::vector<std::string> all;
    for (const v1::ModelVersion& version : registry_->List()) {
      all.push_back(absl::StrCat(version.version(), version.serving() ? " serving" : "",
                                 version.loaded() ? " loaded" : ""));
    }
    for (const auto& damaged : registry_->ListDamaged()) {
      all.push_back(absl::StrCat(damaged.version, " damaged"));
    }
    return all;
  };
  EXPECT_THAT(lines(), ElementsAre("1 serving loaded", "2 loaded"));
  // The good copy is known by its digest from now on.
  ASSERT_OK_AND_ASSIGN(const auto again, registry_->Promote(checkpoint, "fashion", ""));
  EXPECT_EQ(again.version, 2);
  EXPECT_TRUE(again.existed);
  EXPECT_THAT(lines(), ElementsAre("2 serving loaded", "1 damaged"));
  EXPECT_THAT(registry_->Get("fashion", 1),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("can't be used")));
}

TEST_F(ModelRegistryTest, ADtypeIsKeptOverARestart) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", "bf16"));
  Restart();
  EXPECT_THAT(loads_, ElementsAre("1 bf16", "1 bf16"));
  EXPECT_EQ(registry_->Get("fashion", 0).value()->dtype(), "bf16");
}

TEST_F(ModelRegistryTest, TheSameDigestInAnotherDtypeIsLoadedAgain) {
  const fs::path checkpoint = Checkpoint(1);
  ASSERT_OK(registry_->Promote(checkpoint, "fashion", ""));
  ASSERT_OK_AND_ASSIGN(const auto again, registry_->Promote(checkpoint, "fashion", "bf16"));
  EXPECT_EQ(again.version, 1);
  EXPECT_TRUE(again.existed);
  EXPECT_THAT(loads_, ElementsAre("1 fp32", "1 bf16"));
}

TEST_F(ModelRegistryTest, WarmsUpWithPowersOfTwoAndAFullBatch) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  EXPECT_THAT(network_.batches(), ElementsAre(1, 2, 4, 8));
}

TEST_F(ModelRegistryTest, AMissingSelfTestIsReportedAsNotAvailable) {
  self_test_ = SelfTestResult{.available = false};
  ASSERT_OK_AND_ASSIGN(const auto promoted, registry_->Promote(Checkpoint(1), "fashion", ""));
  EXPECT_THAT(Texts(promoted.gates),
              ::testing::Contains("self-test: not available (the checkpoint has none)"));
}

TEST_F(ModelRegistryTest, AFailingSelfTestKeepsTheOldVersion) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  self_test_ = absl::FailedPreconditionError("self-test: max error 3, wanted ≤ 1e-4");
  EXPECT_THAT(registry_->Promote(Checkpoint(2), "fashion", ""),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("max error 3")));
  EXPECT_EQ(BiasOf("fashion"), 1);
  EXPECT_FALSE(fs::exists(VersionFolder("fashion", 2)));
  EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_model_load_failures_total{model="fashion"})"), 1);
  EXPECT_EQ(registry_->List().size(), 1u);
}

TEST_F(ModelRegistryTest, AFailedFirstPromotionLeavesNoModel) {
  self_test_ = absl::FailedPreconditionError("self-test failed");
  EXPECT_FALSE(registry_->Promote(Checkpoint(1), "fashion", "").ok());
  EXPECT_FALSE(fs::exists(folder_ / "models" / "fashion"));
  EXPECT_THAT(registry_->Get("fashion", 0),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("promote")));
}

TEST_F(ModelRegistryTest, AFailingWarmUpKeepsTheOldVersion) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  network_.Fail(absl::ResourceExhaustedError("out of memory"));
  EXPECT_THAT(registry_->Promote(Checkpoint(2), "fashion", ""),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("warming up"), HasSubstr("out of memory"))));
  network_.Fail(absl::OkStatus());
  EXPECT_EQ(BiasOf("fashion"), 1);
}

TEST_F(ModelRegistryTest, NamesThatAreNoFolderNamesAreRefused) {
  const fs::path checkpoint = Checkpoint(1);
  for (const std::string& name : {std::string(), std::string("."), std::string(".hidden"),
                                  std::string("../up"), std::string("a b"), std::string("a/b"),
                                  std::string(65, 'a'), std::string("a\0b", 3), std::string("é")}) {
    EXPECT_THAT(registry_->Promote(checkpoint, name, ""),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1 to 64")))
        << name;
  }
  EXPECT_OK(registry_->Promote(checkpoint, "Fashion_mnist-2.0", ""));
  EXPECT_OK(registry_->Promote(checkpoint, std::string(64, 'a'), ""));
}

TEST_F(ModelRegistryTest, AnUnknownDtypeIsRefused) {
  EXPECT_THAT(registry_->Promote(Checkpoint(1), "fashion", "fp8"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("use fp32 or bf16")));
  const absl::Status endless =
      registry_->Promote(Checkpoint(1), "fashion", std::string(10'000, '\n')).status();
  EXPECT_LT(endless.message().size(), 400u);
}

TEST_F(ModelRegistryTest, NoCheckpointIsNotFound) {
  EXPECT_THAT(registry_->Promote(folder_ / "nothing", "fashion", ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nothing")));
}

TEST_F(ModelRegistryTest, ADamagedCheckpointIsDataLoss) {
  const fs::path checkpoint = Checkpoint(1);
  Damage(checkpoint / std::string(kWeightsFile));
  EXPECT_THAT(registry_->Promote(checkpoint, "fashion", ""),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("weights")));
  EXPECT_FALSE(fs::exists(folder_ / "models" / "fashion"));
}

TEST_F(ModelRegistryTest, ACheckpointWithoutPreprocessingIsRefused) {
  v1::Manifest manifest = FakeManifest();
  manifest.clear_preprocessing();
  EXPECT_THAT(registry_->Promote(Checkpoint(1, manifest), "fashion", ""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("preprocessing")));
}

TEST_F(ModelRegistryTest, PreprocessingForOtherChannelsIsRefused) {
  v1::Manifest manifest = FakeManifest();
  manifest.mutable_network()->set_in_channels(3);
  EXPECT_THAT(registry_->Promote(Checkpoint(1, manifest), "fashion", ""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("in_channels is 3")));
}

TEST_F(ModelRegistryTest, LabelsThatDontMatchTheClassesAreRefused) {
  v1::Manifest manifest = FakeManifest();
  manifest.add_labels("dress");
  EXPECT_THAT(registry_->Promote(Checkpoint(1, manifest), "fashion", ""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("labels has 4 entries")));
}

TEST_F(ModelRegistryTest, ARestartServesWhatWasInService) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(3), "other", ""));
  Restart();
  EXPECT_EQ(BiasOf("fashion"), 2);
  EXPECT_EQ(BiasOf("other"), 3);
}

TEST_F(ModelRegistryTest, StartSkipsADamagedVersionAndTriesAnOlderOne) {
  for (int bias = 1; bias <= 3; ++bias)
    ASSERT_OK(registry_->Promote(Checkpoint(bias), "fashion", ""));
  Damage(VersionFolder("fashion", 3) / std::string(kWeightsFile));
  fs::remove(VersionFolder("fashion", 2) / std::string(kManifestFile));
  Restart();
  EXPECT_EQ(BiasOf("fashion"), 1);
  ASSERT_OK_AND_ASSIGN(const auto next, registry_->Promote(Checkpoint(4), "fashion", ""));
  EXPECT_EQ(next.version, 4);  // a damaged version's number isn't used again
  for (const int version : {2, 3}) {
    EXPECT_THAT(registry_->Get("fashion", version),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr("can't be used")));
  }
}

TEST_F(ModelRegistryTest, AModelWithoutAUsableVersionSaysSo) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  Damage(VersionFolder("fashion", 1) / std::string(kWeightsFile));
  Restart();
  EXPECT_THAT(
      registry_->Get("fashion", 0),
      StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no version of fashion could be loaded")));
  EXPECT_THAT(registry_->Get("fashion", 7),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("there is none")));
  EXPECT_FALSE(registry_->Answers());
  EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_model_ready{model="fashion"})"), 0);
  ASSERT_OK(registry_->Promote(Checkpoint(2), "other", ""));
  EXPECT_TRUE(registry_->Answers()) << "one does";
  EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_model_ready{model="other"})"), 1);
  ASSERT_OK(registry_->Unload("other", "").status());
  EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_model_ready{model="other"})"), 0);
}

TEST_F(ModelRegistryTest, AModelWhoseEveryManifestIsUnreadableHasFailedAndIsThere) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  for (const bool with_state : {true, false}) {
    for (const int version : {1, 2}) {
      std::ofstream(VersionFolder("fashion", version) / std::string(kManifestFile)) << "garbage";
    }
    if (!with_state) fs::remove(folder_ / "models" / "fashion" / "state.json");
    Restart();
    EXPECT_FALSE(registry_->Answers());
    EXPECT_THAT(registry_->Readiness(), ElementsAre(::testing::Pair("fashion", false)));
    EXPECT_THAT(registry_->Get("fashion", 0),
                StatusIs(absl::StatusCode::kUnavailable,
                         HasSubstr("no version of fashion could be loaded")));
    EXPECT_THAT(registry_->Get("fashion", 2),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr("version 2 of fashion")));
    EXPECT_EQ(registry_->ListDamaged().size(), 2u);
  }
  // The name is as good as before.
  ASSERT_OK_AND_ASSIGN(const auto next, registry_->Promote(Checkpoint(3), "fashion", ""));
  EXPECT_EQ(next.version, 3);
  EXPECT_EQ(BiasOf("fashion"), 3);
  EXPECT_TRUE(registry_->Answers());
}

TEST_F(ModelRegistryTest, AServerWithoutModelsOrWithUnloadedOnesIsNoFailedOne) {
  EXPECT_TRUE(registry_->Answers());
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  EXPECT_TRUE(registry_->Answers());
  ASSERT_OK(registry_->Unload("fashion", "").status());
  EXPECT_TRUE(registry_->Answers()) << "as somebody wished";
}

TEST_F(ModelRegistryTest, StartTakesTheNewestWhenTheRecordIsGone) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  fs::remove(folder_ / "models" / "fashion" / "state.json");
  Restart();
  EXPECT_EQ(BiasOf("fashion"), 2);
}

TEST_F(ModelRegistryTest, StartClearsAwayAnInterruptedPromotion) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  fs::create_directories(folder_ / "models" / "fashion" / "2.tmp");
  fs::create_directories(folder_ / "models" / ".cache");
  std::ofstream(folder_ / "models" / "notes.txt") << "not a model";
  Restart();
  EXPECT_FALSE(fs::exists(folder_ / "models" / "fashion" / "2.tmp"));
  EXPECT_EQ(registry_->List().size(), 1u);
}

TEST_F(ModelRegistryTest, AFolderThatCantBeMadeIsAnError) {
  std::ofstream(folder_ / "file") << "in the way";
  ModelRegistry::Options options;
  options.folder = folder_ / "file" / "models";
  ModelRegistry registry(options, testing::FakeLoader(network_), testing::PassingSelfTest,
                         *metrics_);
  EXPECT_FALSE(registry.Start().ok());
}

TEST_F(ModelRegistryTest, ANamedOlderVersionIsLoadedOnDemandAndKept) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  ASSERT_OK_AND_ASSIGN(const auto not_loaded, registry_->Find("fashion", 1));
  EXPECT_EQ(not_loaded, nullptr);
  loads_.clear();
  EXPECT_EQ(BiasOf("fashion", 1), 1);
  EXPECT_EQ(BiasOf("fashion", 1), 1);
  EXPECT_THAT(loads_, ElementsAre("1 fp32"));
  EXPECT_EQ(BiasOf("fashion"), 2);
}

TEST_F(ModelRegistryTest, OnlyTwoOlderVersionsAreKeptTheLeastRecentlyUsedGoes) {
  for (int bias = 1; bias <= 4; ++bias)
    ASSERT_OK(registry_->Promote(Checkpoint(bias), "fashion", ""));
  EXPECT_EQ(BiasOf("fashion", 1), 1);
  EXPECT_EQ(BiasOf("fashion", 2), 2);
  EXPECT_EQ(BiasOf("fashion", 1), 1);
  EXPECT_EQ(BiasOf("fashion", 3), 3);  // 2 goes
  EXPECT_NE(registry_->Find("fashion", 1).value(), nullptr);
  EXPECT_EQ(registry_->Find("fashion", 2).value(), nullptr);
  EXPECT_NE(registry_->Find("fashion", 3).value(), nullptr);
}

TEST_F(ModelRegistryTest, ADamagedOlderVersionIsDataLossAndThenUnavailable) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  Damage(VersionFolder("fashion", 1) / std::string(kWeightsFile));
  EXPECT_THAT(registry_->Get("fashion", 1),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("version 1")));
  for (int i = 0; i < 2; ++i) {
    EXPECT_THAT(registry_->Get("fashion", 1),
                StatusIs(absl::StatusCode::kUnavailable,
                         AllOf(HasSubstr("version 1 of fashion"), HasSubstr("weights"))));
  }
  EXPECT_THAT(registry_->Get("fashion", 7),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("there is 2")));
  const auto damaged = registry_->ListDamaged();
  ASSERT_EQ(damaged.size(), 1U);
  EXPECT_EQ(damaged[0].name, "fashion");
  EXPECT_EQ(damaged[0].version, 1);
  EXPECT_TRUE(registry_->Answers());
}

// serving.md 1.5: known and not ready, whatever the reason.
TEST_F(ModelRegistryTest, AKnownVersionThatCantBeLoadedNowIsUnavailableUntilItCan) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  const auto unavailable = [&](const char* why) {
    EXPECT_THAT(registry_->Get("fashion", 1),
                StatusIs(absl::StatusCode::kUnavailable,
                         AllOf(HasSubstr("loading fashion version 1"), HasSubstr(why))));
    EXPECT_THAT(registry_->ListDamaged(), ::testing::IsEmpty());
  };
  const fs::path manifest = VersionFolder("fashion", 1) / std::string(kManifestFile);
  fs::rename(manifest, folder_ / "aside");
  unavailable("No such file");
  fs::rename(folder_ / "aside", manifest);

  v1::Manifest labels = FakeManifest();
  labels.add_labels("dress");
  const fs::path good = VersionFolder("fashion", 1);
  fs::rename(good, folder_ / "good");
  ASSERT_OK(WriteFakeCheckpoint(good, 1, labels));
  unavailable("labels has 4 entries");
  fs::remove_all(good);
  fs::rename(folder_ / "good", good);

  for (const absl::Status& why :
       {absl::ResourceExhaustedError("out of memory"), absl::PermissionDeniedError("may not"),
        absl::InternalError("broken"), absl::FailedPreconditionError("self-test: off by 3")}) {
    self_test_ = why;
    unavailable(std::string(why.message()).c_str());
  }
  self_test_ = SelfTestResult{};
  EXPECT_EQ(BiasOf("fashion", 1), 1);
}

TEST_F(ModelRegistryTest, AListOfWhatThereIsIsBounded) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  // Only their manifests are read at the start.
  const fs::path manifest = VersionFolder("fashion", 1) / std::string(kManifestFile);
  for (int version = 2; version <= 3000; ++version) {
    fs::create_directories(VersionFolder("fashion", version));
    fs::copy_file(manifest, VersionFolder("fashion", version) / std::string(kManifestFile));
  }
  Restart();
  for (const absl::Status& unknown :
       {registry_->Find("fashion", 9999).status(),
        registry_->SetAlias("fashion", "canary", 9999, "").status()}) {
    EXPECT_THAT(unknown, StatusIs(absl::StatusCode::kNotFound,
                                  AllOf(HasSubstr("there is 2981, 2982, "),
                                        HasSubstr(", 2999, 3000 and 2980 older"))));
    EXPECT_LT(unknown.message().size(), 2000u);
  }
}

TEST_F(ModelRegistryTest, AListOfModelsIsBounded) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  ASSERT_OK(registry_->Unload("fashion", ""));
  for (int i = 100; i < 400; ++i) {
    const fs::path other = folder_ / "models" / absl::StrCat(std::string(61, 'a'), i);
    fs::copy(folder_ / "models" / "fashion", other, fs::copy_options::recursive);
  }
  Restart();
  for (const absl::Status& unknown :
       {registry_->Find(std::string(5000, '\n'), 0).status(), registry_->Find("", 0).status()}) {
    EXPECT_THAT(unknown.message(),
                AllOf(HasSubstr("aaa100, aaaa"), HasSubstr("aaa119 and 281 more")));
    EXPECT_LT(unknown.message().size(), 2000u);
  }
}

TEST_F(ModelRegistryTest, UnknownModelsAndVersionsAreNotFoundAndNameWhatThereIs) {
  EXPECT_THAT(registry_->Get("", 0),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no model is in service")));
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(1), "other", ""));
  EXPECT_THAT(registry_->Get("nosuch", 0),
              StatusIs(absl::StatusCode::kNotFound,
                       HasSubstr("no model \"nosuch\"; there is fashion, other")));
  EXPECT_THAT(
      registry_->Get("fashion", 9),
      StatusIs(absl::StatusCode::kNotFound, HasSubstr("no version 9 of fashion; there is 1, 2")));
  EXPECT_THAT(registry_->Get("fashion", -1),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("-1")));
  EXPECT_EQ(registry_->MetricsOf("nosuch"), nullptr);
}

TEST_F(ModelRegistryTest, AnEmptyNameMeansTheOnlyModel) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  EXPECT_EQ(registry_->Get("", 0).value()->name(), "fashion");
  ASSERT_OK(registry_->Promote(Checkpoint(1), "other", ""));
  EXPECT_THAT(registry_->Get("", 0), StatusIs(absl::StatusCode::kInvalidArgument,
                                              HasSubstr("name one of fashion, other")));
}

TEST_F(ModelRegistryTest, ListsEveryVersionByNameAndNumber) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "b", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(2), "b", ""));
  ASSERT_OK(registry_->Promote(Checkpoint(3), "a", ""));
  std::vector<std::string> lines;
  for (const v1::ModelVersion& version : registry_->List()) {
    lines.push_back(
        absl::StrCat(version.name(), " ", version.version(), version.serving() ? " serving" : ""));
    EXPECT_EQ(version.network().num_classes(), 3);
    EXPECT_EQ(version.preprocessing().crop(), 32);
    EXPECT_THAT(version.digest(), HasSubstr("sha256:"));
    EXPECT_GT(version.created().seconds(), 0);
  }
  EXPECT_THAT(lines, ElementsAre("a 1 serving", "b 1", "b 2 serving"));
}

TEST_F(ModelRegistryTest, AnOldVersionLivesAsLongAsSomebodyHoldsIt) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  auto held = registry_->Get("fashion", 0).value();
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  EXPECT_EQ(Bias(*held), 1);
  EXPECT_TRUE(HasSeries(*metrics_, R"(pyramid_serving_images_total{model="fashion",version="1"})"));
  held = nullptr;
  for (int i = 0;
       i < 5000 &&
       HasSeries(*metrics_, R"(pyramid_serving_images_total{model="fashion",version="1"})");
       ++i) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_FALSE(
      HasSeries(*metrics_, R"(pyramid_serving_images_total{model="fashion",version="1"})"));
}

TEST_F(ModelRegistryTest, TheLastHolderMayBeTheVersionsOwnBatchThread) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  auto held = registry_->Get("fashion", 0).value();
  Batcher& batcher = held->batcher();
  auto room = std::make_unique<Batcher::Room>(batcher.Admit({.pictures = 1}).value());
  std::vector<Batcher::Picture> pictures(1);
  pictures[0].pixels.assign(32 * 32, 0);
  pictures[0].height = pictures[0].width = 32;
  absl::Notification gone;
  absl::Notification may_go;
  pictures[0].done = [&gone, &may_go,
                      held = std::move(held)](absl::StatusOr<Batcher::Answer>) mutable {
    may_go.WaitForNotification();
    held = nullptr;
    gone.Notify();
  };
  batcher.Submit(*room, std::move(pictures));
  room = nullptr;
  ASSERT_OK(registry_->Promote(Checkpoint(2), "fashion", ""));
  may_go.Notify();
  gone.WaitForNotification();
  registry_ = nullptr;  // doesn't hang
}

TEST_F(ModelRegistryTest, RequestsDuringSwapsSeeTheOldOrTheNewVersionAndNeverAnError) {
  ASSERT_OK(registry_->Promote(Checkpoint(1), "fashion", ""));
  std::atomic<bool> stop{false};
  std::atomic<int> answered{0};
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t) {
    callers.emplace_back([&] {
      while (!stop) {
        const auto version = registry_->Find("fashion", 0);
        // Checkpoint n has bias n and becomes version n.
        if (!version.ok() || Bias(**version) != static_cast<float>((*version)->version())) ++wrong;
        ++answered;
      }
    });
  }
  for (int bias = 2; bias <= 12; ++bias) {
    const auto promoted = registry_->Promote(Checkpoint(bias), "fashion", "");
    EXPECT_TRUE(promoted.ok()) << promoted.status();
    EXPECT_EQ(promoted->version, bias);
  }
  stop = true;
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
  EXPECT_GT(answered.load(), 0);
  EXPECT_EQ(BiasOf("fashion"), 12);
}

TEST_F(ModelRegistryTest, PromotionsOfOneNameGoOneAfterTheOther) {
  std::vector<fs::path> checkpoints;
  for (int bias = 1; bias <= 4; ++bias) checkpoints.push_back(Checkpoint(bias));
  std::vector<std::future<int64_t>> promotions;
  for (const fs::path& checkpoint : checkpoints) {
    promotions.push_back(std::async(std::launch::async, [&registry = *registry_, checkpoint] {
      const auto promoted = registry.Promote(checkpoint, "fashion", "");
      return promoted.ok() ? promoted->version : -1;
    }));
  }
  std::vector<int64_t> versions;
  for (auto& promotion : promotions) versions.push_back(promotion.get());
  EXPECT_THAT(versions, ::testing::UnorderedElementsAre(1, 2, 3, 4));
}

}  // namespace
}  // namespace pyramid
