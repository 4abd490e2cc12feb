#include "client/retry.h"

#include <gtest/gtest.h>

namespace pyramid {
namespace {

constexpr auto kFull = absl::StatusCode::kResourceExhausted;

TEST(RetryTest, OnlyFullAndUnavailableAreRepeated) {
  for (int number = 0; number <= 16; ++number) {
    const auto code = static_cast<absl::StatusCode>(number);
    const bool repeated =
        RetryDelay({}, code, 1, absl::ZeroDuration(), std::nullopt, 0.5).has_value();
    EXPECT_EQ(repeated, code == kFull || code == absl::StatusCode::kUnavailable) << number;
  }
}

TEST(RetryTest, WaitsTwiceAsLongEachTimeUpToTheLongest) {
  const RetryPolicy policy;
  const auto delay = [&](int tries) {
    return *RetryDelay(policy, kFull, tries, absl::ZeroDuration(), std::nullopt, 1.0);
  };
  EXPECT_EQ(delay(1), absl::Milliseconds(50));
  EXPECT_EQ(delay(2), absl::Milliseconds(100));
  EXPECT_EQ(delay(5), absl::Milliseconds(800));
  EXPECT_EQ(delay(50), policy.longest);
}

TEST(RetryTest, JitterTakesUpToHalf) {
  EXPECT_EQ(*RetryDelay({}, kFull, 1, absl::ZeroDuration(), std::nullopt, 0.0),
            absl::Milliseconds(25));
}

TEST(RetryTest, PushbackReplacesTheBackoff) {
  EXPECT_EQ(*RetryDelay({}, kFull, 7, absl::ZeroDuration(), 30, 0.5), absl::Milliseconds(30));
  EXPECT_EQ(*RetryDelay({}, kFull, 7, absl::ZeroDuration(), 0, 0.5), absl::ZeroDuration());
}

TEST(RetryTest, NegativePushbackEndsIt) {
  EXPECT_FALSE(RetryDelay({}, kFull, 1, absl::ZeroDuration(), -1, 0.5).has_value());
}

TEST(RetryTest, GivesUpWhenPatienceEnds) {
  EXPECT_TRUE(RetryDelay({}, kFull, 1, absl::Seconds(59), std::nullopt, 1.0).has_value());
  EXPECT_FALSE(RetryDelay({}, kFull, 1, absl::Seconds(60), std::nullopt, 1.0).has_value());
  EXPECT_FALSE(RetryDelay({}, kFull, 1, absl::Seconds(1), 60'000, 1.0).has_value());
}

TEST(RetryTest, PushbackThatIsNoNumberForbidsARetry) {
  EXPECT_EQ(ParsePushback("250"), 250);
  EXPECT_EQ(ParsePushback("-1"), -1);
  EXPECT_LT(ParsePushback("soon"), 0);
  EXPECT_LT(ParsePushback(""), 0);
}

}  // namespace
}  // namespace pyramid
