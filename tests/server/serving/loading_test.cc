#include "server/serving/loading.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "absl/time/clock.h"
#include "model/thread_limit.h"
#include "server/serving/stand_back.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::ElementsAre;
using testing::FakeClassifier;
using testing::FakeManifest;
using testing::FakeNetwork;
using ::testing::HasSubstr;
using testing::StatusIs;

int NiceOfThisThread() { return getpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid))); }

TEST(LoadingTest, WorkBesideServingHasAThreadALimitAndPatience) {
  const std::thread::id caller = std::this_thread::get_id();
  const int nice = NiceOfThisThread();
  std::thread::id worker;
  int limit = 0, others_limit = 0, worker_nice = 0;
  RunBesideServing(2, nullptr, [&] {
    worker = std::this_thread::get_id();
    limit = ThreadLimit::Of(64);
    worker_nice = NiceOfThisThread();
    std::thread([&] { others_limit = ThreadLimit::Of(64); }).join();
  });
  EXPECT_NE(worker, caller);
  EXPECT_EQ(limit, 2);
  EXPECT_EQ(others_limit, 64);
  EXPECT_EQ(worker_nice, std::max(15, nice));
  EXPECT_EQ(NiceOfThisThread(), nice);
  EXPECT_EQ(ThreadLimit::Of(64), 64);
}

TEST(LoadingTest, WorkStandsAsideOnlyForAWhileWhereItMay) {
  if (sched_getscheduler(0) != SCHED_OTHER) GTEST_SKIP() << "started with a policy of its own";
  bool may = false;
  std::thread([&] {
    StandBack(15);
    may = StandAside();
  }).join();
  int first = -1, later = -1, nice = -1;
  const int before = NiceOfThisThread();
  RunBesideServing(
      1, nullptr,
      [&] {
        first = sched_getscheduler(0);
        const absl::Time until = absl::Now() + absl::Seconds(5);
        do {
          later = sched_getscheduler(0);
        } while (later == SCHED_IDLE && absl::Now() < until);
        nice = NiceOfThisThread();
      },
      absl::Milliseconds(50));
  EXPECT_EQ(first, may ? SCHED_IDLE : SCHED_OTHER);
  EXPECT_EQ(later, SCHED_OTHER);
  EXPECT_EQ(nice, std::min(19, before + 15));
  RunBesideServing(2, nullptr, [&] { first = sched_getscheduler(0); });
  EXPECT_EQ(first, SCHED_OTHER) << "more threads than its own";
}

TEST(LoadingTest, LimitsNestAndNeverRaise) {
  EXPECT_EQ(ThreadLimit::Of(8), 8);
  {
    const ThreadLimit outer(2);
    EXPECT_EQ(ThreadLimit::Of(8), 2);
    EXPECT_EQ(ThreadLimit::Of(1), 1);
    {
      const ThreadLimit inner(4);
      EXPECT_EQ(ThreadLimit::Of(8), 4);
    }
    EXPECT_EQ(ThreadLimit::Of(8), 2);
  }
  EXPECT_EQ(ThreadLimit::Of(8), 8);
}

TEST(LoadingTest, TheCpuWarmsPowersOfTwoOthersEverySize) {
  EXPECT_THAT(WarmUpSizes(1, "cpu"), ElementsAre(1));
  EXPECT_THAT(WarmUpSizes(8, "cpu"), ElementsAre(1, 2, 4, 8));
  EXPECT_THAT(WarmUpSizes(12, "cpu"), ElementsAre(1, 2, 4, 8, 12));
  EXPECT_THAT(WarmUpSizes(5, "cuda:0"), ElementsAre(1, 2, 3, 4, 5));
}

TEST(LoadingTest, WarmingUpRunsEachSizeAndSaysWhichFailed) {
  FakeNetwork network;
  FakeClassifier classifier(network, FakeManifest());
  EXPECT_OK(WarmUp(classifier, {1, 3}));
  EXPECT_THAT(network.batches(), ElementsAre(1, 3));
  network.Fail(absl::ResourceExhaustedError("out of memory"));
  EXPECT_THAT(WarmUp(classifier, {2}),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       HasSubstr("warming up with 2 pictures: out of memory")));
}

TEST(LoadingTest, LatencyIsAMedianOfPasses) {
  FakeNetwork network;
  FakeClassifier classifier(network, FakeManifest());
  int passes = 0;
  // One in three is slow: the mean would show it.
  network.OnForward([&] { absl::SleepFor(absl::Milliseconds(++passes % 3 == 0 ? 60 : 5)); });
  ASSERT_OK_AND_ASSIGN(const absl::Duration median, MeasureLatency(classifier, 4, Clock::Real()));
  EXPECT_GE(median, absl::Milliseconds(5));
  EXPECT_LT(median, absl::Milliseconds(40));
  EXPECT_GE(passes, 3);
  EXPECT_LE(passes, 20);
  EXPECT_EQ(network.batches().front(), 4);
  network.Fail(absl::InternalError("broken"));
  EXPECT_THAT(MeasureLatency(classifier, 4, Clock::Real()),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("measuring latency")));
}

}  // namespace
}  // namespace pyramid
