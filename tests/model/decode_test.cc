// Every kind of picture file to the pixels that Pillow gives, or to a refusal that says why.
#include <malloc.h>
#include <zlib.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <opencv2/imgcodecs.hpp>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "model/preprocess.h"
#include "proto/base/file.h"
#include "tests/model/pictures.h"
#include "tests/testing/png.h"
#include "tests/testing/sanitized.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::BlankPng;
using ::pyramid::testing::Chunk;
using ::pyramid::testing::Compare;
using ::pyramid::testing::Decoded;
using ::pyramid::testing::Packed;
using ::pyramid::testing::Picture;
using ::pyramid::testing::Png;
using ::pyramid::testing::Random;
using ::pyramid::testing::StatusIs;
using ::testing::_;
using ::testing::HasSubstr;

// What Pillow says of the pictures; see tests/golden/README.md.
nlohmann::json ExpectedPictures() {
  nlohmann::json list = nlohmann::json::parse(Picture("decoded.json"));
  list.update(nlohmann::json::parse(Picture("decoded_more.json")));
  const nlohmann::json crcs = nlohmann::json::parse(Picture("decoded_crc32.json"));
  for (const auto& [name, crc] : crcs.items()) list.at(name)["crc32"] = crc;
  return list;
}

std::string Means(const double (&means)[3]) {
  return absl::StrFormat("%.3f %.3f %.3f", means[0], means[1], means[2]);
}

// Prints the whole table: ctest -R EveryPicture -V.
TEST(DecodeTest, EveryPictureOfTheGoldenFolderIsWhatPillowSees) {
  int pictures = 0;
  int refused = 0;
  const nlohmann::json list = ExpectedPictures();
  for (const auto& [name, expected] : list.items()) {
    const auto image = DecodeImage(Picture(name), 3, true);
    if (expected.contains("error")) {
      std::printf("%-26s expected %-38s got %s\n", name.c_str(),
                  absl::StrCat("a refusal (", expected["error"].get<std::string>(), ")").c_str(),
                  image.ok() ? "a picture" : std::string(image.status().message()).c_str());
      EXPECT_THAT(image, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("picture: ")))
          << name;
      ++refused;
      continue;
    }
    ++pictures;
    ASSERT_OK(image) << name;
    ASSERT_EQ(image->channels, 3) << name;
    double got[3] = {};
    double want[3] = {};
    for (size_t i = 0; i < image->pixels.size(); ++i) got[i % 3] += image->pixels[i];
    for (int c = 0; c < 3; ++c) {
      got[c] /= image->width * image->height;
      want[c] = expected["mean_rgb"][static_cast<size_t>(c)].get<double>();
      EXPECT_NEAR(got[c], want[c], 0.001) << name << " channel " << c;
    }
    const auto size = [](int width, int height) { return absl::StrCat(width, "x", height, " "); };
    std::string more;
    if (expected.contains("crc32")) {
      const bool equal = crc32(0, image->pixels.data(), static_cast<uInt>(image->pixels.size())) ==
                         expected["crc32"].get<uint32_t>();
      more = equal ? ", every byte equal" : ", some byte differs";
      EXPECT_TRUE(equal) << name;
    }
    EXPECT_EQ(size(image->width, image->height), size(expected["width"], expected["height"]))
        << name;
    std::printf("%-26s expected %-38s got %s\n", name.c_str(),
                absl::StrCat(size(expected["width"], expected["height"]), Means(want)).c_str(),
                absl::StrCat(size(image->width, image->height), Means(got), more).c_str());
  }
  EXPECT_EQ(pictures, 27 + 17);
  EXPECT_EQ(refused, 4 + 4);
}

TEST(DecodeTest, SaysWhatIsWrong) {
  const auto refusal = [](const std::string& name) {
    return std::string(DecodeImage(Picture(name), 3, true).status().message());
  };
  EXPECT_THAT(refusal("empty.jpg"), HasSubstr("empty"));
  EXPECT_THAT(refusal("truncated.jpg"), HasSubstr("Premature end"));
  EXPECT_THAT(refusal("not_an_image.jpg"), HasSubstr("no JPEG, PNG, WebP, GIF or BMP"));
  EXPECT_THAT(refusal("claims_65535.jpg"), HasSubstr("dimension is 65500"));  // libjpeg's own
  for (const char* name : {"claims_65535.png", "claims_65535.gif", "claims_65535.bmp"}) {
    EXPECT_THAT(refusal(name), HasSubstr("65535x65535; a side may have at most 32768")) << name;
  }
  EXPECT_THAT(refusal("claims_16384.webp"),
              HasSubstr("16384x16384 is 268435456 pixels; at most 50000000"));
}

TEST(DecodeTest, ProfilesGammaAndTransparencyChangeNothing) {
  const RgbImage plain = Decoded("plain.bmp");
  for (const char* name : {"icc_gamma.png", "rgb_trns.png", "interlaced.png"}) {
    EXPECT_EQ(Compare(Decoded(name), plain).largest, 0) << name;
  }
  EXPECT_EQ(Compare(Decoded("icc.jpg"), Decoded("baseline_444.jpg")).largest, 0);
  EXPECT_EQ(Compare(Decoded("palette_trns.png"), Decoded("palette.bmp")).largest, 0);
}

TEST(DecodeTest, InkPicturesLookLikeTheirOrigin) {
  const RgbImage plain = Decoded("plain.bmp");
  EXPECT_LT(Compare(Decoded("cmyk.jpg"), plain).mean, 3);
  EXPECT_LT(Compare(Decoded("ycck.jpg"), plain).mean, 3);
}

TEST(DecodeTest, TheFirstPictureOfAnAnimationIsTaken) {
  EXPECT_LT(Compare(Decoded("animated.gif"), Decoded("plain.bmp")).mean, 6);
}

TEST(DecodeTest, NamesDontMatter) {
  EXPECT_EQ(Compare(Decoded("wrong_extension.png"), Decoded("baseline_444.jpg")).largest, 0);
}

TEST(DecodeTest, SixteenBitsBecomeEightByRounding) {
  // Every 16-bit grey once: 256 rows of 256.
  std::string rows;
  for (int value = 0; value < 65536; ++value) {
    if (value % 256 == 0) rows += '\0';
    rows += static_cast<char>(value >> 8);
    rows += static_cast<char>(value & 0xff);
  }
  ASSERT_OK_AND_ASSIGN(const RgbImage image, DecodeImage(Png(256, 256, 16, 0, rows), 1, true));
  for (int value = 0; value < 65536; ++value) {
    ASSERT_EQ(image.pixels[static_cast<size_t>(value)], (value + 128) / 257) << value;
  }
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

// The picture as PNG with an eXIf chunk of big-endian TIFF.
std::string PngWithOrientation(const RgbImage& image, int orientation) {
  auto png = EncodePng(image);
  EXPECT_OK(png);
  std::string tiff("MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01", 18);
  tiff += std::string(1, '\0') + static_cast<char>(orientation) + std::string(6, '\0');
  std::string all = *png;
  all.insert(33, Chunk("eXIf", tiff));
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
  const RgbImage stored = Decoded("gray.jpg", 1);
  const RgbImage thrice = Decoded("gray.jpg", 3);
  ASSERT_EQ(stored.pixels.size() * 3, thrice.pixels.size());
  for (size_t i = 0; i < thrice.pixels.size(); ++i) {
    ASSERT_EQ(thrice.pixels[i], stored.pixels[i / 3]) << i;
  }
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
  EXPECT_EQ(Compare(Decoded("gray16.png"), Decoded("gray_alpha.png")).largest, 0);
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

TEST(DecodeTest, BlankPicturesPassAndBombsDoNot) {
  // What deflate makes of nothing: the most pixels a byte of grey and of RGB.
  for (const auto& [kind, samples] : {std::pair{0, 1}, std::pair{2, 3}}) {
    const std::string blank = BlankPng(4000, 4000, 8, kind, samples);
    EXPECT_LT(blank.size(), 50'000u);
    ASSERT_OK_AND_ASSIGN(const RgbImage image, DecodeImage(blank, 3, true));
    EXPECT_EQ(image.width, 4000);
  }
  // One bit a pixel: eight times as many.
  const std::string bomb = BlankPng(7000, 7000, 1, 0, 1);
  EXPECT_THAT(DecodeImage(bomb, 3, true),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr(absl::StrCat("7000x7000 in ", bomb.size(),
                                              " bytes; at most 2000 pixels a byte"))));
  EXPECT_OK(DecodeImage(bomb, 1, true, {.max_pixels_per_byte = 10'000}));
  EXPECT_OK(DecodeImage(BlankPng(1024, 1024, 1, 0, 1), 1, true));  // small
  // Exactly at the limit, and one over.
  std::string png = BlankPng(1025, 1024, 8, 0, 1);
  const auto size = static_cast<int64_t>(png.size());
  const int64_t needed = (1025 * 1024 + size - 1) / size;
  EXPECT_OK(DecodeImage(png, 1, true, {.max_pixels_per_byte = needed}));
  EXPECT_THAT(DecodeImage(png, 1, true, {.max_pixels_per_byte = needed - 1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("pixels a byte")));
  // A canvas of nearly nothing, in a GIF and a WebP of a few bytes.
  for (const char* name : {"claims_65535.gif", "claims_16384.webp"}) {
    EXPECT_THAT(
        DecodeImage(Picture(name), 3, true, {.max_pixels = int64_t{1} << 40, .max_side = 1 << 20}),
        StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("pixels a byte")))
        << name;
  }
}

// Scans of a progressive JPEG that add a bit to each block's mean: with marker and header.
std::vector<std::string> MeanRefinements(const std::string& jpeg) {
  std::vector<std::string> scans;
  for (size_t at = jpeg.find("\xff\xda"); at != std::string::npos;) {
    const size_t next = jpeg.find("\xff\xda", at + 2);
    const size_t header_end = at + 2 + static_cast<unsigned char>(jpeg[at + 3]);
    const size_t end = jpeg.find("\xff\xc4", at + 2);  // its tables come before the next scan
    if (jpeg.substr(header_end - 3, 3) == std::string("\0\0\x10", 3)) {
      scans.push_back(jpeg.substr(at, std::min(end, next) - at));
    }
    at = next;
  }
  return scans;
}

TEST(DecodeTest, AJpegOfVeryManyScansIsRefused) {
  const std::string whole = Picture("progressive_420.jpg");
  const std::vector<std::string> scans = MeanRefinements(whole);
  ASSERT_EQ(scans.size(), 1u);
  const auto repeated = [&](int count) {
    std::string many = whole;
    for (int i = 0; i < count; ++i) many.insert(whole.find(scans[0]), scans[0]);
    return many;
  };
  ASSERT_OK_AND_ASSIGN(const RgbImage same, DecodeImage(repeated(50), 3, true));
  EXPECT_EQ(Compare(same, Decoded("progressive_420.jpg")).largest, 0);
  EXPECT_THAT(DecodeImage(repeated(150), 3, true),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than 100 scans")));
}

// MB of resident memory that `work` needs at its peak beyond what was there; -1: the system won't
// tell.
double PeakGrowth(const std::function<void()>& work) {
  mallopt(M_MMAP_THRESHOLD, 1 << 17);  // large blocks come from the system and go back to it
  malloc_trim(0);
  std::ofstream reset("/proc/self/clear_refs");
  reset << "5" << std::flush;
  if (!reset.good()) return -1;
  const auto peak = [] {
    auto status = ReadFile("/proc/self/status");
    double kb = 0;
    if (!status.ok()) return kb;
    const size_t at = status->find("VmHWM:");
    if (at != std::string::npos) std::sscanf(status->c_str() + at, "VmHWM: %lf", &kb);
    return kb;
  };
  const double before = peak();
  work();
  return (peak() - before) / 1024;
}

TEST(DecodeMemoryTest, BombsCostNothing) {
  const std::string zeros(200 << 20, '\0');
  const std::string packed = Packed(zeros);
  ASSERT_LT(packed.size(), 300'000u);
  const std::string row(1 + 8 * 3, '\0');
  std::string rows;
  for (int i = 0; i < 8; ++i) rows += row;
  const std::vector<std::pair<const char*, std::string>> bombs = {
      {"PNG of 30000x30000", BlankPng(30000, 30000, 1, 0, 1)},
      {"PNG of 7000x7000 in 6 KB", BlankPng(7000, 7000, 1, 0, 1)},
      {"PNG with a profile of 200 MB",
       Png(8, 8, 8, 2, rows, false, Chunk("iCCP", std::string("bomb\0\0", 6) + packed))},
      {"PNG with a text of 200 MB",
       Png(8, 8, 8, 2, rows, false, Chunk("zTXt", std::string("bomb\0\0", 6) + packed))},
      {"PNG with 200 MB of rows too many", Png(8, 8, 8, 2, zeros)},
      {"PNG of 65535x65535", Picture("claims_65535.png")},
      {"JPEG of 65535x65535", Picture("claims_65535.jpg")},
      {"GIF of 65535x65535", Picture("claims_65535.gif")},
      {"BMP of 65535x65535", Picture("claims_65535.bmp")},
      {"WebP of 16384x16384", Picture("claims_16384.webp")},
  };
  for (const auto& [name, bytes] : bombs) {
    const double growth = PeakGrowth([&, &file = bytes] { (void)DecodeImage(file, 3, true); });
    if (growth < 0) GTEST_SKIP() << "/proc/self/clear_refs can't be written";
    std::printf("%-34s %8zu bytes: %5.1f MB\n", name, bytes.size(), growth);
    if (!testing::kSanitized) {
      EXPECT_LT(growth, 4) << name;
    }
  }
}

// What preprocess.h promises, by the formats that need the most.
TEST(DecodeMemoryTest, APixelCostsAtMostTwelveBytes) {
  constexpr int kSide = 3000;
  const DecodeLimits limits = {.max_pixels_per_byte = 1 << 20};
  cv::Mat blank(kSide, kSide, CV_8UC4, cv::Scalar(40, 90, 200, 128));
  const auto encoded = [&](const char* kind, const std::vector<int>& flags, int channels) {
    cv::Mat picture = blank;
    if (channels == 3) picture = cv::Mat(kSide, kSide, CV_8UC3, cv::Scalar(40, 90, 200));
    std::vector<uchar> bytes;
    EXPECT_TRUE(cv::imencode(kind, picture, bytes, flags));
    return std::string(bytes.begin(), bytes.end());
  };
  std::string rotated = encoded(".jpg", {}, 3);
  rotated.insert(2, std::string("\xff\xe1\0\x22"
                                "Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03"
                                "\0\0\0\x01\0\x06\0\0\0\0\0\0",
                                36));
  const size_t wide_row = 1 + size_t{kSide} * 8;
  const std::vector<std::pair<const char*, std::string>> pictures = {
      {"JPEG", encoded(".jpg", {}, 3)},
      {"JPEG, turned by its orientation", rotated},
      {"progressive JPEG", encoded(".jpg", {cv::IMWRITE_JPEG_PROGRESSIVE, 1}, 3)},
      {"PNG, 16-bit RGBA", Png(kSide, kSide, 16, 6, std::string(wide_row * kSide, '\0'))},
      {"lossless WebP with alpha", encoded(".webp", {cv::IMWRITE_WEBP_QUALITY, 101}, 4)},
      {"lossy WebP with alpha", encoded(".webp", {cv::IMWRITE_WEBP_QUALITY, 90}, 4)},
      {"BMP", encoded(".bmp", {}, 3)},
  };
  for (const auto& [name, bytes] : pictures) {
    const double growth = PeakGrowth([&, &kind = name, &file = bytes] {
      const auto image = DecodeImage(file, 3, true, limits);
      EXPECT_OK(image) << kind;
    });
    if (growth < 0) GTEST_SKIP() << "/proc/self/clear_refs can't be written";
    const double bytes_per_pixel = growth * (1 << 20) / (double{kSide} * kSide);
    std::printf("%-34s %8zu bytes: %5.1f bytes a pixel\n", name, bytes.size(), bytes_per_pixel);
    EXPECT_GT(bytes_per_pixel, 2.9) << name;  // the picture itself: the measurement works
    if (!testing::kSanitized) {
      EXPECT_LT(bytes_per_pixel, 12) << name;
    }
  }
}

}  // namespace
}  // namespace pyramid
