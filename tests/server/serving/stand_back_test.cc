#include "server/serving/stand_back.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <thread>

namespace pyramid {
namespace {

int PolicyOfANewThread() {
  int policy = -1;
  std::thread([&policy] { policy = sched_getscheduler(0); }).join();
  return policy;
}

TEST(StandBackTest, ThreadsOfThatTimeTakeTurns) {
  if (sched_getscheduler(0) != SCHED_OTHER) GTEST_SKIP() << "started with a policy of its own";
  {
    const TurnTaking turns;
    EXPECT_EQ(PolicyOfANewThread(), SCHED_BATCH);
    int computing = -1;
    std::thread([&computing] {
      StandBack(0);
      computing = sched_getscheduler(0);
    }).join();
    EXPECT_EQ(computing, SCHED_OTHER);
  }
  EXPECT_EQ(PolicyOfANewThread(), SCHED_OTHER);
}

}  // namespace
}  // namespace pyramid
