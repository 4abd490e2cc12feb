#include "model/formats/safetensors.h"

#include <algorithm>
#include <array>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/formats/weight_file.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr absl::string_view kMetadata = "__metadata__";
constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeader = uint64_t{16} << 20;  // a PVT v2's header has 0.1 MB

constexpr std::array<std::pair<absl::string_view, int64_t>, 13> kElementSizes = {{{"F32", 4},
                                                                                  {"F64", 8},
                                                                                  {"F16", 2},
                                                                                  {"BF16", 2},
                                                                                  {"I64", 8},
                                                                                  {"I32", 4},
                                                                                  {"I16", 2},
                                                                                  {"I8", 1},
                                                                                  {"U64", 8},
                                                                                  {"U32", 4},
                                                                                  {"U16", 2},
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

// One tensor's entry of the header, as it is read.
struct Entry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> offsets;
  bool has_dtype = false;
  bool has_shape = false;
  bool has_offsets = false;
  bool whole_shape = true;    // all dimensions are whole numbers
  bool whole_offsets = true;  // the offsets too
};

// Takes the header's JSON apart as it is read: no more memory than what is kept of it. Fields of an
// entry that aren't known are skipped, as the format's own library does.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(std::function<absl::Status(Entry&)> take) : take_(std::move(take)) {}

  absl::Status status = absl::OkStatus();
  std::map<std::string, std::string> metadata;

  bool null() override { return Scalar(); }
  bool boolean(bool) override { return Scalar(); }
  bool number_integer(int64_t) override { return Number(std::nullopt); }
  bool number_unsigned(uint64_t number) override {
    if (number > static_cast<uint64_t>(INT64_MAX)) return Number(std::nullopt);
    return Number(static_cast<int64_t>(number));
  }
  bool number_float(double, const std::string&) override { return Number(std::nullopt); }
  bool binary(nlohmann::json::binary_t&) override { return Scalar(); }
  bool string(std::string& text) override {
    if (depth_ == 2 && in_metadata_) {
      if (metadata.size() >= kMaxMetadata) {
        return Fail(Malformed(absl::StrCat("__metadata__ has more than ", kMaxMetadata, " texts")));
      }
      metadata[field_] = std::move(text);
      return true;
    }
    if (depth_ == 2 && field_ == "dtype") {
      entry_.dtype = std::move(text);
      entry_.has_dtype = true;
      return true;
    }
    return Scalar();
  }

  bool start_object(size_t) override {
    if (depth_ == 0) {
      depth_ = 1;
      return true;
    }
    if (depth_ == 1) {
      in_metadata_ = entry_.name == kMetadata;
    } else if (!Nested()) {
      return false;
    }
    ++depth_;
    return true;
  }
  bool key(std::string& name) override {
    if (depth_ == 1) {
      entry_ = {};
      entry_.name = std::move(name);
    } else if (depth_ == 2) {
      field_ = std::move(name);
    }
    return true;
  }
  bool end_object() override {
    --depth_;
    if (depth_ != 1) return true;
    if (!in_metadata_) return Fail(take_(entry_));
    in_metadata_ = false;
    return true;
  }
  bool start_array(size_t) override {
    if (depth_ == 0) return Fail(Malformed("the header isn't a JSON object"));
    if (depth_ == 1) return Scalar();
    if (!Nested()) return false;
    if (depth_ == 2 && field_ == "shape") {
      entry_.shape.clear();
      entry_.has_shape = true;
    } else if (depth_ == 2 && field_ == "data_offsets") {
      entry_.offsets.clear();
      entry_.has_offsets = true;
    }
    ++depth_;
    return true;
  }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception&) override {
    return Fail(Malformed("the header isn't a JSON object"));
  }

 private:
  static constexpr size_t kMaxMetadata = 10'000;

  bool Fail(const absl::Status& why) {
    if (!why.ok()) status = why;
    return why.ok();
  }
  // A container within an entry or the metadata.
  bool Nested() {
    if (in_metadata_) {
      return Fail(Malformed(absl::StrCat("__metadata__.", field_, " isn't a text")));
    }
    if (depth_ == 3 && field_ == "shape") entry_.whole_shape = false;
    if (depth_ == 3 && field_ == "data_offsets") entry_.whole_offsets = false;
    return true;
  }
  // A value that means something only in an unknown field.
  bool Scalar() {
    if (depth_ == 0) return Fail(Malformed("the header isn't a JSON object"));
    if (depth_ == 1) {
      return Fail(entry_.name == kMetadata ? Malformed("__metadata__ isn't an object")
                                           : Malformed(entry_.name, "its entry isn't an object"));
    }
    return Nested();
  }
  bool Number(std::optional<int64_t> whole) {
    if (depth_ != 3 || in_metadata_) return Scalar();
    if (field_ == "shape") {
      entry_.whole_shape = entry_.whole_shape && whole.has_value();
      if (entry_.shape.size() >= kMaxTensorRank) {
        return Fail(
            Malformed(entry_.name, absl::StrCat("more than ", kMaxTensorRank, " dimensions")));
      }
      entry_.shape.push_back(whole.value_or(0));
    } else if (field_ == "data_offsets") {
      entry_.whole_offsets = entry_.whole_offsets && whole.has_value();
      if (entry_.offsets.size() < 3) entry_.offsets.push_back(whole.value_or(-1));
    }
    return true;
  }

  const std::function<absl::Status(Entry&)> take_;
  int depth_ = 0;  // 1: among the tensors, 2: in one's entry, 3: in a list of it
  bool in_metadata_ = false;
  Entry entry_;
  std::string field_;
};

// A tensor of the header; its bytes lie at [begin, end) of the data.
struct Place {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t begin = 0;
  int64_t end = 0;
};

absl::StatusOr<Place> CheckEntry(Entry& entry, int64_t data_bytes) {
  const std::string& name = entry.name;
  if (!entry.has_dtype) return Malformed(name, "no dtype");
  if (!entry.has_shape) return Malformed(name, "no shape");
  if (!entry.has_offsets || entry.offsets.size() != 2) {
    return Malformed(name, "no data_offsets of two numbers");
  }
  const int64_t element_size = SafetensorsElementSize(entry.dtype);
  if (element_size == 0) {
    return absl::InvalidArgumentError(absl::StrCat("safetensors: tensor \"", name, "\": dtype \"",
                                                   entry.dtype, "\" isn't known"));
  }
  if (!entry.whole_shape) return Malformed(name, "a dimension isn't a whole number");
  const int64_t begin = entry.offsets[0];
  const int64_t end = entry.offsets[1];
  if (!entry.whole_offsets || begin > end || end > data_bytes) {
    return Malformed(name, absl::StrCat("data_offsets [", begin, ",", end, "] don't lie in the ",
                                        data_bytes, " bytes of data"));
  }
  const std::optional<int64_t> size = ByteSize(entry.shape, element_size);
  if (!size || *size != end - begin) {
    return Malformed(name, absl::StrCat("shape [", absl::StrJoin(entry.shape, ","), "] of ",
                                        entry.dtype, " doesn't fit its ", end - begin, " bytes"));
  }
  return Place{name, std::move(entry.dtype), std::move(entry.shape), begin, end};
}

struct Header {
  std::vector<Place> tensors;  // by offset
  std::map<std::string, std::string> metadata;
};

// The header's length, of the first 8 bytes.
absl::StatusOr<int64_t> HeaderSize(absl::string_view length, int64_t file_bytes) {
  const int64_t behind = file_bytes - static_cast<int64_t>(kLengthBytes);
  if (behind < 0) {
    return Malformed(absl::StrCat("the file has ", file_bytes, " bytes, too few for a header"));
  }
  uint64_t size = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    size |= uint64_t{static_cast<unsigned char>(length[i])} << (8 * i);
  }
  if (size > kMaxHeader || size > static_cast<uint64_t>(behind)) {
    return Malformed(absl::StrCat("the header's length, ", size, ", is more than the ", behind,
                                  " bytes that follow or than ", kMaxHeader));
  }
  return static_cast<int64_t>(size);
}

// InvalidArgument: a dtype that isn't known. DataLoss: malformed.
absl::StatusOr<Header> ParseHeader(absl::string_view text, int64_t data_bytes) {
  Header header;
  HeaderReader reader([&](Entry& entry) -> absl::Status {
    if (header.tensors.size() >= kMaxStoredTensors) {
      return Malformed(absl::StrCat("more than ", kMaxStoredTensors, " tensors"));
    }
    ASSIGN_OR_RETURN(Place place, CheckEntry(entry, data_bytes));
    header.tensors.push_back(std::move(place));
    return absl::OkStatus();
  });
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &reader)) {
    return reader.status.ok() ? Malformed("the header isn't a JSON object") : reader.status;
  }
  header.metadata = std::move(reader.metadata);

  std::vector<Place>& tensors = header.tensors;
  std::stable_sort(tensors.begin(), tensors.end(), [](const Place& a, const Place& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  absl::flat_hash_set<absl::string_view> names;
  int64_t next = 0;
  for (const Place& tensor : tensors) {
    if (!names.insert(tensor.name).second) return Malformed(tensor.name, "is there twice");
    if (tensor.begin != next) {
      return Malformed(tensor.name,
                       absl::StrCat("begins at byte ", tensor.begin,
                                    " of the data where the one before ends at ", next));
    }
    next = tensor.end;
  }
  if (next != data_bytes) {
    return Malformed(
        absl::StrCat("the tensors end at byte ", next, " of ", data_bytes, " bytes of data"));
  }
  return header;
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
  ASSIGN_OR_RETURN(const int64_t header_size, HeaderSize(file, static_cast<int64_t>(file.size())));
  const absl::string_view data = file.substr(kLengthBytes + static_cast<size_t>(header_size));
  absl::StatusOr<Header> header =
      ParseHeader(file.substr(kLengthBytes, static_cast<size_t>(header_size)),
                  static_cast<int64_t>(data.size()));
  if (!header.ok()) return absl::DataLossError(header.status().message());
  SafetensorsView view;
  view.metadata = std::move(header->metadata);
  for (Place& tensor : header->tensors) {
    view.tensors.push_back({std::move(tensor.name), std::move(tensor.dtype),
                            std::move(tensor.shape),
                            data.substr(static_cast<size_t>(tensor.begin),
                                        static_cast<size_t>(tensor.end - tensor.begin))});
  }
  return view;
}

absl::StatusOr<WeightFile> IndexSafetensors(const ByteSource& source) {
  std::string length(static_cast<size_t>(std::min<int64_t>(source.size(), kLengthBytes)), '\0');
  RETURN_IF_ERROR(source.Read(0, std::span<char>(length)));
  ASSIGN_OR_RETURN(const int64_t header_size, HeaderSize(length, source.size()));
  const int64_t data_begin = static_cast<int64_t>(kLengthBytes) + header_size;
  WeightFile file;
  file.format = WeightFormat::kSafetensors;
  std::string text(static_cast<size_t>(header_size), '\0');
  RETURN_IF_ERROR(source.Read(kLengthBytes, std::span<char>(text)));
  ASSIGN_OR_RETURN(Header header, ParseHeader(text, source.size() - data_begin));
  for (Place& place : header.tensors) {
    StoredTensor tensor;
    tensor.name = std::move(place.name);
    tensor.dtype = std::move(place.dtype);
    tensor.shape = std::move(place.shape);
    tensor.storage = {{data_begin + place.begin, place.end - place.begin}};
    file.tensors.push_back(std::move(tensor));
  }
  for (const auto& [name, value] : header.metadata) AddNote(file, name, value);
  return file;
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
