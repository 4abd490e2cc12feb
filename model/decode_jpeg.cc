// JPEG by libjpeg, whose defaults (slow integer DCT, smooth upsampling) are Pillow's, so that the
// pixels are too; and so that a truncated file is an error rather than half grey.
#include <setjmp.h>
#include <stdio.h>  // jpeglib.h needs FILE
//
#include <jpeglib.h>
// jerror.h needs jpeglib.h's configuration
#include <jerror.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/decoders.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

// libjpeg behind calls that return false instead of leaping. No object with a destructor lives
// between a setjmp and its longjmp.
class JpegDecoder {
 public:
  explicit JpegDecoder(absl::string_view bytes) {
    info_.err = jpeg_std_error(&error_.base);
    error_.base.error_exit = [](j_common_ptr info) { Leap(info); };
    error_.base.emit_message = [](j_common_ptr info, int level) {
      if (level < 0 && IsLoss(info->err->msg_code)) Leap(info);
    };
    error_.base.output_message = [](j_common_ptr) {};
    if (setjmp(error_.leap) != 0) return;
    jpeg_create_decompress(&info_);
    progress_.progress_monitor = [](j_common_ptr info) {
      auto* decoder = reinterpret_cast<j_decompress_ptr>(info);
      if (decoder->input_scan_number <= kMaxScans) return;
      auto* error = reinterpret_cast<Error*>(info->err);
      std::snprintf(error->message, sizeof(error->message), "more than %d scans", kMaxScans);
      longjmp(error->leap, 1);
    };
    info_.progress = &progress_;
    jpeg_mem_src(&info_, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
    created_ = true;
  }
  ~JpegDecoder() {
    if (created_) jpeg_destroy_decompress(&info_);
  }
  JpegDecoder(const JpegDecoder&) = delete;
  JpegDecoder& operator=(const JpegDecoder&) = delete;

  bool ReadHeader() {
    if (!created_ || setjmp(error_.leap) != 0) return false;
    return jpeg_read_header(&info_, TRUE) == JPEG_HEADER_OK;
  }
  // The samples that ReadRow gives: 1 grey, 3 RGB, 4 CMYK, 0 something else.
  int ChooseOutput() {
    switch (info_.jpeg_color_space) {
      case JCS_GRAYSCALE:
        info_.out_color_space = JCS_GRAYSCALE;
        return 1;
      case JCS_YCbCr:
      case JCS_RGB:
        info_.out_color_space = JCS_RGB;
        return 3;
      case JCS_CMYK:
      case JCS_YCCK:
        info_.out_color_space = JCS_CMYK;
        return 4;
      default:
        return 0;
    }
  }
  bool Start() {
    if (setjmp(error_.leap) != 0) return false;
    return jpeg_start_decompress(&info_) != FALSE;
  }
  bool ReadRow(uint8_t* row) {
    if (setjmp(error_.leap) != 0) return false;
    JSAMPROW rows[] = {row};
    return jpeg_read_scanlines(&info_, rows, 1) == 1;
  }
  int width() const { return static_cast<int>(info_.image_width); }
  int height() const { return static_cast<int>(info_.image_height); }
  const char* message() const { return error_.message; }

 private:
  static constexpr int kMaxScans =
      100;  // a progressive picture has about 10; each costs a pass over all of it

  struct Error {
    jpeg_error_mgr base;
    jmp_buf leap;
    char message[JMSG_LENGTH_MAX] = "";
  };

  // Warnings that mean that part of the picture is missing. Others, such as extra bytes between
  // segments, are tolerated, as everywhere.
  static bool IsLoss(int code) {
    return code == JWRN_JPEG_EOF || code == JWRN_HIT_MARKER || code == JWRN_HUFF_BAD_CODE ||
           code == JWRN_ARITH_BAD_CODE || code == JWRN_MUST_RESYNC;
  }
  [[noreturn]] static void Leap(j_common_ptr info) {
    auto* error = reinterpret_cast<Error*>(info->err);
    info->err->format_message(info, error->message);
    longjmp(error->leap, 1);
  }

  jpeg_decompress_struct info_{};
  Error error_;
  jpeg_progress_mgr progress_{};
  bool created_ = false;
};

// Adobe's inverted CMYK to RGB in Pillow's rounding (Convert.c, cmyk2rgb; JpegImagePlugin takes
// every CMYK file as inverted).
void CmykRow(const uint8_t* cmyk, int width, uint8_t* rgb) {
  for (int x = 0; x < width; ++x) {
    const int white = cmyk[4 * x + 3];
    for (int c = 0; c < 3; ++c) {
      const int product = (255 - cmyk[4 * x + c]) * white + 128;
      rgb[3 * x + c] = static_cast<uint8_t>(std::max(0, white - (((product >> 8) + product) >> 8)));
    }
  }
}

}  // namespace

absl::StatusOr<RgbImage> DecodeJpeg(absl::string_view bytes, const DecodeLimits& limits) {
  auto decoder = std::make_unique<JpegDecoder>(bytes);
  const auto broken = [&] {
    return NotAPicture(absl::StrCat("broken JPEG: ", decoder->message()));
  };
  if (!decoder->ReadHeader()) return broken();
  RETURN_IF_ERROR(CheckPictureSize(decoder->width(), decoder->height(), bytes.size(), limits));
  const int samples = decoder->ChooseOutput();
  if (samples == 0)
    return NotAPicture("a JPEG whose colours are neither grey, YCbCr, RGB nor CMYK");
  if (!decoder->Start()) return broken();
  const int width = decoder->width();
  RgbImage image = BlankImage(width, decoder->height(), samples == 1 ? 1 : 3);
  std::vector<uint8_t> cmyk(samples == 4 ? static_cast<size_t>(width) * 4 : 0);
  const size_t stride = static_cast<size_t>(width) * static_cast<size_t>(image.channels);
  for (int y = 0; y < image.height; ++y) {
    uint8_t* row = image.pixels.data() + static_cast<size_t>(y) * stride;
    if (!decoder->ReadRow(samples == 4 ? cmyk.data() : row)) return broken();
    if (samples == 4) CmykRow(cmyk.data(), width, row);
  }
  return image;
}

}  // namespace pyramid
