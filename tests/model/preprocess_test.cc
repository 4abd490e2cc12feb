#include "model/preprocess.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <opencv2/imgproc.hpp>
#include <random>

#include "tests/model/pictures.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::Compare;
using ::pyramid::testing::CutOut;
using ::pyramid::testing::Decoded;
using ::pyramid::testing::Difference;
using ::pyramid::testing::Picture;
using ::pyramid::testing::Random;
using ::pyramid::testing::StatusIs;
using ::testing::HasSubstr;

v1::Preprocessing Resizing(int side, int crop, const std::string& antialias,
                           const std::string& kernel = "bicubic", int channels = 3) {
  v1::Preprocessing p;
  p.set_channels(channels);
  p.set_exif("apply");
  p.mutable_resize()->set_side(side);
  p.mutable_resize()->set_kernel(kernel);
  p.mutable_resize()->set_antialias(antialias);
  p.mutable_resize()->set_other_side("floor");
  p.set_crop(crop);
  for (int c = 0; c < channels; ++c) {
    p.add_mean(0.5);
    p.add_std(0.25);
  }
  return p;
}

v1::Preprocessing Padding(int to, int fill, int crop) {
  v1::Preprocessing p = Resizing(to, crop, "none", "bicubic", 1);
  p.mutable_pad()->set_to(to);
  p.mutable_pad()->set_fill(fill);
  return p;
}

struct Golden {
  const char* picture;
  const char* expected;
};
constexpr Golden kPillow[] = {{"portrait.png", "expected_pillow_portrait_png.png"},
                              {"scene.jpg", "expected_pillow_scene_jpg.png"},
                              {"scene.png", "expected_pillow_scene_png.png"},
                              {"tiny.png", "expected_pillow_tiny_png.png"}};
constexpr Golden kMindSpore[] = {{"portrait.png", "expected_mindspore_portrait_png.png"},
                                 {"scene.jpg", "expected_mindspore_scene_jpg.png"},
                                 {"scene.png", "expected_mindspore_scene_png.png"},
                                 {"tiny.png", "expected_mindspore_tiny_png.png"}};

// ctest -R "Bicubic" -V shows them.
void Print(const char* picture, const char* whose, const Difference& difference) {
  std::printf("%-14s %.4f %% of the values are %s's, the largest difference is %d\n", picture,
              100 * (1 - difference.unequal), whose, difference.largest);
}

TEST(ResizeTest, AntialiasedBicubicIsPillows) {
  for (const Golden& golden : kPillow) {
    ASSERT_OK_AND_ASSIGN(const RgbImage image,
                         ResizeAndCrop(Decoded(golden.picture), Resizing(248, 224, "pillow")));
    const Difference difference = Compare(image, Decoded(golden.expected));
    Print(golden.picture, "Pillow", difference);
    EXPECT_LE(difference.largest, 1) << golden.picture;
    EXPECT_LE(difference.unequal, 0.001) << golden.picture;
  }
}

TEST(ResizeTest, PlainBicubicIsMindSpores) {
  for (const Golden& golden : kMindSpore) {
    ASSERT_OK_AND_ASSIGN(const RgbImage image,
                         ResizeAndCrop(Decoded(golden.picture), Resizing(248, 224, "none")));
    const Difference difference = Compare(image, Decoded(golden.expected));
    Print(golden.picture, "MindSpore", difference);
    EXPECT_LE(difference.largest, 1) << golden.picture;
  }
}

TEST(ResizeTest, PlainKernelsAreOpenCvs) {
  std::mt19937 random(7);
  for (int round = 0; round < 60; ++round) {
    const auto side = [&] { return static_cast<int>(1 + random() % 90); };
    const RgbImage image = Random(side(), side(), round % 2 == 0 ? 3 : 1, random());
    const int width = side();
    const int height = side();
    for (const Kernel kernel : {Kernel::kBilinear, Kernel::kBicubic}) {
      const RgbImage ours =
          ResizeBox(image, 0, 0, image.width, image.height, width, height, kernel, false);
      const int type = image.channels == 3 ? CV_8UC3 : CV_8UC1;
      const cv::Mat in(image.height, image.width, type, const_cast<uint8_t*>(image.pixels.data()));
      RgbImage theirs{.width = width, .height = height, .channels = image.channels, .pixels = {}};
      theirs.pixels.resize(ours.pixels.size());
      cv::Mat out(height, width, type, theirs.pixels.data());
      cv::resize(in, out, out.size(), 0, 0,
                 kernel == Kernel::kBicubic ? cv::INTER_CUBIC : cv::INTER_LINEAR);
      EXPECT_LE(Compare(ours, theirs).largest, 1)
          << image.width << "x" << image.height << " to " << width << "x" << height << " kernel "
          << static_cast<int>(kernel);
    }
  }
}

TEST(ResizeTest, AntialiasedKernelsAverageWhatTheyCover) {
  // 4 to 1 bilinear: a triangle over eight inputs; with a constant picture nothing changes.
  RgbImage flat{.width = 40, .height = 30, .channels = 1, .pixels = std::vector<uint8_t>(1200, 77)};
  for (const Kernel kernel : {Kernel::kBilinear, Kernel::kBicubic}) {
    const RgbImage small = ResizeBox(flat, 0, 0, 40, 30, 10, 7, kernel, true);
    EXPECT_EQ(small.pixels, std::vector<uint8_t>(70, 77));
  }
  // Two inputs of weights 3/4 and 1/4 at an edge: 3 to 2 widens the triangle to 1.5, inputs 0, 1, 2
  // at distance 1/4, 3/4, 7/4.
  RgbImage three{.width = 3, .height = 1, .channels = 1, .pixels = {0, 120, 240}};
  const RgbImage two = ResizeBox(three, 0, 0, 3, 1, 2, 1, Kernel::kBilinear, true);
  // Centre 0.75: weights 1 - 0.25/1.5, 1 - 0.75/1.5, nothing beyond 1.5.
  const double w0 = 1 - 0.25 / 1.5;
  const double w1 = 1 - 0.75 / 1.5;
  EXPECT_EQ(two.pixels[0], std::lround(120 * w1 / (w0 + w1)));
  EXPECT_EQ(two.pixels[1], std::lround((120 * w1 + 240 * w0) / (w0 + w1)));
}

TEST(ResizeTest, ABoxIsResizedAsIfItHadBeenCutOut) {
  const RgbImage image = Random(50, 40, 3, 9);
  const RgbImage cut = CutOut(image, 7, 11, 20, 25);
  for (const Kernel kernel : {Kernel::kBilinear, Kernel::kBicubic}) {
    for (const bool antialias : {true, false}) {
      EXPECT_EQ(Compare(ResizeBox(image, 7, 11, 20, 25, 16, 30, kernel, antialias),
                        ResizeBox(cut, 0, 0, 20, 25, 16, 30, kernel, antialias))
                    .largest,
                0);
    }
  }
  EXPECT_EQ(Compare(ResizeBox(image, 7, 11, 20, 25, 20, 25, Kernel::kBicubic, true), cut).largest,
            0);
  EXPECT_EQ(Compare(ResizeBox(image, 7, 11, 20, 25, 20, 25, Kernel::kBicubic, false), cut).largest,
            0);
}

TEST(ResizeTest, TheCropIsThatOfTheWholeResizedPicture) {
  const RgbImage image = Random(61, 43, 3, 11);
  for (const char* antialias : {"pillow", "none"}) {
    for (const char* kernel : {"bilinear", "bicubic"}) {
      v1::Preprocessing p = Resizing(30, 24, antialias, kernel);
      ASSERT_OK_AND_ASSIGN(const RgbImage crop, ResizeAndCrop(image, p));
      // 61 * 30 / 43 = 42.56: floor 42, round 43.
      const RgbImage whole =
          ResizeBox(image, 0, 0, 61, 43, 42, 30,
                    kernel == std::string("bicubic") ? Kernel::kBicubic : Kernel::kBilinear,
                    antialias == std::string("pillow"));
      EXPECT_EQ(Compare(crop, CutOut(whole, 9, 3, 24, 24)).largest, 0)
          << antialias << " " << kernel;
      p.mutable_resize()->set_other_side("round");
      ASSERT_OK_AND_ASSIGN(const RgbImage rounded, ResizeAndCrop(image, p));
      const RgbImage wider =
          ResizeBox(image, 0, 0, 61, 43, 43, 30,
                    kernel == std::string("bicubic") ? Kernel::kBicubic : Kernel::kBilinear,
                    antialias == std::string("pillow"));
      // 19 over: 9.5 is rounded to the even 10 as Python does, or down.
      EXPECT_EQ(
          Compare(rounded, CutOut(wider, antialias == std::string("pillow") ? 10 : 9, 3, 24, 24))
              .largest,
          0)
          << antialias << " " << kernel;
    }
  }
}

TEST(ResizeTest, AnUnevenCropIsRoundedAsTheOriginDoes) {
  const RgbImage seven = Random(7, 7, 1, 13);  // 3 over: 1.5
  ASSERT_OK_AND_ASSIGN(const RgbImage even,
                       ResizeAndCrop(seven, Resizing(7, 4, "pillow", "bicubic", 1)));
  EXPECT_EQ(Compare(even, CutOut(seven, 2, 2, 4, 4)).largest, 0);
  ASSERT_OK_AND_ASSIGN(const RgbImage lower,
                       ResizeAndCrop(seven, Resizing(7, 4, "none", "bicubic", 1)));
  EXPECT_EQ(Compare(lower, CutOut(seven, 1, 1, 4, 4)).largest, 0);
  const RgbImage five = Random(5, 5, 1, 14);  // 1 over: 0.5
  ASSERT_OK_AND_ASSIGN(const RgbImage zero,
                       ResizeAndCrop(five, Resizing(5, 4, "pillow", "bicubic", 1)));
  EXPECT_EQ(Compare(zero, CutOut(five, 0, 0, 4, 4)).largest, 0);
}

TEST(ResizeTest, AStripCostsOnlyItsCrop) {
  // Resized as a whole it would be 496,000x248 pixels, 369 MB.
  const RgbImage strip = Decoded("strip_2000x1.png");
  for (const char* antialias : {"pillow", "none"}) {
    ASSERT_OK_AND_ASSIGN(const RgbImage crop, ResizeAndCrop(strip, Resizing(248, 224, antialias)));
    ASSERT_EQ(crop.pixels.size(), 224u * 224 * 3);
    const size_t stride = 224 * 3;
    for (size_t i = stride; i < crop.pixels.size(); ++i)
      ASSERT_EQ(crop.pixels[i], crop.pixels[i - stride]);
    // The crop spans source pixels 999.55 to 1000.45: their left and right neighbours decide its
    // ends.
    const auto pixel = [&](int x) { return strip.pixels[static_cast<size_t>(x) * 3]; };
    const auto [low, high] = std::minmax({pixel(998), pixel(999), pixel(1000), pixel(1001)});
    const int overshoot = (high - low) / 4 + 1;
    for (size_t i = 0; i < stride; i += 3) {
      ASSERT_GE(crop.pixels[i], low - overshoot);
      ASSERT_LE(crop.pixels[i], high + overshoot);
    }
  }
  const RgbImage tall = Random(1, 30000, 1, 15);
  ASSERT_OK_AND_ASSIGN(const RgbImage crop,
                       ResizeAndCrop(tall, Resizing(248, 224, "pillow", "bicubic", 1)));
  EXPECT_EQ(crop.height, 224);
}

TEST(ResizeTest, OnePixelFillsTheCrop) {
  const RgbImage one = Decoded("one_pixel.png");
  for (const char* antialias : {"pillow", "none"}) {
    ASSERT_OK_AND_ASSIGN(const RgbImage crop, ResizeAndCrop(one, Resizing(248, 224, antialias)));
    for (size_t i = 0; i < crop.pixels.size(); ++i) ASSERT_EQ(crop.pixels[i], one.pixels[i % 3]);
  }
}

TEST(PadTest, CentresThePictureOnItsCanvas) {
  const RgbImage image = Random(5, 3, 1, 17);
  ASSERT_OK_AND_ASSIGN(const RgbImage padded, ResizeAndCrop(image, Padding(8, 9, 8)));
  // Offsets floor(3 / 2) = 1 and floor(5 / 2) = 2.
  EXPECT_EQ(Compare(CutOut(padded, 1, 2, 5, 3), image).largest, 0);
  EXPECT_EQ(std::count(padded.pixels.begin(), padded.pixels.end(), 9),
            64 - 15 + std::count(image.pixels.begin(), image.pixels.end(), 9));
  EXPECT_EQ(padded.width, 8);
  EXPECT_EQ(padded.height, 8);
}

TEST(PadTest, CropsTheCanvas) {
  const RgbImage image = Random(10, 6, 1, 19);
  ASSERT_OK_AND_ASSIGN(const RgbImage padded, ResizeAndCrop(image, Padding(12, 9, 12)));
  for (const int crop : {1, 4, 7, 8, 11}) {
    ASSERT_OK_AND_ASSIGN(const RgbImage cropped, ResizeAndCrop(image, Padding(12, 9, crop)));
    const int begin = (12 - crop) / 2;
    EXPECT_EQ(Compare(cropped, CutOut(padded, begin, begin, crop, crop)).largest, 0) << crop;
  }
}

TEST(PadTest, ALargerPictureIsAnError) {
  EXPECT_OK(ResizeAndCrop(Random(32, 32, 1, 1), Padding(32, 0, 32)));
  for (const auto& [width, height] : {std::pair{33, 10}, std::pair{10, 33}}) {
    EXPECT_THAT(ResizeAndCrop(Random(width, height, 1, 1), Padding(32, 0, 32)),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr("at most 32x32 (preprocessing.pad.to)")));
  }
}

TEST(PreprocessTest, NormalisesEveryValueExactly) {
  RgbImage image{.width = 16, .height = 16, .channels = 3, .pixels = {}};
  for (int v = 0; v < 256; ++v) {
    for (int c = 0; c < 3; ++c) image.pixels.push_back(static_cast<uint8_t>((v + 50 * c) % 256));
  }
  v1::Preprocessing p = Resizing(16, 16, "pillow");
  p.clear_mean();
  p.clear_std();
  for (const double mean : {0.485, 0.456, 0.406}) p.add_mean(mean);
  for (const double std : {0.229, 0.224, 0.225}) p.add_std(std);
  ASSERT_OK_AND_ASSIGN(const std::vector<float> floats, Preprocess(image, p));
  ASSERT_EQ(floats.size(), 768u);
  for (size_t i = 0; i < 768; ++i) {
    const size_t c = i % 3;
    const float expected = (static_cast<float>(image.pixels[i]) / 255.f -
                            static_cast<float>(p.mean(static_cast<int>(c)))) /
                           static_cast<float>(p.std(static_cast<int>(c)));
    ASSERT_EQ(floats[c * 256 + i / 3], expected);  // CHW
  }
}

TEST(PreprocessTest, DecodeAndPreprocessIsItsTwoSteps) {
  const v1::Preprocessing p = Resizing(248, 224, "pillow");
  ASSERT_OK_AND_ASSIGN(const std::vector<float> at_once,
                       DecodeAndPreprocess(Picture("exif_6.jpg"), p));
  ASSERT_OK_AND_ASSIGN(const std::vector<float> in_steps, Preprocess(Decoded("exif_6.jpg"), p));
  EXPECT_EQ(at_once, in_steps);
  v1::Preprocessing ignoring = p;
  ignoring.set_exif("ignore");
  ASSERT_OK_AND_ASSIGN(const std::vector<float> lying,
                       DecodeAndPreprocess(Picture("exif_6.jpg"), ignoring));
  EXPECT_NE(at_once, lying);
  EXPECT_THAT(DecodeAndPreprocess("", p),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("empty")));
  EXPECT_THAT(DecodeAndPreprocess(Picture("scene.jpg"), p, {.max_side = 10}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 10")));
}

TEST(PreprocessTest, RefusesPicturesOfOtherChannelsOrLengths) {
  EXPECT_THAT(ResizeAndCrop(Random(4, 4, 1, 1), Resizing(4, 4, "pillow")),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("1 channels, preprocessing.channels is 3")));
  RgbImage lying = Random(4, 4, 3, 1);
  lying.width = 5;
  EXPECT_THAT(ResizeAndCrop(lying, Resizing(4, 4, "pillow")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("5x4x3 but has 48 bytes")));
}

TEST(PreprocessTest, CheckNamesTheFieldThatCantBeCarriedOut) {
  EXPECT_OK(CheckPreprocessing(Resizing(248, 224, "pillow")));
  EXPECT_OK(CheckPreprocessing(Padding(32, 0, 32)));
  const std::vector<std::pair<const char*, std::function<void(v1::Preprocessing&)>>> cases = {
      {"preprocessing.channels is 4; use 1 or 3", [](auto& p) { p.set_channels(4); }},
      {"preprocessing.exif is \"\"; use apply or ignore", [](auto& p) { p.clear_exif(); }},
      {"preprocessing.crop is 0; use 1..4096", [](auto& p) { p.set_crop(0); }},
      {"preprocessing.crop is 249; the scaled picture may have only 248",
       [](auto& p) { p.set_crop(249); }},
      {"preprocessing.resize is missing", [](auto& p) { p.clear_resize(); }},
      {"preprocessing.resize.side is 5000; use 1..4096",
       [](auto& p) { p.mutable_resize()->set_side(5000); }},
      {"preprocessing.resize.kernel is \"cubic\"; use bicubic or bilinear",
       [](auto& p) { p.mutable_resize()->set_kernel("cubic"); }},
      {"preprocessing.resize.antialias is \"on\"; use pillow or none",
       [](auto& p) { p.mutable_resize()->set_antialias("on"); }},
      {"preprocessing.resize.other_side is \"up\"; use floor or round",
       [](auto& p) { p.mutable_resize()->set_other_side("up"); }},
      {"preprocessing.pad.to is 0; use 1..4096", [](auto& p) { p.mutable_pad()->set_to(0); }},
      {"preprocessing.pad.fill is 256; use 0..255",
       [](auto& p) {
         p.mutable_pad()->set_to(300);
         p.mutable_pad()->set_fill(256);
       }},
      {"preprocessing.mean has 2 values; channels is 3",
       [](auto& p) { p.mutable_mean()->RemoveLast(); }},
      {"preprocessing.std has 4 values; channels is 3", [](auto& p) { p.add_std(1); }},
      {"preprocessing.mean has 123.675; use 0..1", [](auto& p) { p.set_mean(0, 123.675); }},
      {"preprocessing.mean has nan", [](auto& p) { p.set_mean(0, std::nan("")); }},
      {"preprocessing.std has 0; use more than 0", [](auto& p) { p.set_std(1, 0); }},
  };
  for (const auto& [message, edit] : cases) {
    v1::Preprocessing p = Resizing(248, 224, "pillow");
    edit(p);
    EXPECT_THAT(CheckPreprocessing(p),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
    EXPECT_THAT(ResizeAndCrop(Random(300, 300, 3, 1), p),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  }
}

}  // namespace
}  // namespace pyramid
