// pyramid-worker as whoever starts it sees it: ranks, signals, files, exit codes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mount.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <regex>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "model/checkpoint.h"
#include "proto/base/file.h"
#include "tests/testing/idx_data.h"
#include "tests/testing/process.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"
#include "tests/worker/fake_coordinator.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::FakeCoordinator;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Process;
using testing::RunResult;

constexpr absl::Duration kLimit = absl::Seconds(90);

class WorkerProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::WriteIdxFolder(folder_ / "idx", 96, 40);
    WriteRecipe(32, 8, "");
  }

  void WriteRecipe(int side, int batch, const std::string& more) {
    ASSERT_OK(WriteFileAtomically(
        folder_ / "recipe.yaml",
        absl::StrCat("dataset: fashion_mnist\ndata_dir: ", (folder_ / "idx").string(),
                     "\nin_channels: 1\nimage_resize: ", side, "\nimage_pad: ", side,
                     "\ncrop_padding: 2\ncolor_jitter: 0\nbatch_size: ", batch,
                     "\nwarmup_epochs: 0\ndecay_epochs: 2\nlog_interval: 1\ndrop_path_rate: "
                     "0.1\nlabel_smoothing: 0.1\n",
                     more.find("epoch_size") == std::string::npos ? "epoch_size: 2\n" : "", more)));
  }

  std::vector<std::string> Command(const std::vector<std::string>& arguments) {
    std::vector<std::string> command = {std::string(PYRAMID_BINARY_DIR) + "/bin/pyramid-worker"};
    command.insert(command.end(), arguments.begin(), arguments.end());
    return command;
  }
  // Trains without a coordinator, into <folder>/<name>.
  std::vector<std::string> TrainCommand(const std::string& name,
                                        const std::vector<std::string>& more = {}) {
    std::vector<std::string> arguments = {"train",
                                          "-c",
                                          (folder_ / "recipe.yaml").string(),
                                          "--ckpt-save-dir",
                                          (folder_ / name).string(),
                                          "--threads",
                                          "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Command(arguments);
  }
  RunResult Run(const std::vector<std::string>& command, const std::string& name) {
    return testing::Run(command, folder_ / name, kLimit);
  }

  // One rank under the coordinator.
  std::vector<std::string> JobCommand(int rank, int world) {
    return Command({"train", "--job", "job-1", "--epoch", "3", "--rank", absl::StrCat(rank),
                    "--world", absl::StrCat(world), "--server-file",
                    (folder_ / "server.json").string(), "--folder", (folder_ / "job").string(),
                    "--config", (folder_ / "recipe.yaml").string(), "--device", "cpu", "--threads",
                    "1"});
  }
  nlohmann::json ExitRecord(int rank) {
    const absl::StatusOr<std::string> text =
        ReadFile(folder_ / absl::StrCat("job/attempts/3/rank", rank, ".exit.json"));
    EXPECT_OK(text.status());
    return text.ok() ? nlohmann::json::parse(*text) : nlohmann::json();
  }

  static std::vector<double> Losses(const std::string& out) {
    std::vector<double> losses;
    const std::regex line("batch: \\[.*\\], loss: ([0-9.]+),");
    for (const absl::string_view text : absl::StrSplit(out, '\n')) {
      std::match_results<absl::string_view::const_iterator> match;
      if (std::regex_search(text.begin(), text.end(), match, line))
        losses.push_back(std::stod(match[1].str()));
    }
    return losses;
  }
  // Waits for `text` in the process's output.
  static bool Await(Process& process, const std::string& text) {
    const absl::Time deadline = absl::Now() + kLimit;
    while (absl::Now() < deadline && process.Running()) {
      if (process.Out().find(text) != std::string::npos) return true;
      absl::SleepFor(absl::Milliseconds(10));
    }
    return process.Out().find(text) != std::string::npos;
  }
  std::string Weights(const std::string& name, int64_t step) {
    const absl::StatusOr<std::string> bytes =
        ReadFile(folder_ / name / CheckpointName(step) / std::string(kWeightsFile));
    EXPECT_OK(bytes.status());
    return bytes.value_or("");
  }

  testing::TempFolder folder_;
};

TEST_F(WorkerProcessTest, TwoRanksTakeTheSameStepsAsOne) {
  for (const auto& [model, side] :
       {std::pair{"pvt_v2_b0", 32}, {"pvt_v2_b0", 96}, {"pvt_v2_b2_li", 32}}) {
    const std::string name = absl::StrCat(model, "_", side);
    WriteRecipe(side, 8, "val_while_train: False\nepoch_size: 1\n");
    const RunResult one = Run(TrainCommand("one_" + name, {"--model", model}), "one");
    ASSERT_EQ(one.exit_code, 0) << one.err;
    WriteRecipe(side, 4, "val_while_train: False\nepoch_size: 1\n");
    const RunResult two =
        Run(TrainCommand("two_" + name, {"--model", model, "--workers", "2"}), "two");
    ASSERT_EQ(two.exit_code, 0) << two.err;
    EXPECT_THAT(two.err, HasSubstr("starting 2 ranks"));
    const std::vector<double> alone = Losses(one.out);
    const std::vector<double> shared = Losses(two.out);
    ASSERT_EQ(alone.size(), 12u);
    ASSERT_EQ(shared.size(), 12u);
    // Six decimals are printed. AdamW turns rounding into differences from step to step.
    for (int step = 0; step < 3; ++step)
      EXPECT_NEAR(shared[step], alone[step], 4e-6) << name << " step " << step;
    EXPECT_NEAR(shared[11], alone[11], 0.05) << name;
  }
}

TEST_F(WorkerProcessTest, SigtermSavesAndTheResumedRunEndsTheSame) {
  const RunResult whole = Run(TrainCommand("whole", {"--workers", "2"}), "whole");
  ASSERT_EQ(whole.exit_code, 0) << whole.err;
  // 96 pictures, two ranks of 8: six steps an epoch, twelve in all.
  Process process(TrainCommand("parts", {"--workers", "2"}), folder_ / "parts1");
  ASSERT_TRUE(Await(process, "Epoch: [1/2], batch: [2/6]"));
  process.Signal(SIGTERM);
  const RunResult stopped = process.Wait(kLimit);
  EXPECT_EQ(stopped.exit_code, 10) << stopped.err;
  EXPECT_THAT(stopped.out, HasSubstr("Saved and stopped, as asked"));
  EXPECT_FALSE(ListCheckpoints(folder_ / "parts").empty());
  const RunResult resumed = Run(TrainCommand("parts", {"--workers", "2"}), "parts2");
  ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  EXPECT_THAT(resumed.out, HasSubstr("Resuming from"));
  EXPECT_EQ(Weights("parts", 12), Weights("whole", 12));
  // One row an epoch, as if it had never been interrupted.
  ASSERT_OK_AND_ASSIGN(const std::string log, ReadFile(folder_ / "parts/result.log"));
  const std::vector<std::string> rows = absl::StrSplit(log, '\n', absl::SkipEmpty());
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_THAT(rows[0],
              AllOf(HasSubstr("TrainLoss"), HasSubstr("Top_1_Accuracy"), HasSubstr("MeanLoss")));
  // And a third start has nothing left to do.
  const RunResult again = Run(TrainCommand("parts", {"--workers", "2"}), "parts3");
  EXPECT_EQ(again.exit_code, 0);
  EXPECT_THAT(again.out, AllOf(HasSubstr("Finish training!"), Not(HasSubstr("batch: [1/6]"))));
}

TEST_F(WorkerProcessTest, ADeadRankEndsTheLocalLaunch) {
  Process process(
      TrainCommand("dead", {"--workers", "2", "--epoch-size", "200", "--val-while-train", "False"}),
      folder_ / "dead");
  ASSERT_TRUE(Await(process, "batch: [2/6]"));
  // The ranks are the launcher's children, rank 1 the younger.
  ASSERT_OK_AND_ASSIGN(
      const std::string children,
      ReadFile(absl::StrCat("/proc/", process.pid(), "/task/", process.pid(), "/children")));
  const std::vector<std::string> pids = absl::StrSplit(children, ' ', absl::SkipEmpty());
  ASSERT_EQ(pids.size(), 2u);
  kill(std::stoi(pids[1]), SIGKILL);
  const RunResult result = process.Wait(absl::Seconds(30));
  EXPECT_FALSE(result.timed_out);
  EXPECT_NE(result.exit_code, 0);
  EXPECT_THAT(result.err, HasSubstr("ending the others"));
}

TEST_F(WorkerProcessTest, ReportsToTheCoordinatorAndLeavesAnExitRecord) {
  FakeCoordinator coordinator(folder_ / "server.json");
  WriteRecipe(32, 8, "workers: 2\n");
  Process zero(JobCommand(0, 2), folder_ / "rank0");
  Process one(JobCommand(1, 2), folder_ / "rank1");
  EXPECT_EQ(zero.Wait(kLimit).exit_code, 0) << zero.Err();
  EXPECT_EQ(one.Wait(kLimit).exit_code, 0) << one.Err();
  EXPECT_EQ(coordinator.registers().size(), 2u);
  const auto finishes = coordinator.finishes();
  ASSERT_EQ(finishes.size(), 2u);
  for (const auto& finish : finishes) {
    EXPECT_TRUE(finish.succeeded());
    EXPECT_FALSE(finish.stopped());
    EXPECT_EQ(finish.progress().step(), 12);
    EXPECT_EQ(finish.progress().steps(), 12);
    EXPECT_EQ(finish.progress().images(), 192);
    EXPECT_TRUE(finish.progress().validated());
  }
  std::vector<std::string> checkpoints;
  int lines = 0;
  for (const auto& report : coordinator.reports()) {
    for (const auto& checkpoint : report.new_checkpoints()) checkpoints.push_back(checkpoint.id());
    lines += report.log_lines_size();
  }
  EXPECT_THAT(checkpoints, ElementsAre("step-00000006", "step-00000012"));
  EXPECT_GT(lines, 20);
  const nlohmann::json record = ExitRecord(0);
  EXPECT_EQ(record.at("worker").at("job_id"), "job-1");
  EXPECT_EQ(record.at("worker").at("epoch"), "3");
  EXPECT_EQ(record.at("succeeded"), true);
  EXPECT_EQ(ExitRecord(1).at("worker").at("rank"), 1);
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest,
                       VerifyCheckpoint(folder_ / "job/checkpoints/step-00000012"));
  EXPECT_EQ(manifest.training().job_id(), "job-1");
  EXPECT_EQ(manifest.training().attempt_epoch(), 3);
  EXPECT_EQ(manifest.training().global_batch(), 16);
}

TEST_F(WorkerProcessTest, SavesAndStopsWhenTheCoordinatorAsks) {
  FakeCoordinator coordinator(folder_ / "server.json");
  WriteRecipe(32, 8, "epoch_size: 500\nval_while_train: False\nckpt_save_interval: 500\n");
  Process process(JobCommand(0, 1), folder_ / "rank0");
  ASSERT_TRUE(
      coordinator.AwaitReport([](const auto& r) { return r.progress().step() > 0; }, kLimit))
      << process.Err();
  coordinator.set_directive(v1::SAVE);
  ASSERT_TRUE(
      coordinator.AwaitReport(
          [](const auto& r) { return r.saves_done() == 1 && r.new_checkpoints_size() == 1; },
          kLimit) ||
      coordinator.AwaitReport([](const auto& r) { return r.saves_done() == 1; }, kLimit));
  coordinator.set_directive(v1::GO_ON);
  EXPECT_TRUE(process.Running());
  coordinator.set_directive(v1::STOP);
  const RunResult result = process.Wait(kLimit);
  EXPECT_EQ(result.exit_code, 10) << result.err;
  const nlohmann::json record = ExitRecord(0);
  EXPECT_EQ(record.at("stopped"), true);
  EXPECT_EQ(record.at("succeeded"), false);
  const int64_t step = std::stoll(record.at("progress").at("step").get<std::string>());
  EXPECT_EQ(ListCheckpoints(folder_ / "job/checkpoints").back().filename(), CheckpointName(step));
}

TEST_F(WorkerProcessTest, TrainsOnWhileTheCoordinatorIsGone) {
  FakeCoordinator coordinator(folder_ / "server.json");
  WriteRecipe(32, 8, "epoch_size: 12\nval_interval: 12\nckpt_save_interval: 12\n");
  Process process(JobCommand(0, 1), folder_ / "rank0");
  ASSERT_TRUE(
      coordinator.AwaitReport([](const auto& r) { return r.progress().step() > 0; }, kLimit))
      << process.Err();
  coordinator.Vanish();
  absl::SleepFor(absl::Seconds(2));
  EXPECT_TRUE(process.Running());
  coordinator.Return();
  EXPECT_EQ(process.Wait(kLimit).exit_code, 0) << process.Err();
  ASSERT_FALSE(coordinator.finishes().empty());
  EXPECT_TRUE(coordinator.finishes().back().succeeded());
}

TEST_F(WorkerProcessTest, AStaleEpochEndsTheWorkerAtOnce) {
  FakeCoordinator coordinator(folder_ / "server.json");
  WriteRecipe(32, 8, "epoch_size: 500\n");
  Process process(JobCommand(0, 1), folder_ / "rank0");
  ASSERT_TRUE(
      coordinator.AwaitReport([](const auto& r) { return r.progress().step() > 0; }, kLimit))
      << process.Err();
  coordinator.set_epoch(4);
  const RunResult result = process.Wait(absl::Seconds(20));
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, HasSubstr("a newer attempt has begun"));
}

TEST_F(WorkerProcessTest, ADeadPeerIsACommunicationFailureWithinSeconds) {
  FakeCoordinator coordinator(folder_ / "server.json");
  WriteRecipe(32, 8, "epoch_size: 500\nworkers: 2\nval_while_train: False\n");
  Process zero(JobCommand(0, 2), folder_ / "rank0");
  Process one(JobCommand(1, 2), folder_ / "rank1");
  ASSERT_TRUE(Await(zero, "batch: [3/6]")) << zero.Err();
  one.Signal(SIGKILL);
  const absl::Time begin = absl::Now();
  const RunResult result = zero.Wait(absl::Seconds(30));
  EXPECT_EQ(result.exit_code, 1) << result.err;
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
  EXPECT_EQ(ExitRecord(0).at("failure"), "COMM");
  ASSERT_EQ(coordinator.finishes().size(), 1u);
  EXPECT_EQ(coordinator.finishes()[0].failure(), v1::COMM);
}

TEST_F(WorkerProcessTest, AFullDiskKeepsTheLastGoodCheckpoint) {
  FakeCoordinator coordinator(folder_ / "server.json");
  const fs::path checkpoints = folder_ / "job/checkpoints";
  fs::create_directories(checkpoints);
  // One checkpoint of b0 has about 41 MB.
  if (mount("tmpfs", checkpoints.c_str(), "tmpfs", 0, "size=64m") != 0)
    GTEST_SKIP() << "mounting a tmpfs needs root";
  const absl::Cleanup unmount = [&] { umount2(checkpoints.c_str(), MNT_DETACH); };
  const RunResult result = Run(JobCommand(0, 1), "rank0");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("bytes"), HasSubstr("older checkpoints are untouched")));
  const nlohmann::json record = ExitRecord(0);
  EXPECT_EQ(record.at("failure"), "DISK_FULL");
  EXPECT_EQ(record.at("succeeded"), false);
  const std::vector<fs::path> left = ListCheckpoints(checkpoints);
  ASSERT_EQ(left.size(), 1u);
  EXPECT_OK(VerifyCheckpoint(left[0]));
}

TEST_F(WorkerProcessTest, MistakesHaveTheirExitCodesAndOneLine) {
  struct Case {
    std::vector<std::string> arguments;
    int code;
    std::string line;
  };
  const std::string recipe = (folder_ / "recipe.yaml").string();
  const std::string out = (folder_ / "mistakes").string();
  const std::vector<Case> cases = {
      {{}, 2, "no command"},
      {{"fly"}, 2, "fly"},
      {{"train", "-c", recipe, "--batch_sze", "3"}, 2, "batch_sze"},
      {{"train", "-c", recipe, "--set", "batch_sze=3"}, 2, "did you mean batch_size"},
      {{"train", "-c", recipe, "--batch-size", "0"}, 2, "recipe.batch_size is 0"},
      {{"train", "-c", recipe, "--model", "pvt_v2_b9"}, 2, "pvt_v2_b0"},
      {{"train", "-c", (folder_ / "none.yaml").string()}, 3, "none.yaml"},
      {{"train", "-c", recipe, "--data-dir", "/nowhere", "--ckpt-save-dir", out}, 3, "/nowhere"},
      {{"train", "-c", recipe, "--val-split", "dev", "--ckpt-save-dir", out},
       3,
       "splits there: train, val"},
      {{"train", "-c", recipe, "--batch-size", "1000", "--ckpt-save-dir", out},
       2,
       "a step takes 1000 pictures"},
      {{"train", "-c", recipe, "--num-classes", "2", "--ckpt-save-dir", out}, 2, "2 classes"},
      {{"train", "-c", recipe, "--device", "npu", "--ckpt-save-dir", out}, 1, "usable: cpu"},
      {{"train", "-c", recipe, "--ckpt_path", "/nowhere", "--ckpt-save-dir", out}, 3, "/nowhere"},
      {{"validate", "-c", recipe}, 2, "--ckpt_path"},
      {{"validate", "-c", recipe, "--ckpt", "/nowhere"}, 3, "/nowhere"},
      {{"bench", "train", "--variant", "x"}, 2, "pvt_v2_b0"},
      {{"data", "verify", "/nowhere"}, 3, "/nowhere"},
  };
  for (const Case& c : cases) {
    const RunResult result = Run(Command(c.arguments), "mistake");
    const std::string shown = c.arguments.empty() ? "" : c.arguments.back();
    EXPECT_EQ(result.exit_code, c.code) << shown << ": " << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr("pyramid-worker: "), HasSubstr(c.line))) << shown;
    EXPECT_LE(std::count(result.err.begin(), result.err.end(), '\n'), 1)
        << shown << ": " << result.err;
  }
}

TEST_F(WorkerProcessTest, HelpIsEverywhere) {
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"--help"},
                                             {"train", "--help"},
                                             {"validate", "--help"},
                                             {"bench", "--help"},
                                             {"bench", "train", "--help"},
                                             {"data", "--help"},
                                             {"data", "export", "--help"}}) {
    const RunResult result = Run(Command(arguments), "help");
    EXPECT_EQ(result.exit_code, 0);
    EXPECT_GT(result.out.size(), 100u);
  }
}

TEST_F(WorkerProcessTest, ValidateGivesTheTrainersNumbers) {
  const RunResult train = Run(TrainCommand("ckpt"), "train");
  ASSERT_EQ(train.exit_code, 0) << train.err;
  const fs::path checkpoint = ListCheckpoints(folder_ / "ckpt").back();
  const RunResult json = Run(Command({"validate", "-c", (folder_ / "recipe.yaml").string(),
                                      "--ckpt_path", checkpoint.string(), "--json"}),
                             "validate");
  ASSERT_EQ(json.exit_code, 0) << json.err;
  const nlohmann::json result = nlohmann::json::parse(json.out);
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, ReadManifest(checkpoint));
  EXPECT_EQ(result.at("images"), 40);
  EXPECT_DOUBLE_EQ(result.at("top1").get<double>(), manifest.training().val_top1());
  EXPECT_DOUBLE_EQ(result.at("top5").get<double>(), manifest.training().val_top5());
  EXPECT_NEAR(result.at("loss").get<double>(), manifest.training().val_loss(), 1e-5);
  const RunResult text = Run(Command({"validate", "-c", (folder_ / "recipe.yaml").string(),
                                      "--ckpt_path", checkpoint.string()}),
                             "validate");
  EXPECT_THAT(text.out, HasSubstr("{'Top_1_Accuracy': "));
}

TEST_F(WorkerProcessTest, DataExportWritesNamedFilesAndAStream) {
  const RunResult files =
      Run(Command({"data", "export", (folder_ / "recipe.yaml").string(), "--split", "val",
                   "--count", "3", "--out", (folder_ / "out").string()}),
          "export");
  ASSERT_EQ(files.exit_code, 0) << files.err;
  int count = 0;
  for (const auto& entry : fs::directory_iterator(folder_ / "out")) {
    EXPECT_TRUE(
        std::regex_match(entry.path().filename().string(), std::regex("0000[0-2]-[a-z_-]+\\.png")))
        << entry.path();
    ++count;
  }
  EXPECT_EQ(count, 3);
  const RunResult stream =
      Run(Command({"data", "export", (folder_ / "idx").string(), "--count", "2", "--out", "-"}),
          "stream");
  ASSERT_EQ(stream.exit_code, 0) << stream.err;
  const size_t end = stream.out.find('\n');
  const nlohmann::json head = nlohmann::json::parse(stream.out.substr(0, end));
  EXPECT_EQ(head.at("count"), 2);
  EXPECT_EQ(head.at("classes").size(), 10u);
  size_t at = end + 1;
  for (int i = 0; i < 2; ++i) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(stream.out.data()) + at;
    EXPECT_LT(bytes[0], 10);
    const size_t length = bytes[4] | bytes[5] << 8 | bytes[6] << 16;
    EXPECT_EQ(stream.out.substr(at + 9, 3), "PNG");
    at += 8 + length;
  }
  EXPECT_EQ(at, stream.out.size());
}

TEST_F(WorkerProcessTest, DataVerifyCountsBadPictures) {
  const RunResult good =
      Run(Command({"data", "verify", (folder_ / "idx").string(), "--split", "train", "--json"}),
          "good");
  EXPECT_EQ(good.exit_code, 0) << good.err;
  EXPECT_EQ(nlohmann::json::parse(good.out).at("images"), 96);
  fs::create_directories(folder_ / "pictures/val/a");
  ASSERT_OK(WriteFileSynced(folder_ / "pictures/val/a/1.jpg", "no picture"));
  const RunResult bad = Run(Command({"data", "verify", (folder_ / "pictures").string()}), "bad");
  EXPECT_EQ(bad.exit_code, 1);
  EXPECT_THAT(bad.out, HasSubstr("1 bad"));
  EXPECT_THAT(bad.err, HasSubstr("1.jpg"));
}

TEST_F(WorkerProcessTest, BenchTrainPrintsOneObject) {
  const RunResult result =
      Run(Command({"bench", "train", "--variant", "pvt_v2_b0", "--batch", "8", "--size", "32",
                   "--classes", "10", "--workers", "2", "--seconds", "1", "--json"}),
          "bench");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_GT(json.at("images_per_second").get<double>(), 1);
  EXPECT_EQ(json.at("batch"), 8);
  EXPECT_EQ(json.at("workers"), 2);
  EXPECT_GT(json.at("peak_rss_mb").get<double>(), 10);
  EXPECT_EQ(json.at("path").get<std::string>().rfind("fused ", 0), 0u) << json;
}

TEST_F(WorkerProcessTest, BenchModelPrintsOneObject) {
  const RunResult result = Run(Command({"bench", "model", "--batch", "2", "--size", "64",
                                        "--seconds", "1", "--threads", "1", "--json"}),
                               "bench");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_GT(json.at("images_per_second").get<double>(), 1);
  EXPECT_EQ(json.at("classes"), 1000);
}

TEST_F(WorkerProcessTest, MpirunLaunchesTwoRanks) {
  std::vector<std::string> command = {"mpirun", "--allow-run-as-root", "--oversubscribe", "-n",
                                      "2"};
  for (const std::string& word : Command({"--config", (folder_ / "recipe.yaml").string(),
                                          "--ckpt-save-dir", (folder_ / "mpi").string()}))
    command.push_back(word);
  const RunResult result = Run(command, "mpi");
  ASSERT_EQ(result.exit_code, 0) << result.err << result.out;
  EXPECT_THAT(result.out, AllOf(HasSubstr("Distributed mode: True (launcher: mpirun)"),
                                HasSubstr("Finish training!")));
  const fs::path checkpoint = ListCheckpoints(folder_ / "mpi").back();
  EXPECT_EQ(checkpoint.filename(), CheckpointName(12));
  // Both ranks' pictures are in what the validation says of its answers.
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, ReadManifest(checkpoint));
  const v1::AnswerMix& answers = manifest.training().val_answers();
  EXPECT_EQ(answers.classes_size(), 10);
  for (const auto* counts : {&answers.classes(), &answers.confidence()}) {
    EXPECT_EQ(std::accumulate(counts->begin(), counts->end(), int64_t{0}), 40);
  }
}

}  // namespace
}  // namespace pyramid
