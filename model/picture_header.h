// What a picture file says of itself, read before any decoder sees a byte.
#ifndef PYRAMID_MODEL_PICTURE_HEADER_H_
#define PYRAMID_MODEL_PICTURE_HEADER_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/preprocess.h"

namespace pyramid {

enum class PictureFormat { kJpeg, kPng, kGif, kBmp, kWebp };

struct PictureHeader {
  PictureFormat format = PictureFormat::kJpeg;
  int64_t width = 0;  // 0: the decoder finds out and checks (JPEG)
  int64_t height = 0;
  int orientation = 1;  // EXIF, 1..8
};

// By the first bytes, whatever the file is called.
//   InvalidArgument  none of the formats, or a header that is cut off
absl::StatusOr<PictureHeader> ReadPictureHeader(absl::string_view bytes);

// InvalidArgument, naming the limit, if a file of `bytes` bytes may not have this size.
absl::Status CheckPictureSize(int64_t width, int64_t height, size_t bytes,
                              const DecodeLimits& limits);

// InvalidArgument, "picture: " and `what`.
absl::Status NotAPicture(absl::string_view what);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_PICTURE_HEADER_H_
