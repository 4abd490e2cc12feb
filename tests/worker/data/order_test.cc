#include "worker/data/order.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "worker/data/random.h"

namespace pyramid {
namespace {

using ::testing::ElementsAre;

TEST(OrderTest, IsAPermutationThatDependsOnSeedAndEpoch) {
  const OrderOptions options{.seed = 7, .pictures = 1000};
  const std::vector<int64_t> order = EpochOrder(options, 3);
  EXPECT_EQ(EpochOrder(options, 3), order);
  EXPECT_NE(EpochOrder(options, 4), order);
  EXPECT_NE(EpochOrder({.seed = 8, .pictures = 1000}, 3), order);
  std::vector<int64_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  std::vector<int64_t> all(1000);
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(sorted, all);
}

// Checkpoints of older versions go on in the same order only if these stay.
TEST(OrderTest, StaysTheSameFromVersionToVersion) {
  EXPECT_THAT(EpochOrder({.seed = 42, .pictures = 8}, 0), ElementsAre(2, 7, 1, 6, 5, 4, 0, 3));
  EXPECT_THAT(EpochOrder({.seed = 42, .pictures = 8}, 1), ElementsAre(3, 2, 4, 6, 7, 1, 0, 5));
}

TEST(OrderTest, WithoutShuffleIsTheDatasetsOwn) {
  EXPECT_THAT(EpochOrder({.seed = 1, .pictures = 4, .shuffle = false}, 9), ElementsAre(0, 1, 2, 3));
}

TEST(OrderTest, ASampleOfTheDataIsTheSameInEveryEpoch) {
  const OrderOptions options{.seed = 5, .pictures = 100, .num_samples = 10};
  const std::vector<int64_t> first = EpochOrder(options, 0);
  const std::vector<int64_t> second = EpochOrder(options, 1);
  EXPECT_NE(first, second);
  EXPECT_EQ(std::set<int64_t>(first.begin(), first.end()),
            std::set<int64_t>(second.begin(), second.end()));
  EXPECT_EQ(first.size(), 10u);
}

TEST(OrderTest, PartsCoverEverythingOnce) {
  for (const int world : {1, 2, 3, 7}) {
    for (const int64_t count : {0, 1, 5, 64, 129}) {
      int64_t next = 0;
      for (int rank = 0; rank < world; ++rank) {
        const IndexRange part = PartOf(count, rank, world);
        EXPECT_EQ(part.begin, next);
        EXPECT_LE(std::abs(part.size() - count / world), 1);
        next = part.end;
      }
      EXPECT_EQ(next, count);
    }
  }
}

TEST(OrderTest, StepsRoundDownOrUp) {
  EXPECT_EQ(StepsPerEpoch(100, 32, true), 3);
  EXPECT_EQ(StepsPerEpoch(100, 32, false), 4);
  EXPECT_EQ(StepsPerEpoch(96, 32, false), 3);
  EXPECT_EQ(StepsPerEpoch(31, 32, true), 0);
}

TEST(RandomTest, DrawsAreUniformAndStreamsApart) {
  CounterRandom random(RandomStream::kAugment, 1, 2, 3);
  double sum = 0;
  double squares = 0;
  for (int i = 0; i < 100000; ++i) {
    const double value = random.Uniform();
    ASSERT_GE(value, 0);
    ASSERT_LT(value, 1);
    sum += value;
    squares += value * value;
  }
  EXPECT_NEAR(sum / 100000, 0.5, 0.005);
  EXPECT_NEAR(squares / 100000, 1.0 / 3, 0.005);
  CounterRandom other(RandomStream::kSubstitute, 1, 2, 3);
  CounterRandom same(RandomStream::kAugment, 1, 2, 3);
  EXPECT_NE(other.Next(), same.Next());
}

TEST(RandomTest, NormalHasUnitVariance) {
  CounterRandom random(RandomStream::kAugment, 9, 0, 0);
  double sum = 0;
  double squares = 0;
  for (int i = 0; i < 50000; ++i) {
    const double value = random.Normal();
    sum += value;
    squares += value * value;
  }
  EXPECT_NEAR(sum / 50000, 0, 0.02);
  EXPECT_NEAR(squares / 50000, 1, 0.03);
}

}  // namespace
}  // namespace pyramid
