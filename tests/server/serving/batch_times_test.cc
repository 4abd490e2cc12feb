#include "server/serving/batch_times.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace pyramid {
namespace {

constexpr int64_t kPixels = int64_t{224} * 224;
const absl::Time kStart = absl::FromUnixSeconds(1'000'000);

double Ms(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

TEST(BatchTimesTest, NothingIsKnownAtFirst) {
  const BatchTime time = BatchTimes().For(kPixels);
  EXPECT_FALSE(time.known());
  EXPECT_EQ(time.Of(32), absl::ZeroDuration());
  EXPECT_EQ(time.Largest(absl::ZeroDuration(), 32), 32);
}

TEST(BatchTimesTest, TwoBatchSizesGiveTheLine) {
  BatchTimes times;
  times.Observe(kPixels, 1, absl::Milliseconds(5), kStart);
  times.Observe(kPixels, 32, absl::Milliseconds(67), kStart);
  const BatchTime time = times.For(kPixels);
  EXPECT_NEAR(time.per_picture, 0.002, 1e-9);
  EXPECT_NEAR(time.fixed, 0.003, 1e-9);
  EXPECT_NEAR(Ms(time.Of(8)), 19, 1e-6);
  EXPECT_NEAR(Ms(time.AtMost(8)), 19 / 0.92, 1e-6);
}

// Twice as many are taken to cost the same, so that somebody tries; more cost in proportion.
TEST(BatchTimesTest, OneBatchSizeInvitesToTryTwiceAsMany) {
  BatchTimes times;
  for (int i = 0; i < 20; ++i) times.Observe(kPixels, 8, absl::Milliseconds(16), kStart);
  const BatchTime time = times.For(kPixels);
  EXPECT_NEAR(Ms(time.Of(1)), 16, 1e-6);
  EXPECT_NEAR(Ms(time.Of(16)), 16, 1e-6);
  EXPECT_NEAR(Ms(time.Of(32)), 32, 1e-6);
  EXPECT_EQ(time.Largest(absl::Milliseconds(20), 32), 18);  // 16 / 0.92 is 17.4
  EXPECT_EQ(time.Largest(absl::Milliseconds(17), 32), 0);
}

TEST(BatchTimesTest, TheLargestBatchWithinATimeFitsIt) {
  const BatchTime time{.per_picture = 0.002, .fixed = 0.003, .measured = 32};
  EXPECT_EQ(time.Largest(absl::Milliseconds(19), 32), 8);
  for (int n = 1; n <= 32; ++n) EXPECT_EQ(time.Largest(time.AtMost(n), 32), n);
  EXPECT_EQ(time.Largest(absl::Milliseconds(4), 32), 0);
  EXPECT_EQ(time.Largest(absl::Milliseconds(2), 32), 0);
  EXPECT_EQ(time.Largest(-absl::Milliseconds(2), 32), 0);
  EXPECT_EQ(time.Largest(absl::InfiniteDuration(), 32), 32);
  const BatchTime flat{.per_picture = 0, .fixed = 0.003, .measured = 16};
  EXPECT_EQ(flat.Largest(absl::Milliseconds(3), 32), 32);
  EXPECT_EQ(flat.Largest(absl::Milliseconds(2), 32), 0);
  const BatchTime slow{.per_picture = 0.002, .fixed = 0.003, .measured = 32, .slow = 2};
  EXPECT_EQ(slow.Largest(absl::Milliseconds(38), 32), 8);
}

TEST(BatchTimesTest, AHiccupChangesNothing) {
  BatchTimes times;
  for (int i = 0; i < 16; ++i) {
    for (const int batch : {1, 8, 32}) {
      times.Observe(kPixels, batch, absl::Milliseconds(3 + 2 * batch), kStart);
    }
  }
  times.Observe(kPixels, 8, absl::Seconds(5), kStart);
  times.Observe(kPixels, 32, absl::Seconds(5), kStart);
  EXPECT_NEAR(Ms(times.For(kPixels).Of(8)), 19, 1e-6);
}

TEST(BatchTimesTest, FollowsAChangeWithinAWindow) {
  BatchTimes times;
  for (int i = 0; i < 16; ++i) times.Observe(kPixels, 8, absl::Milliseconds(10), kStart);
  for (int i = 0; i < 16; ++i) times.Observe(kPixels, 8, absl::Milliseconds(30), kStart);
  EXPECT_NEAR(Ms(times.For(kPixels).Of(8)), 30, 1e-6);
}

TEST(BatchTimesTest, HalfOfTheBatchesTakeTheTimeAndNearlyAllTheMost) {
  std::mt19937 random(7);
  for (const double sigma : {0.02, 0.1, 0.3}) {
    std::normal_distribution<double> noise(0, sigma);
    BatchTimes times;
    int slower = 0, over = 0;
    constexpr int kTries = 3000;
    for (int i = -300; i < kTries; ++i) {
      const int batch = 1 + static_cast<int>(random() % 32);
      const absl::Duration time = absl::Milliseconds(3 + 2 * batch) * std::exp(noise(random));
      const BatchTime expected = times.For(kPixels);
      slower += i >= 0 && time > expected.Of(batch);
      over += i >= 0 && time > expected.AtMost(batch);
      times.Observe(kPixels, batch, time, kStart);
    }
    EXPECT_NEAR(slower, 0.5 * kTries, 0.1 * kTries) << sigma;
    EXPECT_LT(over, 0.08 * kTries) << sigma;
    if (sigma > 0.05) {
      EXPECT_GT(over, 0.02 * kTries) << sigma;
    }
  }
}

TEST(BatchTimesTest, ABatchSizeThatNoLongerRunsIsForgottenAfterAMinute) {
  BatchTimes times;
  times.Observe(kPixels, 32, absl::Milliseconds(100), kStart);
  times.Observe(kPixels, 1, absl::Milliseconds(5), kStart + absl::Seconds(59));
  EXPECT_NEAR(Ms(times.For(kPixels).Of(32)), 100, 1e-3);
  times.Observe(kPixels, 1, absl::Milliseconds(5), kStart + absl::Seconds(61));
  EXPECT_NEAR(Ms(times.For(kPixels).Of(32)), 80, 1e-3);
}

TEST(BatchTimesTest, EachPictureSizeHasItsOwnLineAndOthersAreScaled) {
  BatchTimes times;
  for (const int batch : {1, 8}) {
    times.Observe(kPixels, batch, absl::Milliseconds(2 * batch), kStart);
    times.Observe(64 * 64, batch, absl::Milliseconds(1) * (1 + batch), kStart);
  }
  EXPECT_NEAR(Ms(times.For(kPixels).Of(4)), 8, 1e-6);
  EXPECT_NEAR(Ms(times.For(64 * 64).Of(4)), 5, 1e-6);
  EXPECT_NEAR(Ms(times.For(4 * kPixels).Of(4)), 32, 1e-6);
  EXPECT_NEAR(Ms(times.For(32 * 32).Of(4)), 2, 1e-6);
}

TEST(BatchTimesTest, NeitherPartOfTheLineIsNegative) {
  BatchTimes times;
  times.Observe(kPixels, 1, absl::Milliseconds(9), kStart);  // the first pass of all is slow
  times.Observe(kPixels, 4, absl::Milliseconds(3), kStart);
  const BatchTime falling = times.For(kPixels);
  EXPECT_EQ(falling.per_picture, 0);
  EXPECT_GT(falling.fixed, 0.003);
  BatchTimes steep;
  steep.Observe(kPixels, 1, absl::Milliseconds(1), kStart);
  steep.Observe(kPixels, 4, absl::Milliseconds(40), kStart);
  EXPECT_EQ(steep.For(kPixels).fixed, 0);
  EXPECT_GT(steep.For(kPixels).per_picture, 0);
}

TEST(BatchTimesTest, EachPictureSizeKnowsWhenItWasMeasuredOrTriedLast) {
  BatchTimes times;
  EXPECT_EQ(times.newest(kPixels), absl::InfinitePast());
  times.Observe(kPixels, 1, absl::Milliseconds(5), kStart);
  EXPECT_EQ(times.newest(kPixels), kStart);
  EXPECT_EQ(times.newest(4 * kPixels), absl::InfinitePast());
  times.Try(4 * kPixels, kStart + absl::Seconds(1));
  EXPECT_EQ(times.newest(4 * kPixels), kStart + absl::Seconds(1));
  EXPECT_EQ(times.newest(kPixels), kStart);
  EXPECT_NEAR(Ms(times.For(4 * kPixels).Of(1)), 5, 1e-6) << "trying teaches nothing yet";
}

TEST(BatchTimesTest, AClockThatStandsStillTeachesNothing) {
  BatchTimes times;
  times.Observe(kPixels, 4, absl::ZeroDuration(), kStart);
  EXPECT_FALSE(times.For(kPixels).known());
}

}  // namespace
}  // namespace pyramid
