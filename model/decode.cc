// Bytes of a picture file → RgbImage: DecodeImage and EncodePng of model/preprocess.h.
//
// The file's kind, its size and its EXIF orientation are read here, before any decoder sees a byte.
// JPEG goes to libjpeg, so that a truncated file is an error rather than half grey; GIF to giflib,
// first picture only; PNG to libpng, because OpenCV lets it write each broken file's fault to
// standard error; WebP and BMP to OpenCV, which is told to leave samples and orientation as they
// are.
#include <gif_lib.h>
#include <png.h>
#include <setjmp.h>
#include <stdio.h>  // jpeglib.h needs FILE
//
#include <jpeglib.h>
// jerror.h needs jpeglib.h's configuration
#include <jerror.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <opencv2/core.hpp>
#include <opencv2/imgcodecs.hpp>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/exception_guard.h"
#include "model/preprocess.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

enum class Format { kJpeg, kPng, kGif, kBmp, kWebp };

struct Header {
  Format format = Format::kJpeg;
  int64_t width = 0;  // 0: the decoder finds out (JPEG)
  int64_t height = 0;
  int orientation = 1;  // EXIF, 1..8
};

absl::Status NotAPicture(absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("picture: ", what));
}

// Unsigned integers at a place of the file; 0 beyond its end.
uint32_t Byte(absl::string_view bytes, size_t at) {
  return at < bytes.size() ? static_cast<unsigned char>(bytes[at]) : 0;
}
uint32_t Little(absl::string_view bytes, size_t at, int size) {
  uint32_t value = 0;
  for (int i = size - 1; i >= 0; --i) value = value << 8 | Byte(bytes, at + static_cast<size_t>(i));
  return value;
}
uint32_t Big(absl::string_view bytes, size_t at, int size) {
  uint32_t value = 0;
  for (int i = 0; i < size; ++i) value = value << 8 | Byte(bytes, at + static_cast<size_t>(i));
  return value;
}

// The orientation in a TIFF structure; 1 if there is none or it is nonsense, as viewers do.
int OrientationInTiff(absl::string_view tiff) {
  if (absl::StartsWith(tiff, absl::string_view("Exif\0\0", 6))) tiff.remove_prefix(6);
  const bool little = absl::StartsWith(tiff, "II");
  if (!little && !absl::StartsWith(tiff, "MM")) return 1;
  const auto number = [&](size_t at, int size) {
    return little ? Little(tiff, at, size) : Big(tiff, at, size);
  };
  if (number(2, 2) != 42) return 1;
  const size_t directory = number(4, 4);
  const size_t entries = number(directory, 2);
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + 12 * i;
    if (entry + 12 > tiff.size()) return 1;
    if (number(entry, 2) != 0x0112) continue;
    const uint32_t type = number(entry + 2, 2);
    const uint32_t value = type == 3 ? number(entry + 8, 2) : type == 4 ? number(entry + 8, 4) : 1;
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
  }
  return 1;
}

// Walks the segments before the first scan.
Header JpegHeader(absl::string_view bytes) {
  Header header;
  header.format = Format::kJpeg;
  size_t at = 2;
  while (at + 4 <= bytes.size() && Byte(bytes, at) == 0xff) {
    const uint32_t marker = Byte(bytes, at + 1);
    if (marker == 0xff) {
      ++at;  // fill
      continue;
    }
    if (marker == 0x01 || (marker >= 0xd0 && marker <= 0xd8)) {
      at += 2;  // no length
      continue;
    }
    if (marker == 0xda || marker == 0xd9) break;
    const size_t length = Big(bytes, at + 2, 2);
    if (length < 2 || at + 2 + length > bytes.size()) break;
    const absl::string_view segment = bytes.substr(at + 4, length - 2);
    if (marker == 0xe1 && absl::StartsWith(segment, absl::string_view("Exif\0\0", 6))) {
      header.orientation = OrientationInTiff(segment);
      break;
    }
    at += 2 + length;
  }
  return header;
}

absl::StatusOr<Header> PngHeader(absl::string_view bytes) {
  if (bytes.size() < 33 || bytes.substr(12, 4) != "IHDR" || Big(bytes, 8, 4) != 13) {
    return NotAPicture("a PNG whose header is cut off");
  }
  Header header;
  header.format = Format::kPng;
  header.width = Big(bytes, 16, 4);
  header.height = Big(bytes, 20, 4);
  size_t at = 8;
  while (at + 12 <= bytes.size()) {
    const size_t length = Big(bytes, at, 4);
    if (length > bytes.size() - at - 12) break;
    if (bytes.substr(at + 4, 4) == "eXIf") {
      header.orientation = OrientationInTiff(bytes.substr(at + 8, length));
      break;
    }
    at += 12 + length;
  }
  return header;
}

absl::StatusOr<Header> BmpHeader(absl::string_view bytes) {
  if (bytes.size() < 26 || bytes.size() < 14 + uint64_t{Little(bytes, 14, 4)}) {
    return NotAPicture("a BMP whose header is cut off");
  }
  Header header;
  header.format = Format::kBmp;
  if (Little(bytes, 14, 4) == 12) {
    header.width = Little(bytes, 18, 2);
    header.height = Little(bytes, 20, 2);
  } else {
    header.width = static_cast<int32_t>(Little(bytes, 18, 4));
    header.height =
        std::abs(int64_t{static_cast<int32_t>(Little(bytes, 22, 4))});  // negative: top row first
  }
  // OpenCV writes a line to standard error for a file that ends early; most are found here.
  const uint32_t compression = Little(bytes, 14, 4) >= 40 ? Little(bytes, 30, 4) : 0;
  const int64_t bits = Little(bytes, 14, 4) == 12 ? Little(bytes, 24, 2) : Little(bytes, 28, 2);
  if (compression == 0 || compression == 3) {
    // Rows are filled up to four bytes. Sides are below 2^31 and bits below 2^16: the product fits.
    const int64_t row = (header.width * bits + 31) / 32 * 4;
    const int64_t data = static_cast<int64_t>(bytes.size()) - Little(bytes, 10, 4);
    if (header.width > 0 && header.height > 0 && row > 0 && data / row < header.height) {
      return NotAPicture("a BMP that is cut off");
    }
  }
  return header;
}

absl::StatusOr<Header> WebpHeader(absl::string_view bytes) {
  const absl::Status cut = NotAPicture("a WebP whose header is cut off");
  if (bytes.size() < 32) return cut;  // what OpenCV wants to see
  if (Little(bytes, 4, 4) > bytes.size() - 8) return NotAPicture("a WebP that is cut off");
  Header header;
  header.format = Format::kWebp;
  const absl::string_view kind = bytes.substr(12, 4);
  if (kind == "VP8 ") {
    header.width = Little(bytes, 26, 2) & 0x3fff;
    header.height = Little(bytes, 28, 2) & 0x3fff;
  } else if (kind == "VP8L") {
    const uint32_t sides = Little(bytes, 21, 4);
    header.width = (sides & 0x3fff) + 1;
    header.height = (sides >> 14 & 0x3fff) + 1;
  } else if (kind == "VP8X") {
    header.width = Little(bytes, 24, 3) + 1;
    header.height = Little(bytes, 27, 3) + 1;
  } else {
    return cut;
  }
  size_t at = 12;
  while (at + 8 <= bytes.size()) {
    const size_t length = Little(bytes, at + 4, 4);
    if (length > bytes.size() - at - 8) break;
    if (bytes.substr(at, 4) == "EXIF") {
      header.orientation = OrientationInTiff(bytes.substr(at + 8, length));
      break;
    }
    at += 8 + length + length % 2;
  }
  return header;
}

absl::StatusOr<Header> ReadHeader(absl::string_view bytes) {
  if (absl::StartsWith(bytes, "\xff\xd8\xff")) return JpegHeader(bytes);
  if (absl::StartsWith(bytes, "\x89PNG\r\n\x1a\n")) return PngHeader(bytes);
  if (absl::StartsWith(bytes, "GIF87a") || absl::StartsWith(bytes, "GIF89a")) {
    if (bytes.size() < 13) return NotAPicture("a GIF whose header is cut off");
    Header header;
    header.format = Format::kGif;
    header.width = Little(bytes, 6, 2);
    header.height = Little(bytes, 8, 2);
    return header;
  }
  if (absl::StartsWith(bytes, "BM")) return BmpHeader(bytes);
  if (absl::StartsWith(bytes, "RIFF") && bytes.size() >= 12 && bytes.substr(8, 4) == "WEBP") {
    return WebpHeader(bytes);
  }
  return NotAPicture(
      absl::StrCat("its ", bytes.size(), " bytes begin as no JPEG, PNG, WebP, GIF or BMP does"));
}

absl::Status CheckSize(int64_t width, int64_t height, const DecodeLimits& limits) {
  if (width < 1 || height < 1)
    return NotAPicture(absl::StrCat(width, "x", height, " has no pixels"));
  if (width > limits.max_side || height > limits.max_side) {
    return NotAPicture(
        absl::StrCat(width, "x", height, "; a side may have at most ", limits.max_side, " pixels"));
  }
  if (width * height > limits.max_pixels) {
    return NotAPicture(absl::StrCat(width, "x", height, " is ", width * height, " pixels; at most ",
                                    limits.max_pixels));
  }
  return absl::OkStatus();
}

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
      500;  // a progressive picture has about 10; each costs a pass over all of it

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

absl::StatusOr<RgbImage> DecodeJpeg(absl::string_view bytes, const DecodeLimits& limits) {
  auto decoder = std::make_unique<JpegDecoder>(bytes);
  const auto broken = [&] {
    return NotAPicture(absl::StrCat("broken JPEG: ", decoder->message()));
  };
  if (!decoder->ReadHeader()) return broken();
  RETURN_IF_ERROR(CheckSize(decoder->width(), decoder->height(), limits));
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

// The first picture of the file on its canvas, whose rest has the transparent colour, or colour 0,
// as Pillow does.
absl::StatusOr<RgbImage> DecodeGif(absl::string_view bytes, const DecodeLimits& limits) {
  int error = 0;
  absl::string_view rest = bytes;
  GifFileType* gif = DGifOpen(
      &rest,
      [](GifFileType* file, GifByteType* out, int size) {
        auto& source = *static_cast<absl::string_view*>(file->UserData);
        const size_t count = std::min(source.size(), static_cast<size_t>(size));
        std::memcpy(out, source.data(), count);
        source.remove_prefix(count);
        return static_cast<int>(count);
      },
      &error);
  const auto broken = [&] {
    const char* text = GifErrorString(gif != nullptr ? gif->Error : error);
    return NotAPicture(absl::StrCat("broken GIF: ", text != nullptr ? text : "cut off"));
  };
  if (gif == nullptr) return broken();
  const absl::Cleanup closer = [&] { DGifCloseFile(gif, nullptr); };

  int transparent = 0;
  GifRecordType record = UNDEFINED_RECORD_TYPE;
  while (true) {
    if (DGifGetRecordType(gif, &record) == GIF_ERROR) return broken();
    if (record == IMAGE_DESC_RECORD_TYPE) break;
    if (record != EXTENSION_RECORD_TYPE) return NotAPicture("a GIF without a picture");
    int code = 0;
    GifByteType* block = nullptr;
    if (DGifGetExtension(gif, &code, &block) == GIF_ERROR) return broken();
    if (code == GRAPHICS_EXT_FUNC_CODE && block != nullptr && block[0] >= 4 &&
        (block[1] & 1) != 0) {
      transparent = block[4];
    }
    while (block != nullptr) {
      if (DGifGetExtensionNext(gif, &block) == GIF_ERROR) return broken();
    }
  }
  if (DGifGetImageDesc(gif) == GIF_ERROR) return broken();
  const GifImageDesc& frame = gif->Image;
  RETURN_IF_ERROR(CheckSize(frame.Width, frame.Height, limits));
  const ColorMapObject* colours = frame.ColorMap != nullptr ? frame.ColorMap : gif->SColorMap;
  if (colours == nullptr) return NotAPicture("a GIF without a colour table");

  std::array<std::array<uint8_t, 3>, 256> table{};
  for (int i = 0; i < std::min(colours->ColorCount, 256); ++i) {
    table[static_cast<size_t>(i)] = {colours->Colors[i].Red, colours->Colors[i].Green,
                                     colours->Colors[i].Blue};
  }
  RgbImage image = BlankImage(gif->SWidth, gif->SHeight, 3);
  const auto put = [&](int x, int y, int index) {
    if (x < 0 || y < 0 || x >= image.width || y >= image.height) return;
    const size_t at =
        (static_cast<size_t>(y) * static_cast<size_t>(image.width) + static_cast<size_t>(x)) * 3;
    std::memcpy(image.pixels.data() + at, table[static_cast<size_t>(index)].data(), 3);
  };
  for (int y = 0; y < image.height; ++y) {
    for (int x = 0; x < image.width; ++x) put(x, y, transparent);
  }
  struct Pass {
    int first, step;
  };
  const std::vector<Pass> passes = frame.Interlace
                                       ? std::vector<Pass>{{0, 8}, {4, 8}, {2, 4}, {1, 2}}
                                       : std::vector<Pass>{{0, 1}};
  std::vector<GifPixelType> line(static_cast<size_t>(frame.Width));
  for (const Pass& pass : passes) {
    for (int y = pass.first; y < frame.Height; y += pass.step) {
      if (DGifGetLine(gif, line.data(), frame.Width) == GIF_ERROR) return broken();
      for (int x = 0; x < frame.Width; ++x) {
        put(frame.Left + x, frame.Top + y, line[static_cast<size_t>(x)]);
      }
    }
  }
  return image;
}

// A 16-bit sample as 8 bits, 255 being 65535, rounded.
uint8_t To8(uint16_t value) { return static_cast<uint8_t>((value + 128) / 257); }

// libpng behind calls that return false instead of leaping, as JpegDecoder. Gives grey or RGB, with
// or without alpha, of 8 or 16 bits.
class PngDecoder {
 public:
  explicit PngDecoder(absl::string_view bytes) : rest_(bytes) {
    png_ = png_create_read_struct(
        PNG_LIBPNG_VER_STRING, this,
        [](png_structp png, png_const_charp message) {
          auto* self = static_cast<PngDecoder*>(png_get_error_ptr(png));
          std::snprintf(self->message_, sizeof(self->message_), "%s", message);
          png_longjmp(png, 1);
        },
        [](png_structp, png_const_charp) {});
    if (png_ == nullptr) return;
    info_ = png_create_info_struct(png_);
    png_set_read_fn(png_, this, [](png_structp png, png_bytep out, size_t size) {
      auto* self = static_cast<PngDecoder*>(png_get_io_ptr(png));
      if (size > self->rest_.size()) png_error(png, "the file is cut off");
      std::memcpy(out, self->rest_.data(), size);
      self->rest_.remove_prefix(size);
    });
  }
  ~PngDecoder() { png_destroy_read_struct(&png_, &info_, nullptr); }
  PngDecoder(const PngDecoder&) = delete;
  PngDecoder& operator=(const PngDecoder&) = delete;

  // Up to the first row.
  bool Start() {
    if (png_ == nullptr || info_ == nullptr || setjmp(png_jmpbuf(png_)) != 0) return false;
    png_read_info(png_, info_);
    const int colours = png_get_color_type(png_, info_);
    if (colours == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png_);
    if (colours == PNG_COLOR_TYPE_GRAY) png_set_expand_gray_1_2_4_to_8(png_);
    png_set_strip_alpha(png_);
    passes_ = png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    return true;
  }
  // All rows of the picture; interlaced files come in several passes over them.
  bool Read(uint8_t* pixels, size_t stride) {
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    const png_uint_32 rows = png_get_image_height(png_, info_);
    for (int pass = 0; pass < passes_; ++pass) {
      for (png_uint_32 y = 0; y < rows; ++y) png_read_row(png_, pixels + y * stride, nullptr);
    }
    png_read_end(png_, nullptr);
    return true;
  }
  int channels() const { return png_get_channels(png_, info_); }
  int bits() const { return png_get_bit_depth(png_, info_); }
  size_t stride() const { return png_get_rowbytes(png_, info_); }
  const char* message() const { return message_; }

 private:
  absl::string_view rest_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  int passes_ = 1;
  char message_[128] = "";
};

absl::StatusOr<RgbImage> DecodePng(absl::string_view bytes, const Header& header) {
  auto decoder = std::make_unique<PngDecoder>(bytes);
  const auto broken = [&] { return NotAPicture(absl::StrCat("broken PNG: ", decoder->message())); };
  if (!decoder->Start()) return broken();
  const int channels = decoder->channels();
  if ((channels != 1 && channels != 3) || (decoder->bits() != 8 && decoder->bits() != 16)) {
    return NotAPicture(
        absl::StrCat("a PNG of ", channels, " channels of ", decoder->bits(), " bits"));
  }
  RgbImage image =
      BlankImage(static_cast<int>(header.width), static_cast<int>(header.height), channels);
  const size_t row = static_cast<size_t>(header.width) * static_cast<size_t>(channels);
  if (decoder->stride() != row * static_cast<size_t>(decoder->bits()) / 8) {
    return NotAPicture("a PNG whose rows don't have its header's width");
  }
  if (decoder->bits() == 8) {
    if (!decoder->Read(image.pixels.data(), row)) return broken();
    return image;
  }
  std::vector<uint8_t> wide(image.pixels.size() * 2);
  if (!decoder->Read(wide.data(), row * 2)) return broken();
  for (size_t i = 0; i < image.pixels.size(); ++i) {
    image.pixels[i] = To8(static_cast<uint16_t>(wide[2 * i] << 8 | wide[2 * i + 1]));
  }
  return image;
}

absl::StatusOr<RgbImage> DecodeWithOpenCv(absl::string_view bytes, const Header& header) {
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
absl::StatusOr<RgbImage> DecodeStored(absl::string_view bytes, const Header& header,
                                      const DecodeLimits& limits) {
  switch (header.format) {
    case Format::kJpeg:
      return DecodeJpeg(bytes, limits);
    case Format::kPng:
      return DecodePng(bytes, header);
    case Format::kGif:
      return DecodeGif(bytes, limits);
    case Format::kBmp:
    case Format::kWebp:
      return DecodeWithOpenCv(bytes, header);
  }
  return absl::InternalError("picture: a format without a decoder");
}

// Turns the picture upright (EXIF 2.3, 4.6.4, tag 274).
RgbImage Upright(RgbImage image, int orientation) {
  if (orientation <= 1) return image;
  const bool swapped = orientation >= 5;
  const int width = image.width;
  const int height = image.height;
  RgbImage turned = BlankImage(swapped ? height : width, swapped ? width : height, image.channels);
  const auto channels = static_cast<size_t>(image.channels);
  const bool flip_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool flip_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  uint8_t* to = turned.pixels.data();
  for (int y = 0; y < turned.height; ++y) {
    for (int x = 0; x < turned.width; ++x) {
      int from_x = swapped ? y : x;
      int from_y = swapped ? x : y;
      if (flip_x) from_x = width - 1 - from_x;
      if (flip_y) from_y = height - 1 - from_y;
      const size_t from =
          (static_cast<size_t>(from_y) * static_cast<size_t>(width) + static_cast<size_t>(from_x)) *
          channels;
      for (size_t c = 0; c < channels; ++c) *to++ = image.pixels[from + c];
    }
  }
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
  ASSIGN_OR_RETURN(const Header header, ReadHeader(bytes));
  if (header.format != Format::kJpeg) {
    RETURN_IF_ERROR(CheckSize(header.width, header.height, limits));
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
