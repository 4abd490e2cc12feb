// Text of unknown origin, taken apart.
#ifndef PYRAMID_PROTO_BASE_UTF8_H_
#define PYRAMID_PROTO_BASE_UTF8_H_

#include <cstddef>

#include "absl/strings/string_view.h"

namespace pyramid {

// How many bytes the well-formed character of UTF-8 takes that begins `text`, which isn't empty; 0:
// none does.
inline size_t Utf8Length(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // Longer than need be, surrogates, beyond U+10FFFF.
  if ((first == 0xe0 && byte(1) < 0xa0) || (first == 0xed && byte(1) > 0x9f) ||
      (first == 0xf0 && byte(1) < 0x90) || (first == 0xf4 && byte(1) > 0x8f)) {
    return 0;
  }
  return length;
}

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_UTF8_H_
