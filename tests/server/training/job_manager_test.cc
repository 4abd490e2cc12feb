#include "server/training/job_manager.h"

#include <gmock/gmock.h>
#include <google/protobuf/util/json_util.h>
#include <gtest/gtest.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>
#include <sqlite3.h>
#include <sys/mount.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <functional>
#include <set>
#include <thread>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "tests/server/training/fake_launcher.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::FakeLauncher;
using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class JobManagerTest : public ::testing::Test {
 protected:
  JobManagerTest() {
    std::filesystem::create_directory(folder_ / "pictures");
    options_.data = folder_ / "data";
    options_.devices = {{"cpu", 2}};
    options_.worker_program = "/bin/worker";
    options_.cores = 4;
    options_.tick = absl::Milliseconds(2);
    options_.first_backoff = absl::Milliseconds(10);
    options_.limits.kill_grace = absl::Milliseconds(100);
    options_.reattach_window = absl::Milliseconds(300);
  }
  ~JobManagerTest() override { EXPECT_FALSE(launcher_.doubled()) << "two live attempts"; }

  void Create() {
    absl::StatusOr<std::unique_ptr<JobManager>> manager =
        JobManager::Create(options_, launcher_, metrics_);
    ASSERT_OK(manager);
    manager_ = *std::move(manager);
  }
  void Start() {
    Create();
    manager_->Start();
  }
  // As after kill -9: the manager goes without a word, its processes stay.
  void Crash() {
    manager_.reset();
    launcher_.Forget();
    options_.dies_at = nullptr;
  }

  v1::SubmitJobRequest Request(const std::string& extra = "", const std::string& id = "") {
    v1::SubmitJobRequest request;
    request.set_request_id(id);
    request.set_recipe(absl::StrCat("data_dir: ", (folder_ / "pictures").string(), "\n", extra));
    return request;
  }
  std::string Submit(const std::string& extra = "", const std::string& id = "") {
    const absl::StatusOr<v1::SubmitJobResponse> response = manager_->Submit(Request(extra, id));
    EXPECT_OK(response);
    return response.ok() ? response->job().id() : "";
  }
  v1::Job Await(const std::string& id, const std::function<bool(const v1::Job&)>& condition) {
    for (int i = 0; i < 5000; ++i) {
      const absl::StatusOr<v1::Job> job = manager_->Get(id);
      if (job.ok() && condition(*job)) return *job;
      absl::SleepFor(absl::Milliseconds(1));
    }
    ADD_FAILURE() << "waited in vain for\n" << manager_->Get(id)->DebugString();
    return {};
  }
  v1::Job AwaitState(const std::string& id, v1::JobState state) {
    return Await(id, [state](const v1::Job& job) { return job.state() == state; });
  }
  // Waits for the launch of attempt number `attempt` (1 is the first) and gives its epoch.
  int64_t AwaitLaunch(const std::string& id, int attempt = 1) {
    const v1::Job job = Await(id, [&](const v1::Job& j) {
      return j.attempts_size() >= attempt && j.attempts(attempt - 1).workers_size() == j.workers();
    });
    return job.attempts_size() < attempt ? 0 : job.attempts(attempt - 1).epoch();
  }
  static v1::WorkerId Worker(const std::string& id, int64_t epoch, int rank = 0) {
    v1::WorkerId worker;
    worker.set_job_id(id);
    worker.set_epoch(epoch);
    worker.set_rank(rank);
    return worker;
  }
  absl::StatusOr<v1::RegisterResponse> Register(const std::string& id, int64_t epoch,
                                                int rank = 0) {
    v1::RegisterRequest request;
    *request.mutable_worker() = Worker(id, epoch, rank);
    return manager_->Register(request);
  }
  v1::ReportRequest Report(const std::string& id, int64_t epoch, int64_t sequence, int64_t step,
                           int rank = 0) {
    v1::ReportRequest request;
    *request.mutable_worker() = Worker(id, epoch, rank);
    request.set_sequence(sequence);
    request.mutable_progress()->set_step(step);
    request.mutable_progress()->set_images(step * 10);
    return request;
  }
  // Makes the folder too.
  v1::Checkpoint Checkpoint(const std::string& id, int64_t step) {
    v1::Checkpoint checkpoint;
    checkpoint.set_id(absl::StrCat("step-", step));
    checkpoint.set_step(step);
    checkpoint.set_path((options_.data / "jobs" / id / "checkpoints" / checkpoint.id()).string());
    checkpoint.set_write_seconds(0.5);
    std::filesystem::create_directories(checkpoint.path());
    return checkpoint;
  }
  v1::FinishRequest Finished(const std::string& id, int64_t epoch, int rank = 0) {
    v1::FinishRequest request;
    *request.mutable_worker() = Worker(id, epoch, rank);
    request.set_succeeded(true);
    return request;
  }
  v1::FinishRequest Failed(const std::string& id, int64_t epoch, v1::FailureClass failure,
                           const std::string& message) {
    v1::FinishRequest request;
    *request.mutable_worker() = Worker(id, epoch);
    request.set_failure(failure);
    request.set_message(message);
    return request;
  }
  void WriteExitRecord(const v1::FinishRequest& finish) {
    std::string json;
    ASSERT_TRUE(google::protobuf::util::MessageToJsonString(finish, &json).ok());
    std::ofstream(WorkerExitPath(options_.data / "jobs" / finish.worker().job_id(),
                                 finish.worker().epoch(), finish.worker().rank()))
        << json;
  }
  // Submits a job of one worker and brings it to RUNNING.
  std::pair<std::string, int64_t> Running(const std::string& extra = "") {
    const std::string id = Submit(extra);
    const int64_t epoch = AwaitLaunch(id);
    EXPECT_OK(Register(id, epoch));
    AwaitState(id, v1::RUNNING);
    return {id, epoch};
  }
  double Metric(const std::string& name, const std::string& label = "") {
    double sum = 0;
    for (const prometheus::MetricFamily& family : metrics_.registry()->Collect()) {
      if (family.name != name) continue;
      for (const prometheus::ClientMetric& metric : family.metric) {
        bool wanted = label.empty();
        for (const auto& pair : metric.label) wanted |= pair.value == label;
        if (wanted) {
          sum += metric.counter.value + metric.gauge.value +
                 static_cast<double>(metric.histogram.sample_count);
        }
      }
    }
    return sum;
  }
  std::vector<v1::JobEvent> History(const std::string& id, int64_t after = 0) {
    v1::WatchJobRequest request;
    request.set_job_id(id);
    request.set_after_event(after);
    request.set_history_only(true);
    const auto watch = manager_->Watch(request);
    EXPECT_OK(watch);
    std::vector<v1::JobEvent> events;
    while (true) {
      absl::StatusOr<v1::JobEvent> event = (*watch)->Next(absl::Now() + absl::Seconds(5));
      if (!event.ok()) {
        EXPECT_EQ(event.status().code(), absl::StatusCode::kOutOfRange) << event.status();
        return events;
      }
      events.push_back(*std::move(event));
    }
  }

  TempFolder folder_;
  FakeLauncher launcher_;
  Metrics metrics_;
  JobManager::Options options_;
  std::unique_ptr<JobManager> manager_;
};

// ---------------------------------------------------------------- submit, get, list

TEST_F(JobManagerTest, EachAttemptsWorkersGetVariablesOfTheirOwn) {
  options_.worker_environment = [](const std::string& job, int64_t epoch) {
    return std::vector<std::string>{absl::StrCat("TOKEN=", job, "/", epoch)};
  };
  Start();
  const std::string id = Submit("workers: 2\n");
  const int64_t epoch = AwaitLaunch(id);
  for (const WorkerLaunch& launch : launcher_.launches()) {
    EXPECT_THAT(launch.environment, ::testing::ElementsAre(absl::StrCat("TOKEN=", id, "/", epoch)));
  }
}

TEST_F(JobManagerTest, AJobLivesFromSubmitToSucceeded) {
  Start();
  const std::string id = Submit("workers: 2\nowner: ann\n");
  const int64_t epoch = AwaitLaunch(id);
  const std::vector<WorkerLaunch> launches = launcher_.launches();
  ASSERT_EQ(launches.size(), 2u);
  EXPECT_EQ(launches[1].key, (WorkerKey{id, epoch, 1}));
  EXPECT_EQ(launches[1].world, 2);
  EXPECT_EQ(launches[1].threads, 2);  // 4 cores, 2 slots
  EXPECT_EQ(launches[1].program, "/bin/worker");
  EXPECT_EQ(launches[1].server_file, options_.data / "server.json");
  EXPECT_EQ(ReadFile(launches[1].config).value_or(""), manager_->Get(id)->recipe());

  ASSERT_OK(Register(id, epoch, 0));
  EXPECT_EQ(manager_->Get(id)->state(), v1::STARTING);
  ASSERT_OK(Register(id, epoch, 1));
  EXPECT_EQ(manager_->Get(id)->state(), v1::RUNNING);

  v1::ReportRequest report = Report(id, epoch, 1, 10);
  *report.add_new_checkpoints() = Checkpoint(id, 10);
  report.add_log_lines("loss 0.5");
  ASSERT_OK_AND_ASSIGN(const v1::ReportResponse response, manager_->Report(report));
  EXPECT_EQ(response.directive(), v1::GO_ON);
  EXPECT_EQ(manager_->Get(id)->progress().step(), 10);

  ASSERT_OK(manager_->Finish(Finished(id, epoch, 1)));
  launcher_.Exit({id, epoch, 1}, 0);
  ASSERT_OK(manager_->Finish(Finished(id, epoch, 0)));
  launcher_.Exit({id, epoch, 0}, 0);
  const v1::Job job = AwaitState(id, v1::SUCCEEDED);
  EXPECT_EQ(job.attempts_size(), 1);
  EXPECT_EQ(job.attempts(0).failure(), v1::FAILURE_CLASS_UNSPECIFIED);
  EXPECT_TRUE(job.has_submitted() && job.has_started() && job.has_ended());
  EXPECT_EQ(job.checkpoints_size(), 1);
  EXPECT_EQ(job.restarts(), 0);
  EXPECT_EQ(job.owner(), "ann");
  EXPECT_TRUE(launcher_.signals().empty());
}

TEST_F(JobManagerTest, TheSameRequestIsTheSameJobEvenWhenItsDataHasGone) {
  Start();
  ASSERT_OK_AND_ASSIGN(const v1::SubmitJobResponse first, manager_->Submit(Request("", "r")));
  EXPECT_FALSE(first.existed());
  std::filesystem::remove(folder_ / "pictures");
  ASSERT_OK_AND_ASSIGN(const v1::SubmitJobResponse again, manager_->Submit(Request("", "r")));
  EXPECT_TRUE(again.existed());
  EXPECT_EQ(again.job().id(), first.job().id());
  EXPECT_THAT(manager_->Submit(Request("lr: 0.5", "r")),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("\"r\"")));
  EXPECT_THAT(manager_->Submit(Request("", "other")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("data_dir")));
}

TEST_F(JobManagerTest, RacingSubmitsOfOneRequestMakeOneJob) {
  Start();
  std::vector<std::thread> threads;
  std::atomic<int> made{0}, failed{0};
  absl::Mutex mutex;
  std::set<std::string> ids;
  for (int i = 0; i < 16; ++i) {
    threads.emplace_back([&] {
      const auto response = manager_->Submit(Request("", "same"));
      if (!response.ok()) {
        ++failed;
        return;
      }
      if (!response->existed()) ++made;
      absl::MutexLock lock(&mutex);
      ids.insert(response->job().id());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(made, 1);
  EXPECT_EQ(ids.size(), 1u);
}

TEST_F(JobManagerTest, WithoutARequestIdTheServerMakesOne) {
  Start();
  const std::string first = Submit(), second = Submit();
  EXPECT_NE(first, second);
  EXPECT_FALSE(manager_->Get(first)->request_id().empty());
}

TEST_F(JobManagerTest, ValidateOnlyResolvesAndSaysHowItWouldWaitButQueuesNothing) {
  Create();
  v1::SubmitJobRequest request = Request("workers: 2\nbatch_size: 64\n");
  request.set_validate_only(true);
  ASSERT_OK_AND_ASSIGN(v1::SubmitJobResponse response, manager_->Submit(request));
  EXPECT_EQ(response.job().id(), "");
  EXPECT_EQ(response.job().reason(), "would start at once");
  EXPECT_THAT(response.job().recipe(), HasSubstr("batch_size: 64"));
  Submit("workers: 1");
  ASSERT_OK_AND_ASSIGN(response, manager_->Submit(request));
  EXPECT_EQ(response.job().reason(), "needs 2 cpu workers, 1 of 2 free");
  EXPECT_EQ(manager_->List({}).size(), 1u);
  request.set_recipe("batch_size: 0");
  EXPECT_THAT(manager_->Submit(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("batch_size")));
}

TEST_F(JobManagerTest, TheRecipesWarningsAreAnswered) {
  Start();
  ASSERT_OK_AND_ASSIGN(const v1::SubmitJobResponse response,
                       manager_->Submit(Request("loss_scale_type: dynamic\n")));
  EXPECT_THAT(std::vector<std::string>(response.warnings().begin(), response.warnings().end()),
              ::testing::Contains(HasSubstr("loss scaling")));
}

TEST_F(JobManagerTest, ListsTheNewestFirstByStateAndLimit) {
  Create();
  for (int i = 0; i < 5; ++i) Submit();
  v1::CancelJobRequest cancel;
  cancel.set_job_id("j-000002");
  ASSERT_OK(manager_->Cancel(cancel));
  const auto ids = [&](const v1::ListJobsRequest& request) {
    std::vector<std::string> all;
    for (const v1::Job& job : manager_->List(request)) all.push_back(job.id());
    return all;
  };
  v1::ListJobsRequest request;
  request.set_limit(2);
  EXPECT_THAT(ids(request), ElementsAre("j-000005", "j-000004"));
  request.add_states(v1::CANCELED);
  EXPECT_THAT(ids(request), ElementsAre("j-000002"));
  EXPECT_EQ(ids({}).size(), 5u);
}

TEST_F(JobManagerTest, AnUnknownJobIsNotFound) {
  Start();
  EXPECT_THAT(manager_->Get("j-000009"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("j-000009")));
  v1::CancelJobRequest cancel;
  cancel.set_job_id("nope");
  EXPECT_THAT(manager_->Cancel(cancel), StatusIs(absl::StatusCode::kNotFound, HasSubstr("nope")));
  v1::WatchJobRequest watch;
  watch.set_job_id("nope");
  EXPECT_THAT(manager_->Watch(watch).status(),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nope")));
  EXPECT_THAT(manager_->CheckpointFolder("nope", ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nope")));
}

// ---------------------------------------------------------------- queue

TEST_F(JobManagerTest, AWaitingJobSaysWhyWithNumbersAndStartsInTurn) {
  Start();
  const auto [first, epoch] = Running("workers: 1");
  const std::string second = Submit("workers: 2");
  const std::string third = Submit("workers: 1");
  Await(second,
        [](const v1::Job& job) { return job.reason() == "needs 2 cpu workers, 1 of 2 free"; });
  Await(third, [](const v1::Job& job) {
    return job.reason() == "needs 1 cpu worker, 1 of 2 free; 1 job ahead";
  });
  ASSERT_OK(manager_->Finish(Finished(first, epoch)));
  launcher_.Exit({first, epoch, 0}, 0);
  AwaitLaunch(second);
  Await(third,
        [](const v1::Job& job) { return job.reason() == "needs 1 cpu worker, 0 of 2 free"; });
  EXPECT_EQ(manager_->Get(second)->reason(), "");
  EXPECT_EQ(manager_->Get(third)->attempts_size(), 0);
}

TEST_F(JobManagerTest, CudaDevicesAreGivenByName) {
  options_.devices = {{"cuda", 3}};
  Start();
  const auto [first, epoch] = Running("device: cuda\nworkers: 1");
  const std::string second = Submit("device: cuda\nworkers: 2");
  AwaitLaunch(second);
  EXPECT_THAT(manager_->Get(first)->attempts(0).devices(), ElementsAre("cuda:0"));
  EXPECT_THAT(manager_->Get(second)->attempts(0).devices(), ElementsAre("cuda:1", "cuda:2"));
  EXPECT_EQ(launcher_.launches()[2].device, "cuda:2");
}

// ---------------------------------------------------------------- cancel

TEST_F(JobManagerTest, AQueuedJobIsCanceledAtOnce) {
  Create();
  const std::string id = Submit();
  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  cancel.set_reason("a typo");
  ASSERT_OK_AND_ASSIGN(const v1::Job job, manager_->Cancel(cancel));
  EXPECT_EQ(job.state(), v1::CANCELED);
  EXPECT_EQ(job.reason(), "canceled: a typo");
  EXPECT_TRUE(job.has_ended());
  EXPECT_THAT(manager_->Cancel(cancel),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("CANCELED")));
  manager_->Start();
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_TRUE(launcher_.launches().empty());
}

TEST_F(JobManagerTest, ARunningJobIsAskedToSaveAndStop) {
  Start();
  const auto [id, epoch] = Running();
  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  ASSERT_OK_AND_ASSIGN(v1::Job job, manager_->Cancel(cancel));
  EXPECT_EQ(job.state(), v1::STOPPING);
  EXPECT_EQ(job.stop_target(), v1::CANCELED);
  ASSERT_OK_AND_ASSIGN(job, manager_->Cancel(cancel));  // harmless
  ASSERT_OK_AND_ASSIGN(const v1::ReportResponse response,
                       manager_->Report(Report(id, epoch, 1, 7)));
  EXPECT_EQ(response.directive(), v1::STOP);
  v1::FinishRequest finish = Finished(id, epoch);
  finish.set_succeeded(false);
  finish.set_stopped(true);
  *finish.add_new_checkpoints() = Checkpoint(id, 7);
  ASSERT_OK(manager_->Finish(finish));
  launcher_.Exit({id, epoch, 0}, 75);
  job = AwaitState(id, v1::CANCELED);
  EXPECT_EQ(job.checkpoints_size(), 1);
  EXPECT_EQ(job.attempts(0).failure(), v1::FAILURE_CLASS_UNSPECIFIED);
  EXPECT_TRUE(launcher_.signals().empty());
}

TEST_F(JobManagerTest, ARunningJobSavesOnRequestOnce) {
  Start();
  const auto [id, epoch] = Running();
  ASSERT_OK(manager_->Save(id));
  ASSERT_OK(manager_->Save(id));  // two wishes before a save are one save
  ASSERT_OK_AND_ASSIGN(v1::ReportResponse response, manager_->Report(Report(id, epoch, 1, 7)));
  EXPECT_EQ(response.directive(), v1::SAVE);
  v1::ReportRequest saved = Report(id, epoch, 2, 8);
  saved.set_saves_done(1);
  ASSERT_OK_AND_ASSIGN(response, manager_->Report(saved));
  EXPECT_EQ(response.directive(), v1::GO_ON);
  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  ASSERT_OK(manager_->Cancel(cancel));
  EXPECT_THAT(manager_->Save(id),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("STOPPING")));
  EXPECT_THAT(manager_->Save("j-999999"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("j-999999")));
}

TEST_F(JobManagerTest, AWorkerThatDoesntStopIsTerminatedThenKilled) {
  options_.limits.stop_grace = absl::Milliseconds(30);
  options_.limits.kill_grace = absl::Milliseconds(30);
  launcher_.set_dies_of_term(false);
  Start();
  const auto [id, epoch] = Running();
  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  ASSERT_OK(manager_->Cancel(cancel));
  const v1::Job job = AwaitState(id, v1::CANCELED);
  EXPECT_EQ(job.reason(), "canceled");
  const WorkerKey key{id, epoch, 0};
  EXPECT_THAT(launcher_.signals(), ElementsAre(std::pair(key, SIGTERM), std::pair(key, SIGKILL)));
}

TEST_F(JobManagerTest, AStartingJobCanBeCanceled) {
  options_.limits.stop_grace = absl::Milliseconds(30);
  Start();
  const std::string id = Submit();
  const int64_t epoch = AwaitLaunch(id);
  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  ASSERT_OK_AND_ASSIGN(const v1::Job job, manager_->Cancel(cancel));
  EXPECT_EQ(job.state(), v1::STOPPING);
  ASSERT_OK_AND_ASSIGN(const v1::RegisterResponse response, Register(id, epoch));
  EXPECT_EQ(response.directive(), v1::STOP);
  AwaitState(id, v1::CANCELED);
}

TEST_F(JobManagerTest, ARecoveringJobIsCanceledAtOnce) {
  options_.first_backoff = absl::Hours(1);
  Start();
  const auto [id, epoch] = Running();
  launcher_.Exit({id, epoch, 0}, 3);
  AwaitState(id, v1::RECOVERING);
  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  ASSERT_OK_AND_ASSIGN(const v1::Job job, manager_->Cancel(cancel));
  EXPECT_EQ(job.state(), v1::CANCELED);
}

TEST_F(JobManagerTest, AJobThatWasDoneBeforeItSawTheStopSucceeded) {
  Start();
  const auto [id, epoch] = Running();
  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  ASSERT_OK(manager_->Cancel(cancel));
  ASSERT_OK(manager_->Finish(Finished(id, epoch)));
  launcher_.Exit({id, epoch, 0}, 0);
  AwaitState(id, v1::SUCCEEDED);
  EXPECT_THAT(manager_->Cancel(cancel),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("SUCCEEDED")));
}

// ---------------------------------------------------------------- failures

TEST_F(JobManagerTest, ADeadWorkerEndsItsGangAndTheJobGoesOnFromItsCheckpoint) {
  Start();
  const std::string id = Submit("workers: 2");
  const int64_t epoch = AwaitLaunch(id);
  ASSERT_OK(Register(id, epoch, 0));
  ASSERT_OK(Register(id, epoch, 1));
  v1::ReportRequest report = Report(id, epoch, 1, 20);
  *report.add_new_checkpoints() = Checkpoint(id, 20);
  ASSERT_OK(manager_->Report(report));
  std::ofstream(WorkerLogPath(options_.data / "jobs" / id, epoch, 1)) << "one\nlast words\n";
  launcher_.Kill({id, epoch, 1}, SIGSEGV);

  const int64_t second = AwaitLaunch(id, 2);
  EXPECT_GT(second, epoch);
  const v1::Job job = *manager_->Get(id);
  EXPECT_EQ(job.restarts(), 1);
  const v1::Attempt& ended = job.attempts(0);
  EXPECT_EQ(ended.failure(), v1::WORKER_LOST);
  EXPECT_THAT(ended.cause(), AllOf(HasSubstr("rank 1"), HasSubstr("signal 11 (SIGSEGV)")));
  EXPECT_EQ(ended.workers(1).signal(), SIGSEGV);
  EXPECT_THAT(ended.workers(1).last_lines(), ElementsAre("one", "last words"));
  EXPECT_EQ(ended.workers(0).signal(), SIGTERM);  // ours
  EXPECT_EQ(job.attempts(1).resumed_step(), 20);
  EXPECT_THAT(launcher_.signals(), ElementsAre(std::pair(WorkerKey{id, epoch, 0}, SIGTERM)));
}

TEST_F(JobManagerTest, GivesUpAfterMaxRestartsWithTheCauseAsReason) {
  options_.first_backoff = absl::Milliseconds(1);
  Start();
  const std::string id = Submit("max_restarts: 2");
  for (int attempt = 1; attempt <= 3; ++attempt) {
    launcher_.Exit({id, AwaitLaunch(id, attempt), 0}, 3);
  }
  const v1::Job job = AwaitState(id, v1::FAILED);
  EXPECT_EQ(job.attempts_size(), 3);
  EXPECT_EQ(job.restarts(), 2);
  EXPECT_THAT(job.reason(), AllOf(HasSubstr("WORKER_LOST: rank 0"), HasSubstr("exited with code 3"),
                                  HasSubstr("gave up after 2 of 2 restarts")));
  EXPECT_EQ(Metric("pyramid_job_restarts_total"), 2);
  EXPECT_EQ(Metric("pyramid_attempts_total"), 3);
}

TEST_F(JobManagerTest, WhatARetryCantCureIsNotRetried) {
  Start();
  for (const v1::FailureClass failure :
       {v1::CONFIG, v1::DATA_CORRUPT, v1::DISK_FULL, v1::NOT_A_NUMBER, v1::OOM_HOST}) {
    const auto [id, epoch] = Running();
    ASSERT_OK(manager_->Finish(Failed(id, epoch, failure, "labels out of range")));
    launcher_.Exit({id, epoch, 0}, 1);
    const v1::Job job = AwaitState(id, v1::FAILED);
    EXPECT_EQ(job.attempts_size(), 1);
    EXPECT_EQ(job.attempts(0).failure(), failure);
    EXPECT_EQ(job.reason(), absl::StrCat(FailureName(failure), ": rank 0: labels out of range"));
  }
  EXPECT_EQ(Metric("pyramid_checkpoint_failures_total"), 1);  // DISK_FULL
}

TEST_F(JobManagerTest, AFullDiskKeepsTheLastGoodCheckpoint) {
  Start();
  const auto [id, epoch] = Running();
  v1::ReportRequest report = Report(id, epoch, 1, 20);
  *report.add_new_checkpoints() = Checkpoint(id, 20);
  ASSERT_OK(manager_->Report(report));
  ASSERT_OK(manager_->Finish(Failed(id, epoch, v1::DISK_FULL, "no space left on device")));
  launcher_.Exit({id, epoch, 0}, 1);
  AwaitState(id, v1::FAILED);
  EXPECT_OK(manager_->CheckpointFolder(id, ""));
}

TEST_F(JobManagerTest, AProgramThatCantRunFailsTheJobAtOnce) {
  launcher_.set_launch_error(absl::NotFoundError("can't run /bin/worker"));
  Start();
  const std::string id = Submit();
  const v1::Job job = AwaitState(id, v1::FAILED);
  EXPECT_EQ(job.reason(), "CONFIG: launching rank 0: can't run /bin/worker");
}

TEST_F(JobManagerTest, AMachineWithoutProcessesLeftIsTriedAgain) {
  launcher_.set_launch_error(absl::UnavailableError("no more processes"));
  Start();
  const std::string id = Submit();
  const v1::Job waiting = Await(id, [](const v1::Job& job) {
    return job.attempts_size() == 1 && job.attempts(0).has_ended();
  });
  EXPECT_EQ(waiting.attempts(0).failure(), v1::NODE_LOST);
  launcher_.set_launch_error(absl::OkStatus());
  Await(id,
        [](const v1::Job& job) { return job.attempts_size() > 1 && job.state() == v1::STARTING; });
}

TEST_F(JobManagerTest, AWorkerThatNeverReportsHangs) {
  options_.limits.start_timeout = absl::Milliseconds(50);
  Start();
  const std::string id = Submit("max_restarts: 0");
  const v1::Job job = AwaitState(id, v1::FAILED);
  EXPECT_EQ(job.attempts(0).failure(), v1::HANG);
  EXPECT_THAT(job.reason(), HasSubstr("didn't report within 50ms of its launch"));
}

TEST_F(JobManagerTest, AWorkerThatFallsSilentHangsAndIsRestarted) {
  options_.limits.lost_after = absl::Milliseconds(100);
  launcher_.set_dies_of_term(false);
  Start();
  const auto [id, epoch] = Running();
  ASSERT_OK(manager_->Report(Report(id, epoch, 1, 5)));
  AwaitLaunch(id, 2);
  const v1::Job job = *manager_->Get(id);
  EXPECT_EQ(job.attempts(0).failure(), v1::HANG);
  EXPECT_THAT(job.attempts(0).cause(), HasSubstr("its last step was 5"));
  EXPECT_EQ(job.restarts(), 1);
}

TEST_F(JobManagerTest, ARecoveringJobSaysWhyItWaits) {
  options_.first_backoff = absl::Hours(1);
  Start();
  const auto [id, epoch] = Running();
  launcher_.Exit({id, epoch, 0}, 3);
  Await(id, [](const v1::Job& job) {
    return job.state() == v1::RECOVERING && absl::StartsWith(job.reason(), "starts again at ") &&
           absl::StrContains(job.reason(), " UTC; the last attempt: rank 0");
  });
}

TEST_F(JobManagerTest, AWorkerStoppedFromOutsideGoesOnWithoutBeingCounted) {
  Start();
  const auto [id, epoch] = Running("max_restarts: 0");
  v1::FinishRequest finish = Finished(id, epoch);
  finish.set_succeeded(false);
  finish.set_stopped(true);
  ASSERT_OK(manager_->Finish(finish));
  launcher_.Exit({id, epoch, 0}, 75);
  AwaitLaunch(id, 2);
  EXPECT_EQ(manager_->Get(id)->restarts(), 0);
  EXPECT_EQ(manager_->Get(id)->attempts(0).failure(), v1::PREEMPTED);
}

// ---------------------------------------------------------------- what workers say

TEST_F(JobManagerTest, AStaleOrUnknownWorkerIsRefused) {
  Start();
  const auto [id, epoch] = Running();
  launcher_.Exit({id, epoch, 0}, 3);
  const int64_t second = AwaitLaunch(id, 2);
  EXPECT_THAT(Register(id, epoch), StatusIs(absl::StatusCode::kFailedPrecondition,
                                            HasSubstr(absl::StrCat(second, " is"))));
  EXPECT_THAT(manager_->Report(Report(id, epoch, 9, 9)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("must exit")));
  EXPECT_THAT(manager_->Finish(Finished(id, epoch)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("must exit")));
  EXPECT_THAT(Register("j-999999", 1),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("j-999999")));
  v1::ReportRequest elsewhere = Report("j-999999", 1, 1, 1);
  *elsewhere.add_new_checkpoints() = Checkpoint("j-999999", 1);
  EXPECT_THAT(manager_->Report(elsewhere),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("j-999999")));
  EXPECT_THAT(Register(id, second, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("has 1 workers")));
  EXPECT_EQ(manager_->Get(id)->state(), v1::STARTING);
}

TEST_F(JobManagerTest, ARepeatedReportIsAnsweredAndOtherwiseIgnored) {
  Start();
  const auto [id, epoch] = Running();
  v1::ReportRequest report = Report(id, epoch, 1, 10);
  report.add_log_lines("once");
  *report.add_new_checkpoints() = Checkpoint(id, 10);
  for (int i = 0; i < 3; ++i) ASSERT_OK(manager_->Report(report));
  int lines = 0, checkpoints = 0;
  for (const v1::JobEvent& event : History(id)) {
    lines += event.has_log();
    checkpoints += event.has_checkpoint();
  }
  EXPECT_EQ(lines, 1);
  EXPECT_EQ(checkpoints, 1);
  EXPECT_EQ(Metric("pyramid_train_images_total", id), 100);
}

TEST_F(JobManagerTest, ARepeatedFinishIsAnsweredEvenAfterTheEnd) {
  Start();
  const auto [id, epoch] = Running();
  ASSERT_OK(manager_->Finish(Finished(id, epoch)));
  ASSERT_OK(manager_->Finish(Finished(id, epoch)));
  launcher_.Exit({id, epoch, 0}, 0);
  AwaitState(id, v1::SUCCEEDED);
  EXPECT_OK(manager_->Finish(Finished(id, epoch)));
  Crash();
  Start();
  EXPECT_OK(manager_->Finish(Finished(id, epoch)));
}

TEST_F(JobManagerTest, OnlyRankZerosProgressIsTheJobs) {
  Start();
  const std::string id = Submit("workers: 2");
  const int64_t epoch = AwaitLaunch(id);
  ASSERT_OK(manager_->Report(Report(id, epoch, 1, 10, 0)));
  ASSERT_OK(manager_->Report(Report(id, epoch, 1, 99, 1)));
  EXPECT_EQ(manager_->Get(id)->progress().step(), 10);
  EXPECT_EQ(manager_->Get(id)->state(), v1::RUNNING);  // a report says as much as a registration
}

TEST_F(JobManagerTest, LogLinesOfAnyBytesAreKeptAsText) {
  Start();
  const auto [id, epoch] = Running();
  v1::ReportRequest report = Report(id, epoch, 1, 1);
  report.add_log_lines("bad \xff byte \x1b[0m");
  ASSERT_OK(manager_->Report(report));
  std::string text;
  for (const v1::JobEvent& event : History(id)) {
    if (event.has_log()) text = event.log().text();
  }
  EXPECT_EQ(text, "bad ? byte  [0m");
}

TEST_F(JobManagerTest, CheckpointsThatTheWorkerRemovedAreForgotten) {
  Start();
  const auto [id, epoch] = Running();
  v1::ReportRequest report = Report(id, epoch, 1, 10);
  *report.add_new_checkpoints() = Checkpoint(id, 10);
  ASSERT_OK(manager_->Report(report));
  std::filesystem::remove(manager_->Get(id)->checkpoints(0).path());
  EXPECT_THAT(manager_->CheckpointFolder(id, "step-10"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("keep_checkpoint_max")));
  report = Report(id, epoch, 2, 20);
  *report.add_new_checkpoints() = Checkpoint(id, 20);
  ASSERT_OK(manager_->Report(report));
  const v1::Job job = *manager_->Get(id);
  ASSERT_EQ(job.checkpoints_size(), 1);
  EXPECT_EQ(job.checkpoints(0).step(), 20);
}

TEST_F(JobManagerTest, CheckpointsThatNobodyReportedAreFoundOnDisk) {
  options_.find_checkpoints = [this](const std::filesystem::path& folder) {
    std::vector<v1::Checkpoint> found;
    if (std::filesystem::exists(folder / "checkpoints" / "step-30")) {
      found.push_back(Checkpoint(folder.filename().string(), 30));
    }
    return found;
  };
  Start();
  const auto [id, epoch] = Running();
  Checkpoint(id, 30);
  launcher_.Kill({id, epoch, 0}, SIGKILL);
  AwaitLaunch(id, 2);
  EXPECT_EQ(manager_->Get(id)->attempts(1).resumed_step(), 30);
  EXPECT_OK(manager_->CheckpointFolder(id, "step-30"));
}

TEST_F(JobManagerTest, PromotionNeedsACheckpoint) {
  Start();
  const auto [id, epoch] = Running();
  EXPECT_THAT(manager_->CheckpointFolder(id, ""),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no checkpoint yet")));
  v1::ReportRequest report = Report(id, epoch, 1, 20);
  *report.add_new_checkpoints() = Checkpoint(id, 10);
  *report.add_new_checkpoints() = Checkpoint(id, 20);
  ASSERT_OK(manager_->Report(report));
  ASSERT_OK_AND_ASSIGN(std::filesystem::path path, manager_->CheckpointFolder(id, ""));
  EXPECT_EQ(path.filename(), "step-20");
  ASSERT_OK_AND_ASSIGN(path, manager_->CheckpointFolder(id, "step-10"));
  EXPECT_EQ(path.filename(), "step-10");
  EXPECT_THAT(manager_->CheckpointFolder(id, "step-15"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("the newest is step-20")));
}

TEST_F(JobManagerTest, MetricsFollowTheJob) {
  Start();
  const auto [id, epoch] = Running();
  EXPECT_EQ(Metric("pyramid_jobs", "running"), 1);
  EXPECT_EQ(Metric("pyramid_queue_wait_seconds"), 1);
  v1::ReportRequest report = Report(id, epoch, 1, 10);
  *report.add_new_checkpoints() = Checkpoint(id, 10);
  ASSERT_OK(manager_->Report(report));
  EXPECT_EQ(Metric("pyramid_job_step", id), 10);
  EXPECT_EQ(Metric("pyramid_checkpoint_duration_seconds"), 1);
  ASSERT_OK(manager_->Finish(Finished(id, epoch)));
  launcher_.Exit({id, epoch, 0}, 0);
  AwaitState(id, v1::SUCCEEDED);
  EXPECT_EQ(Metric("pyramid_jobs", "running"), 0);
  EXPECT_EQ(Metric("pyramid_jobs", "succeeded"), 1);
  EXPECT_EQ(Metric("pyramid_job_step", id), 0);
}

// ---------------------------------------------------------------- watch

TEST_F(JobManagerTest, AWatchGivesWhatWasStoredThenWhatHappensAndEnds) {
  Start();
  const auto [id, epoch] = Running();
  v1::WatchJobRequest request;
  request.set_job_id(id);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<JobWatch> watch, manager_->Watch(request));
  std::vector<v1::JobState> states;
  std::vector<int64_t> numbers;
  bool progress = false;
  std::thread worker([&, id = id, epoch = epoch] {
    absl::SleepFor(absl::Milliseconds(30));
    EXPECT_OK(manager_->Report(Report(id, epoch, 1, 42)));
    absl::SleepFor(absl::Milliseconds(30));
    EXPECT_OK(manager_->Finish(Finished(id, epoch)));
    launcher_.Exit({id, epoch, 0}, 0);
  });
  absl::Status end;
  while (end.ok()) {
    const absl::StatusOr<v1::JobEvent> event = watch->Next(absl::Now() + absl::Seconds(5));
    end = event.status();
    if (!event.ok()) break;
    if (event->has_job()) {
      states.push_back(event->job().state());
      numbers.push_back(event->number());
      EXPECT_EQ(event->job().folder(), (options_.data / "jobs" / id).string());
    }
    progress |= event->has_progress() && event->progress().step() == 42;
  }
  worker.join();
  EXPECT_THAT(end, StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("ended")));
  EXPECT_THAT(states, ElementsAre(v1::QUEUED, v1::STARTING, v1::RUNNING, v1::SUCCEEDED));
  EXPECT_TRUE(std::is_sorted(numbers.begin(), numbers.end()));
  EXPECT_TRUE(progress);
}

TEST_F(JobManagerTest, AWatchGoesOnFromACursorAndCanLeaveLogsOut) {
  Start();
  const auto [id, epoch] = Running();
  v1::ReportRequest report = Report(id, epoch, 1, 1);
  report.add_log_lines("a");
  report.add_log_lines("b");
  ASSERT_OK(manager_->Report(report));
  const std::vector<v1::JobEvent> all = History(id);
  ASSERT_GE(all.size(), 5u);
  const std::vector<v1::JobEvent> rest = History(id, all[2].number());
  EXPECT_EQ(rest[0].number(), all[3].number());
  EXPECT_EQ(rest.size(), all.size() - 3);
  v1::WatchJobRequest request;
  request.set_job_id(id);
  request.set_no_logs(true);
  request.set_history_only(true);
  ASSERT_OK_AND_ASSIGN(const auto watch, manager_->Watch(request));
  while (true) {
    const auto event = watch->Next(absl::Now() + absl::Seconds(5));
    if (!event.ok()) break;
    EXPECT_FALSE(event->has_log());
  }
  request.set_after_event(-1);
  EXPECT_THAT(manager_->Watch(request).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("after_event is -1")));
}

TEST_F(JobManagerTest, ASlowWatcherSeesTheNewestProgressOnly) {
  Start();
  const auto [id, epoch] = Running();
  v1::WatchJobRequest request;
  request.set_job_id(id);
  ASSERT_OK_AND_ASSIGN(const auto watch, manager_->Watch(request));
  for (int i = 1; i <= 100; ++i) ASSERT_OK(manager_->Report(Report(id, epoch, i, i)));
  std::vector<int64_t> steps;
  int64_t last_number = 0;
  while (true) {
    const auto event = watch->Next(absl::Now() + absl::Milliseconds(20));
    if (!event.ok()) {
      EXPECT_THAT(event.status(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("")));
      break;
    }
    if (event->has_progress()) {
      steps.push_back(event->progress().step());
      EXPECT_EQ(event->number(), last_number);
    }
    last_number = event->number();
  }
  EXPECT_THAT(steps, ElementsAre(100));
}

TEST_F(JobManagerTest, AWatcherHearsOfANewReasonThatIsntStored) {
  options_.devices = {{"cpu", 1}};
  Start();
  Running();
  const std::string id = Submit();
  v1::WatchJobRequest request;
  request.set_job_id(id);
  ASSERT_OK_AND_ASSIGN(const auto watch, manager_->Watch(request));
  std::string reason;
  while (reason.empty()) {
    const auto event = watch->Next(absl::Now() + absl::Seconds(5));
    ASSERT_OK(event);
    reason = event->job().reason();
  }
  EXPECT_EQ(reason, "needs 1 cpu worker, 0 of 1 free");
}

// ---------------------------------------------------------------- restarts of the server

TEST_F(JobManagerTest, NothingAcknowledgedIsLostInACrash) {
  Create();  // nothing is launched
  std::vector<std::string> ids;
  for (int i = 0; i < 10; ++i) ids.push_back(Submit("", absl::StrCat("r", i)));
  Crash();
  Create();
  for (int i = 0; i < 10; ++i) {
    ASSERT_OK_AND_ASSIGN(const v1::SubmitJobResponse again,
                         manager_->Submit(Request("", absl::StrCat("r", i))));
    EXPECT_TRUE(again.existed());
    EXPECT_EQ(again.job().id(), ids[i]);
    EXPECT_EQ(again.job().state(), v1::QUEUED);
    EXPECT_FALSE(again.job().folder().empty());
  }
  EXPECT_NE(Submit(), ids[9]);
}

TEST_F(JobManagerTest, AWorkerThatReportsIsAdopted) {
  Start();
  const auto [id, epoch] = Running();
  ASSERT_OK(manager_->Report(Report(id, epoch, 1, 5)));
  Crash();
  Start();
  ASSERT_OK(manager_->Report(Report(id, epoch, 2, 6)));
  absl::SleepFor(options_.reattach_window + absl::Milliseconds(50));
  v1::Job job = *manager_->Get(id);
  EXPECT_EQ(job.state(), v1::RUNNING);
  EXPECT_EQ(job.attempts_size(), 1);
  EXPECT_EQ(job.progress().step(), 6);
  ASSERT_OK(manager_->Finish(Finished(id, epoch)));
  launcher_.Exit({id, epoch, 0}, 0);
  job = AwaitState(id, v1::SUCCEEDED);
  EXPECT_EQ(job.attempts_size(), 1);
  EXPECT_EQ(launcher_.launches().size(), 1u);
}

TEST_F(JobManagerTest, AReportRepeatedAcrossACrashIsNotCountedTwice) {
  Start();
  const auto [id, epoch] = Running();
  v1::ReportRequest report = Report(id, epoch, 1, 5);
  report.add_log_lines("once");
  ASSERT_OK(manager_->Report(report));
  Crash();
  Start();
  ASSERT_OK(manager_->Report(report));
  int lines = 0;
  for (const v1::JobEvent& event : History(id)) lines += event.has_log();
  EXPECT_EQ(lines, 1);
}

TEST_F(JobManagerTest, AWatcherSeesTheLastKnownProgressAfterARestart) {
  options_.progress_interval = absl::ZeroDuration();
  Start();
  const auto [id, epoch] = Running();
  ASSERT_OK(manager_->Report(Report(id, epoch, 1, 33)));
  Crash();
  Start();
  const std::vector<v1::JobEvent> events = History(id);
  EXPECT_EQ(events.back().progress().step(), 33);
}

TEST_F(JobManagerTest, ASilentWorkerIsKilledAfterTheWindowAndTheJobGoesOn) {
  Start();
  const auto [id, epoch] = Running("max_restarts: 0");
  v1::ReportRequest report = Report(id, epoch, 1, 20);
  *report.add_new_checkpoints() = Checkpoint(id, 20);
  ASSERT_OK(manager_->Report(report));
  Crash();
  Start();
  EXPECT_EQ(manager_->Get(id)->state(), v1::RUNNING);  // unreachable isn't failed
  const int64_t second = AwaitLaunch(id, 2);
  EXPECT_GT(second, epoch);
  const v1::Job job = *manager_->Get(id);
  EXPECT_EQ(job.attempts(0).failure(), v1::COORDINATOR_RESTART);
  EXPECT_EQ(job.attempts(1).resumed_step(), 20);
  EXPECT_EQ(job.restarts(), 0);
  EXPECT_THAT(launcher_.signals(), ElementsAre(std::pair(WorkerKey{id, epoch, 0}, SIGTERM)));
}

TEST_F(JobManagerTest, AWorkerThatDiedDuringTheOutageIsNoticedAtOnce) {
  options_.reattach_window = absl::Hours(1);
  Start();
  const std::string id = Submit("workers: 2");
  const int64_t epoch = AwaitLaunch(id);
  ASSERT_OK(Register(id, epoch, 0));
  ASSERT_OK(Register(id, epoch, 1));
  Crash();
  launcher_.Kill({id, epoch, 1}, SIGKILL);
  launcher_.Forget();
  Start();
  AwaitLaunch(id, 2);
  const v1::Job job = *manager_->Get(id);
  EXPECT_EQ(job.attempts(0).failure(), v1::WORKER_LOST);
  EXPECT_THAT(job.attempts(0).cause(), AllOf(HasSubstr("rank 1"), HasSubstr("ended unseen")));
  EXPECT_EQ(job.restarts(), 1);
}

TEST_F(JobManagerTest, WorkersThatAllDiedWithTheServerDontCount) {
  options_.reattach_window = absl::Hours(1);
  Start();
  const auto [id, epoch] = Running("max_restarts: 0");
  Crash();
  launcher_.Kill({id, epoch, 0}, SIGKILL);
  launcher_.Forget();
  Start();
  AwaitLaunch(id, 2);
  EXPECT_EQ(manager_->Get(id)->attempts(0).failure(), v1::COORDINATOR_RESTART);
}

TEST_F(JobManagerTest, SuccessDuringTheOutageIsHonoured) {
  Start();
  const auto [id, epoch] = Running();
  Crash();
  v1::FinishRequest finish = Finished(id, epoch);
  finish.mutable_progress()->set_step(100);
  *finish.add_new_checkpoints() = Checkpoint(id, 100);
  WriteExitRecord(finish);
  launcher_.Exit({id, epoch, 0}, 0);
  launcher_.Forget();
  Start();
  const v1::Job job = AwaitState(id, v1::SUCCEEDED);
  EXPECT_EQ(job.attempts_size(), 1);
  EXPECT_EQ(job.progress().step(), 100);
  EXPECT_EQ(job.checkpoints_size(), 1);
  EXPECT_EQ(launcher_.launches().size(), 1u);
}

TEST_F(JobManagerTest, AnAcknowledgedFinishSurvivesACrashWithoutItsRecord) {
  Start();
  const auto [id, epoch] = Running();
  ASSERT_OK(manager_->Finish(Finished(id, epoch)));
  Crash();
  launcher_.Exit({id, epoch, 0}, 0);
  launcher_.Forget();
  Start();
  AwaitState(id, v1::SUCCEEDED);
  EXPECT_EQ(launcher_.launches().size(), 1u);
}

TEST_F(JobManagerTest, AFailureThatCouldOnlyBeWrittenDownIsTheCause) {
  Start();
  const auto [id, epoch] = Running();
  WriteExitRecord(Failed(id, epoch, v1::DATA_CORRUPT, "picture 7 is damaged"));
  launcher_.Exit({id, epoch, 0}, 1);
  const v1::Job job = AwaitState(id, v1::FAILED);
  EXPECT_EQ(job.reason(), "DATA_CORRUPT: rank 0: picture 7 is damaged");
}

TEST_F(JobManagerTest, ARecordOfAnotherAttemptIsNotBelieved) {
  Start();
  const auto [id, epoch] = Running("max_restarts: 0");
  v1::FinishRequest finish = Finished(id, epoch);
  WriteExitRecord(finish);
  std::string json;
  finish.mutable_worker()->set_epoch(epoch + 7);
  ASSERT_TRUE(google::protobuf::util::MessageToJsonString(finish, &json).ok());
  std::ofstream(WorkerExitPath(options_.data / "jobs" / id, epoch, 0)) << json;
  launcher_.Exit({id, epoch, 0}, 0);
  AwaitState(id, v1::FAILED);
}

TEST_F(JobManagerTest, AJobThatWasStoppingEndsCanceledAfterARestart) {
  options_.limits.stop_grace = absl::Milliseconds(100);
  Start();
  const auto [id, epoch] = Running();
  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  ASSERT_OK(manager_->Cancel(cancel));
  Crash();
  Start();
  EXPECT_EQ(manager_->Get(id)->state(), v1::STOPPING);
  ASSERT_OK_AND_ASSIGN(const v1::ReportResponse response,
                       manager_->Report(Report(id, epoch, 1, 1)));
  EXPECT_EQ(response.directive(), v1::STOP);
  AwaitState(id, v1::CANCELED);
}

TEST_F(JobManagerTest, EndedJobsStayAsTheyWere) {
  Start();
  const auto [id, epoch] = Running();
  ASSERT_OK(manager_->Finish(Finished(id, epoch)));
  launcher_.Exit({id, epoch, 0}, 0);
  const v1::Job before = AwaitState(id, v1::SUCCEEDED);
  Crash();
  Start();
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(manager_->Get(id)->SerializeAsString(), before.SerializeAsString());
  EXPECT_EQ(launcher_.launches().size(), 1u);
}

TEST_F(JobManagerTest, EpochsGrowAcrossJobsAndRestarts) {
  Start();
  const auto [first, epoch1] = Running();
  const auto [second, epoch2] = Running();
  EXPECT_GT(epoch2, epoch1);
  Crash();
  launcher_.Kill({first, epoch1, 0}, SIGKILL);
  launcher_.Kill({second, epoch2, 0}, SIGKILL);
  launcher_.Forget();
  Start();
  std::set<int64_t> epochs = {epoch1, epoch2, AwaitLaunch(first, 2), AwaitLaunch(second, 2)};
  EXPECT_EQ(epochs.size(), 4u);
  EXPECT_EQ(*epochs.begin(), epoch1);
}

// Kills the manager at each named point and checks what must hold afterwards.
class CrashPointTest : public JobManagerTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(CrashPointTest, TheJobEndsOnceAndNoTwoAttemptsLive) {
  std::atomic<bool> died{false};
  options_.reattach_window = absl::Milliseconds(100);
  options_.dies_at = [&](absl::string_view point) {
    if (point != GetParam()) return false;
    died = true;
    return true;
  };
  Start();
  const std::string id = Submit("workers: 2\nmax_restarts: 0", "r");
  for (int i = 0; i < 2000 && !died; ++i) absl::SleepFor(absl::Milliseconds(1));
  ASSERT_TRUE(died);
  EXPECT_THAT(Register(id, 1), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("killed")));
  Crash();
  Start();
  EXPECT_TRUE(manager_->Submit(Request("workers: 2\nmax_restarts: 0", "r"))->existed());
  // Nobody answers for the first attempt; the second one is a whole gang with a later epoch.
  const int64_t epoch = AwaitLaunch(id, 2);
  EXPECT_EQ(launcher_.running(), 2u);
  v1::Job job = *manager_->Get(id);
  EXPECT_EQ(job.attempts(0).failure(), v1::COORDINATOR_RESTART) << job.DebugString();
  EXPECT_LT(job.attempts(0).epoch(), epoch);
  EXPECT_THAT(Register(id, job.attempts(0).epoch()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("must exit")));
  for (int rank = 0; rank < 2; ++rank) {
    ASSERT_OK(Register(id, epoch, rank));
    ASSERT_OK(manager_->Finish(Finished(id, epoch, rank)));
    launcher_.Exit({id, epoch, rank}, 0);
  }
  job = AwaitState(id, v1::SUCCEEDED);
  EXPECT_EQ(job.attempts_size(), 2);
  EXPECT_EQ(job.restarts(), 0);
}

INSTANTIATE_TEST_SUITE_P(Points, CrashPointTest,
                         ::testing::Values("after-commit-before-launch", "after-first-launch",
                                           "after-launch-before-record"));

// ---------------------------------------------------------------- drain

TEST_F(JobManagerTest, DrainingAsksWorkersToSaveAndTheNextServerGoesOn) {
  Start();
  const auto [id, epoch] = Running("max_restarts: 0\nworkers: 1");
  const std::string queued = Submit("workers: 2");
  std::thread drain([&] { manager_->Drain(absl::Seconds(10)); });
  v1::ReportRequest report = Report(id, epoch, 1, 5);
  while (manager_->Report(report)->directive() != v1::STOP) {
    report.set_sequence(report.sequence() + 1);
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_THAT(manager_->Submit(Request("lr: 0.1")),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("stopping")));
  v1::FinishRequest finish = Finished(id, epoch);
  finish.set_succeeded(false);
  finish.set_stopped(true);
  *finish.add_new_checkpoints() = Checkpoint(id, 5);
  ASSERT_OK(manager_->Finish(finish));
  launcher_.Exit({id, epoch, 0}, 75);
  drain.join();
  v1::Job job = *manager_->Get(id);
  EXPECT_EQ(job.state(), v1::RECOVERING);
  EXPECT_EQ(job.attempts(0).failure(), v1::COORDINATOR_RESTART);
  EXPECT_EQ(manager_->Get(queued)->state(), v1::QUEUED);
  EXPECT_TRUE(launcher_.signals().empty());

  Crash();
  Start();
  AwaitLaunch(id, 2);
  job = *manager_->Get(id);
  EXPECT_EQ(job.restarts(), 0);
  EXPECT_EQ(job.attempts(1).resumed_step(), 5);
}

TEST_F(JobManagerTest, DrainingIsBounded) {
  launcher_.set_dies_of_term(false);
  Start();
  const auto [id, epoch] = Running();
  const absl::Time began = absl::Now();
  manager_->Drain(absl::Milliseconds(200));
  EXPECT_LT(absl::Now() - began, absl::Seconds(2));
  EXPECT_EQ(launcher_.running(), 0u);
  EXPECT_EQ(manager_->Get(id)->state(), v1::RECOVERING);
  const WorkerKey key{id, epoch, 0};
  EXPECT_THAT(launcher_.signals(), ElementsAre(std::pair(key, SIGTERM), std::pair(key, SIGKILL)));
}

TEST_F(JobManagerTest, DrainingEndsWatchesWithUnavailable) {
  Start();
  const std::string id = Submit();
  v1::WatchJobRequest request;
  request.set_job_id(id);
  ASSERT_OK_AND_ASSIGN(const auto watch, manager_->Watch(request));
  std::thread drain([&] {
    absl::SleepFor(absl::Milliseconds(30));
    manager_->Drain(absl::Milliseconds(100));
  });
  absl::Status end;
  while (end.ok()) end = watch->Next(absl::Now() + absl::Seconds(5)).status();
  drain.join();
  EXPECT_THAT(end, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("stopping")));
}

// ---------------------------------------------------------------- the store's errors

TEST_F(JobManagerTest, ANewerDataFolderIsRefused) {
  Create();
  manager_.reset();
  sqlite3* database = nullptr;
  ASSERT_EQ(sqlite3_open((options_.data / "jobs.sqlite").c_str(), &database), SQLITE_OK);
  sqlite3_exec(database, "PRAGMA user_version = 9", nullptr, nullptr, nullptr);
  sqlite3_close(database);
  EXPECT_THAT(JobManager::Create(options_, launcher_, metrics_).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("version 9")));
}

TEST_F(JobManagerTest, AFullDiskIsToldAndWaitedOut) {
  std::filesystem::create_directories(options_.data);
  if (mount("tmpfs", options_.data.c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "this user can't mount a tmpfs: " << std::strerror(errno);
  }
  const absl::Cleanup unmount = [&] {
    manager_.reset();
    umount2(options_.data.c_str(), MNT_DETACH);
  };
  options_.first_backoff = absl::Hours(1);
  Start();
  const auto [id, epoch] = Running();
  {
    std::ofstream filler(options_.data / "filler");
    filler << std::string(2 << 20, 'x') << std::flush;
  }
  // Small writes may still find room in what SQLite has already.
  absl::Status status;
  for (int i = 0; i < 200 && status.ok(); ++i) {
    v1::ReportRequest report = Report(id, epoch, i + 1, i);
    *report.add_new_checkpoints() = Checkpoint(id, i);
    status = manager_->Report(report).status();
  }
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("full")));
  EXPECT_THAT(manager_->Submit(Request("lr: 0.5")),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("full")));
  launcher_.Exit({id, epoch, 0}, 3);
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(manager_->Get(id)->state(), v1::RUNNING);  // what isn't on disk hasn't happened
  std::filesystem::remove(options_.data / "filler");
  AwaitState(id, v1::RECOVERING);
  EXPECT_OK(manager_->Submit(Request("lr: 0.5")));
}

TEST_F(JobManagerTest, ADamagedDataFolderIsDataLoss) {
  std::filesystem::create_directories(options_.data);
  std::ofstream(options_.data / "jobs.sqlite") << std::string(4096, '!');
  EXPECT_THAT(JobManager::Create(options_, launcher_, metrics_).status(),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("jobs.sqlite")));
}

}  // namespace
}  // namespace pyramid
