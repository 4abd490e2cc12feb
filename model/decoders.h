// One decoder per format, for DecodeImage (decode.cc) only. Each gives the picture as it lies in
// the file: grey or RGB, not turned, of the header's size.
//   InvalidArgument  broken, cut off, or of another size than its header says
// Out of memory is an exception: the caller guards.
#ifndef PYRAMID_MODEL_DECODERS_H_
#define PYRAMID_MODEL_DECODERS_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/picture_header.h"
#include "model/preprocess.h"

namespace pyramid {

// Checks its size against `limits` itself, after libjpeg's reading of the header: files with odd
// bytes between their segments are common.
absl::StatusOr<RgbImage> DecodeJpeg(absl::string_view bytes, const DecodeLimits& limits);
absl::StatusOr<RgbImage> DecodePng(absl::string_view bytes, const PictureHeader& header);
// The first picture, on the file's canvas; its own size is checked too.
absl::StatusOr<RgbImage> DecodeGif(absl::string_view bytes, const DecodeLimits& limits);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_DECODERS_H_
