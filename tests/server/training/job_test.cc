#include "server/training/job.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <vector>

#include "absl/strings/match.h"
#include "gmock/gmock.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;

constexpr v1::JobState kStates[] = {v1::QUEUED,   v1::STARTING,   v1::RUNNING,  v1::PAUSING,
                                    v1::PAUSED,   v1::RECOVERING, v1::STOPPING, v1::SUCCEEDED,
                                    v1::CANCELED, v1::FAILED};

TEST(JobTest, NothingFollowsAnEndedState) {
  for (const v1::JobState from : {v1::SUCCEEDED, v1::CANCELED, v1::FAILED}) {
    EXPECT_TRUE(IsEnded(from));
    for (const v1::JobState to : kStates) EXPECT_FALSE(MayFollow(from, to)) << from << " " << to;
  }
}

TEST(JobTest, EveryStateLeadsToAnEnd) {
  for (const v1::JobState start : kStates) {
    std::vector<v1::JobState> reached = {start};
    for (size_t i = 0; i < reached.size(); ++i) {
      for (const v1::JobState to : kStates) {
        if (MayFollow(reached[i], to) &&
            std::find(reached.begin(), reached.end(), to) == reached.end()) {
          reached.push_back(to);
        }
      }
    }
    EXPECT_TRUE(std::any_of(reached.begin(), reached.end(), IsEnded)) << start;
  }
}

TEST(JobTest, StoppingNeverBecomesMilder) {
  for (const v1::JobState to : kStates) {
    EXPECT_EQ(MayFollow(v1::STOPPING, to), IsEnded(to)) << to;
  }
  EXPECT_TRUE(MayFollow(v1::RUNNING, v1::RECOVERING));
  EXPECT_FALSE(MayFollow(v1::QUEUED, v1::RUNNING));
  EXPECT_FALSE(MayFollow(v1::RECOVERING, v1::RUNNING));
}

TEST(JobTest, WhatTheUserMustFixIsNotRetried) {
  for (const v1::FailureClass failure :
       {v1::USER_ERROR, v1::CONFIG, v1::DATA_CORRUPT, v1::OOM_DEVICE, v1::OOM_HOST, v1::DISK_FULL,
        v1::NOT_A_NUMBER}) {
    EXPECT_FALSE(RuleOf(failure).retry) << FailureName(failure);
  }
  for (const v1::FailureClass failure : {v1::HANG, v1::COMM, v1::WORKER_LOST, v1::NODE_LOST}) {
    EXPECT_TRUE(RuleOf(failure).retry && RuleOf(failure).counted) << FailureName(failure);
  }
  for (const v1::FailureClass failure : {v1::PREEMPTED, v1::COORDINATOR_RESTART}) {
    EXPECT_TRUE(RuleOf(failure).retry && !RuleOf(failure).counted) << FailureName(failure);
  }
}

WorkerEnd Exited(int rank, int code) {
  return {.rank = rank, .status_known = true, .exit_code = code, .pid = 100 + rank};
}
WorkerEnd Killed(int rank, int signal, int sent = 0) {
  return {
      .rank = rank, .status_known = true, .signal = signal, .signal_sent = sent, .pid = 100 + rank};
}
WorkerEnd Said(int rank, v1::FailureClass failure, const std::string& message) {
  WorkerEnd end = Exited(rank, 1);
  end.finish.emplace().set_failure(failure);
  end.finish->set_message(message);
  return end;
}
WorkerEnd Succeeded(int rank) {
  WorkerEnd end = Exited(rank, 0);
  end.finish.emplace().set_succeeded(true);
  return end;
}
WorkerEnd Stopped(int rank) {
  WorkerEnd end = Exited(rank, 75);
  end.finish.emplace().set_stopped(true);
  return end;
}

TEST(JudgeTest, RankZeroDecidesSuccess) {
  EXPECT_TRUE(Judge({Succeeded(0), Killed(1, SIGSEGV)}, std::nullopt).succeeded);
  EXPECT_FALSE(Judge({Killed(0, SIGSEGV), Succeeded(1)}, std::nullopt).succeeded);
}

TEST(JudgeTest, TheDeathIsTheCauseNotThePeersBrokenConnection) {
  const AttemptOutcome outcome =
      Judge({Said(0, v1::COMM, "peer closed"), Killed(1, SIGKILL)}, std::nullopt);
  EXPECT_EQ(outcome.failure, v1::WORKER_LOST);
  EXPECT_EQ(outcome.cause,
            "rank 1 (pid 101) was killed by signal 9 (SIGKILL): out of memory, or somebody ended "
            "it");
}

TEST(JudgeTest, WhatAWorkerSaysOfItselfComesBeforeDeaths) {
  const AttemptOutcome outcome =
      Judge({Killed(0, SIGABRT), Said(1, v1::DISK_FULL, "no space left")}, std::nullopt);
  EXPECT_EQ(outcome.failure, v1::DISK_FULL);
  EXPECT_EQ(outcome.cause, "rank 1: no space left");
}

TEST(JudgeTest, AWorkerThatWeEndedIsNotTheCause) {
  const AttemptOutcome outcome = Judge({Killed(0, SIGTERM, SIGTERM), Exited(1, 3)}, std::nullopt);
  EXPECT_EQ(outcome.cause, "rank 1 (pid 101) exited with code 3");
  // A stronger signal than ours came from elsewhere.
  EXPECT_THAT(Judge({Killed(0, SIGKILL, SIGTERM), Stopped(1)}, std::nullopt).cause,
              HasSubstr("rank 0 (pid 100) was killed by signal 9"));
}

TEST(JudgeTest, OurVerdictComesFirst) {
  const AttemptOutcome outcome = Judge({Killed(0, SIGTERM, SIGTERM), Said(1, v1::COMM, "closed")},
                                       EndVerdict{v1::HANG, "rank 0 lives but didn't report"});
  EXPECT_EQ(outcome.failure, v1::HANG);
  EXPECT_EQ(outcome.cause, "rank 0 lives but didn't report");
}

TEST(JudgeTest, ASilentExitIsALoss) {
  EXPECT_EQ(Judge({Exited(0, 0)}, std::nullopt).failure, v1::WORKER_LOST);
  EXPECT_THAT(Judge({Exited(0, 0)}, std::nullopt).cause, HasSubstr("without saying"));
  EXPECT_THAT(Judge({WorkerEnd{.rank = 0, .pid = 7}}, std::nullopt).cause,
              HasSubstr("ended unseen"));
  EXPECT_THAT(Judge({WorkerEnd{.rank = 0}}, std::nullopt).cause, HasSubstr("never launched"));
  EXPECT_EQ(Judge({Said(0, v1::FAILURE_CLASS_UNSPECIFIED, "")}, std::nullopt).failure,
            v1::WORKER_LOST);
}

TEST(JudgeTest, SavedAndStoppedIsNoFailure) {
  const AttemptOutcome outcome = Judge({Stopped(0), Stopped(1)}, std::nullopt);
  EXPECT_TRUE(outcome.stopped);
  EXPECT_EQ(outcome.failure, v1::FAILURE_CLASS_UNSPECIFIED);
}

v1::Job Running(int restarts, int max_restarts) {
  v1::Job job;
  job.set_state(v1::RUNNING);
  job.set_restarts(restarts);
  job.set_max_restarts(max_restarts);
  return job;
}

TEST(AfterAttemptTest, RestartsWithGrowingBackoffUntilTheLimit) {
  const AttemptOutcome lost{.failure = v1::WORKER_LOST, .cause = "gone"};
  for (const auto& [restarts, seconds] : {std::pair{0, 1}, {1, 2}, {2, 4}}) {
    const NextStep step = AfterAttempt(Running(restarts, 3), lost, false, absl::Seconds(1));
    EXPECT_EQ(step.state, v1::RECOVERING);
    EXPECT_EQ(step.backoff, absl::Seconds(seconds));
  }
  EXPECT_EQ(AfterAttempt(Running(40, 100), lost, false, absl::Seconds(1)).backoff,
            absl::Minutes(5));
  const NextStep last = AfterAttempt(Running(3, 3), lost, false, absl::Seconds(1));
  EXPECT_EQ(last.state, v1::FAILED);
  EXPECT_EQ(last.reason, "WORKER_LOST: gone; gave up after 3 of 3 restarts");
}

TEST(AfterAttemptTest, FailsAtOnceWhereARetryIsUseless) {
  const NextStep step = AfterAttempt(Running(0, 3), {.failure = v1::CONFIG, .cause = "no such key"},
                                     false, absl::Seconds(1));
  EXPECT_EQ(step.state, v1::FAILED);
  EXPECT_EQ(step.reason, "CONFIG: no such key");
}

TEST(AfterAttemptTest, RestartOfTheServerIsFree) {
  const NextStep step =
      AfterAttempt(Running(3, 3), {.failure = v1::COORDINATOR_RESTART, .cause = "away"}, false,
                   absl::Seconds(1));
  EXPECT_EQ(step.state, v1::RECOVERING);
  EXPECT_EQ(step.backoff, absl::ZeroDuration());
}

TEST(AfterAttemptTest, AStopFromOutsideGoesOnLater) {
  const NextStep step = AfterAttempt(Running(3, 3), {.stopped = true}, false, absl::Seconds(1));
  EXPECT_EQ(step.state, v1::RECOVERING);
  EXPECT_EQ(step.failure, v1::PREEMPTED);
}

TEST(AfterAttemptTest, DrainingLeavesTheJobToTheNextServer) {
  for (const AttemptOutcome& outcome :
       {AttemptOutcome{.stopped = true}, AttemptOutcome{.failure = v1::WORKER_LOST},
        AttemptOutcome{.failure = v1::COMM}}) {
    const NextStep step = AfterAttempt(Running(3, 3), outcome, true, absl::Seconds(1));
    EXPECT_EQ(step.state, v1::RECOVERING);
    EXPECT_EQ(step.failure, v1::COORDINATOR_RESTART);
  }
  EXPECT_EQ(AfterAttempt(Running(0, 3), {.failure = v1::DISK_FULL}, true, absl::Seconds(1)).state,
            v1::FAILED);
  EXPECT_EQ(AfterAttempt(Running(0, 3), {.succeeded = true}, true, absl::Seconds(1)).state,
            v1::SUCCEEDED);
}

TEST(AfterAttemptTest, StoppingEndsCanceledUnlessTheJobWasDone) {
  v1::Job job = Running(0, 3);
  job.set_state(v1::STOPPING);
  job.set_reason("canceled: enough");
  NextStep step = AfterAttempt(job, {.stopped = true, .cause = "saved"}, false, absl::Seconds(1));
  EXPECT_EQ(step.state, v1::CANCELED);
  EXPECT_EQ(step.reason, "canceled: enough");
  EXPECT_EQ(step.failure, v1::FAILURE_CLASS_UNSPECIFIED);
  step =
      AfterAttempt(job, {.failure = v1::DISK_FULL, .cause = "no space"}, false, absl::Seconds(1));
  EXPECT_EQ(step.state, v1::CANCELED);
  EXPECT_EQ(step.reason, "canceled: enough; no space");
  EXPECT_EQ(AfterAttempt(job, {.succeeded = true}, false, absl::Seconds(1)).state, v1::SUCCEEDED);
}

TEST(JobTest, NewestCheckpointIsTheOneOfTheLastStep) {
  v1::Job job;
  EXPECT_EQ(NewestCheckpoint(job), nullptr);
  for (const int64_t step : {10, 30, 20}) job.add_checkpoints()->set_step(step);
  EXPECT_EQ(NewestCheckpoint(job)->step(), 30);
}

TEST(JobTest, OnlyTheLastAttemptCanBeLive) {
  v1::Job job;
  EXPECT_EQ(LiveAttemptOf(job), nullptr);
  job.add_attempts()->set_epoch(1);
  EXPECT_EQ(LiveAttemptOf(job)->epoch(), 1);
  job.mutable_attempts(0)->mutable_ended()->set_seconds(1);
  EXPECT_EQ(LiveAttemptOf(job), nullptr);
}

}  // namespace
}  // namespace pyramid
