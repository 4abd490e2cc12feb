#include "model/picture_header.h"

#include <algorithm>
#include <cstdlib>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

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
PictureHeader JpegHeader(absl::string_view bytes) {
  PictureHeader header;
  header.format = PictureFormat::kJpeg;
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

absl::StatusOr<PictureHeader> PngHeader(absl::string_view bytes) {
  if (bytes.size() < 33 || bytes.substr(12, 4) != "IHDR" || Big(bytes, 8, 4) != 13) {
    return NotAPicture("a PNG whose header is cut off");
  }
  PictureHeader header;
  header.format = PictureFormat::kPng;
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

absl::StatusOr<PictureHeader> BmpHeader(absl::string_view bytes) {
  if (bytes.size() < 26 || bytes.size() < 14 + uint64_t{Little(bytes, 14, 4)}) {
    return NotAPicture("a BMP whose header is cut off");
  }
  PictureHeader header;
  header.format = PictureFormat::kBmp;
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
  if (compression > 3) return NotAPicture(absl::StrCat("a BMP of compression ", compression));
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

absl::StatusOr<PictureHeader> WebpHeader(absl::string_view bytes) {
  const absl::Status cut = NotAPicture("a WebP whose header is cut off");
  if (bytes.size() < 32) return cut;  // what OpenCV wants to see
  if (Little(bytes, 4, 4) > bytes.size() - 8) return NotAPicture("a WebP that is cut off");
  PictureHeader header;
  header.format = PictureFormat::kWebp;
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

}  // namespace

absl::Status NotAPicture(absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("picture: ", what));
}

absl::StatusOr<PictureHeader> ReadPictureHeader(absl::string_view bytes) {
  if (absl::StartsWith(bytes, "\xff\xd8\xff")) return JpegHeader(bytes);
  if (absl::StartsWith(bytes, "\x89PNG\r\n\x1a\n")) return PngHeader(bytes);
  if (absl::StartsWith(bytes, "GIF87a") || absl::StartsWith(bytes, "GIF89a")) {
    if (bytes.size() < 13) return NotAPicture("a GIF whose header is cut off");
    PictureHeader header;
    header.format = PictureFormat::kGif;
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

absl::Status CheckPictureSize(int64_t width, int64_t height, size_t bytes,
                              const DecodeLimits& limits) {
  if (width < 1 || height < 1)
    return NotAPicture(absl::StrCat(width, "x", height, " has no pixels"));
  if (width > limits.max_side || height > limits.max_side) {
    return NotAPicture(
        absl::StrCat(width, "x", height, "; a side may have at most ", limits.max_side, " pixels"));
  }
  const int64_t pixels = width * height;
  if (pixels > limits.max_pixels) {
    return NotAPicture(
        absl::StrCat(width, "x", height, " is ", pixels, " pixels; at most ", limits.max_pixels));
  }
  if (pixels > kSmallPicture && (pixels - 1) / std::max<int64_t>(1, limits.max_pixels_per_byte) >=
                                    static_cast<int64_t>(bytes)) {
    return NotAPicture(absl::StrCat(width, "x", height, " in ", bytes, " bytes; at most ",
                                    limits.max_pixels_per_byte, " pixels a byte"));
  }
  return absl::OkStatus();
}

}  // namespace pyramid
