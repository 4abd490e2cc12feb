#include "model/preprocess.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <opencv2/imgproc.hpp>
#include <random>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::_;
using ::testing::HasSubstr;

std::string Picture(const std::string& name) {
  auto bytes = ReadFile(absl::StrCat(PYRAMID_SOURCE_DIR, "/tests/golden/images/", name));
  EXPECT_OK(bytes);
  return bytes.ok() ? *bytes : "";
}

RgbImage Decoded(const std::string& name, int channels = 3) {
  auto image = DecodeImage(Picture(name), channels, true);
  EXPECT_OK(image) << name;
  return image.ok() ? *image : RgbImage();
}

// Made by tests/golden's origin with Pillow; see tests/golden/README.md.
const nlohmann::json& DecodedList() {
  static const nlohmann::json list = nlohmann::json::parse(Picture("decoded.json"));
  return list;
}

RgbImage Random(int width, int height, int channels, uint32_t seed) {
  std::mt19937 random(seed);
  RgbImage image{.width = width, .height = height, .channels = channels, .pixels = {}};
  image.pixels.resize(static_cast<size_t>(width * height * channels));
  for (uint8_t& value : image.pixels) value = static_cast<uint8_t>(random());
  return image;
}

RgbImage CutOut(const RgbImage& image, int x, int y, int width, int height) {
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

Difference Compare(const RgbImage& a, const RgbImage& b) {
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

TEST(DecodeTest, GivesPillowsSizeAndColoursForEveryPicture) {
  int pictures = 0;
  for (const auto& [name, expected] : DecodedList().items()) {
    if (expected.contains("error")) continue;
    const RgbImage image = Decoded(name);
    EXPECT_EQ(image.width, expected["width"]) << name;
    EXPECT_EQ(image.height, expected["height"]) << name;
    ASSERT_EQ(image.channels, 3) << name;
    double sums[3] = {};
    for (size_t i = 0; i < image.pixels.size(); ++i) sums[i % 3] += image.pixels[i];
    for (int c = 0; c < 3; ++c) {
      EXPECT_NEAR(sums[c] / (image.width * image.height), expected["mean_rgb"][c].get<double>(),
                  1.0)
          << name << " channel " << c;
    }
    ++pictures;
  }
  EXPECT_EQ(pictures, 27);
}

TEST(DecodeTest, RefusesEveryBrokenPicture) {
  int pictures = 0;
  for (const auto& [name, expected] : DecodedList().items()) {
    if (!expected.contains("error")) continue;
    EXPECT_THAT(DecodeImage(Picture(name), 3, true),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("picture")))
        << name;
    ++pictures;
  }
  EXPECT_EQ(pictures, 4);
}

TEST(DecodeTest, SaysWhatIsWrong) {
  const auto refusal = [](const std::string& name) {
    return std::string(DecodeImage(Picture(name), 3, true).status().message());
  };
  EXPECT_THAT(refusal("empty.jpg"), HasSubstr("empty"));
  EXPECT_THAT(refusal("truncated.jpg"), HasSubstr("Premature end"));
  EXPECT_THAT(refusal("not_an_image.jpg"), HasSubstr("no JPEG, PNG, WebP, GIF or BMP"));
  EXPECT_THAT(refusal("claims_65535.png"), HasSubstr("65535x65535"));
}

TEST(DecodeTest, ExifOrientationTurnsAllEightPicturesUpright) {
  const RgbImage upright = Decoded("exif_1.jpg");
  for (int orientation = 2; orientation <= 8; ++orientation) {
    const std::string name = absl::StrCat("exif_", orientation, ".jpg");
    // Compressed after turning, so blocks and chroma differ a little; a wrong turn differs by tens.
    EXPECT_LT(Compare(Decoded(name), upright).mean, 2.0) << name;
    ASSERT_OK_AND_ASSIGN(const RgbImage stored,
                         DecodeImage(Picture(name), 3, /*apply_exif=*/false));
    EXPECT_EQ(stored.width, orientation >= 5 ? 72 : 96) << name;
    EXPECT_EQ(stored.height, orientation >= 5 ? 96 : 72) << name;
    if (orientation < 5) {
      EXPECT_GT(Compare(stored, upright).mean, 10.0) << name;
    }
  }
}

uint32_t Crc32(absl::string_view bytes) {
  uint32_t crc = 0xffffffff;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int i = 0; i < 8; ++i) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc;
}

// The picture as PNG with an eXIf chunk of big-endian TIFF.
std::string PngWithOrientation(const RgbImage& image, int orientation) {
  auto png = EncodePng(image);
  EXPECT_OK(png);
  const auto big = [](uint32_t v) {
    std::string text;
    for (int shift = 24; shift >= 0; shift -= 8) text += static_cast<char>(v >> shift & 0xff);
    return text;
  };
  std::string chunk("eXIfMM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01", 22);
  chunk += std::string(1, '\0') + static_cast<char>(orientation) + std::string(6, '\0');
  std::string all = *png;
  all.insert(33, big(static_cast<uint32_t>(chunk.size() - 4)) + chunk + big(Crc32(chunk)));
  return all;
}

TEST(DecodeTest, ExifOrientationOfAPngIsExact) {
  const RgbImage image = Random(3, 2, 3, 1);  // a b c / d e f
  const auto turned = [&](int orientation) {
    auto decoded = DecodeImage(PngWithOrientation(image, orientation), 3, true);
    EXPECT_OK(decoded);
    std::string letters;
    if (!decoded.ok()) return letters;
    for (int y = 0; y < decoded->height; ++y) {
      for (int x = 0; x < decoded->width; ++x) {
        for (int i = 0; i < 6; ++i) {
          if (std::memcmp(&decoded->pixels[static_cast<size_t>(y * decoded->width + x) * 3],
                          &image.pixels[static_cast<size_t>(i) * 3], 3) == 0) {
            letters += static_cast<char>('a' + i);
          }
        }
      }
      letters += '/';
    }
    return letters;
  };
  EXPECT_EQ(turned(1), "abc/def/");
  EXPECT_EQ(turned(2), "cba/fed/");
  EXPECT_EQ(turned(3), "fed/cba/");
  EXPECT_EQ(turned(4), "def/abc/");
  EXPECT_EQ(turned(5), "ad/be/cf/");
  EXPECT_EQ(turned(6), "da/eb/fc/");
  EXPECT_EQ(turned(7), "fc/eb/da/");
  EXPECT_EQ(turned(8), "cf/be/ad/");
  EXPECT_EQ(turned(9), "abc/def/");  // nonsense is ignored
  EXPECT_EQ(turned(0), "abc/def/");
}

TEST(DecodeTest, GivesGreyWhenAskedForOneChannel) {
  EXPECT_EQ(Compare(Decoded("gray.jpg", 1), Decoded("gray.jpg", 1)).largest, 0);
  const RgbImage colour = Decoded("scene.png", 3);
  const RgbImage grey = Decoded("scene.png", 1);
  ASSERT_EQ(grey.channels, 1);
  ASSERT_EQ(grey.pixels.size() * 3, colour.pixels.size());
  for (size_t i = 0; i < grey.pixels.size(); ++i) {
    const double luma = 0.299 * colour.pixels[3 * i] + 0.587 * colour.pixels[3 * i + 1] +
                        0.114 * colour.pixels[3 * i + 2];
    ASSERT_NEAR(grey.pixels[i], luma, 0.51) << i;
  }
  EXPECT_THAT(DecodeImage(Picture("scene.png"), 2, true),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("channels is 2; use 1 or 3")));
}

TEST(DecodeTest, AlphaIsDroppedNotBlended) {
  EXPECT_EQ(Compare(Decoded("rgba.png"), Decoded("plain.bmp")).largest, 0);
  EXPECT_EQ(Compare(Decoded("lossless.webp"), Decoded("plain.bmp")).largest, 0);
  EXPECT_EQ(Compare(Decoded("rgb16.png"), Decoded("plain.bmp")).largest, 0);
}

TEST(DecodeTest, KeepsToItsLimits) {
  const std::string scene = Picture("scene.jpg");  // 640x480
  DecodeLimits limits;
  limits.max_bytes = static_cast<int64_t>(scene.size()) - 1;
  EXPECT_THAT(DecodeImage(scene, 3, true, limits),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr(absl::StrCat("at most ", scene.size() - 1))));
  for (const char* name : {"scene.jpg", "scene.png"}) {
    limits = {.max_pixels = 640 * 480 - 1};
    EXPECT_THAT(DecodeImage(Picture(name), 3, true, limits),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr("640x480 is 307200 pixels; at most 307199")));
    limits = {.max_side = 639};
    EXPECT_THAT(DecodeImage(Picture(name), 3, true, limits),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 639 pixels")));
    limits = {.max_pixels = 640 * 480, .max_side = 640};
    EXPECT_OK(DecodeImage(Picture(name), 3, true, limits));
  }
  limits = {.max_side = 95};
  for (const char* name : {"animated.gif", "plain.bmp", "lossless.webp"}) {
    EXPECT_THAT(DecodeImage(Picture(name), 3, true, limits),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr("96x72; a side may have at most 95")));
  }
}

const char* const kOneOfEachKind[] = {"baseline_444.jpg", "progressive_420.jpg", "cmyk.jpg",
                                      "palette.png",      "rgb16.png",           "bilevel.png",
                                      "lossless.webp",    "animated.gif",        "plain.bmp"};

TEST(DecodeTest, EveryKindOfFileCutShortIsRefused) {
  for (const char* name : kOneOfEachKind) {
    const std::string whole = Picture(name);
    // The GIF's first picture ends early: the second follows.
    const size_t needed =
        std::string(name) == "animated.gif" ? whole.size() / 3 : whole.size() * 9 / 10;
    for (size_t size = 1; size <= needed; size += 1 + size / 20) {
      EXPECT_THAT(DecodeImage(absl::string_view(whole).substr(0, size), 3, true),
                  StatusIs(absl::StatusCode::kInvalidArgument, _))
          << name << " cut to " << size << " of " << whole.size();
    }
  }
}

TEST(DecodeTest, DamagedFilesGiveAPictureOrInvalidArgument) {
  std::mt19937 random(3);
  int refused = 0;
  DecodeLimits limits{.max_pixels = 1 << 20};
  for (const char* name : kOneOfEachKind) {
    const std::string whole = Picture(name);
    for (int round = 0; round < 200; ++round) {
      std::string bytes = whole;
      for (int i = 0; i < 3; ++i)
        bytes[random() % std::min<size_t>(bytes.size(), 2000)] = static_cast<char>(random());
      const auto image = DecodeImage(bytes, 3, true, limits);
      if (image.ok()) {
        EXPECT_EQ(image->pixels.size(), static_cast<size_t>(image->width * image->height * 3));
      } else {
        EXPECT_EQ(image.status().code(), absl::StatusCode::kInvalidArgument) << image.status();
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, 100);
}

TEST(DecodeTest, EncodePngIsLossless) {
  for (const int channels : {1, 3}) {
    const RgbImage image = Random(17, 5, channels, 5);
    ASSERT_OK_AND_ASSIGN(const std::string png, EncodePng(image));
    ASSERT_OK_AND_ASSIGN(const RgbImage back, DecodeImage(png, channels, true));
    EXPECT_EQ(Compare(back, image).largest, 0);
  }
  EXPECT_THAT(EncodePng({}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("can't be written")));
  RgbImage lying = Random(4, 4, 3, 1);
  lying.height = 5;
  EXPECT_THAT(EncodePng(lying),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("4x5x3 with 48 bytes")));
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

TEST(ResizeTest, AntialiasedBicubicIsPillows) {
  for (const Golden& golden : kPillow) {
    ASSERT_OK_AND_ASSIGN(const RgbImage image,
                         ResizeAndCrop(Decoded(golden.picture), Resizing(248, 224, "pillow")));
    const Difference difference = Compare(image, Decoded(golden.expected));
    EXPECT_LE(difference.largest, 1) << golden.picture;
    EXPECT_LE(difference.unequal, 0.001) << golden.picture;
  }
}

TEST(ResizeTest, PlainBicubicIsMindSpores) {
  for (const Golden& golden : kMindSpore) {
    ASSERT_OK_AND_ASSIGN(const RgbImage image,
                         ResizeAndCrop(Decoded(golden.picture), Resizing(248, 224, "none")));
    EXPECT_LE(Compare(image, Decoded(golden.expected)).largest, 1) << golden.picture;
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
