#include "server/training/live_attempt.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

namespace pyramid {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const absl::Time kStart = absl::FromUnixSeconds(1000);
const AttemptLimits kLimits = {.lost_after = absl::Seconds(60),
                               .start_timeout = absl::Seconds(120),
                               .stop_grace = absl::Seconds(30),
                               .kill_grace = absl::Seconds(5)};

MATCHER_P2(Order, rank, signal, "") { return arg.rank == rank && arg.signal == signal; }

// Two workers that run and report.
LiveAttempt Gang() {
  LiveAttempt live{.epoch = 1, .launched = kStart};
  live.workers.resize(2);
  for (int rank = 0; rank < 2; ++rank) {
    LiveWorker& worker = live.workers[rank];
    worker.end.rank = rank;
    worker.end.pid = 100 + rank;
    worker.heard = worker.reports = true;
    worker.last_heard = kStart;
  }
  return live;
}

absl::Time At(int seconds) { return kStart + absl::Seconds(seconds); }

TEST(LiveAttemptTest, ARunningGangIsLeftAlone) {
  LiveAttempt live = Gang();
  EXPECT_THAT(live.Supervise(kLimits, At(59)), IsEmpty());
  EXPECT_FALSE(live.AllGone());
  EXPECT_TRUE(live.AllHeard());
}

TEST(LiveAttemptTest, ADeathEndsTheGangTermThenKillEachOnce) {
  LiveAttempt live = Gang();
  live.workers[1].gone = true;
  EXPECT_THAT(live.Supervise(kLimits, At(1)), ElementsAre(Order(0, SIGTERM)));
  EXPECT_THAT(live.Supervise(kLimits, At(2)), IsEmpty());
  EXPECT_THAT(live.Supervise(kLimits, At(6)), ElementsAre(Order(0, SIGKILL)));
  EXPECT_THAT(live.Supervise(kLimits, At(60)), IsEmpty());
  live.workers[0].gone = true;
  EXPECT_TRUE(live.AllGone());
}

TEST(LiveAttemptTest, AWorkerThatSaysItFailedEndsTheGang) {
  LiveAttempt live = Gang();
  live.workers[1].end.finish.emplace().set_failure(v1::DISK_FULL);
  EXPECT_THAT(live.Supervise(kLimits, At(1)), ElementsAre(Order(0, SIGTERM), Order(1, SIGTERM)));
}

TEST(LiveAttemptTest, PeersOfARankZeroThatIsDoneHaveTimeToLeave) {
  LiveAttempt live = Gang();
  live.workers[0].end.finish.emplace().set_succeeded(true);
  live.workers[0].finished = At(10);
  live.workers[0].gone = true;
  EXPECT_THAT(live.Supervise(kLimits, At(39)), IsEmpty());
  EXPECT_THAT(live.Supervise(kLimits, At(40)), ElementsAre(Order(1, SIGTERM)));
  EXPECT_THAT(live.Supervise(kLimits, At(45)), ElementsAre(Order(1, SIGKILL)));
  EXPECT_FALSE(live.verdict.has_value());
}

TEST(LiveAttemptTest, RankZeroMayWorkOnWhenAPeerIsDone) {
  LiveAttempt live = Gang();
  live.workers[1].end.finish.emplace().set_succeeded(true);
  live.workers[1].finished = At(0);
  live.workers[1].gone = true;
  live.workers[0].last_heard = At(100);
  EXPECT_THAT(live.Supervise(kLimits, At(110)), IsEmpty());
}

TEST(LiveAttemptTest, SilenceOfOneRankIsAHangThatNamesIt) {
  LiveAttempt live = Gang();
  live.workers[0].last_heard = At(60);
  live.workers[1].last_step = 17;
  EXPECT_THAT(live.Supervise(kLimits, At(60)), IsEmpty());
  EXPECT_THAT(live.Supervise(kLimits, At(61)), ElementsAre(Order(0, SIGTERM), Order(1, SIGTERM)));
  EXPECT_EQ(live.verdict->failure, v1::HANG);
  EXPECT_EQ(live.verdict->cause, "rank 1 lives but didn't report for 1m; its last step was 17");
}

TEST(LiveAttemptTest, ARankThatNeverReportsIsNotSilentWhileAnotherTalks) {
  LiveAttempt live = Gang();
  live.workers[1].reports = false;
  live.workers[0].last_heard = At(500);
  EXPECT_THAT(live.Supervise(kLimits, At(510)), IsEmpty());
  EXPECT_THAT(live.Supervise(kLimits, At(561)), ElementsAre(Order(0, SIGTERM), Order(1, SIGTERM)));
}

TEST(LiveAttemptTest, WorkersThatOnlyRegisteredHangToo) {
  LiveAttempt live = Gang();
  live.workers[0].reports = live.workers[1].reports = false;
  EXPECT_THAT(live.Supervise(kLimits, At(60)), IsEmpty());
  live.Supervise(kLimits, At(61));
  ASSERT_TRUE(live.verdict.has_value());
  EXPECT_EQ(live.verdict->cause, "no worker reported for 1m");
}

TEST(LiveAttemptTest, AWorkerMustReportWithinTheStartTimeout) {
  LiveAttempt live = Gang();
  live.workers[0].last_heard = At(119);
  live.workers[1].heard = live.workers[1].reports = false;
  EXPECT_THAT(live.Supervise(kLimits, At(120)), IsEmpty());
  live.Supervise(kLimits, At(121));
  EXPECT_EQ(live.verdict->failure, v1::HANG);
  EXPECT_EQ(live.verdict->cause, "rank 1 didn't report within 2m of its launch");
}

TEST(LiveAttemptTest, AfterARestartOfTheServerSilentWorkersHaveTheWindow) {
  LiveAttempt live = Gang();
  live.reattach_until = At(20);
  live.workers[0].last_heard = At(1);
  live.workers[1].heard = live.workers[1].reports = false;
  live.workers[1].last_heard = absl::InfinitePast();
  EXPECT_THAT(live.Supervise(kLimits, At(19)), IsEmpty());
  live.Supervise(kLimits, At(20));
  EXPECT_EQ(live.verdict->failure, v1::COORDINATOR_RESTART);
  EXPECT_THAT(live.verdict->cause, HasSubstr("rank 1"));
}

TEST(LiveAttemptTest, WorkersThatReportedAreAdopted) {
  LiveAttempt live = Gang();
  live.reattach_until = At(20);
  EXPECT_THAT(live.Supervise(kLimits, At(30)), IsEmpty());
  EXPECT_EQ(live.reattach_until, absl::InfinitePast());
}

TEST(LiveAttemptTest, NothingIsDecidedWhileLaunching) {
  LiveAttempt live = Gang();
  live.launching = true;
  live.workers[0].gone = live.workers[1].gone = true;
  EXPECT_THAT(live.Supervise(kLimits, At(500)), IsEmpty());
  EXPECT_FALSE(live.AllGone());
}

TEST(LiveAttemptTest, EndTimesOnlyComeNearer) {
  LiveAttempt live = Gang();
  live.EndBy(At(10), At(20));
  live.EndBy(At(50), At(15));
  EXPECT_EQ(live.terminate_at, At(10));
  EXPECT_EQ(live.kill_at, At(15));
  EXPECT_THAT(live.Supervise(kLimits, At(9)), IsEmpty());
  EXPECT_THAT(live.Supervise(kLimits, At(30)), ElementsAre(Order(0, SIGKILL), Order(1, SIGKILL)));
}

TEST(LiveAttemptTest, APauseOfTheServerIsNotTheWorkersSilence) {
  LiveAttempt live = Gang();
  live.Shift(absl::Seconds(300));
  EXPECT_THAT(live.Supervise(kLimits, At(350)), IsEmpty());
  EXPECT_THAT(live.Supervise(kLimits, At(361)), ElementsAre(Order(0, SIGTERM), Order(1, SIGTERM)));
}

}  // namespace
}  // namespace pyramid
