// A picture's file: decoded to grey and to colours, then prepared as timm's and MindCV's weights
// see it.
#include <string>

#include "model/preprocess.h"
#include "tests/fuzz/fuzz_target.h"

namespace pyramid {
namespace {

using fuzz::Require;

// What decoders need stays within the bound up to here: eight bytes a pixel and the result.
constexpr DecodeLimits kLimits = {.max_pixels = 4'000'000, .max_side = 32'768};

v1::Preprocessing Recipe(const char* kernel, const char* antialias, const char* other_side) {
  v1::Preprocessing p;
  p.set_channels(3);
  p.set_exif("apply");
  p.mutable_resize()->set_side(72);
  p.mutable_resize()->set_kernel(kernel);
  p.mutable_resize()->set_antialias(antialias);
  p.mutable_resize()->set_other_side(other_side);
  p.set_crop(64);
  for (int c = 0; c < 3; ++c) {
    p.add_mean(0.5);
    p.add_std(0.25);
  }
  return p;
}

void TryDecoding(absl::string_view bytes, int channels, bool apply_exif) {
  const auto image = DecodeImage(bytes, channels, apply_exif, kLimits);
  if (!image.ok()) {
    Require(absl::IsInvalidArgument(image.status()), "a picture that isn't taken is refused");
    Require(!image.status().message().empty(), "and told why");
    return;
  }
  const int64_t pixels = int64_t{image->width} * image->height;
  Require(image->width >= 1 && image->height >= 1 && pixels <= kLimits.max_pixels,
          "the sides are within the limits");
  Require(image->channels == channels &&
              image->pixels.size() == static_cast<size_t>(pixels) * static_cast<size_t>(channels),
          "as many bytes as sides and channels say");
}

void TryPreparing(absl::string_view bytes, const v1::Preprocessing& recipe) {
  const auto pixels = DecodeAndPreprocess(bytes, recipe, kLimits);
  Require(!pixels.ok() || pixels->size() == 3 * 64 * 64, "channels x crop x crop numbers");
}

}  // namespace
}  // namespace pyramid

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto timm = pyramid::Recipe("bicubic", "pillow", "floor");
  static const auto mindcv = pyramid::Recipe("bicubic", "none", "floor");
  const absl::string_view bytes(reinterpret_cast<const char*>(data), size);
  pyramid::TryDecoding(bytes, 1, false);
  pyramid::TryDecoding(bytes, 3, true);
  pyramid::TryPreparing(bytes, timm);
  pyramid::TryPreparing(bytes, mindcv);
  return 0;
}
