#include "client/npy.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

// "\x93NUMPY", major, minor, header length (u16 or u32, little-endian), header, data.
// numpy.lib.format.
constexpr absl::string_view kMagic = "\x93NUMPY";

uint32_t LittleEndian(absl::string_view bytes) {
  uint32_t value = 0;
  for (size_t i = bytes.size(); i > 0; --i) {
    value = value << 8 | static_cast<unsigned char>(bytes[i - 1]);
  }
  return value;
}

// The text after 'key': in a Python dict literal.
absl::StatusOr<absl::string_view> ValueOf(absl::string_view header, absl::string_view key) {
  for (const char quote : {'\'', '"'}) {
    const std::string quoted = absl::StrCat(std::string(1, quote), key, std::string(1, quote));
    const size_t at = header.find(quoted);
    if (at == absl::string_view::npos) continue;
    absl::string_view rest = absl::StripLeadingAsciiWhitespace(header.substr(at + quoted.size()));
    if (!absl::StartsWith(rest, ":")) break;
    return absl::StripLeadingAsciiWhitespace(rest.substr(1));
  }
  return absl::InvalidArgumentError(absl::StrCat(".npy: the header has no ", key));
}

absl::Status CheckDtype(absl::string_view header) {
  ASSIGN_OR_RETURN(const absl::string_view value, ValueOf(header, "descr"));
  if (absl::StartsWith(value, "'<f4'") || absl::StartsWith(value, "\"<f4\"")) {
    return absl::OkStatus();
  }
  const std::string shown(value.substr(0, std::min<size_t>(value.find(','), 40)));
  return absl::InvalidArgumentError(absl::StrCat(
      ".npy: the dtype is ", shown, "; use float32, little-endian ('<f4'): array.astype('<f4')"));
}

absl::Status CheckOrder(absl::string_view header) {
  ASSIGN_OR_RETURN(const absl::string_view value, ValueOf(header, "fortran_order"));
  if (absl::StartsWith(value, "False")) return absl::OkStatus();
  if (absl::StartsWith(value, "True")) {
    return absl::InvalidArgumentError(
        ".npy: the array is in Fortran order; save numpy.ascontiguousarray(array)");
  }
  return absl::InvalidArgumentError(".npy: fortran_order is neither True nor False");
}

absl::StatusOr<std::vector<int64_t>> ReadShape(absl::string_view header) {
  ASSIGN_OR_RETURN(const absl::string_view value, ValueOf(header, "shape"));
  const size_t end = value.find(')');
  if (!absl::StartsWith(value, "(") || end == absl::string_view::npos) {
    return absl::InvalidArgumentError(".npy: the shape isn't a tuple");
  }
  std::vector<int64_t> shape;
  for (absl::string_view part : absl::StrSplit(value.substr(1, end - 1), ',')) {
    part = absl::StripAsciiWhitespace(part);
    if (part.empty()) continue;  // after the last comma
    int64_t side = 0;
    if (!absl::SimpleAtoi(part, &side) || side < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(".npy: the shape holds \"", part.substr(0, 40), "\""));
    }
    shape.push_back(side);
  }
  return shape;
}

}  // namespace

absl::StatusOr<NpyTensor> ParseNpy(absl::string_view file) {
  if (!absl::StartsWith(file, kMagic)) {
    return absl::InvalidArgumentError(".npy: not a NumPy array file (its first bytes differ)");
  }
  if (file.size() < kMagic.size() + 2) return absl::DataLossError(".npy: ends in its first bytes");
  const int major = static_cast<unsigned char>(file[kMagic.size()]);
  if (major != 1 && major != 2) {
    return absl::InvalidArgumentError(
        absl::StrCat(".npy: header version ", major, "; versions 1 and 2 are read"));
  }
  const size_t length_at = kMagic.size() + 2;
  const size_t length_bytes = major == 1 ? 2 : 4;
  if (file.size() < length_at + length_bytes) {
    return absl::DataLossError(".npy: ends in its first bytes");
  }
  const size_t header_bytes = LittleEndian(file.substr(length_at, length_bytes));
  const size_t header_at = length_at + length_bytes;
  if (header_bytes > file.size() - header_at) {
    return absl::DataLossError(absl::StrCat(".npy: the header should have ", header_bytes,
                                            " bytes, the file ends after ",
                                            file.size() - header_at));
  }
  const absl::string_view header = file.substr(header_at, header_bytes);
  RETURN_IF_ERROR(CheckDtype(header));
  RETURN_IF_ERROR(CheckOrder(header));
  ASSIGN_OR_RETURN(const std::vector<int64_t> shape, ReadShape(header));
  const std::string shown = absl::StrCat("(", absl::StrJoin(shape, ", "), ")");
  if (shape.size() != 4) {
    return absl::InvalidArgumentError(
        absl::StrCat(".npy: the shape is ", shown,
                     "; use four dimensions: (pictures, channels, height, width)"));
  }
  const absl::string_view data = file.substr(header_at + header_bytes);
  // The product is compared by division, so that it can't overflow.
  uint64_t left = data.size() / sizeof(float);
  for (const int64_t side : shape) {
    if (side < 1 || side > std::numeric_limits<int>::max()) {
      return absl::InvalidArgumentError(
          absl::StrCat(".npy: the shape is ", shown, "; every dimension must be at least 1"));
    }
    left /= static_cast<uint64_t>(side);
  }
  if (left == 0) {
    return absl::DataLossError(absl::StrCat(".npy: truncated: ", data.size(),
                                            " bytes of data are too few for shape ", shown));
  }
  const size_t count = static_cast<size_t>(shape[0] * shape[1] * shape[2] * shape[3]);
  if (data.size() != count * sizeof(float)) {
    return absl::DataLossError(absl::StrCat(".npy: ", data.size(), " bytes of data; shape ", shown,
                                            " takes ", count * sizeof(float)));
  }
  NpyTensor tensor{.batch = static_cast<int>(shape[0]),
                   .channels = static_cast<int>(shape[1]),
                   .height = static_cast<int>(shape[2]),
                   .width = static_cast<int>(shape[3])};
  tensor.values.resize(count);
  std::memcpy(tensor.values.data(), data.data(), data.size());
  return tensor;
}

}  // namespace pyramid
