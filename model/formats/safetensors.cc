#include "model/formats/safetensors.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr absl::string_view kMetadata = "__metadata__";
constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeader = 100'000'000;  // safetensors, lib.rs: MAX_HEADER_SIZE

constexpr std::array<std::pair<absl::string_view, int64_t>, 10> kElementSizes = {{{"F32", 4},
                                                                                  {"F64", 8},
                                                                                  {"F16", 2},
                                                                                  {"BF16", 2},
                                                                                  {"I64", 8},
                                                                                  {"I32", 4},
                                                                                  {"I16", 2},
                                                                                  {"I8", 1},
                                                                                  {"U8", 1},
                                                                                  {"BOOL", 1}}};

absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("safetensors: ", what));
}

absl::Status Malformed(absl::string_view tensor, absl::string_view what) {
  return Malformed(absl::StrCat("tensor \"", tensor, "\": ", what));
}

// Bytes of a tensor; nothing if a dimension is negative or the product overflows.
std::optional<int64_t> ByteSize(const std::vector<int64_t>& shape, int64_t element_size) {
  int64_t size = element_size;
  for (const int64_t dimension : shape) {
    if (dimension < 0 || __builtin_mul_overflow(size, dimension, &size)) return std::nullopt;
  }
  return size;
}

// A whole number that is not negative; nothing for anything else.
std::optional<int64_t> Whole(const nlohmann::json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const uint64_t number = value.get<uint64_t>();
  if (number > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
  return static_cast<int64_t>(number);
}

// One entry of the header; `data` is everything behind the header.
absl::StatusOr<TensorBytes> ParseTensor(const std::string& name, const nlohmann::json& entry,
                                        absl::string_view data) {
  if (!entry.is_object()) return Malformed(name, "its entry isn't an object");
  const auto dtype = entry.find("dtype");
  const auto shape = entry.find("shape");
  const auto offsets = entry.find("data_offsets");
  if (dtype == entry.end() || !dtype->is_string()) return Malformed(name, "no dtype");
  if (shape == entry.end() || !shape->is_array()) return Malformed(name, "no shape");
  if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2) {
    return Malformed(name, "no data_offsets of two numbers");
  }
  TensorBytes tensor;
  tensor.name = name;
  tensor.dtype = dtype->get<std::string>();
  const int64_t element_size = SafetensorsElementSize(tensor.dtype);
  if (element_size == 0) {
    return Malformed(name, absl::StrCat("dtype \"", tensor.dtype, "\" isn't known"));
  }
  for (const nlohmann::json& dimension : *shape) {
    const std::optional<int64_t> whole = Whole(dimension);
    if (!whole) return Malformed(name, "a dimension isn't a whole number");
    tensor.shape.push_back(*whole);
  }
  const std::optional<int64_t> begin = Whole((*offsets)[0]);
  const std::optional<int64_t> end = Whole((*offsets)[1]);
  if (!begin || !end || *begin > *end || *end > static_cast<int64_t>(data.size())) {
    return Malformed(name, absl::StrCat("data_offsets ", offsets->dump(), " don't lie in the ",
                                        data.size(), " bytes of data"));
  }
  const std::optional<int64_t> size = ByteSize(tensor.shape, element_size);
  if (!size || *size != *end - *begin) {
    return Malformed(name, absl::StrCat("shape ", shape->dump(), " of ", tensor.dtype,
                                        " doesn't fit its ", *end - *begin, " bytes"));
  }
  tensor.data = data.substr(static_cast<size_t>(*begin), static_cast<size_t>(*end - *begin));
  return tensor;
}

}  // namespace

int64_t SafetensorsElementSize(absl::string_view dtype) {
  for (const auto& [name, size] : kElementSizes) {
    if (name == dtype) return size;
  }
  return 0;
}

const TensorBytes* SafetensorsView::Find(absl::string_view name) const {
  for (const TensorBytes& tensor : tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

absl::StatusOr<SafetensorsView> ParseSafetensors(absl::string_view file) {
  if (file.size() < kLengthBytes) {
    return Malformed(absl::StrCat("the file has ", file.size(), " bytes, too few for a header"));
  }
  uint64_t header_size = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    header_size |= uint64_t{static_cast<unsigned char>(file[i])} << (8 * i);
  }
  if (header_size > kMaxHeader || header_size > file.size() - kLengthBytes) {
    return Malformed(absl::StrCat("the header's length, ", header_size, ", is more than the ",
                                  file.size() - kLengthBytes, " bytes that follow or than ",
                                  kMaxHeader));
  }
  const absl::string_view header_text = file.substr(kLengthBytes, static_cast<size_t>(header_size));
  const absl::string_view data = file.substr(kLengthBytes + static_cast<size_t>(header_size));
  const nlohmann::json header =
      nlohmann::json::parse(header_text.begin(), header_text.end(), nullptr, false);
  if (!header.is_object()) return Malformed("the header isn't a JSON object");

  SafetensorsView view;
  for (const auto& [name, entry] : header.items()) {
    if (name == kMetadata) {
      if (!entry.is_object()) return Malformed("__metadata__ isn't an object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) {
          return Malformed(absl::StrCat("__metadata__.", key, " isn't a text"));
        }
        view.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    ASSIGN_OR_RETURN(TensorBytes tensor, ParseTensor(name, entry, data));
    view.tensors.push_back(std::move(tensor));
  }
  // Tensors cover the data without overlap or gap, as the format's own reader demands. Empty
  // tensors go before what starts there.
  std::stable_sort(
      view.tensors.begin(), view.tensors.end(), [](const TensorBytes& a, const TensorBytes& b) {
        return std::pair(a.data.data(), a.data.size()) < std::pair(b.data.data(), b.data.size());
      });
  const char* next = data.data();
  for (const TensorBytes& tensor : view.tensors) {
    if (tensor.data.data() != next) {
      return Malformed(
          tensor.name,
          absl::StrCat("begins at byte ", tensor.data.data() - data.data(),
                       " of the data where the one before ends at ", next - data.data()));
    }
    next += tensor.data.size();
  }
  if (next != data.data() + data.size()) {
    return Malformed(absl::StrCat("the tensors end at byte ", next - data.data(), " of ",
                                  data.size(), " bytes of data"));
  }
  return view;
}

absl::StatusOr<std::string> SerializeSafetensors(
    const std::vector<TensorBytes>& tensors, const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[std::string(kMetadata)] = metadata;
  std::set<absl::string_view> names;
  size_t offset = 0;
  for (const TensorBytes& tensor : tensors) {
    if (tensor.name == kMetadata || !names.insert(tensor.name).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("safetensors: the name \"", tensor.name, "\" is taken"));
    }
    const int64_t element_size = SafetensorsElementSize(tensor.dtype);
    if (element_size == 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "safetensors: tensor \"", tensor.name, "\": dtype \"", tensor.dtype, "\" isn't known"));
    }
    const std::optional<int64_t> size = ByteSize(tensor.shape, element_size);
    if (!size || static_cast<size_t>(*size) != tensor.data.size()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "safetensors: tensor \"", tensor.name, "\": shape [", absl::StrJoin(tensor.shape, ", "),
          "] of ", tensor.dtype, " doesn't fit its ", tensor.data.size(), " bytes"));
    }
    // push_back, not operator[]: a look-up in an ordered_json walks all the keys before.
    header.get_ref<nlohmann::ordered_json::object_t&>().emplace_back(
        tensor.name,
        nlohmann::ordered_json{{"dtype", tensor.dtype},
                               {"shape", tensor.shape},
                               {"data_offsets", {offset, offset + tensor.data.size()}}});
    offset += tensor.data.size();
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(
        absl::StrCat("safetensors: a name or metadata isn't UTF-8: ", e.what()));
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  if (text.size() > kMaxHeader) {
    return absl::InvalidArgumentError(
        absl::StrCat("safetensors: the header has ", text.size(), " bytes; at most ", kMaxHeader));
  }
  std::string file;
  file.reserve(kLengthBytes + text.size() + offset);
  for (size_t i = 0; i < kLengthBytes; ++i) {
    file += static_cast<char>((uint64_t{text.size()} >> (8 * i)) & 0xff);
  }
  file += text;
  for (const TensorBytes& tensor : tensors) file.append(tensor.data.data(), tensor.data.size());
  return file;
}

}  // namespace pyramid
