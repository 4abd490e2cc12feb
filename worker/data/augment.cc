#include "worker/data/augment.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "worker/data/random.h"

namespace pyramid {
namespace {

// The `side` x `side` window of a picture centred on a canvas of `pad`, shifted by (dx, dy); black
// outside.
absl::StatusOr<RgbImage> ShiftedCrop(const RgbImage& image, int pad, int side, int dx, int dy) {
  if (image.width > pad || image.height > pad) {
    return absl::InvalidArgumentError(absl::StrCat("a picture of ", image.width, "x", image.height,
                                                   " doesn't fit recipe.image_pad ", pad));
  }
  RgbImage out{.width = side, .height = side, .channels = image.channels};
  out.pixels.assign(size_t{1} * side * side * image.channels, 0);
  // Where the picture's first pixel lies in the window.
  const int left = (pad - image.width) / 2 - (pad - side) / 2 - dx;
  const int top = (pad - image.height) / 2 - (pad - side) / 2 - dy;
  const int x_begin = std::max(0, left);
  const int x_end = std::min(side, left + image.width);
  if (x_begin >= x_end) return out;
  for (int y = std::max(0, top); y < std::min(side, top + image.height); ++y) {
    std::memcpy(&out.pixels[(int64_t{y} * side + x_begin) * image.channels],
                &image.pixels[(int64_t{y - top} * image.width + (x_begin - left)) * image.channels],
                size_t{1} * (x_end - x_begin) * image.channels);
  }
  return out;
}

struct Box {
  int x, y, width, height;
};

// Ten attempts at a box of random area and aspect, then the centre box nearest to the allowed
// aspects: torchvision's RandomResizedCrop, which MindSpore's RandomCropDecodeResize follows.
Box RandomBox(const RgbImage& image, const Recipe& r, CounterRandom& random) {
  const double area = double{1} * image.width * image.height;
  const double low = std::log(r.ratio[0]);
  const double high = std::log(r.ratio[1]);
  for (int attempt = 0; attempt < 10; ++attempt) {
    const double target = area * random.Uniform(r.scale[0], r.scale[1]);
    const double aspect = std::exp(random.Uniform(low, high));
    const int width = static_cast<int>(std::lround(std::sqrt(target * aspect)));
    const int height = static_cast<int>(std::lround(std::sqrt(target / aspect)));
    if (width < 1 || height < 1 || width > image.width || height > image.height) continue;
    const int x = static_cast<int>(random.Below(image.width - width + 1));
    const int y = static_cast<int>(random.Below(image.height - height + 1));
    return {x, y, width, height};
  }
  const double aspect = double{1} * image.width / image.height;
  int width = image.width;
  int height = image.height;
  if (aspect < r.ratio[0]) height = std::max(1, static_cast<int>(std::lround(width / r.ratio[0])));
  if (aspect > r.ratio[1]) width = std::max(1, static_cast<int>(std::lround(height * r.ratio[1])));
  return {(image.width - width) / 2, (image.height - height) / 2, width, height};
}

void FlipHorizontally(RgbImage& image) {
  const int c = image.channels;
  for (int y = 0; y < image.height; ++y) {
    uint8_t* row = &image.pixels[int64_t{y} * image.width * c];
    for (int x = 0; x < image.width / 2; ++x) {
      std::swap_ranges(row + x * c, row + (x + 1) * c, row + (image.width - 1 - x) * c);
    }
  }
}

void FlipVertically(RgbImage& image) {
  const int64_t stride = int64_t{image.width} * image.channels;
  for (int y = 0; y < image.height / 2; ++y) {
    std::swap_ranges(image.pixels.begin() + y * stride, image.pixels.begin() + (y + 1) * stride,
                     image.pixels.begin() + (image.height - 1 - y) * stride);
  }
}

uint8_t ToByte(double value) { return static_cast<uint8_t>(std::clamp(value + 0.5, 0.0, 255.0)); }

double Grey(const uint8_t* rgb) {
  return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2];
}  // ITU-R 601

// Brightness, contrast and saturation by factors in 1 ± amount, in random order; each as Pillow's
// ImageEnhance blends it.
void ColorJitter(RgbImage& image, double amount, CounterRandom& random) {
  std::array<int, 3> order = {0, 1, 2};
  for (int i = 2; i > 0; --i) std::swap(order[i], order[random.Below(i + 1)]);
  for (const int what : order) {
    const double factor = random.Uniform(std::max(0.0, 1 - amount), 1 + amount);
    double base = 0;
    if (what == 1) {
      for (size_t i = 0; i < image.pixels.size(); i += 3) base += Grey(&image.pixels[i]);
      base = std::floor(base / (static_cast<double>(image.pixels.size()) / 3) + 0.5);
    }
    for (size_t i = 0; i < image.pixels.size(); i += 3) {
      uint8_t* rgb = &image.pixels[i];
      if (what == 2) base = Grey(rgb);
      for (int c = 0; c < 3; ++c) rgb[c] = ToByte(base + (rgb[c] - base) * factor);
    }
  }
}

// MindSpore's RandomErasing: uniform area and aspect, several attempts; a constant or noise.
void Erase(float* pixels, int channels, int side, const Recipe& r, CounterRandom& random) {
  double constant = 0;
  const bool noise = !absl::SimpleAtod(r.re_value, &constant);
  for (int attempt = 0; attempt < r.re_max_attempts; ++attempt) {
    const double area = random.Uniform(r.re_scale[0], r.re_scale[1]) * side * side;
    const double aspect = random.Uniform(r.re_ratio[0], r.re_ratio[1]);
    const int height = static_cast<int>(std::lround(std::sqrt(area * aspect)));
    const int width = static_cast<int>(std::lround(std::sqrt(area / aspect)));
    if (height < 1 || width < 1 || height >= side || width >= side) continue;
    const int top = static_cast<int>(random.Below(side - height + 1));
    const int left = static_cast<int>(random.Below(side - width + 1));
    for (int c = 0; c < channels; ++c) {
      for (int y = top; y < top + height; ++y) {
        float* row = pixels + (int64_t{c} * side + y) * side;
        for (int x = left; x < left + width; ++x) {
          row[x] = static_cast<float>(noise ? random.Normal() : constant);
        }
      }
    }
    return;
  }
}

}  // namespace

Augmenter::Augmenter(const Recipe& recipe)
    : recipe_(recipe), preprocessing_(EvalPreprocessingOf(recipe)) {}

absl::Status Augmenter::Apply(const RgbImage& image, int64_t epoch, int64_t position,
                              float* out) const {
  const Recipe& r = recipe_;
  const int side = r.image_resize;
  CounterRandom random(RandomStream::kAugment, r.seed, epoch, position);
  RgbImage crop;
  if (r.image_pad > 0) {
    const int range = 2 * r.crop_padding + 1;
    const int dx = static_cast<int>(random.Below(range)) - r.crop_padding;
    const int dy = static_cast<int>(random.Below(range)) - r.crop_padding;
    absl::StatusOr<RgbImage> shifted = ShiftedCrop(image, r.image_pad, side, dx, dy);
    if (!shifted.ok()) return shifted.status();
    crop = *std::move(shifted);
  } else {
    const Box box = RandomBox(image, r, random);
    const Kernel kernel = r.interpolation == "bicubic" ? Kernel::kBicubic : Kernel::kBilinear;
    crop = ResizeBox(image, box.x, box.y, box.width, box.height, side, side, kernel,
                     /*antialias=*/r.compat != "mindcv");
  }
  if (random.Chance(r.hflip)) FlipHorizontally(crop);
  if (random.Chance(r.vflip)) FlipVertically(crop);
  if (r.color_jitter > 0 && crop.channels == 3) ColorJitter(crop, r.color_jitter, random);
  Normalise(crop, preprocessing_, out);
  if (random.Chance(r.re_prob)) Erase(out, crop.channels, side, r, random);
  return absl::OkStatus();
}

}  // namespace pyramid
