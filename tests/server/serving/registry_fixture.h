// A registry of fake networks in a folder of its own, started again as a server would.
#ifndef PYRAMID_TESTS_SERVER_SERVING_REGISTRY_FIXTURE_H_
#define PYRAMID_TESTS_SERVER_SERVING_REGISTRY_FIXTURE_H_

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "model/checkpoint.h"
#include "server/serving/model_registry.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid::testing {

class RegistryFixture : public ::testing::Test {
 protected:
  void SetUp() override { Restart(); }

  // A server that starts on the same folder.
  void Restart() {
    registry_ = nullptr;
    metrics_ = std::make_unique<Metrics>();
    options_.folder = folder_ / "models";
    options_.batching.max_batch = 8;
    ClassifierLoader fake = FakeLoader(network_);
    registry_ = std::make_unique<ModelRegistry>(
        options_,
        [this, fake = std::move(fake)](const std::filesystem::path& folder,
                                       const ClassifierOptions& classifier) {
          loads_.push_back(absl::StrCat(folder.filename().string(), " ", classifier.dtype));
          return fake(folder, classifier);
        },
        [this](Classifier&, const std::filesystem::path&, const ClassifierOptions&) {
          return self_test_;
        },
        *metrics_);
    ASSERT_OK(registry_->Start());
  }
  // A trained checkpoint; other biases are other weights.
  std::filesystem::path Checkpoint(int bias, v1::Manifest manifest = FakeManifest()) {
    const std::filesystem::path folder = folder_ / absl::StrCat("checkpoint-", ++checkpoints_);
    EXPECT_TRUE(WriteFakeCheckpoint(folder, bias, std::move(manifest)).ok());
    return folder;
  }
  // The first logit that the version gives a black picture: its bias.
  static float Bias(const ModelVersion& version) {
    absl::Notification answered;
    float bias = -1000;
    auto room = version.batcher().Admit({.pictures = 1});
    if (!room.ok()) return bias;
    std::vector<Batcher::Picture> pictures(1);
    pictures[0].pixels.assign(32 * 32, 0);
    pictures[0].height = pictures[0].width = 32;
    pictures[0].done = [&](absl::StatusOr<Batcher::Answer> answer) {
      if (answer.ok()) bias = answer->logits[0];
      answered.Notify();
    };
    version.batcher().Submit(*room, std::move(pictures));
    answered.WaitForNotification();
    return bias;
  }
  float BiasOf(absl::string_view name, int64_t version = 0) {
    const auto found = registry_->Get(name, version);
    return found.ok() ? Bias(**found) : -2000;
  }
  std::filesystem::path VersionFolder(const std::string& name, int version) {
    return folder_ / "models" / name / absl::StrCat(version);
  }
  static void Damage(const std::filesystem::path& file) {
    std::ofstream out(file, std::ios::binary | std::ios::app);
    out << "x";
  }

  static std::vector<std::string> Texts(const std::vector<v1::GateResult>& gates) {
    std::vector<std::string> texts;
    for (const v1::GateResult& gate : gates) texts.push_back(gate.text());
    return texts;
  }
  // Promotes a fresh checkpoint with this bias; the version that it became, 0 if that failed.
  int64_t Promote(int bias, const ModelRegistry::Promotion& promotion = {},
                  const std::string& name = "fashion") {
    const auto promoted = registry_->Promote(Checkpoint(bias), name, promotion);
    EXPECT_TRUE(promoted.ok()) << promoted.status();
    return promoted.ok() ? promoted->version : 0;
  }

  TempFolder folder_;
  ModelRegistry::Options options_;  // for the next Restart
  FakeNetwork network_;
  absl::StatusOr<SelfTestResult> self_test_ =
      SelfTestResult{.available = true, .pictures = 16, .max_error = 1e-6, .tolerance = 1e-4};
  std::vector<std::string> loads_;  // only written by one thread at a time in these tests
  int checkpoints_ = 0;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<ModelRegistry> registry_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_SERVER_SERVING_REGISTRY_FIXTURE_H_
