#include "server/security/rate_limit.h"

#include <gtest/gtest.h>

namespace pyramid {
namespace {

const absl::Time kStart = absl::FromUnixSeconds(1'700'000'000);

TEST(TokenBucketTest, ASecondsWorthMayComeAtOnce) {
  TokenBucket bucket(10);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(bucket.Take(1, kStart), absl::ZeroDuration()) << i;
  EXPECT_NEAR(absl::ToDoubleSeconds(bucket.Take(1, kStart)), 0.1, 1e-9);
}

TEST(TokenBucketTest, WhatItSaysToWaitIsEnough) {
  TokenBucket bucket(10);
  ASSERT_EQ(bucket.Take(10, kStart), absl::ZeroDuration());
  const absl::Duration wait = bucket.Take(4, kStart);
  EXPECT_NEAR(absl::ToDoubleSeconds(wait), 0.4, 1e-9);
  EXPECT_GT(bucket.Take(4, kStart + wait - absl::Milliseconds(1)), absl::ZeroDuration());
  EXPECT_EQ(bucket.Take(4, kStart + wait + absl::Nanoseconds(1)), absl::ZeroDuration());
}

TEST(TokenBucketTest, TheRateHoldsOverTime) {
  TokenBucket bucket(100);
  int taken = 0;
  for (int ms = 0; ms < 10'000; ++ms) {
    if (bucket.Take(1, kStart + absl::Milliseconds(ms)) == absl::ZeroDuration()) ++taken;
  }
  EXPECT_NEAR(taken, 1100, 2) << "10 s at 100 a second, and the second's worth it began with";
}

TEST(TokenBucketTest, ALargeRequestIsTakenAndPaidForAfterwards) {
  TokenBucket bucket(10);
  EXPECT_EQ(bucket.Take(64, kStart), absl::ZeroDuration());
  EXPECT_NEAR(absl::ToDoubleSeconds(bucket.Take(1, kStart)), 5.5, 1e-9);
  int taken = 0;
  for (int ms = 0; ms < 640'000; ms += 10) {
    if (bucket.Take(64, kStart + absl::Milliseconds(ms)) == absl::ZeroDuration()) taken += 64;
  }
  EXPECT_NEAR(taken, 6400, 64);
}

TEST(TokenBucketTest, LessThanOneASecond) {
  TokenBucket bucket(0.5);
  EXPECT_EQ(bucket.Take(1, kStart), absl::ZeroDuration());
  EXPECT_NEAR(absl::ToDoubleSeconds(bucket.Take(1, kStart)), 2, 1e-9);
}

TEST(TokenBucketTest, AClockThatStepsBackGivesNothing) {
  TokenBucket bucket(10);
  ASSERT_EQ(bucket.Take(10, kStart), absl::ZeroDuration());
  EXPECT_GT(bucket.Take(1, kStart - absl::Hours(1)), absl::ZeroDuration());
  EXPECT_GT(bucket.Take(1, kStart + absl::Milliseconds(50)), absl::ZeroDuration());
}

}  // namespace
}  // namespace pyramid
