#include "model/preprocess.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr int kMaxSide = 4096;  // of what a network takes

// A part of a picture; samples never leave it, as if it had been cut out.
struct Window {
  const uint8_t* pixels = nullptr;
  size_t stride = 0;  // bytes from row to row
  int width = 0;
  int height = 0;
  int channels = 0;
};

// Outputs [begin, begin + count) of an axis that resizes [start, start + length) to `size` outputs.
struct Span {
  double start = 0;
  double length = 0;
  int64_t size = 0;
  int64_t begin = 0;
  int count = 0;
};

// ---- Pillow's antialiased resampling (Resample.c of Pillow 10): the kernel is widened by the
// scale, weights are 22-bit fixed point, each pass rounds to 8 bits, the horizontal one comes
// first.

constexpr int kPillowBits = 32 - 8 - 2;

struct PillowAxis {
  std::vector<int> first;        // per output: first input
  std::vector<int> taps;         // per output: inputs
  std::vector<int32_t> weights;  // [output][width]
  int width = 0;                 // weights kept per output
};

double PillowKernel(Kernel kernel, double x) {
  x = std::abs(x);
  if (kernel == Kernel::kBilinear) return x < 1 ? 1 - x : 0;
  constexpr double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

PillowAxis MakePillowAxis(const Span& span, int in_size, Kernel kernel) {
  const double scale = span.length / static_cast<double>(span.size);
  const double filter_scale = std::max(scale, 1.0);
  const double support = (kernel == Kernel::kBicubic ? 2.0 : 1.0) * filter_scale;
  PillowAxis axis;
  axis.width = static_cast<int>(std::ceil(support)) * 2 + 1;
  axis.weights.resize(static_cast<size_t>(span.count) * static_cast<size_t>(axis.width));
  std::vector<double> exact(static_cast<size_t>(axis.width));
  for (int i = 0; i < span.count; ++i) {
    const double center = span.start + (static_cast<double>(span.begin + i) + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(center - support + 0.5));
    const int last = std::min(in_size, static_cast<int>(center + support + 0.5));
    const int taps = std::max(0, last - first);
    double sum = 0;
    for (int k = 0; k < taps; ++k) {
      exact[static_cast<size_t>(k)] =
          PillowKernel(kernel, (k + first - center + 0.5) * (1.0 / filter_scale));
      sum += exact[static_cast<size_t>(k)];
    }
    int32_t* weights =
        axis.weights.data() + static_cast<size_t>(i) * static_cast<size_t>(axis.width);
    for (int k = 0; k < taps; ++k) {
      double w = exact[static_cast<size_t>(k)];
      if (sum != 0) w /= sum;
      weights[k] = static_cast<int32_t>((w < 0 ? -0.5 : 0.5) + w * (1 << kPillowBits));
    }
    axis.first.push_back(first);
    axis.taps.push_back(taps);
  }
  return axis;
}

uint8_t PillowClip(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> kPillowBits, 0, 255));
}

template <int C>
void PillowRow(const uint8_t* row, const PillowAxis& axis, int count, uint8_t* out) {
  for (int i = 0; i < count; ++i) {
    const uint8_t* in = row + static_cast<size_t>(axis.first[static_cast<size_t>(i)]) * C;
    const int32_t* weights =
        axis.weights.data() + static_cast<size_t>(i) * static_cast<size_t>(axis.width);
    int32_t sum[C];
    for (int c = 0; c < C; ++c) sum[c] = 1 << (kPillowBits - 1);
    for (int k = 0; k < axis.taps[static_cast<size_t>(i)]; ++k) {
      for (int c = 0; c < C; ++c) sum[c] += in[k * C + c] * weights[k];
    }
    for (int c = 0; c < C; ++c) out[i * C + c] = PillowClip(sum[c]);
  }
}

RgbImage ResizePillow(const Window& in, const Span& across, const Span& down, Kernel kernel) {
  const PillowAxis x_axis = MakePillowAxis(across, in.width, kernel);
  const PillowAxis y_axis = MakePillowAxis(down, in.height, kernel);
  RgbImage out = BlankImage(across.count, down.count, in.channels);
  const size_t stride = static_cast<size_t>(across.count) * static_cast<size_t>(in.channels);
  // Rows that the vertical pass reads, resized across.
  const int first_row = y_axis.first.front();
  const int rows = y_axis.first.back() + y_axis.taps.back() - first_row;
  std::vector<uint8_t> between(static_cast<size_t>(rows) * stride);
  for (int y = 0; y < rows; ++y) {
    const uint8_t* row = in.pixels + static_cast<size_t>(first_row + y) * in.stride;
    uint8_t* to = between.data() + static_cast<size_t>(y) * stride;
    if (in.channels == 3) {
      PillowRow<3>(row, x_axis, across.count, to);
    } else {
      PillowRow<1>(row, x_axis, across.count, to);
    }
  }
  std::vector<int32_t> sums(stride);
  for (int y = 0; y < down.count; ++y) {
    const auto output = static_cast<size_t>(y);
    std::fill(sums.begin(), sums.end(), 1 << (kPillowBits - 1));
    for (int k = 0; k < y_axis.taps[output]; ++k) {
      const int32_t weight =
          y_axis.weights[output * static_cast<size_t>(y_axis.width) + static_cast<size_t>(k)];
      const uint8_t* row =
          between.data() + static_cast<size_t>(y_axis.first[output] - first_row + k) * stride;
      for (size_t i = 0; i < stride; ++i) sums[i] += row[i] * weight;
    }
    uint8_t* to = out.pixels.data() + output * stride;
    for (size_t i = 0; i < stride; ++i) to[i] = PillowClip(sums[i]);
  }
  return out;
}

// ---- OpenCV's resampling without antialiasing (resize.cpp of OpenCV 4): 2 or 4 taps, weights are
// 11-bit fixed point, the horizontal pass isn't rounded. Equal to cv::resize within one level: its
// vectorised cubic pass rounds in float.

constexpr int kOpenCvBits = 11;
constexpr int kMaxTaps = 4;

struct OpenCvAxis {
  std::vector<std::array<int, kMaxTaps>> inputs;  // clamped to the window
  std::vector<std::array<int32_t, kMaxTaps>> weights;
  int taps = 0;
};

OpenCvAxis MakeOpenCvAxis(const Span& span, int in_size, Kernel kernel) {
  OpenCvAxis axis;
  axis.taps = kernel == Kernel::kBicubic ? 4 : 2;
  const double scale = 1.0 / (static_cast<double>(span.size) / span.length);
  for (int i = 0; i < span.count; ++i) {
    auto x =
        static_cast<float>(span.start + (static_cast<double>(span.begin + i) + 0.5) * scale - 0.5);
    const int base = static_cast<int>(std::floor(x));
    x -= static_cast<float>(base);
    std::array<float, kMaxTaps> exact{};
    if (kernel == Kernel::kBicubic) {
      constexpr float a = -0.75f;
      exact[0] = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a;
      exact[1] = ((a + 2) * x - (a + 3)) * x * x + 1;
      exact[2] = ((a + 2) * (1 - x) - (a + 3)) * (1 - x) * (1 - x) + 1;
      exact[3] = 1.f - exact[0] - exact[1] - exact[2];
    } else {
      exact[0] = 1.f - x;
      exact[1] = x;
    }
    std::array<int, kMaxTaps> inputs{};
    std::array<int32_t, kMaxTaps> weights{};
    for (int k = 0; k < axis.taps; ++k) {
      const auto tap = static_cast<size_t>(k);
      inputs[tap] = std::clamp(base + k - (axis.taps / 2 - 1), 0, in_size - 1);
      weights[tap] = static_cast<int32_t>(std::lrint(exact[tap] * (1 << kOpenCvBits)));
    }
    axis.inputs.push_back(inputs);
    axis.weights.push_back(weights);
  }
  return axis;
}

RgbImage ResizeOpenCv(const Window& in, const Span& across, const Span& down, Kernel kernel) {
  const OpenCvAxis x_axis = MakeOpenCvAxis(across, in.width, kernel);
  const OpenCvAxis y_axis = MakeOpenCvAxis(down, in.height, kernel);
  RgbImage out = BlankImage(across.count, down.count, in.channels);
  const auto channels = static_cast<size_t>(in.channels);
  const size_t stride = static_cast<size_t>(across.count) * channels;
  const int first_row = y_axis.inputs.front().front();
  const int rows = y_axis.inputs.back()[static_cast<size_t>(y_axis.taps - 1)] - first_row + 1;
  std::vector<int32_t> between(static_cast<size_t>(rows) * stride);
  std::vector<bool> done(static_cast<size_t>(rows), false);  // a strong reduction skips rows
  const auto across_row = [&](int y) {
    const auto index = static_cast<size_t>(y - first_row);
    int32_t* to = between.data() + index * stride;
    if (done[index]) return to;
    done[index] = true;
    const uint8_t* row = in.pixels + static_cast<size_t>(y) * in.stride;
    for (size_t x = 0; x < x_axis.inputs.size(); ++x) {
      for (size_t c = 0; c < channels; ++c) {
        int32_t sum = 0;
        for (int k = 0; k < x_axis.taps; ++k) {
          const auto tap = static_cast<size_t>(k);
          sum += row[static_cast<size_t>(x_axis.inputs[x][tap]) * channels + c] *
                 x_axis.weights[x][tap];
        }
        to[x * channels + c] = sum;
      }
    }
    return to;
  };
  for (size_t y = 0; y < y_axis.inputs.size(); ++y) {
    std::array<const int32_t*, kMaxTaps> from{};
    for (int k = 0; k < y_axis.taps; ++k) {
      from[static_cast<size_t>(k)] = across_row(y_axis.inputs[y][static_cast<size_t>(k)]);
    }
    const std::array<int32_t, kMaxTaps>& w = y_axis.weights[y];
    uint8_t* to = out.pixels.data() + y * stride;
    for (size_t i = 0; i < stride; ++i) {
      int32_t value = 0;
      if (kernel == Kernel::kBicubic) {
        const int32_t sum =
            from[0][i] * w[0] + from[1][i] * w[1] + from[2][i] * w[2] + from[3][i] * w[3];
        value = (sum + (1 << (2 * kOpenCvBits - 1))) >> (2 * kOpenCvBits);
      } else {
        value = (((w[0] * (from[0][i] >> 4)) >> 16) + ((w[1] * (from[1][i] >> 4)) >> 16) + 2) >> 2;
      }
      to[i] = static_cast<uint8_t>(std::clamp(value, 0, 255));
    }
  }
  return out;
}

RgbImage ResizeWindow(const Window& in, const Span& across, const Span& down, Kernel kernel,
                      bool antialias) {
  return antialias ? ResizePillow(in, across, down, kernel)
                   : ResizeOpenCv(in, across, down, kernel);
}

Window WholeOf(const RgbImage& image) {
  return {.pixels = image.pixels.data(),
          .stride = static_cast<size_t>(image.width) * static_cast<size_t>(image.channels),
          .width = image.width,
          .height = image.height,
          .channels = image.channels};
}

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
    Span s;
    s.length = side;
    s.size = scaled(side);
    s.begin = CropBegin(s.size, crop, antialias);
    s.count = crop;
    return s;
  };
  return ResizeWindow(WholeOf(image), span(image.width), span(image.height),
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
  std::vector<float> out(cropped.pixels.size());
  Normalise(cropped, p, out.data());
  return out;
}

absl::StatusOr<std::vector<float>> DecodeAndPreprocess(absl::string_view bytes,
                                                       const v1::Preprocessing& p,
                                                       const DecodeLimits& limits) {
  RETURN_IF_ERROR(CheckPreprocessing(p));
  ASSIGN_OR_RETURN(const RgbImage image,
                   DecodeImage(bytes, p.channels(), p.exif() == "apply", limits));
  return Preprocess(image, p);
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
  Window window = WholeOf(image);
  window.pixels += static_cast<size_t>(top) * window.stride +
                   static_cast<size_t>(left) * static_cast<size_t>(image.channels);
  window.width = right - left;
  window.height = bottom - top;
  const Span across = {
      .start = x - left, .length = width, .size = out_width, .begin = 0, .count = out_width};
  const Span down = {
      .start = y - top, .length = height, .size = out_height, .begin = 0, .count = out_height};
  return ResizeWindow(window, across, down, kernel, antialias);
}

}  // namespace pyramid
