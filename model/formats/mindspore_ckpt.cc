// MindSpore's .ckpt: protobuf messages one after another, each with one value {tag, tensor {dims,
// type, content}}; large tensors come as consecutive values of the same tag and full dims. The wire
// is walked here, value by value, so that contents stay in the file.
//
// Source: checkpoint.proto and python/mindspore/train/serialization.py of MindSpore 2.
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "model/formats/safetensors.h"
#include "model/formats/weight_file.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

// Field numbers.
constexpr uint64_t kValue = 1;      // of a checkpoint
constexpr uint64_t kTag = 1;        // of a value
constexpr uint64_t kTensor = 2;     //
constexpr uint64_t kMapTensor = 3;  //
constexpr uint64_t kDims = 1;       // of a tensor
constexpr uint64_t kType = 2;       //
constexpr uint64_t kContent = 3;    //

constexpr int64_t kMaxTag = 1024;
constexpr int64_t kMaxType = 64;
constexpr int64_t kMaxNoteContent = 4096;
constexpr size_t kMaxPieces = 100'000;
constexpr absl::string_view kTrailer = "crc_num";
constexpr int64_t kTrailerBytes = 17;

constexpr std::array<std::pair<absl::string_view, absl::string_view>, 13> kTypes = {
    {{"Float32", "F32"},
     {"Float16", "F16"},
     {"BFloat16", "BF16"},
     {"Float64", "F64"},
     {"Int8", "I8"},
     {"Int16", "I16"},
     {"Int32", "I32"},
     {"Int64", "I64"},
     {"UInt8", "U8"},
     {"UInt16", "U16"},
     {"UInt32", "U32"},
     {"UInt64", "U64"},
     {"Bool", "BOOL"}}};

absl::Status Damaged(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("MindSpore ckpt: ", what));
}

// What one value says.
struct Value {
  std::string tag;
  std::string type;
  std::vector<int64_t> dims;
  std::optional<Extent> content;
  bool is_map = false;
};

// A parameter whose values may come in several pieces.
struct Parameter {
  std::string tag;
  std::string type;
  std::vector<int64_t> dims;
  std::vector<Extent> pieces;
  int64_t bytes = 0;
};

class Walker {
 public:
  Walker(const ByteSource& source, int64_t end) : source_(source), reader_(source, 0, end) {}

  absl::Status Walk(WeightFile& file) {
    while (reader_.remaining() > 0) {
      const int64_t at = reader_.offset();
      absl::StatusOr<std::optional<Value>> value = ReadValue();
      if (!value.ok()) {
        return Annotate(value.status(), absl::StrCat("MindSpore ckpt: the value at byte ", at));
      }
      if (*value) RETURN_IF_ERROR(Take(*std::move(*value), file));
    }
    return Finish(file);
  }

 private:
  absl::StatusOr<uint64_t> Varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      ASSIGN_OR_RETURN(const uint8_t byte, reader_.Byte());
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    return absl::DataLossError("a number of more than 10 bytes");
  }

  // The end of a field with a length that lies within `end`.
  absl::StatusOr<int64_t> FieldEnd(int64_t end) {
    ASSIGN_OR_RETURN(const uint64_t length, Varint());
    const int64_t left = end - reader_.offset();
    if (left < 0 || length > static_cast<uint64_t>(left)) {
      return absl::DataLossError(
          absl::StrCat("a field of ", length, " bytes where ", left, " are left: truncated"));
    }
    return reader_.offset() + static_cast<int64_t>(length);
  }

  absl::StatusOr<std::string> TextField(int64_t end, int64_t limit, absl::string_view what) {
    ASSIGN_OR_RETURN(const int64_t field_end, FieldEnd(end));
    const int64_t length = field_end - reader_.offset();
    if (length > limit) {
      return absl::DataLossError(absl::StrCat(what, " has ", length, " bytes; at most ", limit));
    }
    return reader_.Text(length);
  }

  // An unknown field.
  absl::Status SkipField(uint64_t wire, int64_t end) {
    switch (wire) {
      case 0:
        return Varint().status();
      case 1:
        return reader_.Skip(8);
      case 2: {
        ASSIGN_OR_RETURN(const int64_t field_end, FieldEnd(end));
        return reader_.Skip(field_end - reader_.offset());
      }
      case 5:
        return reader_.Skip(4);
      default:
        return absl::DataLossError(absl::StrCat("wire type ", wire));
    }
  }

  // One field of the file; nothing if it isn't a value.
  absl::StatusOr<std::optional<Value>> ReadValue() {
    ASSIGN_OR_RETURN(const uint64_t key, Varint());
    const int64_t file_end = reader_.offset() + reader_.remaining();
    if (key != (kValue << 3 | 2)) {
      RETURN_IF_ERROR(SkipField(key & 7, file_end));
      return std::optional<Value>();
    }
    ASSIGN_OR_RETURN(const int64_t end, FieldEnd(file_end));
    Value value;
    while (reader_.offset() < end) {
      ASSIGN_OR_RETURN(const uint64_t field, Varint());
      if (field == (kTag << 3 | 2)) {
        ASSIGN_OR_RETURN(value.tag, TextField(end, kMaxTag, "a name"));
      } else if (field == (kTensor << 3 | 2)) {
        ASSIGN_OR_RETURN(const int64_t tensor_end, FieldEnd(end));
        RETURN_IF_ERROR(ReadTensorField(tensor_end, value));
      } else {
        if (field == (kMapTensor << 3 | 2)) value.is_map = true;
        RETURN_IF_ERROR(SkipField(field & 7, end));
      }
    }
    if (reader_.offset() != end) return absl::DataLossError("a field reaches beyond its value");
    return std::optional<Value>(std::move(value));
  }

  absl::Status ReadTensorField(int64_t end, Value& value) {
    while (reader_.offset() < end) {
      ASSIGN_OR_RETURN(const uint64_t field, Varint());
      if (field == (kDims << 3 | 0)) {
        RETURN_IF_ERROR(ReadDimension(value));
      } else if (field == (kDims << 3 | 2)) {  // packed
        ASSIGN_OR_RETURN(const int64_t packed_end, FieldEnd(end));
        while (reader_.offset() < packed_end) RETURN_IF_ERROR(ReadDimension(value));
        if (reader_.offset() != packed_end) return absl::DataLossError("packed dims are cut");
      } else if (field == (kType << 3 | 2)) {
        ASSIGN_OR_RETURN(value.type, TextField(end, kMaxType, "a type"));
      } else if (field == (kContent << 3 | 2)) {
        ASSIGN_OR_RETURN(const int64_t content_end, FieldEnd(end));
        value.content = Extent{reader_.offset(), content_end - reader_.offset()};
        RETURN_IF_ERROR(reader_.Skip(value.content->bytes));
      } else {
        RETURN_IF_ERROR(SkipField(field & 7, end));
      }
    }
    if (reader_.offset() != end) return absl::DataLossError("a field reaches beyond its tensor");
    return absl::OkStatus();
  }

  absl::Status ReadDimension(Value& value) {
    ASSIGN_OR_RETURN(const uint64_t number, Varint());
    if (value.dims.size() >= kMaxTensorRank || static_cast<int64_t>(number) < 0) {
      return absl::DataLossError(absl::StrCat("dimension ", value.dims.size() + 1, ", ",
                                              static_cast<int64_t>(number),
                                              ", is negative or one too many"));
    }
    value.dims.push_back(static_cast<int64_t>(number));
    return absl::OkStatus();
  }

  // Adds the value to the parameter it continues, or begins a new one.
  absl::Status Take(Value value, WeightFile& file) {
    value.tag = PrintableText(StripSuffix(value.tag));
    if (value.is_map) {
      RETURN_IF_ERROR(Finish(file));
      AddNote(file, value.tag, "a hash table (MapTensor); ignored");
      return absl::OkStatus();
    }
    if (!value.content || value.type.empty()) {
      return Damaged(absl::StrCat("value \"", value.tag, "\" has no type or no content"));
    }
    if (value.type == "random_op" || value.tag == "random_op") return absl::OkStatus();
    if (open_ && open_->tag == value.tag) {
      if (open_->type != value.type || open_->dims != value.dims) {
        return Damaged(absl::StrCat("\"", value.tag, "\": its pieces differ in type or dims"));
      }
    } else {
      RETURN_IF_ERROR(Finish(file));
      if (!names_.insert(value.tag).second) {
        return Damaged(absl::StrCat("\"", value.tag, "\" is there twice"));
      }
      open_ = Parameter{std::move(value.tag), std::move(value.type), std::move(value.dims), {}, 0};
    }
    if (++pieces_ > kMaxPieces) {
      return Damaged(absl::StrCat("more than ", kMaxPieces, " values"));
    }
    open_->pieces.push_back(*value.content);
    open_->bytes += value.content->bytes;  // no overflow: all are within the file
    return absl::OkStatus();
  }

  // The parameter is complete: the next tag differs, or the file ends.
  absl::Status Finish(WeightFile& file) {
    if (!open_) return absl::OkStatus();
    Parameter parameter = *std::move(open_);
    open_.reset();
    if (parameter.type == "str") return AddText(parameter, file);
    StoredTensor tensor;
    for (const auto& [type, dtype] : kTypes) {
      if (type == parameter.type) tensor.dtype = std::string(dtype);
    }
    if (tensor.dtype.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("MindSpore ckpt: \"", parameter.tag, "\" has the type ",
                       absl::CHexEscape(parameter.type), ", which isn't supported"));
    }
    const int64_t size = SafetensorsElementSize(tensor.dtype);
    // A scalar has no dims, or in older versions one of 0.
    const bool scalar = parameter.dims == std::vector<int64_t>{0} && parameter.bytes == size;
    if (!scalar) tensor.shape = std::move(parameter.dims);
    int64_t expected = 0;
    if (__builtin_mul_overflow(tensor.elements(), size, &expected) || expected != parameter.bytes) {
      return Damaged(absl::StrCat("\"", parameter.tag, "\": dims [",
                                  absl::StrJoin(tensor.shape, ", "), "] of ", parameter.type,
                                  " don't fit its ", parameter.bytes, " bytes"));
    }
    tensor.name = std::move(parameter.tag);
    tensor.storage = std::move(parameter.pieces);
    file.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  // A text, in 4 bytes a character.
  absl::Status AddText(const Parameter& parameter, WeightFile& file) {
    std::string text;
    for (const Extent& piece : parameter.pieces) {
      const int64_t bytes = std::min(piece.bytes, kMaxNoteContent) / 4 * 4;
      std::string raw(static_cast<size_t>(bytes), '\0');
      RETURN_IF_ERROR(source_.Read(piece.offset, std::span<char>(raw)));
      for (size_t i = 0; i < raw.size() && text.size() < kMaxNoteContent; i += 4) {
        uint32_t character = 0;
        for (size_t k = 0; k < 4; ++k) {
          character |= uint32_t{static_cast<unsigned char>(raw[i + k])} << (8 * k);
        }
        AppendUtf8(character, text);
      }
    }
    AddNote(file, parameter.tag, text);
    return absl::OkStatus();
  }

  static void AppendUtf8(uint32_t character, std::string& text) {
    if (character > 0x10ffff || (character >= 0xd800 && character < 0xe000)) character = 0xfffd;
    if (character < 0x80) {
      text += static_cast<char>(character);
      return;
    }
    const int more = character < 0x800 ? 1 : character < 0x10000 ? 2 : 3;
    constexpr std::array<uint32_t, 4> kLead = {0, 0xc0, 0xe0, 0xf0};
    text += static_cast<char>(kLead[static_cast<size_t>(more)] | (character >> (6 * more)));
    for (int i = more - 1; i >= 0; --i) {
      text += static_cast<char>(0x80 | ((character >> (6 * i)) & 0x3f));
    }
  }

  // Host-cached parameters are called <name>.__param_key__<number>.
  static absl::string_view StripSuffix(absl::string_view tag) {
    constexpr absl::string_view kSuffix = ".__param_key__";
    const size_t at = tag.rfind(kSuffix);
    int64_t number = 0;
    if (at == absl::string_view::npos ||
        !absl::SimpleAtoi(tag.substr(at + kSuffix.size()), &number)) {
      return tag;
    }
    return tag.substr(0, at);
  }

  const ByteSource& source_;
  BufferedReader reader_;
  std::optional<Parameter> open_;
  absl::flat_hash_set<std::string> names_;
  size_t pieces_ = 0;
};

// The file's end without the trailer, whose CRC-32 is verified.
absl::StatusOr<int64_t> CheckTrailer(const ByteSource& source, bool& has_checksum) {
  has_checksum = false;
  if (source.size() < kTrailerBytes) return source.size();
  std::array<char, kTrailerBytes> bytes = {};
  const int64_t end = source.size() - kTrailerBytes;
  RETURN_IF_ERROR(source.Read(end, bytes));
  if (absl::string_view(bytes.data(), kTrailer.size()) != kTrailer) return source.size();
  has_checksum = true;
  uint64_t stated = 0;
  bool beyond = false;  // 10 bytes, big-endian
  for (size_t i = kTrailer.size(); i < bytes.size(); ++i) {
    beyond = beyond || (stated >> 56) != 0;
    stated = stated << 8 | static_cast<unsigned char>(bytes[i]);
  }
  const Extent all = {0, end};
  ASSIGN_OR_RETURN(const uint32_t crc, Crc32OfExtents(source, {&all, 1}));
  if (beyond || stated != crc) {
    return Damaged("its CRC-32 doesn't match the trailer: the file is damaged");
  }
  return end;
}

}  // namespace

absl::StatusOr<WeightFile> IndexMindSpore(const ByteSource& source) {
  WeightFile file;
  file.format = WeightFormat::kMindSpore;
  ASSIGN_OR_RETURN(const int64_t end, CheckTrailer(source, file.has_checksum));
  RETURN_IF_ERROR(Walker(source, end).Walk(file));
  if (file.tensors.empty() && file.notes.empty()) return Damaged("it holds no values");
  return file;
}

}  // namespace pyramid
