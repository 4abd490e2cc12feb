// The job manager with real processes that talk to it over gRPC: tests/testing/scripted_worker.cc
// in the worker's place.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "server/rpc/worker_service.h"
#include "server/training/job_manager.h"
#include "server/training/local_launcher.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::TempFolder;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;

class WorkerProcessesTest : public ::testing::Test {
 protected:
  WorkerProcessesTest() {
    std::filesystem::create_directories(folder_ / "pictures");
    std::filesystem::create_directories(data());
    options_.data = data();
    options_.devices = {{"cpu", 2}};
    options_.worker_program = std::string(PYRAMID_BINARY_DIR) + "/bin/scripted_worker";
    options_.cores = 2;
    options_.tick = absl::Milliseconds(10);
    options_.first_backoff = absl::Milliseconds(20);
    options_.limits.kill_grace = absl::Milliseconds(500);
    options_.limits.stop_grace = absl::Seconds(5);
    options_.reattach_window = absl::Seconds(5);
    options_.find_checkpoints = FindCheckpoints;
  }
  ~WorkerProcessesTest() override {
    Crash();
    // Workers outlive their server by design; none may outlive the test.
    std::error_code error;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(data(), error)) {
      if (entry.path().extension() != ".pid") continue;
      const auto recorded = ReadPidRecord(entry.path());
      if (!recorded.ok()) continue;
      const auto now = IdentityOf(recorded->pid);
      if (now.ok() && *now == *recorded) kill(-static_cast<pid_t>(recorded->pid), SIGKILL);
    }
  }

  std::filesystem::path data() const { return folder_.path() / "data"; }

  static std::vector<v1::Checkpoint> FindCheckpoints(const std::filesystem::path& job) {
    std::map<int64_t, v1::Checkpoint> found;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(job / "checkpoints", error)) {
      const std::string name = entry.path().filename().string();
      int64_t step = 0;
      if (!absl::SimpleAtoi(name.substr(name.find('-') + 1), &step)) continue;
      found[step].set_id(name);
      found[step].set_step(step);
      found[step].set_path(entry.path().string());
      found[step].set_digest(absl::StrCat("sha256:", step));
    }
    std::vector<v1::Checkpoint> list;
    for (auto& [step, checkpoint] : found) list.push_back(std::move(checkpoint));
    return list;
  }

  // A server on a new port, on the same data folder.
  void Serve() {
    launcher_ = std::make_unique<LocalLauncher>();
    absl::StatusOr<std::unique_ptr<JobManager>> manager =
        JobManager::Create(options_, *launcher_, metrics_);
    ASSERT_OK(manager);
    manager_ = *std::move(manager);
    service_ = std::make_unique<WorkerService>(*manager_, metrics_);
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(service_.get());
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    ASSERT_OK(WriteFileAtomically(data() / "server.json",
                                  absl::StrCat("{\"grpc\": \"127.0.0.1:", port, "\"}")));
    manager_->Start();
  }
  // As kill -9 of the server: nobody is told, nothing is written, workers go on.
  void Crash() {
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
    manager_.reset();
    server_.reset();
    service_.reset();
    launcher_.reset();
  }
  std::string Submit(const std::string& script, const std::string& extra = "") {
    v1::SubmitJobRequest request;
    request.set_recipe(absl::StrCat("data_dir: ", (folder_ / "pictures").string(), "\nowner: \"",
                                    script, "\"\n", extra));
    const absl::StatusOr<v1::SubmitJobResponse> response = manager_->Submit(request);
    EXPECT_OK(response);
    return response.ok() ? response->job().id() : "";
  }
  v1::Job Await(const std::string& id, const std::function<bool(const v1::Job&)>& condition) {
    for (int i = 0; i < 2000; ++i) {
      const absl::StatusOr<v1::Job> job = manager_->Get(id);
      if (job.ok() && condition(*job)) return *job;
      absl::SleepFor(absl::Milliseconds(10));
    }
    ADD_FAILURE() << "waited in vain for\n" << manager_->Get(id)->DebugString();
    return {};
  }
  v1::Job AwaitEnd(const std::string& id) {
    return Await(id, [](const v1::Job& job) { return IsEnded(job.state()); });
  }
  v1::Job AwaitStep(const std::string& id, int64_t step) {
    return Await(id, [step](const v1::Job& job) {
      return job.progress().step() >= step || IsEnded(job.state());
    });
  }
  std::string Log(const std::string& id, int64_t epoch, int rank = 0) {
    return ReadFile(WorkerLogPath(data() / "jobs" / id, epoch, rank)).value_or("");
  }

  TempFolder folder_;
  Metrics metrics_;
  JobManager::Options options_;
  std::unique_ptr<LocalLauncher> launcher_;
  std::unique_ptr<JobManager> manager_;
  std::unique_ptr<WorkerService> service_;
  std::unique_ptr<grpc::Server> server_;
};

TEST_F(WorkerProcessesTest, AGangTrainsToTheEnd) {
  Serve();
  const std::string id = Submit("steps=6 save=3", "workers: 2");
  const v1::Job job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  EXPECT_EQ(job.attempts_size(), 1);
  EXPECT_EQ(job.progress().step(), 6);
  EXPECT_EQ(job.checkpoints_size(), 2);
  EXPECT_EQ(job.attempts(0).workers(1).exit_code(), 0);
  EXPECT_TRUE(job.attempts(0).workers(1).exited());
  EXPECT_EQ(Log(id, job.attempts(0).epoch(), 1),
            absl::StrCat("scripted worker rank 1 of 2, 1 threads\n"));
}

TEST_F(WorkerProcessesTest, ADeathIsRecordedAndTheJobResumesFromItsCheckpoint) {
  Serve();
  // Rank 1 of the first attempt dies when rank 0 has saved step 3 or so and is far from the end.
  const std::string id =
      Submit("steps=60 ms=30 save=3 at=8 rank=1 end=exit:3 attempts=1", "workers: 2");
  const v1::Job job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  ASSERT_EQ(job.attempts_size(), 2);
  EXPECT_EQ(job.restarts(), 1);
  const v1::Attempt& ended = job.attempts(0);
  EXPECT_EQ(ended.failure(), v1::WORKER_LOST);
  EXPECT_THAT(ended.cause(), AllOf(HasSubstr("rank 1"), HasSubstr("exited with code 3")));
  EXPECT_EQ(ended.workers(1).exit_code(), 3);
  EXPECT_THAT(std::vector<std::string>(ended.workers(1).last_lines().begin(),
                                       ended.workers(1).last_lines().end()),
              Contains("last words of rank 1"));
  EXPECT_GE(job.attempts(1).resumed_step(), 3);
}

TEST_F(WorkerProcessesTest, AKilledWorkerIsRestartedUntilTheLimit) {
  Serve();
  const std::string id = Submit("steps=9 save=2 at=3 end=signal:9", "max_restarts: 1");
  const v1::Job job = AwaitEnd(id);
  // The second attempt resumes at 2 and dies at 3 again.
  EXPECT_EQ(job.state(), v1::FAILED);
  ASSERT_EQ(job.attempts_size(), 2);
  EXPECT_EQ(job.attempts(1).resumed_step(), 2);
  EXPECT_EQ(job.attempts(1).workers(0).signal(), SIGKILL);
  EXPECT_THAT(job.reason(), AllOf(HasSubstr("signal 9 (SIGKILL)"), HasSubstr("gave up")));
}

TEST_F(WorkerProcessesTest, AWorkerThatSaysDiskFullEndsTheJobAndKeepsItsCheckpoint) {
  Serve();
  const std::string id = Submit("steps=9 save=2 at=5 end=fail:DISK_FULL");
  const v1::Job job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::FAILED);
  EXPECT_EQ(job.attempts_size(), 1);
  EXPECT_EQ(job.reason(), "DISK_FULL: rank 0: as the script says");
  EXPECT_OK(manager_->CheckpointFolder(id, "step-00000004"));
}

TEST_F(WorkerProcessesTest, AHangingWorkerIsKilledAndTheJobGoesOn) {
  options_.limits.lost_after = absl::Milliseconds(400);
  Serve();
  const std::string id = Submit("steps=8 save=2 at=5 end=hang attempts=1 deaf=1");
  const v1::Job job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  ASSERT_EQ(job.attempts_size(), 2);
  EXPECT_EQ(job.attempts(0).failure(), v1::HANG);
  EXPECT_EQ(job.attempts(1).resumed_step(), 4);
}

TEST_F(WorkerProcessesTest, AFrozenWorkerIsKilledToo) {
  options_.limits.lost_after = absl::Milliseconds(400);
  Serve();
  const std::string id =
      Submit(absl::StrCat("steps=8 save=2 at=5 attempts=1 end=signal:", SIGSTOP));
  const v1::Job job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  EXPECT_EQ(job.attempts(0).failure(), v1::HANG);
}

TEST_F(WorkerProcessesTest, CancelSavesAndStops) {
  Serve();
  const std::string id = Submit("steps=10000 ms=20", "workers: 2");
  AwaitStep(id, 3);
  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  ASSERT_OK(manager_->Cancel(cancel));
  const v1::Job job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::CANCELED);
  EXPECT_EQ(job.checkpoints_size(), 1);
  EXPECT_EQ(job.attempts(0).workers(0).signal(), 0);
}

TEST_F(WorkerProcessesTest, AServerKilledInMidTrainingIsFollowedByOneOnAnotherPort) {
  Serve();
  const std::string id = Submit("steps=60 ms=20 save=10", "workers: 2");
  AwaitStep(id, 5);
  Crash();
  absl::SleepFor(absl::Milliseconds(200));
  Serve();
  const v1::Job job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  EXPECT_EQ(job.attempts_size(), 1) << "it was adopted";
  EXPECT_EQ(job.checkpoints_size(), 6);
}

TEST_F(WorkerProcessesTest, SuccessWhileTheServerWasAwayIsFoundInTheRecord) {
  Serve();
  const std::string id = Submit("steps=20 ms=20 patience=100");
  AwaitStep(id, 5);
  const int64_t epoch = manager_->Get(id)->attempts(0).epoch();
  Crash();
  const std::filesystem::path record = WorkerExitPath(data() / "jobs" / id, epoch, 0);
  const auto pid = ReadPidRecord(WorkerPidPath(data() / "jobs" / id, epoch, 0));
  ASSERT_OK(pid);
  for (int i = 0; i < 1000 && IdentityOf(pid->pid).ok(); ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  ASSERT_TRUE(std::filesystem::exists(record));
  Serve();
  const v1::Job job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  EXPECT_EQ(job.attempts_size(), 1);
  EXPECT_EQ(job.progress().step(), 20);
}

TEST_F(WorkerProcessesTest, AWorkerKilledWhileTheServerWasAwayGoesOnFromItsCheckpoint) {
  Serve();
  const std::string id = Submit("steps=30 ms=20 save=5", "workers: 2\nmax_restarts: 1");
  AwaitStep(id, 7);
  const int64_t epoch = manager_->Get(id)->attempts(0).epoch();
  Crash();
  const auto pid = ReadPidRecord(WorkerPidPath(data() / "jobs" / id, epoch, 1));
  ASSERT_OK(pid);
  kill(static_cast<pid_t>(pid->pid), SIGKILL);
  Serve();
  const v1::Job job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  ASSERT_EQ(job.attempts_size(), 2);
  EXPECT_EQ(job.attempts(0).failure(), v1::WORKER_LOST);
  EXPECT_GE(job.attempts(1).resumed_step(), 5);
}

TEST_F(WorkerProcessesTest, AWorkerOfAnOlderAttemptIsSentAway) {
  options_.reattach_window = absl::Milliseconds(150);
  options_.limits.kill_grace = absl::Seconds(20);
  Serve();
  const std::string id = Submit("steps=40 ms=20 save=5");
  AwaitStep(id, 3);
  const int64_t epoch = manager_->Get(id)->attempts(0).epoch();
  const auto pid = ReadPidRecord(WorkerPidPath(data() / "jobs" / id, epoch, 0));
  ASSERT_OK(pid);
  // Frozen through the outage and the window; its record is lost, so it can't be killed.
  kill(static_cast<pid_t>(pid->pid), SIGSTOP);
  Crash();
  std::filesystem::remove(WorkerPidPath(data() / "jobs" / id, epoch, 0));
  Serve();
  Await(id, [](const v1::Job& job) { return job.attempts_size() == 2; });
  kill(static_cast<pid_t>(pid->pid), SIGCONT);
  EXPECT_EQ(AwaitEnd(id).state(), v1::SUCCEEDED);
  for (int i = 0; i < 1000 && IdentityOf(pid->pid).ok(); ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_THAT(Log(id, epoch), HasSubstr("refused"));
  EXPECT_FALSE(IdentityOf(pid->pid).ok());
}

TEST_F(WorkerProcessesTest, DrainSavesAndTheNextServerGoesOnThere) {
  Serve();
  const std::string id = Submit("steps=40 ms=20 save=1000", "workers: 2\nmax_restarts: 0");
  AwaitStep(id, 5);
  manager_->Drain(absl::Seconds(10));
  v1::Job job = *manager_->Get(id);
  EXPECT_EQ(job.state(), v1::RECOVERING);
  ASSERT_EQ(job.checkpoints_size(), 1);
  const int64_t saved = job.checkpoints(0).step();
  EXPECT_GE(saved, 5);
  Crash();
  Serve();
  job = AwaitEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.DebugString();
  EXPECT_EQ(job.restarts(), 0);
  EXPECT_EQ(job.attempts(1).resumed_step(), saved);
}

}  // namespace
}  // namespace pyramid
