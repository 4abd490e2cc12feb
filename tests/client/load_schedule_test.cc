#include "client/load_schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace pyramid {
namespace {

std::vector<double> Gaps(double rate, uint64_t seed, int count) {
  PoissonArrivals arrivals(rate, seed);
  std::vector<double> gaps;
  double before = 0;
  for (int i = 0; i < count; ++i) {
    const double at = absl::ToDoubleSeconds(arrivals.Next());
    gaps.push_back(at - before);
    before = at;
  }
  return gaps;
}

TEST(PoissonArrivalsTest, GapsAreExponentialWithTheRatesMean) {
  const double rate = 250;
  std::vector<double> gaps = Gaps(rate, 7, 200'000);
  double sum = 0;
  double squares = 0;
  for (const double gap : gaps) {
    ASSERT_GE(gap, 0);
    sum += gap;
    squares += gap * gap;
  }
  const double mean = sum / static_cast<double>(gaps.size());
  EXPECT_NEAR(mean * rate, 1, 0.01);
  const double deviation = std::sqrt(squares / static_cast<double>(gaps.size()) - mean * mean);
  EXPECT_NEAR(deviation * rate, 1, 0.02);  // of an exponential distribution as large as the mean
  EXPECT_NEAR(Quantile(gaps, 0.5) * rate, std::log(2.0), 0.02);
  EXPECT_NEAR(Quantile(gaps, 0.99) * rate, std::log(100.0), 0.1);
}

TEST(PoissonArrivalsTest, GapsDontDependOnEachOther) {
  const std::vector<double> gaps = Gaps(1, 3, 200'000);
  double product = 0;
  for (size_t i = 1; i < gaps.size(); ++i) product += (gaps[i] - 1) * (gaps[i - 1] - 1);
  EXPECT_NEAR(product / static_cast<double>(gaps.size()), 0, 0.02);
}

TEST(PoissonArrivalsTest, TheSeedDecides) {
  EXPECT_EQ(Gaps(10, 5, 100), Gaps(10, 5, 100));
  EXPECT_NE(Gaps(10, 5, 100), Gaps(10, 6, 100));
}

TEST(QuantileTest, IsTheSmallestValueThatTheShareDoesntExceed) {
  std::vector<double> values = {5, 1, 4, 2, 3};
  EXPECT_EQ(Quantile(values, 0), 1);
  EXPECT_EQ(Quantile(values, 0.2), 1);
  EXPECT_EQ(Quantile(values, 0.21), 2);
  EXPECT_EQ(Quantile(values, 0.5), 3);
  EXPECT_EQ(Quantile(values, 0.8), 4);
  EXPECT_EQ(Quantile(values, 0.99), 5);
  EXPECT_EQ(Quantile(values, 1), 5);
}

TEST(QuantileTest, OfAHundredTheNinetyNinthIsP99) {
  std::vector<double> values;
  for (int i = 100; i >= 1; --i) values.push_back(i);
  EXPECT_EQ(Quantile(values, 0.99), 99);
  EXPECT_EQ(Quantile(values, 0.5), 50);
}

TEST(QuantileTest, OfNothingIsNoNumber) {
  std::vector<double> none;
  EXPECT_TRUE(std::isnan(Quantile(none, 0.5)));
}

}  // namespace
}  // namespace pyramid
