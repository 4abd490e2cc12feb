#include "server/serving/work_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "server/serving/pushback.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

std::vector<WorkPool::Task> Repeat(int count, std::atomic<int>& counter) {
  std::vector<WorkPool::Task> tasks;
  for (int i = 0; i < count; ++i) tasks.emplace_back([&counter] { ++counter; });
  return tasks;
}

TEST(WorkPoolTest, CarriesOutWhatWaitsBeforeItGoes) {
  std::atomic<int> done{0};
  {
    WorkPool pool("test", 2, 100);
    ASSERT_OK(pool.Post(Repeat(100, done)));
  }
  EXPECT_EQ(done.load(), 100);
}

TEST(WorkPoolTest, TakesAllTasksOrNone) {
  std::atomic<int> done{0};
  {
    WorkPool pool("test", 1, 4);
    absl::Notification started;
    absl::Notification go_on;
    std::vector<WorkPool::Task> blocker;
    blocker.emplace_back([&] {
      started.Notify();
      go_on.WaitForNotification();
    });
    ASSERT_OK(pool.Post(std::move(blocker)));
    started.WaitForNotification();
    ASSERT_OK(pool.Post(Repeat(3, done)));
    const absl::Status full = pool.Post(Repeat(2, done));
    EXPECT_THAT(full, StatusIs(absl::StatusCode::kResourceExhausted,
                               HasSubstr("3 of 4 tasks wait and 2 more came")));
    EXPECT_GT(PushbackMillis(full), 0);
    EXPECT_OK(pool.Post(Repeat(1, done)));
    go_on.Notify();
  }
  EXPECT_EQ(done.load(), 4);
}

TEST(WorkPoolTest, TellsHowManyThreadsASizeMayHave) {
  WorkPool one("test", 1, 1);
  EXPECT_EQ(one.threads(WorkPool::Size::kUsual), 1);
  EXPECT_EQ(one.threads(WorkPool::Size::kLarge), 1);
  WorkPool four("test", 4, 1);
  EXPECT_EQ(four.threads(WorkPool::Size::kUsual), 4);
  EXPECT_EQ(four.threads(WorkPool::Size::kLarge), 3);
}

TEST(WorkPoolTest, ThreadsStandBackAsFarAsAsked) {
  const auto nice_in = [](int steps) {
    int nice = -100;
    {
      WorkPool pool("test", 1, 1, steps);
      std::vector<WorkPool::Task> tasks;
      tasks.emplace_back([&nice] { nice = getpriority(PRIO_PROCESS, 0); });
      EXPECT_OK(pool.Post(std::move(tasks)));
    }
    return nice;
  };
  const int own = nice_in(0);
  EXPECT_EQ(nice_in(3), std::min(19, own + 3));
}

// One thread that is kept busy until Go, so that tasks wait.
class WaitingPoolTest : public ::testing::Test {
 protected:
  void Occupy(WorkPool& pool, WorkPool::Size size = WorkPool::Size::kUsual) {
    absl::Notification started;
    std::vector<WorkPool::Task> blocker;
    blocker.emplace_back([&started, this] {
      started.Notify();
      go_.WaitForNotification();
    });
    ASSERT_OK(pool.Post(std::move(blocker), {}, size));
    started.WaitForNotification();
  }
  void Post(WorkPool& pool, int name, Order order, WorkPool::Size size = WorkPool::Size::kUsual) {
    std::vector<WorkPool::Task> tasks;
    tasks.emplace_back([this, name] {
      absl::MutexLock lock(&mutex_);
      done_.push_back(name);
    });
    ASSERT_OK(pool.Post(std::move(tasks), order, size));
  }

  absl::Notification go_;
  absl::Mutex mutex_;
  std::vector<int> done_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(WaitingPoolTest, GoesByPriorityThenDeadlineThenArrival) {
  const absl::Time soon = absl::FromUnixSeconds(1);
  {
    WorkPool pool("test", 1, 100);
    Occupy(pool);
    Post(pool, 1, {});
    Post(pool, 2, {});
    Post(pool, 3, {.deadline = soon + absl::Seconds(1)}, WorkPool::Size::kLarge);
    Post(pool, 4, {.deadline = soon});
    Post(pool, 5, {.priority = 1});
    EXPECT_EQ(pool.Ahead({.deadline = soon}, WorkPool::Size::kUsual), 2);
    EXPECT_EQ(pool.Ahead({}, WorkPool::Size::kUsual), 4);
    EXPECT_EQ(pool.Ahead({}, WorkPool::Size::kLarge), 1);
    go_.Notify();
  }
  absl::MutexLock lock(&mutex_);
  EXPECT_THAT(done_, ::testing::ElementsAre(5, 4, 3, 1, 2));
}

TEST_F(WaitingPoolTest, LargeTasksLeaveAThreadToTheOthers) {
  WorkPool pool("test", 2, 100);
  Occupy(pool, WorkPool::Size::kLarge);
  Post(pool, 1, {.priority = 1}, WorkPool::Size::kLarge);
  Post(pool, 2, {});
  const auto done = [&] {
    absl::MutexLock lock(&mutex_);
    const auto some = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return !done_.empty(); };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&some), absl::Seconds(10)));
    return done_;
  };
  EXPECT_THAT(done(), ::testing::ElementsAre(2)) << "the large one waits for the other large one";
  go_.Notify();
}

TEST(PushbackTest, AStatusWithoutHintHasNone) {
  EXPECT_EQ(PushbackMillis(absl::ResourceExhaustedError("full")), -1);
  EXPECT_EQ(PushbackMillis(WithPushback(absl::ResourceExhaustedError("full"), absl::Seconds(2))),
            2000);
}

}  // namespace
}  // namespace pyramid
