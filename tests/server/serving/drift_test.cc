#include "server/serving/drift.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "proto/base/answer_mix.h"

namespace pyramid {
namespace {

// `pictures` drawn by their kinds' weights.
std::vector<int64_t> Draw(const std::vector<double>& weights, int pictures, unsigned seed) {
  std::mt19937 generator(seed);
  std::discrete_distribution<size_t> kind(weights.begin(), weights.end());
  std::vector<int64_t> counts(weights.size());
  for (int i = 0; i < pictures; ++i) ++counts[kind(generator)];
  return counts;
}

v1::AnswerMix Mix(const std::vector<int64_t>& classes, size_t confident_bucket) {
  v1::AnswerMix mix;
  int64_t all = 0;
  for (const int64_t count : classes) {
    mix.add_classes(count);
    all += count;
  }
  for (size_t i = 0; i < kConfidenceBuckets; ++i)
    mix.add_confidence(i == confident_bucket ? all : 0);
  return mix;
}

TEST(AnswerMixTest, BucketsEndWithTheirBounds) {
  EXPECT_EQ(ConfidenceBucket(0), 0);
  EXPECT_EQ(ConfidenceBucket(0.05), 0);
  EXPECT_EQ(ConfidenceBucket(0.051), 1);
  EXPECT_EQ(ConfidenceBucket(0.99), 11);
  EXPECT_EQ(ConfidenceBucket(1), 12);
}

// By hand: (0.8 - 0.5) ln(0.8 / 0.5) + (0.2 - 0.5) ln(0.2 / 0.5) = 0.4159.
TEST(PopulationStabilityIndexTest, IsTheSumOverKinds) {
  const std::vector<int64_t> a{800'000, 200'000};
  const std::vector<int64_t> b{500'000, 500'000};
  EXPECT_NEAR(PopulationStabilityIndex(a, b), 0.4159, 1e-4);
  EXPECT_NEAR(PopulationStabilityIndex(b, a), 0.4159, 1e-4);
}

TEST(PopulationStabilityIndexTest, ChanceAloneIsNoDrift) {
  for (const int classes : {2, 10, 100, 1000}) {
    std::vector<double> weights;
    for (int i = 0; i < classes; ++i) weights.push_back(1 + i % 7);
    const auto validation = Draw(weights, 50 * classes, 1);
    for (unsigned seed = 2; seed < 12; ++seed) {
      const auto live = Draw(weights, 10 * classes + 1000, seed);
      EXPECT_LT(PopulationStabilityIndex(validation, live), 0.05) << classes << " classes";
    }
  }
}

TEST(PopulationStabilityIndexTest, AClassThatTakesOverIsSeenAmongAThousand) {
  std::vector<double> weights(1000, 1);
  const auto validation = Draw(weights, 50'000, 1);
  weights[17] = 500;  // a third of the traffic
  EXPECT_GT(PopulationStabilityIndex(validation, Draw(weights, 11'000, 2)), 0.25);
}

TEST(PopulationStabilityIndexTest, KindsThatOneSideNeverShowedStayFinite) {
  const std::vector<int64_t> a{1000, 0, 0};
  const std::vector<int64_t> b{0, 1000, 0};
  const double index = PopulationStabilityIndex(a, b);
  EXPECT_GT(index, 1);
  EXPECT_TRUE(std::isfinite(index));
  EXPECT_EQ(PopulationStabilityIndex(a, std::vector<int64_t>(3)), 0);
}

TEST(DriftMeterTest, WithoutAValidationThereIsNothing) {
  DriftMeter meter(v1::AnswerMix{});
  EXPECT_FALSE(meter.available());
  for (int i = 0; i < 1000; ++i) EXPECT_FALSE(meter.Observe(0, 0.5).has_value());
}

TEST(DriftMeterTest, BucketsOfAnotherVersionAreNoBaseline) {
  v1::AnswerMix mix = Mix({500, 500}, 3);
  mix.add_confidence(1);
  EXPECT_FALSE(DriftMeter(mix).available());
}

TEST(DriftMeterTest, FewPicturesOnEitherSideTellNothing) {
  DriftMeter meter(Mix({50, 50}, 12));
  DriftMeter well_founded(Mix({500, 500}, 12));
  for (int i = 1; i <= 400; ++i) {
    const auto few = meter.Observe(i % 2, 1);
    const auto index = well_founded.Observe(i % 2, 1);
    EXPECT_EQ(index.has_value(), i % 100 == 0);
    if (!index.has_value()) continue;
    EXPECT_TRUE(std::isnan(few->classes));
    EXPECT_TRUE(std::isnan(few->confidence));
    EXPECT_EQ(std::isnan(index->classes), i < 200) << i;
  }
}

TEST(DriftMeterTest, SeesAShiftAndForgetsItOnceItIsOver) {
  DriftMeter meter(Mix({5000, 5000}, 12));
  DriftMeter::Index index{};
  const auto feed = [&](int pictures, bool shifted) {
    for (int i = 0; i < pictures; ++i) {
      const auto anew = meter.Observe(shifted ? 0 : i % 2, shifted ? 0.6 : 1);
      if (anew.has_value()) index = *anew;
    }
  };
  feed(3000, false);
  EXPECT_LT(index.classes, 0.02);
  EXPECT_LT(index.confidence, 0.02);
  feed(1000, true);
  EXPECT_GT(index.classes, 0.1);
  feed(1000, true);
  EXPECT_GT(index.classes, 0.25);
  EXPECT_GT(index.confidence, 1);
  feed(2000, false);
  EXPECT_LT(index.classes, 0.02);
  EXPECT_LT(index.confidence, 0.02);
}

TEST(DriftMeterTest, AnswersOfClassesThatTheValidationHadNotAreLeftOut) {
  DriftMeter meter(Mix({500, 500}, 12));
  for (int i = 0; i < 300; ++i) EXPECT_FALSE(meter.Observe(2, 1).has_value());
}

}  // namespace
}  // namespace pyramid
