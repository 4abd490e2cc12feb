#include "model/preprocess.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "model/resample.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr int kMaxSide = 4096;  // of what a network takes

absl::Status Bad(absl::string_view field, absl::string_view text) {
  return absl::InvalidArgumentError(absl::StrCat("preprocessing.", field, " ", text));
}

absl::Status CheckOneOf(absl::string_view field, absl::string_view value, absl::string_view a,
                        absl::string_view b) {
  if (value == a || value == b) return absl::OkStatus();
  return Bad(field, absl::StrCat("is \"", value, "\"; use ", a, " or ", b));
}

absl::Status CheckSide(absl::string_view field, int side) {
  if (side >= 1 && side <= kMaxSide) return absl::OkStatus();
  return Bad(field, absl::StrCat("is ", side, "; use 1..", kMaxSide));
}

absl::Status CheckImage(const RgbImage& image, const v1::Preprocessing& p) {
  if (image.channels != p.channels()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the picture has ", image.channels, " channels, preprocessing.channels is ", p.channels()));
  }
  const size_t bytes = static_cast<size_t>(image.width) * static_cast<size_t>(image.height) *
                       static_cast<size_t>(image.channels);
  if (image.width < 1 || image.height < 1 || image.pixels.size() != bytes) {
    return absl::InvalidArgumentError(absl::StrCat("the picture is ", image.width, "x",
                                                   image.height, "x", image.channels, " but has ",
                                                   image.pixels.size(), " bytes"));
  }
  return absl::OkStatus();
}

// Where a crop of `crop` begins in `size` pixels. torchvision rounds halves to the even number,
// MindSpore and padding round down.
int64_t CropBegin(int64_t size, int64_t crop, bool half_to_even) {
  const int64_t rest = size - crop;
  const int64_t half = rest / 2;
  return half_to_even && rest % 2 == 1 && half % 2 == 1 ? half + 1 : half;
}

RgbImage ResizedCrop(const RgbImage& image, const v1::Resize& resize, int crop) {
  const bool antialias = resize.antialias() == "pillow";
  const int64_t shorter = std::min(image.width, image.height);
  const bool round = resize.other_side() == "round";
  const auto scaled = [&](int side) {
    return (int64_t{side} * resize.side() + (round ? shorter / 2 : 0)) / shorter;
  };
  const auto span = [&](int side) {
    resample::Span s;
    s.length = side;
    s.size = scaled(side);
    s.begin = CropBegin(s.size, crop, antialias);
    s.count = crop;
    return s;
  };
  return resample::Resample(resample::WholeOf(image), span(image.width), span(image.height),
                            resize.kernel() == "bicubic" ? Kernel::kBicubic : Kernel::kBilinear,
                            antialias);
}

absl::StatusOr<RgbImage> PaddedCrop(const RgbImage& image, const v1::Pad& pad, int crop) {
  if (image.width > pad.to() || image.height > pad.to()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the picture is ", image.width, "x", image.height, "; this model takes at most ", pad.to(),
        "x", pad.to(), " (preprocessing.pad.to)"));
  }
  RgbImage out = BlankImage(crop, crop, image.channels);
  std::fill(out.pixels.begin(), out.pixels.end(), static_cast<uint8_t>(pad.fill()));
  // Of the picture's corner in the crop; negative: the crop begins within the picture.
  const int begin = static_cast<int>(CropBegin(pad.to(), crop, false));
  const int left = (pad.to() - image.width) / 2 - begin;
  const int top = (pad.to() - image.height) / 2 - begin;
  const int x0 = std::max(0, left);
  const int x1 = std::min(crop, left + image.width);
  const auto channels = static_cast<size_t>(image.channels);
  for (int y = std::max(0, top); y < std::min(crop, top + image.height) && x0 < x1; ++y) {
    const size_t from = static_cast<size_t>(y - top) * static_cast<size_t>(image.width) +
                        static_cast<size_t>(x0 - left);
    const size_t to = static_cast<size_t>(y) * static_cast<size_t>(crop) + static_cast<size_t>(x0);
    std::memcpy(out.pixels.data() + to * channels, image.pixels.data() + from * channels,
                static_cast<size_t>(x1 - x0) * channels);
  }
  return out;
}

std::vector<float> Normalised(const RgbImage& image, const v1::Preprocessing& p) {
  std::vector<float> out(image.pixels.size());
  Normalise(image, p, out.data());
  return out;
}

}  // namespace

RgbImage BlankImage(int width, int height, int channels) {
  RgbImage image;
  image.width = width;
  image.height = height;
  image.channels = channels;
  image.pixels.resize(static_cast<size_t>(width) * static_cast<size_t>(height) *
                      static_cast<size_t>(channels));
  return image;
}

absl::Status CheckPreprocessing(const v1::Preprocessing& p) {
  if (p.channels() != 1 && p.channels() != 3) {
    return Bad("channels", absl::StrCat("is ", p.channels(), "; use 1 or 3"));
  }
  RETURN_IF_ERROR(CheckOneOf("exif", p.exif(), "apply", "ignore"));
  RETURN_IF_ERROR(CheckSide("crop", p.crop()));
  int available = 0;
  switch (p.scale_case()) {
    case v1::Preprocessing::kResize:
      RETURN_IF_ERROR(CheckSide("resize.side", p.resize().side()));
      RETURN_IF_ERROR(CheckOneOf("resize.kernel", p.resize().kernel(), "bicubic", "bilinear"));
      RETURN_IF_ERROR(CheckOneOf("resize.antialias", p.resize().antialias(), "pillow", "none"));
      RETURN_IF_ERROR(CheckOneOf("resize.other_side", p.resize().other_side(), "floor", "round"));
      available = p.resize().side();
      break;
    case v1::Preprocessing::kPad:
      RETURN_IF_ERROR(CheckSide("pad.to", p.pad().to()));
      if (p.pad().fill() < 0 || p.pad().fill() > 255) {
        return Bad("pad.fill", absl::StrCat("is ", p.pad().fill(), "; use 0..255"));
      }
      available = p.pad().to();
      break;
    case v1::Preprocessing::SCALE_NOT_SET:
      return Bad("resize", "is missing and so is preprocessing.pad; give one of them");
  }
  if (p.crop() > available) {
    return Bad("crop",
               absl::StrCat("is ", p.crop(), "; the scaled picture may have only ", available));
  }
  if (p.mean_size() != p.channels() || p.std_size() != p.channels()) {
    return Bad(p.mean_size() != p.channels() ? "mean" : "std",
               absl::StrCat("has ", p.mean_size() != p.channels() ? p.mean_size() : p.std_size(),
                            " values; channels is ", p.channels()));
  }
  for (const double mean : p.mean()) {
    if (!(mean >= 0 && mean <= 1)) return Bad("mean", absl::StrCat("has ", mean, "; use 0..1"));
  }
  for (const double std : p.std()) {
    if (!(std > 0 && std <= 1))
      return Bad("std", absl::StrCat("has ", std, "; use more than 0, at most 1"));
  }
  return absl::OkStatus();
}

absl::StatusOr<RgbImage> ResizeAndCrop(const RgbImage& image, const v1::Preprocessing& p) {
  RETURN_IF_ERROR(CheckPreprocessing(p));
  RETURN_IF_ERROR(CheckImage(image, p));
  if (p.has_pad()) return PaddedCrop(image, p.pad(), p.crop());
  return ResizedCrop(image, p.resize(), p.crop());
}

absl::StatusOr<std::vector<float>> Preprocess(const RgbImage& image, const v1::Preprocessing& p) {
  ASSIGN_OR_RETURN(const RgbImage cropped, ResizeAndCrop(image, p));
  return Normalised(cropped, p);
}

absl::StatusOr<std::vector<float>> DecodeAndPreprocess(absl::string_view bytes,
                                                       const v1::Preprocessing& p,
                                                       const DecodeLimits& limits,
                                                       absl::Duration* decoding) {
  RETURN_IF_ERROR(CheckPreprocessing(p));
  const absl::Time started = absl::Now();
  RgbImage cropped;
  {
    // The whole picture, perhaps the largest block of the process, goes back before the next.
    const absl::StatusOr<RgbImage> image =
        DecodeImage(bytes, p.channels(), p.exif() == "apply", limits);
    if (decoding != nullptr) *decoding = absl::Now() - started;
    RETURN_IF_ERROR(image.status());
    ASSIGN_OR_RETURN(cropped, ResizeAndCrop(*image, p));
  }
  return Normalised(cropped, p);
}

void Normalise(const RgbImage& image, const v1::Preprocessing& p, float* out) {
  const size_t count = static_cast<size_t>(image.width) * static_cast<size_t>(image.height);
  const auto channels = static_cast<size_t>(image.channels);
  for (size_t c = 0; c < channels; ++c) {
    const auto mean = static_cast<float>(p.mean(static_cast<int>(c)));
    const auto std = static_cast<float>(p.std(static_cast<int>(c)));
    // Each of the 256 values once, with the divisions that a tensor library makes, so that the
    // floats are its floats.
    std::array<float, 256> value;
    for (size_t v = 0; v < value.size(); ++v)
      value[v] = (static_cast<float>(v) / 255.f - mean) / std;
    const uint8_t* from = image.pixels.data() + c;
    float* to = out + c * count;
    for (size_t i = 0; i < count; ++i) to[i] = value[from[i * channels]];
  }
}

RgbImage ResizeBox(const RgbImage& image, double x, double y, double width, double height,
                   int out_width, int out_height, Kernel kernel, bool antialias) {
  const int left = std::clamp(static_cast<int>(std::floor(x)), 0, image.width - 1);
  const int top = std::clamp(static_cast<int>(std::floor(y)), 0, image.height - 1);
  const int right = std::clamp(static_cast<int>(std::ceil(x + width)), left + 1, image.width);
  const int bottom = std::clamp(static_cast<int>(std::ceil(y + height)), top + 1, image.height);
  resample::Window window = resample::WholeOf(image);
  window.pixels += static_cast<size_t>(top) * window.stride +
                   static_cast<size_t>(left) * static_cast<size_t>(image.channels);
  window.width = right - left;
  window.height = bottom - top;
  const resample::Span across = {
      .start = x - left, .length = width, .size = out_width, .begin = 0, .count = out_width};
  const resample::Span down = {
      .start = y - top, .length = height, .size = out_height, .begin = 0, .count = out_height};
  return resample::Resample(window, across, down, kernel, antialias);
}

}  // namespace pyramid
