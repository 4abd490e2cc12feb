#include "worker/reporter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/base/file.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"
#include "worker/result_log.h"

namespace pyramid {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::StartsWith;

class FakeClient final : public CoordinatorClient {
 public:
  void SetProgress(const v1::Progress&) override { ++progresses; }
  void AddCheckpoint(const v1::Checkpoint&) override { ++checkpoints; }
  void AddLine(absl::string_view) override { ++lines; }
  bool StopAsked() const override { return true; }
  bool SaveAsked() const override { return true; }
  void SaveDone() override { ++saves; }
  absl::Status Finish(v1::FinishRequest) override { return absl::OkStatus(); }
  int progresses = 0, checkpoints = 0, lines = 0, saves = 0;
};

TEST(ReporterTest, RankZeroSpeaksForAllAndHearsSave) {
  FakeClient client;
  for (const int rank : {0, 1}) {
    const auto reporter = MakeCoordinatorReporter(client, rank);
    reporter->OnProgress({});
    reporter->OnLine("text");
    reporter->SaveDone();
    EXPECT_TRUE(reporter->StopAsked());
    EXPECT_EQ(reporter->SaveAsked(), rank == 0);
  }
  EXPECT_EQ(client.progresses, 1);
  EXPECT_EQ(client.lines, 1);
  EXPECT_EQ(client.saves, 1);
}

TEST(ReporterTest, ConsoleLinesLookLikeMindCvs) {
  testing::TempFolder folder;
  MakeConsoleReporter(false, folder / "rank1.log")->OnLine("Finish training!");
  EXPECT_THAT(*ReadFile(folder / "rank1.log"),
              MatchesRegex("\\[....-..-.. ..:..:..\\] pyramid.train INFO - Finish training!\n"));
}

TEST(ReporterTest, TheExperimentBlockNamesWhatMatters) {
  Recipe recipe;
  const auto lines = ExperimentLines(recipe, {.launcher = "mpirun",
                                              .device = "cpu",
                                              .world = 2,
                                              .val_pictures = -1,
                                              .parameters = 3409194,
                                              .kernels = "fused avx512"});
  EXPECT_EQ(lines[0], "Essential Experiment Configurations:");
  EXPECT_THAT(lines, Contains("Distributed mode: True (launcher: mpirun)"));
  EXPECT_THAT(lines, Contains("Number of devices: 2 x cpu, 1 thread each"));
  EXPECT_THAT(lines, Contains("Number of validation samples: None"));
  EXPECT_THAT(lines, Contains("Model parameters: 3409194"));
  EXPECT_THAT(lines, Contains("Kernels: fused avx512"));
}

TEST(ResultLogTest, GoesOnAfterTheEpochsThatAreDone) {
  testing::TempFolder folder;
  {
    ResultLog log(folder / "result.log", 0);
    for (int epoch = 1; epoch <= 3; ++epoch)
      ASSERT_OK(log.Add({.epoch = epoch, .last_loss = 0.5 * epoch, .top1 = 0.25}));
  }
  ResultLog log(folder / "result.log", 2);
  ASSERT_OK(log.Add(
      {.epoch = 3, .last_loss = 9, .mean_loss = 1.25, .train_seconds = 2, .eval_seconds = 1}));
  const std::string text = *ReadFile(folder / "result.log");
  EXPECT_THAT(text, StartsWith("Epoch               TrainLoss           Top_1_Accuracy      "
                               "Top_5_Accuracy      TrainTime           "));
  EXPECT_THAT(text, HasSubstr("\n2                   1.000000            25.0000             "));
  EXPECT_THAT(
      text,
      HasSubstr("\n3                   9.000000            0.0000              0.0000              "
                "2.00                1.00                3.00                1.250000"));
  EXPECT_THAT(text, Not(HasSubstr("1.500000  ")));
}

}  // namespace
}  // namespace pyramid
