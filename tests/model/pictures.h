// Pictures for the tests of decoding and resampling, and how far two of them differ.
#ifndef PYRAMID_TESTS_MODEL_PICTURES_H_
#define PYRAMID_TESTS_MODEL_PICTURES_H_

#include <algorithm>
#include <cstdlib>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "model/preprocess.h"
#include "proto/base/file.h"
#include "tests/testing/status_matchers.h"

namespace pyramid::testing {

// A file of tests/golden/images.
inline std::string Picture(const std::string& name) {
  auto bytes = ReadFile(absl::StrCat(PYRAMID_SOURCE_DIR, "/tests/golden/images/", name));
  EXPECT_OK(bytes);
  return bytes.ok() ? *bytes : "";
}

inline RgbImage Decoded(const std::string& name, int channels = 3) {
  auto image = DecodeImage(Picture(name), channels, true);
  EXPECT_OK(image) << name;
  return image.ok() ? *image : RgbImage();
}

inline RgbImage Random(int width, int height, int channels, uint32_t seed) {
  std::mt19937 random(seed);
  RgbImage image{.width = width, .height = height, .channels = channels, .pixels = {}};
  image.pixels.resize(static_cast<size_t>(width * height * channels));
  for (uint8_t& value : image.pixels) value = static_cast<uint8_t>(random());
  return image;
}

inline RgbImage CutOut(const RgbImage& image, int x, int y, int width, int height) {
  RgbImage out{.width = width, .height = height, .channels = image.channels, .pixels = {}};
  for (int row = y; row < y + height; ++row) {
    const uint8_t* from = image.pixels.data() + (row * image.width + x) * image.channels;
    out.pixels.insert(out.pixels.end(), from, from + width * image.channels);
  }
  return out;
}

struct Difference {
  int largest = 0;
  double unequal = 0;  // fraction of values
  double mean = 0;     // of the absolute difference
};

inline Difference Compare(const RgbImage& a, const RgbImage& b) {
  EXPECT_EQ(a.width, b.width);
  EXPECT_EQ(a.height, b.height);
  EXPECT_EQ(a.channels, b.channels);
  Difference difference;
  if (a.pixels.size() != b.pixels.size() || a.pixels.empty())
    return {.largest = 255, .unequal = 1, .mean = 255};
  for (size_t i = 0; i < a.pixels.size(); ++i) {
    const int d = std::abs(a.pixels[i] - b.pixels[i]);
    difference.largest = std::max(difference.largest, d);
    difference.unequal += d != 0;
    difference.mean += d;
  }
  difference.unequal /= static_cast<double>(a.pixels.size());
  difference.mean /= static_cast<double>(a.pixels.size());
  return difference;
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_MODEL_PICTURES_H_
