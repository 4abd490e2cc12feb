// Bytes of a picture file → RgbImage: DecodeImage and EncodePng of model/preprocess.h.
//
// The file's kind, size and orientation are read first (picture_header.h) and held against the
// limits. Then a decoder per format (decoders.h); WebP and BMP go to OpenCV, which is told to leave
// samples and orientation as they are.
#include <algorithm>
#include <cstring>
#include <opencv2/core.hpp>
#include <opencv2/imgcodecs.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/decoders.h"
#include "model/exception_guard.h"
#include "model/picture_header.h"
#include "model/preprocess.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

absl::StatusOr<RgbImage> DecodeWithOpenCv(absl::string_view bytes, const PictureHeader& header) {
  const cv::Mat file(1, static_cast<int>(bytes.size()), CV_8UC1, const_cast<char*>(bytes.data()));
  const cv::Mat mat = cv::imdecode(file, cv::IMREAD_UNCHANGED);  // alpha and orientation stay
  if (mat.empty()) return NotAPicture("broken or cut off: it has a header, but can't be decoded");
  if (mat.cols != header.width || mat.rows != header.height) {
    return NotAPicture(absl::StrCat("decodes to ", mat.cols, "x", mat.rows, ", its header says ",
                                    header.width, "x", header.height));
  }
  if (mat.depth() != CV_8U) return NotAPicture("its samples aren't 8 bits wide");
  const int samples = mat.channels();
  RgbImage image = BlankImage(mat.cols, mat.rows, samples >= 3 ? 3 : 1);
  uint8_t* to = image.pixels.data();
  for (int y = 0; y < mat.rows; ++y) {
    const uint8_t* from = mat.ptr<uint8_t>(y);
    for (int x = 0; x < mat.cols; ++x, from += samples) {
      // BGR, and alpha if there is one.
      for (int c = 0; c < image.channels; ++c) *to++ = from[image.channels - 1 - c];
    }
  }
  return image;
}

// As it lies in the file: grey or RGB, not turned.
absl::StatusOr<RgbImage> DecodeStored(absl::string_view bytes, const PictureHeader& header,
                                      const DecodeLimits& limits) {
  switch (header.format) {
    case PictureFormat::kJpeg:
      return DecodeJpeg(bytes, limits);
    case PictureFormat::kPng:
      return DecodePng(bytes, header);
    case PictureFormat::kGif:
      return DecodeGif(bytes, limits);
    case PictureFormat::kBmp:
    case PictureFormat::kWebp:
      return DecodeWithOpenCv(bytes, header);
  }
  return absl::InternalError("picture: a format without a decoder");
}

template <int kChannels>
void Turn(const RgbImage& image, int64_t from, int64_t step_x, int64_t step_y, RgbImage& turned) {
  constexpr int kTile = 32;  // pixels; what is read and written stays in the cache
  for (int top = 0; top < turned.height; top += kTile) {
    for (int left = 0; left < turned.width; left += kTile) {
      for (int y = top; y < std::min(top + kTile, turned.height); ++y) {
        uint8_t* to =
            turned.pixels.data() + (int64_t{y} * turned.width + left) * int64_t{kChannels};
        for (int x = left; x < std::min(left + kTile, turned.width); ++x, to += kChannels) {
          std::memcpy(to, image.pixels.data() + (from + x * step_x + y * step_y) * kChannels,
                      kChannels);
        }
      }
    }
  }
}

// Turns the picture upright (EXIF 2.3, 4.6.4, tag 274).
RgbImage Upright(RgbImage image, int orientation) {
  if (orientation <= 1) return image;
  const bool swapped = orientation >= 5;
  const int64_t width = image.width;
  const int64_t height = image.height;
  RgbImage turned = swapped ? BlankImage(image.height, image.width, image.channels)
                            : BlankImage(image.width, image.height, image.channels);
  const bool flip_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool flip_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  // Where the upright picture's first pixel lies, and how far its next column and row are.
  const int64_t from = (flip_x ? width - 1 : 0) + (flip_y ? (height - 1) * width : 0);
  const int64_t along_x = flip_x ? -1 : 1;
  const int64_t along_y = flip_y ? -width : width;
  const int64_t step_x = swapped ? along_y : along_x;
  const int64_t step_y = swapped ? along_x : along_y;
  image.channels == 3 ? Turn<3>(image, from, step_x, step_y, turned)
                      : Turn<1>(image, from, step_x, step_y, turned);
  return turned;
}

RgbImage WithChannels(RgbImage image, int channels) {
  if (image.channels == channels) return image;
  RgbImage out = BlankImage(image.width, image.height, channels);
  const size_t count = image.pixels.size() / static_cast<size_t>(image.channels);
  const uint8_t* from = image.pixels.data();
  for (size_t i = 0; i < count; ++i) {
    if (channels == 3) {
      std::memset(out.pixels.data() + 3 * i, from[i], 3);
    } else {
      // ITU-R 601-2 luma in Pillow's fixed point (Convert.c, L24).
      const uint32_t luma =
          from[3 * i] * 19595u + from[3 * i + 1] * 38470u + from[3 * i + 2] * 7471u;
      out.pixels[i] = static_cast<uint8_t>((luma + 0x8000) >> 16);
    }
  }
  return out;
}

}  // namespace

absl::StatusOr<RgbImage> DecodeImage(absl::string_view bytes, int channels, bool apply_exif,
                                     const DecodeLimits& limits) {
  if (channels != 1 && channels != 3) {
    return absl::InvalidArgumentError(absl::StrCat("channels is ", channels, "; use 1 or 3"));
  }
  if (bytes.empty()) return NotAPicture("empty");
  if (static_cast<int64_t>(bytes.size()) > limits.max_bytes) {
    return NotAPicture(
        absl::StrCat("the file has ", bytes.size(), " bytes; at most ", limits.max_bytes));
  }
  ASSIGN_OR_RETURN(const PictureHeader header, ReadPictureHeader(bytes));
  if (header.format != PictureFormat::kJpeg) {
    RETURN_IF_ERROR(CheckPictureSize(header.width, header.height, bytes.size(), limits));
  }
  ASSIGN_OR_RETURN(RgbImage image, Guard("picture", absl::StatusCode::kInvalidArgument,
                                         [&] { return DecodeStored(bytes, header, limits); }));
  if (apply_exif) image = Upright(std::move(image), header.orientation);
  return WithChannels(std::move(image), channels);
}

absl::StatusOr<std::string> EncodePng(const RgbImage& image) {
  const auto count = static_cast<size_t>(image.width) * static_cast<size_t>(image.height) *
                     static_cast<size_t>(image.channels);
  if (image.width < 1 || image.height < 1 || (image.channels != 1 && image.channels != 3) ||
      image.pixels.size() != count) {
    return absl::InvalidArgumentError(absl::StrCat("picture: ", image.width, "x", image.height, "x",
                                                   image.channels, " with ", image.pixels.size(),
                                                   " bytes can't be written"));
  }
  return Guard("PNG", absl::StatusCode::kInternal, [&]() -> absl::StatusOr<std::string> {
    cv::Mat mat(image.height, image.width, image.channels == 3 ? CV_8UC3 : CV_8UC1);
    for (size_t i = 0; i < count; ++i) {
      // OpenCV keeps BGR.
      mat.data[image.channels == 3 ? i - i % 3 + (2 - i % 3) : i] = image.pixels[i];
    }
    std::vector<uint8_t> png;
    if (!cv::imencode(".png", mat, png)) return absl::InternalError("PNG: can't be written");
    return std::string(png.begin(), png.end());
  });
}

}  // namespace pyramid
