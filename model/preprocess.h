// The one definition of pixels: bytes → picture → the floats a network takes. Training's
// evaluation, validation and serving all go through here, by the recipe (v1::Preprocessing) that
// lies in each checkpoint's manifest.
//
// Everything here is thread-safe and stateless. Torch-free; OpenCV stays in the .cc.
#ifndef PYRAMID_MODEL_PREPROCESS_H_
#define PYRAMID_MODEL_PREPROCESS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "proto/model.pb.h"

namespace pyramid {

// 8-bit picture, rows top to bottom, channels interleaved (HWC), RGB order.
struct RgbImage {
  int width = 0;
  int height = 0;
  int channels = 0;             // 1 or 3
  std::vector<uint8_t> pixels;  // height * width * channels
};

// A black picture.
RgbImage BlankImage(int width, int height, int channels);

// Held against the file's size and its header before anything is decoded. They bound what decoding
// costs: at most about 12 bytes of memory a pixel.
struct DecodeLimits {
  int64_t max_bytes = 32 << 20;     // of the file
  int64_t max_pixels = 50'000'000;  // width * height
  int max_side = 32'768;
  // Pixels that a byte of the file may stand for, in pictures of more than kSmallPicture. Deflate
  // makes at most 1032 bytes of one, so even a blank grey or RGB PNG passes; blank ones of 1, 2 or
  // 4 bits and blank lossless WebP may not.
  int64_t max_pixels_per_byte = 2000;
};
inline constexpr int64_t kSmallPicture = 1 << 20;  // pixels

// Decodes a JPEG, PNG, WebP, BMP or GIF (its first picture) into `channels` (1 or 3), by its bytes,
// not by any name. Alpha is dropped, 16-bit samples are divided by 257, a palette is looked up,
// CMYK and YCCK are taken as Adobe's inverted; colour profiles and gamma are ignored. `apply_exif`:
// turned upright by the EXIF orientation.
//   InvalidArgument    empty, not a picture, truncated, or over a limit; names which
//   ResourceExhausted  out of memory
absl::StatusOr<RgbImage> DecodeImage(absl::string_view bytes, int channels, bool apply_exif,
                                     const DecodeLimits& limits = {});

// PNG bytes of a picture, lossless.
absl::StatusOr<std::string> EncodePng(const RgbImage& image);

// InvalidArgument, naming the field, unless `p` can be carried out.
absl::Status CheckPreprocessing(const v1::Preprocessing& p);

// resize or pad, centre crop; 8-bit, crop x crop. Only the pixels that the crop needs are computed.
// A crop that can't lie in the middle begins at the even one of its two pixels with antialias
// "pillow" (as torchvision), else at the lower one (as MindSpore).
//   InvalidArgument  channels differ, or the picture doesn't fit pad.to
absl::StatusOr<RgbImage> ResizeAndCrop(const RgbImage& image, const v1::Preprocessing& p);

// ResizeAndCrop, then ÷ 255, mean, std: [channels, crop, crop] floats.
absl::StatusOr<std::vector<float>> Preprocess(const RgbImage& image, const v1::Preprocessing& p);

// DecodeImage and Preprocess. `decoding`, if not null, is set to what the first took.
absl::StatusOr<std::vector<float>> DecodeAndPreprocess(absl::string_view bytes,
                                                       const v1::Preprocessing& p,
                                                       const DecodeLimits& limits = {},
                                                       absl::Duration* decoding = nullptr);

// (x / 255 - mean) / std into CHW; `out` has channels * height * width floats. The trainer
// normalises its augmented pictures with it.
void Normalise(const RgbImage& image, const v1::Preprocessing& p, float* out);

enum class Kernel { kBilinear, kBicubic };

// Resizes the rectangle [x, x+width) x [y, y+height) (source pixels, within the picture) to
// `out_width` x `out_height`, as if it had been cut out first: pixels outside don't count.
// `antialias`: Pillow's, else OpenCV's.
RgbImage ResizeBox(const RgbImage& image, double x, double y, double width, double height,
                   int out_width, int out_height, Kernel kernel, bool antialias);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_PREPROCESS_H_
