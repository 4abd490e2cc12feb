#include "server/serving/device_turns.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

namespace pyramid {
namespace {

using ::testing::ElementsAre;

const absl::Time kNow = absl::FromUnixSeconds(1'000'000);

// Threads that wait for a turn one after the other, and the order in which they get it.
class DeviceTurnsTest : public ::testing::Test {
 protected:
  ~DeviceTurnsTest() override {
    for (std::thread& thread : threads_) thread.join();
  }
  // Returns when the thread waits. `use`: of its turn.
  void Wait(DeviceTurns& device, int user, absl::Duration use = absl::ZeroDuration()) {
    std::atomic<bool> started{false};
    threads_.emplace_back([this, &device, user, use, &started] {
      started = true;
      DeviceTurns::Turn turn = device.Take(user);
      {
        absl::MutexLock lock(&mutex_);
        order_.push_back(user);
      }
      turn.GiveBack(use);
    });
    while (!started) absl::SleepFor(absl::Milliseconds(1));
    absl::SleepFor(absl::Milliseconds(20));
  }
  std::vector<int> Order() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    absl::MutexLock lock(&mutex_);
    return order_;
  }

  absl::Mutex mutex_;
  std::vector<int> order_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

TEST_F(DeviceTurnsTest, WhoHasUsedItLeastGoesNext) {
  DeviceTurns device;
  const int a = device.Join();
  const int b = device.Join();
  DeviceTurns::Turn turn = device.Take(a);
  Wait(device, a);
  Wait(device, b, absl::Seconds(1));
  Wait(device, b);
  turn.GiveBack(absl::Seconds(3));
  EXPECT_THAT(Order(), ElementsAre(b, b, a));
}

TEST_F(DeviceTurnsTest, EqualUseGoesInOrderOfArrival) {
  DeviceTurns device;
  const int a = device.Join();
  const int b = device.Join();
  DeviceTurns::Turn turn = device.Take(device.Join());
  Wait(device, b);
  Wait(device, a);
  turn.GiveBack(absl::ZeroDuration());
  EXPECT_THAT(Order(), ElementsAre(b, a));
}

TEST_F(DeviceTurnsTest, AnIdleTimeIsNoClaim) {
  DeviceTurns device;
  const int busy = device.Join();
  const int idle = device.Join();
  for (int i = 0; i < 3; ++i) device.Take(busy).GiveBack(absl::Seconds(100));
  // Were it one, the idle one would have the device for the next 300 s.
  DeviceTurns::Turn turn = device.Take(idle);
  Wait(device, busy);
  turn.GiveBack(absl::Seconds(101));
  Wait(device, idle);
  EXPECT_THAT(Order(), ElementsAre(busy, idle));
}

TEST_F(DeviceTurnsTest, AnUnusedTurnCostsNothing) {
  DeviceTurns device;
  const int a = device.Join();
  { const DeviceTurns::Turn turn = device.Take(a); }
  EXPECT_FALSE(device.Look(a, kNow).busy);
}

TEST_F(DeviceTurnsTest, TellsWhoElseComputes) {
  DeviceTurns device(2);
  const int a = device.Join(), b = device.Join();
  EXPECT_EQ(device.Look(a, kNow).running, 0);
  EXPECT_FALSE(device.Look(a, kNow).guests);
  DeviceTurns::Turn turn = device.Take(b);
  EXPECT_EQ(device.Look(a, kNow).running, 1);
  EXPECT_EQ(device.Look(a, kNow).rivals, 1);
  {
    const DeviceTurns::Guest loading(device);
    EXPECT_TRUE(device.Look(a, kNow).guests);
  }
  EXPECT_FALSE(device.Look(a, kNow).guests);
}

TEST_F(DeviceTurnsTest, AsManyTurnsAsInstancesAreOutAtATime) {
  DeviceTurns device(2);
  const int a = device.Join();
  DeviceTurns::Turn one = device.Take(a);
  EXPECT_FALSE(device.Look(a, kNow).busy);
  DeviceTurns::Turn two = device.Take(a);
  EXPECT_TRUE(device.Look(a, kNow).busy);
  Wait(device, a);
  {
    absl::MutexLock lock(&mutex_);
    EXPECT_THAT(order_, ElementsAre());
  }
  two.GiveBack(absl::ZeroDuration());
  EXPECT_THAT(Order(), ElementsAre(a));
}

TEST_F(DeviceTurnsTest, LookSaysWhenItIsFreeAndWhoElseWantsIt) {
  DeviceTurns device;
  const int a = device.Join();
  const int b = device.Join();
  DeviceTurns::Turn turn = device.Take(a);
  turn.Expect(kNow + absl::Milliseconds(30));
  EXPECT_EQ(device.Look(a, kNow).free_in, absl::Milliseconds(30));
  EXPECT_EQ(device.Look(a, kNow).rivals, 0);
  EXPECT_EQ(device.Look(b, kNow).rivals, 1);
  EXPECT_EQ(device.Look(b, kNow + absl::Seconds(1)).free_in, absl::ZeroDuration()) << "overdue";
  turn.GiveBack(absl::ZeroDuration());
  EXPECT_EQ(device.Look(b, kNow).free_in, absl::ZeroDuration());
  EXPECT_EQ(device.Look(b, kNow).rivals, 0);
  device.Leave(a);
}

TEST_F(DeviceTurnsTest, TimeIsSharedEquallyNotTurns) {
  DeviceTurns device;
  const int a = device.Join();
  const int b = device.Join();
  DeviceTurns::Turn turn = device.Take(device.Join());
  for (int i = 0; i < 9; ++i) Wait(device, a, absl::Seconds(1));
  for (int i = 0; i < 3; ++i) Wait(device, b, absl::Seconds(3));
  turn.GiveBack(absl::ZeroDuration());
  EXPECT_THAT(Order(), ElementsAre(a, b, a, a, a, b, a, a, a, b, a, a));
}

}  // namespace
}  // namespace pyramid
