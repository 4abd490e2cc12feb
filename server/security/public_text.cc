#include "server/security/public_text.h"

#include <algorithm>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

bool InPath(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '/' || c == '.' || c == '_' ||
         c == '-' || c == '+' || c == '~' || c == '@' || c == '%' ||
         static_cast<unsigned char>(c) >= 0x80;
}

// Where a path may begin: not inside a word ("images/s", "and/or", "https://…").
bool MayPrecedePath(char c) { return !InPath(c) && c != '>' && c != ':'; }

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsHexDigit(char c) { return absl::ascii_isxdigit(static_cast<unsigned char>(c)); }

// The end of ":<port>" at `at`; `at` itself if there is none.
size_t SkipPort(absl::string_view text, size_t at) {
  if (at >= text.size() || text[at] != ':') return at;
  size_t end = at + 1;
  while (end < text.size() && IsDigit(text[end])) ++end;
  return end == at + 1 ? at : end;
}

// The end of a dotted quad with or without a port; `at` if there is none.
size_t SkipIpv4(absl::string_view text, size_t at) {
  size_t end = at;
  for (int part = 0; part < 4; ++part) {
    if (part > 0) {
      if (end >= text.size() || text[end] != '.') return at;
      ++end;
    }
    const size_t begin = end;
    while (end < text.size() && IsDigit(text[end])) ++end;
    int value = 0;
    if (end - begin < 1 || end - begin > 3 ||
        !absl::SimpleAtoi(text.substr(begin, end - begin), &value) || value > 255) {
      return at;
    }
  }
  // "1.2.3.4.5" is a version.
  if (end < text.size() && text[end] == '.' && end + 1 < text.size() && IsDigit(text[end + 1])) {
    return at;
  }
  return SkipPort(text, end);
}

// "[::1]:8001"; two colons at least, or it is something else in brackets.
size_t SkipIpv6(absl::string_view text, size_t at) {
  if (text[at] != '[') return at;
  size_t end = at + 1;
  int colons = 0;
  while (end < text.size() &&
         (IsHexDigit(text[end]) || text[end] == ':' || text[end] == '.' || text[end] == '%')) {
    if (text[end] == ':') ++colons;
    ++end;
  }
  if (colons < 2 || end >= text.size() || text[end] != ']') return at;
  return SkipPort(text, end + 1);
}

// "0x7f12ab34": six digits and more.
size_t SkipPointer(absl::string_view text, size_t at) {
  if (!absl::StartsWith(text.substr(at), "0x")) return at;
  size_t end = at + 2;
  while (end < text.size() && IsHexDigit(text[end])) ++end;
  return end - at >= 8 ? end : at;
}

// "localhost:8001".
size_t SkipLocalhost(absl::string_view text, size_t at) {
  constexpr absl::string_view kName = "localhost";
  if (!absl::StartsWith(text.substr(at), kName)) return at;
  return SkipPort(text, at + kName.size());
}

bool InWord(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.';
}

}  // namespace

std::string HidePaths(absl::string_view text) {
  std::string out;
  size_t at = 0;
  while (at < text.size()) {
    const bool begins =
        text[at] == '/' && (at == 0 || MayPrecedePath(text[at - 1]) ||
                            // "ipv4:/…" isn't, "error:/usr/…" is a path
                            (text[at - 1] == ':' && at + 1 < text.size() && text[at + 1] != '/'));
    if (!begins) {
      out += text[at++];
      continue;
    }
    size_t end = at;
    while (end < text.size() && InPath(text[end])) ++end;
    absl::string_view path = text.substr(at, end - at);
    // A full stop that ends the sentence isn't the path's.
    while (!path.empty() && path.back() == '.') path.remove_suffix(1);
    end = at + path.size();
    const size_t slash = path.rfind('/');
    if (path.size() < 2) {
      absl::StrAppend(&out, path);  // a lone slash
    } else if (slash == 0) {
      absl::StrAppend(&out, "...", path);  // "/tmp": the place alone
    } else {
      absl::StrAppend(&out, "...", path.substr(slash));
    }
    at = std::max(end, at + 1);
  }
  return out;
}

std::string HideAddresses(absl::string_view text) {
  std::string out;
  size_t at = 0;
  while (at < text.size()) {
    size_t end = at;
    if (at == 0 || !InWord(text[at - 1])) {
      for (const auto skip : {SkipIpv4, SkipIpv6, SkipPointer, SkipLocalhost}) {
        if (end == at) end = skip(text, at);
      }
    }
    if (end > at) {
      out += "<address>";
      at = end;
    } else {
      out += text[at++];
    }
  }
  return out;
}

PublicText::PublicText(const std::filesystem::path& data) {
  std::error_code error;
  data_ = std::filesystem::weakly_canonical(data, error).string();
  if (error) data_ = data.string();
  while (data_.size() > 1 && data_.back() == '/') data_.pop_back();
}

std::string PublicText::HideData(absl::string_view text) const {
  if (data_.size() < 2) return std::string(text);
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t end = at + data_.size();
    const bool here = absl::StartsWith(text.substr(at), data_) &&
                      (end == text.size() || text[end] == '/' || !InPath(text[end]));
    if (here) {
      out += "<data>";
      at = end;
    } else {
      out += text[at++];
    }
  }
  return out;
}

std::string PublicText::ForPictures(absl::string_view text) const {
  return HideAddresses(HidePaths(HideData(text)));
}

std::string PublicText::ForJobs(absl::string_view text) const {
  return HideAddresses(HideData(text));
}

}  // namespace pyramid
