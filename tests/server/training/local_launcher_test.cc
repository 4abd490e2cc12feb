#include "server/training/local_launcher.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "server/training/job.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class LocalLauncherTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_OK(MakeFolders(AttemptFolder(folder_.path(), 1))); }
  void TearDown() override {
    for (const int64_t pid : pids_) kill(-static_cast<pid_t>(pid), SIGKILL);
    launcher_.Poll();
  }

  // A shell script in the worker's place.
  WorkerLaunch Script(const std::string& text, int rank = 0) {
    const std::filesystem::path program = folder_ / absl::StrCat("program", rank);
    std::ofstream(program) << "#!/bin/sh\n" << text << "\n";
    std::filesystem::permissions(program, std::filesystem::perms::owner_all);
    return {.key = {"j-000001", 1, rank},
            .world = 2,
            .device = "cpu",
            .threads = 3,
            .program = program,
            .server_file = folder_ / "server.json",
            .folder = folder_.path(),
            .config = folder_ / "recipe.yaml"};
  }
  int64_t Launch(const WorkerLaunch& launch) {
    const absl::StatusOr<int64_t> pid = launcher_.Launch(launch);
    EXPECT_OK(pid);
    pids_.push_back(pid.value_or(0));
    return pids_.back();
  }
  static ProcessEnd AwaitEnd(LocalLauncher& launcher) {
    for (int i = 0; i < 1000; ++i) {
      const std::vector<ProcessEnd> ends = launcher.Poll();
      if (!ends.empty()) return ends[0];
      absl::SleepFor(absl::Milliseconds(10));
    }
    ADD_FAILURE() << "no process ended";
    return {};
  }
  std::string Log(int rank = 0) {
    return ReadFile(WorkerLogPath(folder_.path(), 1, rank)).value_or("no log");
  }
  std::string AwaitLog(const std::string& text) {
    for (int i = 0; i < 1000 && !absl::StrContains(Log(), text); ++i) {
      absl::SleepFor(absl::Milliseconds(10));
    }
    return Log();
  }

  TempFolder folder_;
  LocalLauncher launcher_;
  std::vector<int64_t> pids_;
};

TEST_F(LocalLauncherTest, TheCommandLineSaysEverything) {
  const WorkerLaunch launch = Script("");
  const std::string folder = folder_.path().string();
  EXPECT_THAT(
      LocalLauncher::CommandOf(launch),
      ElementsAre(folder + "/program0", "train", "--job", "j-000001", "--epoch", "1", "--rank", "0",
                  "--world", "2", "--server-file", folder + "/server.json", "--folder", folder,
                  "--config", folder + "/recipe.yaml", "--device", "cpu", "--threads", "3"));
}

TEST_F(LocalLauncherTest, OutputAndThreadsReachTheWorkerAndItsLogIsAppendedTo) {
  std::ofstream(WorkerLogPath(folder_.path(), 1, 0)) << "before\n";
  Launch(Script("echo out $OMP_NUM_THREADS $3; echo err >&2"));
  const ProcessEnd end = AwaitEnd(launcher_);
  EXPECT_TRUE(end.status_known);
  EXPECT_EQ(end.exit_code, 0);
  EXPECT_EQ(end.signal, 0);
  EXPECT_EQ(Log(), "before\nout 3 j-000001\nerr\n");
}

TEST_F(LocalLauncherTest, VariablesOfTheLaunchComeBeforeTheServersOwn) {
  setenv("PYRAMID_TEST_ONE", "the server's", 1);
  setenv("PYRAMID_TEST_ONE_MORE", "kept", 1);
  WorkerLaunch launch = Script("echo $PYRAMID_TEST_ONE, $PYRAMID_TEST_ONE_MORE, $PYRAMID_TEST_TWO");
  launch.environment = {"PYRAMID_TEST_ONE=mine", "PYRAMID_TEST_TWO=2"};
  Launch(launch);
  AwaitEnd(launcher_);
  unsetenv("PYRAMID_TEST_ONE");
  unsetenv("PYRAMID_TEST_ONE_MORE");
  EXPECT_EQ(Log(), "mine, kept, 2\n");
}

TEST_F(LocalLauncherTest, ExitCodesAndSignalsAreSeen) {
  Launch(Script("exit 7"));
  EXPECT_EQ(AwaitEnd(launcher_).exit_code, 7);
  Launch(Script("kill -SEGV $$"));
  EXPECT_EQ(AwaitEnd(launcher_).signal, SIGSEGV);
  EXPECT_TRUE(launcher_.Poll().empty());
}

TEST_F(LocalLauncherTest, TheWorkerInheritsNothing) {
  const int leaked = open("/dev/null", O_RDONLY);  // without O_CLOEXEC
  sigset_t blocked, before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &blocked, &before);
  const auto old_pipe = signal(SIGPIPE, SIG_IGN);
  // Open files but the shell's own script and the listing's folder; masks and ignored signals.
  Launch(
      Script("for f in /proc/$$/fd/*; do readlink $f; done; exec grep -E 'SigBlk|SigIgn' "
             "/proc/self/status"));
  AwaitEnd(launcher_);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  signal(SIGPIPE, old_pipe);
  close(leaked);
  const std::string log = Log();
  EXPECT_THAT(log, HasSubstr("SigBlk:\t0000000000000000"));
  EXPECT_THAT(log, HasSubstr("SigIgn:\t0000000000000000"));
  size_t nulls = 0;
  for (size_t at = log.find("/dev/null"); at != std::string::npos;
       at = log.find("/dev/null", at + 1)) {
    ++nulls;
  }
  EXPECT_EQ(nulls, 1u) << log;  // standard input
  EXPECT_EQ(log.find("pipe:"), std::string::npos) << log;
}

TEST_F(LocalLauncherTest, TheWorkerLeadsAGroupThatASignalReachesAsAWhole) {
  const int64_t pid = Launch(Script("sleep 1000 & echo child $!; wait"));
  const std::string log = AwaitLog("child ");
  EXPECT_EQ(getpgid(static_cast<pid_t>(pid)), pid);
  EXPECT_EQ(getsid(static_cast<pid_t>(pid)), pid);
  const int child = atoi(log.substr(6).c_str());
  ASSERT_GT(child, 0);
  EXPECT_OK(launcher_.Signal({"j-000001", 1, 0}, SIGTERM));
  EXPECT_EQ(AwaitEnd(launcher_).signal, SIGTERM);
  absl::StatusOr<ProcessIdentity> identity = IdentityOf(child);
  for (int i = 0; i < 500 && identity.ok(); ++i) {
    absl::SleepFor(absl::Milliseconds(10));
    identity = IdentityOf(child);
  }
  EXPECT_THAT(identity.status(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("")));
}

TEST_F(LocalLauncherTest, WhatAWorkerLeftBehindEndsWithIt) {
  Launch(Script("sleep 1000 & echo child $!; exit 0"));
  AwaitEnd(launcher_);
  const int child = atoi(Log().substr(6).c_str());
  ASSERT_GT(child, 0);
  absl::StatusOr<ProcessIdentity> identity = IdentityOf(child);
  for (int i = 0; i < 500 && identity.ok(); ++i) {
    absl::SleepFor(absl::Milliseconds(10));
    identity = IdentityOf(child);
  }
  EXPECT_FALSE(identity.ok());
}

TEST_F(LocalLauncherTest, AProgramThatIsntThereIsNotFoundAndLeavesNoRecord) {
  WorkerLaunch launch = Script("");
  launch.program = folder_ / "nowhere";
  EXPECT_THAT(launcher_.Launch(launch),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("can't run")));
  EXPECT_FALSE(std::filesystem::exists(WorkerPidPath(folder_.path(), 1, 0)));
  EXPECT_TRUE(launcher_.Poll().empty());
}

TEST_F(LocalLauncherTest, AProgramThatMayNotRunIsPermissionDenied) {
  WorkerLaunch launch = Script("");
  std::filesystem::permissions(launch.program, std::filesystem::perms::owner_read);
  EXPECT_THAT(launcher_.Launch(launch),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("can't run")));
}

TEST_F(LocalLauncherTest, ALogThatCantBeOpenedIsToldWithItsPath) {
  WorkerLaunch launch = Script("");
  launch.folder = folder_ / "gone";
  EXPECT_THAT(launcher_.Launch(launch),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("gone/attempts/1/rank0.log")));
}

TEST_F(LocalLauncherTest, ThePidRecordNamesTheProcess) {
  const int64_t pid = Launch(Script("sleep 1000"));
  ASSERT_OK_AND_ASSIGN(const ProcessIdentity recorded,
                       ReadPidRecord(WorkerPidPath(folder_.path(), 1, 0)));
  ASSERT_OK_AND_ASSIGN(const ProcessIdentity now, IdentityOf(pid));
  EXPECT_EQ(recorded, now);
  EXPECT_EQ(recorded.pid, pid);
  EXPECT_GT(recorded.start_time, 0u);
}

TEST_F(LocalLauncherTest, ALaterLauncherAdoptsSignalsAndSeesTheEnd) {
  const WorkerKey key{"j-000001", 1, 0};
  const int64_t pid = Launch(Script("sleep 1000"));
  LocalLauncher later;
  ASSERT_OK_AND_ASSIGN(const int64_t adopted, later.Adopt(key, folder_.path()));
  EXPECT_EQ(adopted, pid);
  EXPECT_TRUE(later.Poll().empty());
  EXPECT_OK(later.Signal(key, SIGKILL));
  const ProcessEnd end = AwaitEnd(later);
  EXPECT_EQ(end.key, key);
  EXPECT_FALSE(end.status_known);
  EXPECT_THAT(later.Signal(key, SIGTERM), StatusIs(absl::StatusCode::kNotFound, HasSubstr("")));
}

TEST_F(LocalLauncherTest, AnotherProcessWithTheSamePidIsNotAdopted) {
  const WorkerKey key{"j-000001", 1, 0};
  const int64_t pid = Launch(Script("sleep 1000"));
  const std::filesystem::path record = WorkerPidPath(folder_.path(), 1, 0);
  std::ofstream(record) << "{\"pid\":" << pid << ",\"start_time\":12}";
  EXPECT_THAT(launcher_.Adopt(key, folder_.path()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("has ended")));
  ASSERT_OK_AND_ASSIGN(const ProcessIdentity now, IdentityOf(pid));
  std::ofstream(record) << "{\"boot_id\":\"another\",\"pid\":" << pid
                        << ",\"start_time\":" << now.start_time << "}";
  EXPECT_THAT(launcher_.Adopt(key, folder_.path()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("has ended")));
}

TEST_F(LocalLauncherTest, WithoutARecordThereIsNothingToAdopt) {
  EXPECT_THAT(launcher_.Adopt({"j-000001", 1, 0}, folder_.path()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("rank0.pid")));
  std::ofstream(WorkerPidPath(folder_.path(), 1, 0)) << "not JSON";
  EXPECT_THAT(launcher_.Adopt({"j-000001", 1, 0}, folder_.path()),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("no pid record")));
}

}  // namespace
}  // namespace pyramid
