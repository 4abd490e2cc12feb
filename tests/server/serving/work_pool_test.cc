#include "server/serving/work_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

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

TEST(PushbackTest, AStatusWithoutHintHasNone) {
  EXPECT_EQ(PushbackMillis(absl::ResourceExhaustedError("full")), -1);
  EXPECT_EQ(PushbackMillis(WithPushback(absl::ResourceExhaustedError("full"), absl::Seconds(2))),
            2000);
}

}  // namespace
}  // namespace pyramid
