#include "proto/base/pieces.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/testing/scattered.h"

namespace pyramid {
namespace {

using testing::Scattered;

std::vector<float> Numbers(size_t count) {
  std::vector<float> numbers(count);
  for (size_t i = 0; i < count; ++i) numbers[i] = static_cast<float>(i) - 0.5f;
  return numbers;
}

TEST(FloatReaderTest, ReadsFromAnyPlaceHoweverTheyLie) {
  const std::vector<float> numbers = Numbers(3000);
  for (const size_t longest : {1UL, 3UL, 7UL, 100UL, 5000UL, 100'000UL}) {
    for (const size_t shift : {0UL, 1UL, 2UL, 4UL}) {
      const Scattered scattered(numbers, shift, longest, static_cast<unsigned>(longest + shift));
      std::mt19937 random(1);
      for (const size_t first : {0UL, 1UL, 511UL, 2999UL, 3000UL}) {
        FloatReader reader(scattered.pieces(), first);
        for (size_t at = first; at < numbers.size();) {
          const size_t count = std::min(numbers.size() - at, 1 + random() % FloatReader::kMost);
          const float* const values = reader.Next(count);
          ASSERT_EQ(reinterpret_cast<uintptr_t>(values) % alignof(float), 0);
          ASSERT_TRUE(std::equal(values, values + count, numbers.begin() + at))
              << "from " << at << ", pieces up to " << longest << ", shift " << shift;
          at += count;
        }
      }
    }
  }
}

TEST(FloatReaderTest, WhatLiesAsFloatsIsntCopied) {
  const std::vector<float> numbers = Numbers(1024);
  const std::vector<Pieces> pictures = PiecesOf(numbers, 2);
  ASSERT_EQ(pictures.size(), 2);
  EXPECT_TRUE(pictures[1].LieAsFloats());
  FloatReader reader(pictures[1], 12);
  EXPECT_EQ(reader.Next(500), numbers.data() + 512 + 12);
}

TEST(PiecesTest, OnlyAlignedWholeOnesLieAsFloats) {
  const std::vector<float> numbers = Numbers(8);
  EXPECT_TRUE(Scattered(numbers, 4, 1, 1).pieces().size() == 32);
  EXPECT_FALSE(Scattered(numbers, 0, 1, 1).pieces().LieAsFloats()) << "32 pieces";
  const std::string bytes(33, 'x');
  const auto aligned = reinterpret_cast<uintptr_t>(bytes.data()) % alignof(float) == 0;
  EXPECT_NE(Pieces(absl::string_view(bytes).substr(0, 32)).LieAsFloats(),
            Pieces(absl::string_view(bytes).substr(1, 32)).LieAsFloats() && aligned);
}

TEST(FirstNotFiniteTest, IsTheFirstInAnyPiece) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (const size_t place : {0UL, 511UL, 512UL, 1299UL}) {
      std::vector<float> numbers = Numbers(1300);
      numbers[place] = bad;
      EXPECT_FALSE(AllFinite(numbers.data(), numbers.size()));
      numbers.back() = bad;
      EXPECT_EQ(FirstNotFinite(Scattered(numbers, 1, 50, 3).pieces()), place);
    }
  }
  std::vector<float> largest(700, std::numeric_limits<float>::max());
  largest[3] = std::numeric_limits<float>::denorm_min();
  EXPECT_TRUE(AllFinite(largest.data(), largest.size()));
  EXPECT_EQ(FirstNotFinite(Scattered(largest, 0, 50, 3).pieces()), 700);
}

}  // namespace
}  // namespace pyramid
