// Deaths in mid-training: the server's, a worker's, the disk's.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mount.h>

#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "tests/integration/cluster.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using testing::Cluster;
using ::testing::HasSubstr;
using testing::RunResult;

// 20 steps an epoch; long enough to be hit in mid-training.
std::string LongRecipe(Cluster& cluster) {
  return cluster.SmallRecipe("epoch_size: 12\nval_interval: 4\n");
}

bool HasCheckpoint(const v1::Job& job) { return job.checkpoints_size() > 0; }

TEST(FailureTest, AKilledServerComesBackAndTheJobEndsSucceeded) {
  Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const std::string id = cluster.Submit(LongRecipe(cluster));
  const v1::Job before = cluster.WaitFor(id, HasCheckpoint, absl::Seconds(60));
  const std::string old_address = cluster.grpc_address();
  cluster.Kill();
  absl::SleepFor(absl::Milliseconds(500));
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const v1::Job after = cluster.Get(id);
  EXPECT_GE(after.checkpoints_size(), before.checkpoints_size()) << "nothing acknowledged is lost";
  const v1::Job job = cluster.WaitForEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  EXPECT_EQ(job.progress().step(), 12 * 20);
  RecordProperty("attempts", job.attempts_size());
}

TEST(FailureTest, AServerKilledWhileTheJobFinishesLearnsOfItsSuccess) {
  Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const std::string id = cluster.Submit(cluster.SmallRecipe("epoch_size: 3\n"));
  cluster.WaitForStep(id, 20);
  cluster.Kill();
  const absl::Time deadline = absl::Now() + absl::Seconds(60);
  // The workers go on without the server and end; they wait a bounded time for it before they exit.
  while (!Cluster::WorkerPids(cluster.data().string()).empty() && absl::Now() < deadline) {
    if (std::filesystem::exists(cluster.data() / "jobs" / id / "attempts" / "1" /
                                "rank0.exit.json"))
      break;
    absl::SleepFor(absl::Milliseconds(100));
  }
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const v1::Job job = cluster.WaitForEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  EXPECT_EQ(job.attempts_size(), 1) << "a finished job isn't run again";
}

TEST(FailureTest, AKilledWorkerEndsItsGangAndTheJobResumesFromItsCheckpoint) {
  Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const std::string id = cluster.Submit(LongRecipe(cluster));
  cluster.WaitFor(id, HasCheckpoint, absl::Seconds(60));
  const std::vector<int> workers = Cluster::WorkerPids(cluster.data().string());
  ASSERT_EQ(workers.size(), 2u);
  kill(workers[1], SIGKILL);
  const v1::Job job = cluster.WaitForEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  ASSERT_EQ(job.attempts_size(), 2);
  EXPECT_EQ(job.restarts(), 1);
  EXPECT_EQ(job.attempts(0).failure(), v1::WORKER_LOST);
  EXPECT_THAT(job.attempts(0).cause(), HasSubstr("signal 9"));
  EXPECT_GE(job.attempts(1).resumed_step(), 20);
  EXPECT_EQ(job.progress().step(), 12 * 20);
}

TEST(FailureTest, SigtermSavesAndTheNextStartGoesOn) {
  Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const std::string id = cluster.Submit(LongRecipe(cluster));
  cluster.WaitForStep(id, 30);
  const RunResult stopped = cluster.Stop();
  EXPECT_EQ(stopped.exit_code, 0);
  EXPECT_TRUE(Cluster::WorkerPids(cluster.data().string()).empty());
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const v1::Job job = cluster.WaitForEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  ASSERT_GE(job.attempts_size(), 2);
  EXPECT_GE(job.attempts(1).resumed_step(), 30) << "it saved at the step where it was stopped";
  EXPECT_EQ(job.restarts(), 0) << "a drained server isn't the job's failure";
}

TEST(FailureTest, AFullDiskKeepsTheLastGoodCheckpointAndSaysWhy) {
  Cluster cluster;
  std::filesystem::create_directories(cluster.data());
  // A checkpoint of b0 with its training state takes about 44 MB: the second doesn't fit.
  if (mount("tmpfs", cluster.data().c_str(), "tmpfs", 0, "size=70m") != 0) {
    GTEST_SKIP() << "can't mount a tmpfs here";
  }
  {
    cluster.Start();
    if (!HasFailure()) {
      const std::string id = cluster.Submit(cluster.SmallRecipe("epoch_size: 6\n"));
      const v1::Job job = cluster.WaitForEnd(id, absl::Seconds(90));
      EXPECT_EQ(job.state(), v1::FAILED) << job.DebugString();
      EXPECT_THAT(job.reason(), HasSubstr("disk full"));
      ASSERT_GE(job.attempts_size(), 1);
      EXPECT_EQ(job.attempts(job.attempts_size() - 1).failure(), v1::DISK_FULL);
      ASSERT_GE(job.checkpoints_size(), 1);
      const RunResult inspect = cluster.Cli({"inspect", job.checkpoints(0).path()});
      EXPECT_EQ(inspect.exit_code, 0) << inspect.out << inspect.err;
    }
    cluster.Stop();
  }
  umount2(cluster.data().c_str(), MNT_DETACH);
}

}  // namespace
}  // namespace pyramid
