// Pictures for tests: made up, or from tests/golden/images.
#ifndef PYRAMID_TESTS_TESTING_IMAGES_H_
#define PYRAMID_TESTS_TESTING_IMAGES_H_

#include <cstdint>
#include <filesystem>
#include <string>

#include "model/preprocess.h"
#include "proto/base/file.h"

namespace pyramid::testing {

// A PNG file of side x side pixels, all of one grey.
inline std::string GreyPng(int side, uint8_t grey) {
  RgbImage image{.width = side, .height = side, .channels = 1, .pixels = {}};
  image.pixels.assign(static_cast<size_t>(side) * static_cast<size_t>(side), grey);
  return EncodePng(image).value();
}

// A file of tests/golden/images.
inline std::string GoldenImage(const std::string& name) {
  return ReadFile(std::filesystem::path(PYRAMID_SOURCE_DIR) / "tests/golden/images" / name).value();
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_IMAGES_H_
