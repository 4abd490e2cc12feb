#include "client/program.h"

#include <gmock/gmock.h>

#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/worker_process.h"
#include "tests/client/client_fixture.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using testing::CommandResult;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(NormaliseFlagsTest, UnderscoresInNamesBecomeDashes) {
  EXPECT_THAT(NormaliseFlags({"submit", "--dry_run", "--top_k", "5", "--ckpt_path=my_folder/a_b"}),
              ElementsAre("submit", "--dry-run", "--top-k", "5", "--ckpt-path=my_folder/a_b"));
}

TEST(NormaliseFlagsTest, ValuesStayAsTheyAre) {
  EXPECT_THAT(NormaliseFlags({"--set", "lr_scaling=none", "my_recipe.yaml", "-c_d"}),
              ElementsAre("--set", "lr_scaling=none", "my_recipe.yaml", "-c_d"));
  EXPECT_THAT(NormaliseFlags({"--name=a_b", "--", "--not_a_flag"}),
              ElementsAre("--name=a_b", "--", "--not_a_flag"));
}

TEST(WorkerArgumentsTest, TrainBenchAndDataGoThroughUnchanged) {
  EXPECT_THAT(WorkerArguments({"train", "-c", "r.yaml", "--batch_size", "3", "--help"}),
              ElementsAre("train", "-c", "r.yaml", "--batch_size", "3", "--help"));
  EXPECT_THAT(WorkerArguments({"--server", "a:1", "bench", "model"}),
              ElementsAre("bench", "model"));
  EXPECT_THAT(WorkerArguments({"--server=a:1", "data", "verify", "d"}),
              ElementsAre("data", "verify", "d"));
}

TEST(WorkerArgumentsTest, ValidateIsOfflineWithARecipeOrACheckpoint) {
  for (const std::string flag : {"-c", "-cr.yaml", "--config", "--config=r.yaml", "--ckpt_path",
                                 "--ckpt-path=f", "--ckpt"}) {
    EXPECT_THAT(WorkerArguments({"validate", "--data_dir", "d", flag}),
                ElementsAre("validate", "--data_dir", "d", flag));
  }
  EXPECT_THAT(WorkerArguments({"validate", "data", "--model", "m"}), IsEmpty());
}

TEST(WorkerArgumentsTest, OtherCommandsStayHere) {
  EXPECT_THAT(WorkerArguments({}), IsEmpty());
  EXPECT_THAT(WorkerArguments({"--help"}), IsEmpty());
  EXPECT_THAT(WorkerArguments({"classify", "train", "-c"}), IsEmpty());
  EXPECT_THAT(WorkerArguments({"--server", "train"}), IsEmpty());
}

class ProgramTest : public testing::ClientFixture {};

TEST_F(ProgramTest, HelpNamesEveryCommandAndLeavesWithZero) {
  const CommandResult result = Pyramid({"--help"});
  EXPECT_EQ(result.code, 0);
  for (const std::string command :
       {"submit",   "jobs",     "job",   "watch",   "logs",     "save",   "cancel",
        "promote",  "models",   "alias", "traffic", "rollback", "load",   "unload",
        "classify", "validate", "train", "bench",   "data",     "inspect"}) {
    EXPECT_THAT(result.out, HasSubstr("\n  " + command + " ")) << command;
  }
}

TEST_F(ProgramTest, CommandsHaveTheirOwnHelp) {
  const CommandResult result = Pyramid({"classify", "--help"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, AllOf(HasSubstr("Usage: pyramid classify"), HasSubstr("--top-k")));
}

TEST_F(ProgramTest, VersionIsOneLine) {
  const CommandResult result = Pyramid({"--version"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, ::testing::MatchesRegex("pyramid [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

TEST_F(ProgramTest, NoCommandIsWrongUsage) {
  const CommandResult result = Pyramid({});
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("submit"));
  EXPECT_EQ(Pyramid({"--server", "a:1"}).code, 2);
}

TEST_F(ProgramTest, UnknownCommandNamesTheNearest) {
  const CommandResult result = Pyramid({"sumbit", "r.yaml"});
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(result.out, "");
  EXPECT_EQ(result.err,
            "pyramid: no command \"sumbit\"; did you mean submit? (see pyramid --help)\n");
}

TEST_F(ProgramTest, UnknownFlagAndBadValueAreWrongUsage) {
  EXPECT_EQ(Pyramid({"jobs", "--colour"}).code, 2);
  EXPECT_EQ(Pyramid({"classify", "a.png", "--top-k", "many"}).code, 2);
  EXPECT_EQ(Pyramid({"classify", "a.png", "--top-k", "0"}).code, 2);
  EXPECT_EQ(Pyramid({"job"}).code, 2);
  EXPECT_THAT(Pyramid({"job"}).err, HasSubstr("see pyramid job --help"));
  EXPECT_EQ(Pyramid({"jobs", "--server", "nowhere"}).code, 2);
}

TEST_F(ProgramTest, WorkerCommandsBecomeTheWorker) {
  std::filesystem::path program;
  std::vector<std::string> arguments;
  environment_.worker = "/somewhere/pyramid-worker";
  environment_.become = [&](const std::filesystem::path& path,
                            const std::vector<std::string>& words) {
    program = path;
    arguments = words;
    return absl::OkStatus();
  };
  EXPECT_EQ(Pyramid({"train", "-c", "r.yaml", "--epoch_size", "2"}).code, 0);
  EXPECT_EQ(program, "/somewhere/pyramid-worker");
  EXPECT_THAT(arguments, ElementsAre("train", "-c", "r.yaml", "--epoch_size", "2"));
}

TEST_F(ProgramTest, MissingWorkerIsSaid) {
  const CommandResult result = Pyramid({"train", "-c", "r.yaml"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("pyramid-worker is neither beside this program nor on PATH"));
}

TEST_F(ProgramTest, WorkerIsFoundBesideTheProgramThenOnPath) {
  std::filesystem::create_directory(folder_ / "bin");
  std::filesystem::create_directory(folder_ / "other");
  const std::string search = "/nonexistent:" + (folder_ / "other").string();
  EXPECT_EQ(FindWorker(folder_ / "bin", search), "");
  Write("bin/pyramid-worker", "not executable");
  EXPECT_EQ(FindWorker(folder_ / "bin", search), "");
  const std::filesystem::path on_path = WriteScript("other/pyramid-worker", "#!/bin/sh\n");
  EXPECT_EQ(FindWorker(folder_ / "bin", search), on_path);
  const std::filesystem::path beside = WriteScript("bin/pyramid-worker", "#!/bin/sh\n");
  EXPECT_EQ(FindWorker(folder_ / "bin", search), beside);
}

TEST_F(ProgramTest, BecomingAMissingProgramIsAnError) {
  EXPECT_EQ(Become(folder_ / "nothing", {}).code(), absl::StatusCode::kNotFound);
}

TEST_F(ProgramTest, OutputThatCannotBeWrittenIsAFailure) {
  std::ofstream full("/dev/full");
  std::ostringstream err;
  environment_.out = &full;
  environment_.err = &err;
  environment_.folder = folder_.path();
  EXPECT_EQ(RunProgram({"inspect", "--machine"}, environment_), 1);
  EXPECT_THAT(err.str(), HasSubstr("can't write the output"));
}

class WorkerPipeTest : public testing::ClientFixture {
 protected:
  absl::Status RunScript(const std::string& text, std::string* out = nullptr) {
    const std::filesystem::path script = WriteScript("script", text);
    absl::StatusOr<std::unique_ptr<WorkerPipe>> pipe =
        WorkerPipe::Start(script, {"one", "two"}, folder_.path());
    if (!pipe.ok()) return pipe.status();
    std::string read(1000, '\0');
    size_t done = 0;
    while (true) {
      const absl::StatusOr<size_t> got = (*pipe)->Read(read.data() + done, read.size() - done);
      if (!got.ok()) return got.status();
      if (*got == 0) break;
      done += *got;
    }
    read.resize(done);
    if (out != nullptr) *out = read;
    return (*pipe)->Finish();
  }
};

TEST_F(WorkerPipeTest, ReadsWhatTheChildWritesInItsFolder) {
  std::string out;
  EXPECT_OK(RunScript("#!/bin/sh\necho \"$1 $2\"\npwd\n", &out));
  EXPECT_EQ(out, "one two\n" + std::filesystem::canonical(folder_.path()).string() + "\n");
}

TEST_F(WorkerPipeTest, ExitCodesBecomeStatuses) {
  EXPECT_THAT(RunScript("#!/bin/sh\nexit 1\n"),
              testing::StatusIs(absl::StatusCode::kInternal, HasSubstr("exit code 1")));
  EXPECT_THAT(RunScript("#!/bin/sh\nexit 3\n"),
              testing::StatusIs(absl::StatusCode::kNotFound, HasSubstr("exit code 3")));
  EXPECT_THAT(RunScript("#!/bin/sh\nexit 4\n"),
              testing::StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("exit code 4")));
  EXPECT_THAT(RunScript("#!/bin/sh\nkill -9 $$\n"),
              testing::StatusIs(absl::StatusCode::kInternal, HasSubstr("signal 9")));
}

TEST_F(WorkerPipeTest, DestructorEndsAChildThatStillRuns) {
  const std::filesystem::path script = WriteScript("script", "#!/bin/sh\nexec sleep 600\n");
  const absl::Time start = absl::Now();
  {
    absl::StatusOr<std::unique_ptr<WorkerPipe>> pipe =
        WorkerPipe::Start(script, {}, folder_.path());
    ASSERT_OK(pipe);
  }
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
}

}  // namespace
}  // namespace pyramid
