#include "server/training/text.h"

#include <algorithm>
#include <fstream>

#include "absl/strings/str_split.h"
#include "proto/base/utf8.h"

namespace pyramid {
namespace {

constexpr std::streamoff kTail = 32 << 10;

}  // namespace

std::string CleanLine(absl::string_view text, size_t longest) {
  std::string clean;
  while (!text.empty()) {
    const size_t length = Utf8Length(text);
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
