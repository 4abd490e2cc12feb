#include "server/training/text.h"

#include <algorithm>
#include <fstream>

#include "absl/strings/str_split.h"

namespace pyramid {
namespace {

constexpr std::streamoff kTail = 32 << 10;

// Length of the UTF-8 sequence at the start of `text`; 0: not one.
size_t SequenceLength(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // Too long a form, a surrogate, beyond U+10FFFF.
  if (first == 0xe0 && byte(1) < 0xa0) return 0;
  if (first == 0xed && byte(1) > 0x9f) return 0;
  if (first == 0xf0 && byte(1) < 0x90) return 0;
  if (first == 0xf4 && byte(1) > 0x8f) return 0;
  return length;
}

}  // namespace

std::string CleanLine(absl::string_view text, size_t longest) {
  std::string clean;
  while (!text.empty()) {
    const size_t length = SequenceLength(text);
    const absl::string_view piece = length == 0 ? "?" : text.substr(0, length);
    const unsigned char first = static_cast<unsigned char>(text[0]);
    if (clean.size() + piece.size() > longest) break;
    if (length != 1 || first == '\t' || (first >= 0x20 && first != 0x7f)) {
      clean.append(piece.data(), piece.size());
    } else {
      clean += ' ';
    }
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return clean;
}

std::vector<std::string> LastLines(const std::filesystem::path& file, int count) {
  std::ifstream in(file, std::ios::binary | std::ios::ate);
  if (!in) return {};
  const std::streamoff size = in.tellg();
  const std::streamoff from = std::max<std::streamoff>(0, size - kTail);
  in.seekg(from);
  std::string tail(static_cast<size_t>(size - from), '\0');
  in.read(tail.data(), size - from);
  tail.resize(static_cast<size_t>(std::max<std::streamsize>(0, in.gcount())));

  std::vector<std::string> lines;
  for (const absl::string_view line : absl::StrSplit(tail, '\n', absl::SkipEmpty())) {
    lines.push_back(CleanLine(line, 500));
  }
  if (lines.size() > static_cast<size_t>(count)) lines.erase(lines.begin(), lines.end() - count);
  return lines;
}

}  // namespace pyramid
