#include "server/serving/door.h"

#include <gtest/gtest.h>

#include <optional>
#include <utility>

namespace pyramid {
namespace {

const absl::Time kStart = absl::FromUnixSeconds(1000);

class DoorTest : public ::testing::Test {
 protected:
  void Read(int times, const Door::Wish& wish) {
    for (int i = 0; i < times; ++i) door_.Read(wish, now_);
  }
  static Door::Wish Wish(const std::string& model, int priority = 5) {
    return {.model = model, .pictures = {.pictures = 1, .priority = priority}};
  }

  absl::Time now_ = kStart;
  Door door_;
};

TEST_F(DoorTest, KnowsNothingBeforeItHasSeenEnough) {
  EXPECT_FALSE(door_.Expect(now_).has_value());
  Read(31, Wish("a"));
  EXPECT_FALSE(door_.Expect(now_).has_value());
  Read(1, Wish("a"));
  const auto expected = door_.Expect(now_);
  ASSERT_TRUE(expected.has_value());
  EXPECT_EQ(expected->model, "a");
  EXPECT_EQ(expected->pictures.pictures, 1);
}

TEST_F(DoorTest, DeadlinesMayDiffer) {
  for (int i = 0; i < 32; ++i) {
    Door::Wish wish = Wish("a");
    wish.pictures.deadline = now_ + absl::Milliseconds(i);
    wish.pictures.until_ready = absl::Milliseconds(i);
    Read(1, wish);
  }
  EXPECT_TRUE(door_.Expect(now_).has_value());
}

TEST_F(DoorTest, WhatDiffersKeepsItOpenForAMinute) {
  Door::Wish large = Wish("a");
  large.decode = WorkPool::Size::kLarge;
  Door::Wish two = Wish("a");
  two.pictures.pictures = 2;
  Door::Wish wide = Wish("a");
  wide.pictures.width = 300;
  Door::Wish named = Wish("a");
  named.version = 3;
  for (const Door::Wish& other : {Wish("b"), Wish("a", 1), large, two, wide, named}) {
    Read(32, Wish("a"));
    ASSERT_TRUE(door_.Expect(now_).has_value());
    Read(1, other);
    Read(100, Wish("a"));
    EXPECT_FALSE(door_.Expect(now_ + absl::Seconds(59)).has_value());
    now_ += absl::Seconds(61);
    EXPECT_TRUE(door_.Expect(now_).has_value());
  }
}

TEST_F(DoorTest, OneInSixteenIsReadAllTheSame) {
  int refused = 0;
  for (int i = 0; i < 160; ++i) refused += door_.Refuse(now_ += absl::Milliseconds(10)) ? 1 : 0;
  EXPECT_EQ(refused, 150);
}

TEST_F(DoorTest, NoMoreThanFortyASecondAreReadAllTheSame) {
  int refused = 0;
  for (int i = 0; i < 10'000; ++i) refused += door_.Refuse(now_ += absl::Microseconds(100)) ? 1 : 0;
  EXPECT_GE(refused, 10'000 - 40);
  EXPECT_LT(refused, 10'000 - 35);
}

TEST_F(DoorTest, PassesCountUntilTheyEnd) {
  EXPECT_EQ(door_.Reading(now_), 0);
  std::optional<Door::Pass> first = door_.Enter(now_);
  Door::Pass second = door_.Enter(now_);
  EXPECT_EQ(door_.Reading(now_), 2);
  first.reset();
  EXPECT_EQ(door_.Reading(now_), 1);
  const Door::Pass moved = std::move(second);
  EXPECT_EQ(door_.Reading(now_), 1);
  second = Door::Pass();
  EXPECT_EQ(door_.Reading(now_), 1);
}

TEST_F(DoorTest, PassesOfThoseWhoDontSendNoLongerCount) {
  const Door::Pass slow = door_.Enter(now_);
  now_ += absl::Milliseconds(20);
  std::optional<Door::Pass> quick = door_.Enter(now_);
  EXPECT_EQ(door_.Reading(now_ + absl::Milliseconds(5)), 2);
  EXPECT_EQ(door_.Reading(now_ + absl::Milliseconds(6)), 1);
  quick.reset();
  EXPECT_EQ(door_.Reading(now_ + absl::Milliseconds(6)), 0);
}

}  // namespace
}  // namespace pyramid
