// Training without a server: the worker program by itself, under mpirun, and through `pyramid
// train`.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "proto/base/file.h"
#include "tests/integration/cluster.h"
#include "tests/testing/idx_data.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::Process;
using testing::Program;
using testing::RunResult;

class StandaloneTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::WriteIdxFolder(folder_ / "idx", 320, 60);
    ASSERT_OK(WriteFileAtomically(
        folder_ / "recipe.yaml",
        "model: pvt_v2_b0\ndataset: fashion_mnist\ndata_dir: idx\nin_channels: 1\n"
        "num_classes: 10\nimage_resize: 32\nimage_pad: 32\ncolor_jitter: 0\nworkers: 1\n"
        "batch_size: 16\nepoch_size: 2\nwarmup_epochs: 0\nckpt_save_dir: ckpt\n"));
  }

  RunResult RunHere(const std::vector<std::string>& command, const std::string& name) {
    Process::Options options;
    options.folder = folder_.path();
    return Process(command, folder_ / name, options).Wait(absl::Seconds(100));
  }

  testing::TempFolder folder_;
};

TEST_F(StandaloneTest, MpirunTrainsTwoRanks) {
  const RunResult run = RunHere({"mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2",
                                 Program("pyramid-worker"), "--config", "recipe.yaml"},
                                "mpirun");
  ASSERT_EQ(run.exit_code, 0) << run.out << run.err;
  // 320 pictures, two ranks of 16: ten steps an epoch.
  ASSERT_OK(ReadFile(folder_ / "ckpt/step-00000020/manifest.json"));
}

TEST_F(StandaloneTest, TrainThenValidateGiveTheSameNumber) {
  const RunResult train =
      RunHere({Program("pyramid"), "train", "-c", "recipe.yaml", "--workers", "2"}, "train");
  ASSERT_EQ(train.exit_code, 0) << train.out << train.err;
  ASSERT_OK_AND_ASSIGN(const std::string manifest,
                       ReadFile(folder_ / "ckpt/step-00000020/manifest.json"));
  const RunResult validate =
      RunHere({Program("pyramid"), "validate", "-c", "recipe.yaml", "--ckpt_path",
               "ckpt/step-00000020", "--json", "--predictions", "answers.csv"},
              "validate");
  ASSERT_EQ(validate.exit_code, 0) << validate.err;
  const auto result = nlohmann::json::parse(validate.out);
  EXPECT_DOUBLE_EQ(result.at("top1").get<double>(),
                   nlohmann::json::parse(manifest).at("training").at("val_top1").get<double>());
  // The table adds up to the number.
  ASSERT_OK_AND_ASSIGN(const std::string answers, ReadFile(folder_ / "answers.csv"));
  const std::vector<std::string> lines = absl::StrSplit(answers, '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.front(), "index,label,prediction,probability");
  EXPECT_EQ(static_cast<int64_t>(lines.size()) - 1, result.at("images").get<int64_t>());
  int64_t right = 0;
  for (size_t i = 1; i < lines.size(); ++i) {
    const std::vector<std::string> fields = absl::StrSplit(lines[i], ',');
    ASSERT_EQ(fields.size(), 4u) << lines[i];
    EXPECT_EQ(fields[0], absl::StrCat(i - 1));
    right += fields[1] == fields[2];
  }
  EXPECT_EQ(right, result.at("correct").get<int64_t>());
}

TEST_F(StandaloneTest, BenchPrintsOneObject) {
  const RunResult run =
      RunHere({Program("pyramid"), "bench", "train", "--variant", "pvt_v2_b0", "--batch", "8",
               "--size", "32", "--classes", "10", "--workers", "2", "--seconds", "2", "--json"},
              "bench");
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const auto result = nlohmann::json::parse(run.out.substr(run.out.rfind('{')));
  EXPECT_GT(result.at("images_per_second").get<double>(), 0);
  EXPECT_EQ(result.at("workers").get<int>(), 2);
}

TEST_F(StandaloneTest, AMissingDeviceSaysWhatThereIs) {
  const RunResult run =
      RunHere({Program("pyramid"), "train", "-c", "recipe.yaml", "--device", "npu"}, "npu");
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_THAT(run.err, HasSubstr("usable: cpu"));
}

}  // namespace
}  // namespace pyramid
