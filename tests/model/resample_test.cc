// Every instruction set's loops give the plain loops' bytes.
#include "model/resample.h"

#include <random>

#include "tests/model/pictures.h"

namespace pyramid::resample {
namespace {

using ::pyramid::testing::Random;

struct Case {
  int width, height;          // of the picture
  int out_width, out_height;  // of the whole result
  int crop_width, crop_height;
};

constexpr Case kCases[] = {
    {500, 375, 331, 248, 224, 224},  // what is served
    {375, 500, 248, 330, 224, 224},
    {640, 480, 341, 256, 224, 224},
    {4000, 3, 331, 248, 224, 224},  // few rows
    {3, 4000, 248, 331, 224, 224},
    {2000, 1, 700, 9, 224, 9},
    {1, 2000, 9, 700, 9, 224},
    {1, 1, 248, 248, 224, 224},
    {2, 3, 17, 19, 17, 19},
    {5, 4, 3, 2, 3, 2},
    {7, 7, 7, 7, 7, 7},            // nothing to do
    {1500, 1100, 31, 23, 31, 23},  // many taps
    {97, 61, 5, 3, 5, 3},
    {28, 28, 33, 33, 32, 32},
    {33, 65, 1, 1, 1, 1},
    {100, 100, 6, 6, 5, 5},  // 15 values a row
    {100, 100, 16, 16, 16, 16},
    {64, 48, 11, 8, 11, 8},  // 33 values a row
};

std::vector<const Loops*> VectorLoops() {
  std::vector<const Loops*> all;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") != 0) all.push_back(&kAvx2Loops);
#endif
  return all;
}

Span Middle(int in, int out, int count) {
  return {
      .start = 0, .length = double(in), .size = out, .begin = (out - count) / 2, .count = count};
}

TEST(ResampleTest, VectorLoopsGiveThePlainLoopsBytes) {
  if (VectorLoops().empty()) GTEST_SKIP() << "this machine runs the plain loops only";
  for (const Case& c : kCases) {
    for (const int channels : {1, 3}) {
      const RgbImage image = Random(c.width, c.height, channels, 5);
      for (const Kernel kernel : {Kernel::kBilinear, Kernel::kBicubic}) {
        for (const bool antialias : {true, false}) {
          const auto resampled = [&](const Loops& loops) {
            return Resample(WholeOf(image), Middle(c.width, c.out_width, c.crop_width),
                            Middle(c.height, c.out_height, c.crop_height), kernel, antialias,
                            loops);
          };
          const RgbImage plain = resampled(kPlainLoops);
          for (const Loops* loops : VectorLoops()) {
            ASSERT_EQ(resampled(*loops).pixels, plain.pixels)
                << loops->name << ": " << c.width << "x" << c.height << "x" << channels << " to "
                << c.out_width << "x" << c.out_height << ", kernel " << static_cast<int>(kernel)
                << ", antialias " << antialias;
          }
        }
      }
    }
  }
}

// The largest sums: weights of both signs on pixels of 0 and 255 only.
TEST(ResampleTest, VectorLoopsClipAsThePlainOnesDo) {
  if (VectorLoops().empty()) GTEST_SKIP() << "this machine runs the plain loops only";
  std::mt19937 random(6);
  for (int round = 0; round < 40; ++round) {
    RgbImage image = Random(1 + static_cast<int>(random() % 60),
                            1 + static_cast<int>(random() % 60), round % 2 == 0 ? 3 : 1, random());
    for (uint8_t& value : image.pixels) value = value % 2 == 0 ? 0 : 255;
    const int width = 1 + static_cast<int>(random() % 90);
    const int height = 1 + static_cast<int>(random() % 90);
    for (const bool antialias : {true, false}) {
      const auto resampled = [&](const Loops& loops) {
        return Resample(WholeOf(image), Middle(image.width, width, width),
                        Middle(image.height, height, height), Kernel::kBicubic, antialias, loops);
      };
      const RgbImage plain = resampled(kPlainLoops);
      for (const Loops* loops : VectorLoops()) {
        ASSERT_EQ(resampled(*loops).pixels, plain.pixels)
            << loops->name << ": " << image.width << "x" << image.height << "x" << image.channels
            << " to " << width << "x" << height << ", antialias " << antialias;
      }
    }
  }
}

TEST(ResampleTest, ABoxWithinThePictureIsTheSameToo) {
  if (VectorLoops().empty()) GTEST_SKIP() << "this machine runs the plain loops only";
  const RgbImage image = Random(80, 60, 3, 8);
  Window box = WholeOf(image);
  box.pixels += 11 * box.stride + 7 * 3;
  box.width = 41;
  box.height = 49;  // down to the picture's last row
  for (const bool antialias : {true, false}) {
    const auto resampled = [&](const Loops& loops) {
      return Resample(box, {.start = 0.4, .length = 40.2, .size = 29, .begin = 0, .count = 29},
                      {.start = 0.7, .length = 48.1, .size = 64, .begin = 3, .count = 50},
                      Kernel::kBicubic, antialias, loops);
    };
    const RgbImage plain = resampled(kPlainLoops);
    for (const Loops* loops : VectorLoops()) {
      EXPECT_EQ(resampled(*loops).pixels, plain.pixels) << loops->name << " " << antialias;
    }
  }
}

}  // namespace
}  // namespace pyramid::resample
