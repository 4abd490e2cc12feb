#include "model/formats/weight_file.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/formats/safetensors.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr int64_t kPiece = int64_t{4} << 20;          // bytes read at once
constexpr int64_t kChecksumPiece = int64_t{1} << 20;  // the same, for checksums
constexpr int64_t kExpansion = int64_t{16} << 20;     // what a tensor may have beyond its storage
constexpr size_t kMaxNotes = 1000;
constexpr size_t kMaxNoteBytes = 1024;

// The magic of torch.save's first pickle: LONG1 of 10 bytes, 0x1950a86a20f9469cfc6c.
constexpr absl::string_view kLegacyMagic("\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 12);
constexpr absl::string_view kZipMagic("PK\x03\x04", 4);
constexpr absl::string_view kCrcTrailer = "crc_num";
constexpr int64_t kCrcTrailerBytes = 17;

absl::Status Wrong(const StoredTensor& tensor, absl::string_view what) {
  return absl::DataLossError(
      absl::StrCat("tensor \"", absl::CHexEscape(tensor.name), "\": ", what));
}

// The storage's bytes; nothing if an extent isn't within the source.
std::optional<int64_t> StorageBytes(const StoredTensor& tensor, int64_t source_size) {
  int64_t total = 0;
  for (const Extent& extent : tensor.storage) {
    if (extent.offset < 0 || extent.bytes < 0 || extent.offset > source_size ||
        extent.bytes > source_size - extent.offset ||
        __builtin_add_overflow(total, extent.bytes, &total)) {
      return std::nullopt;
    }
  }
  return total;
}

bool IsRowMajor(const StoredTensor& tensor) {
  if (tensor.strides.empty()) return true;
  int64_t expected = 1;
  for (size_t axis = tensor.shape.size(); axis-- > 0;) {
    if (tensor.shape[axis] != 1 && tensor.strides[axis] != expected) return false;
    expected *= tensor.shape[axis];
  }
  return true;
}

// Fills `out` from `offset` of the storage, whose pieces may lie apart.
absl::Status ReadStorage(const WeightFile& file, const StoredTensor& tensor, int64_t offset,
                         std::span<char> out) {
  for (const Extent& extent : tensor.storage) {
    if (out.empty()) break;
    if (offset >= extent.bytes) {
      offset -= extent.bytes;
      continue;
    }
    const size_t taken = std::min(out.size(), static_cast<size_t>(extent.bytes - offset));
    RETURN_IF_ERROR(file.source->Read(extent.offset + offset, out.first(taken)));
    out = out.subspan(taken);
    offset = 0;
  }
  if (!out.empty()) return Wrong(tensor, "ends beyond its storage");
  return absl::OkStatus();
}

uint32_t UpdateCrc(uint32_t crc, std::span<const char> bytes) {
  while (!bytes.empty()) {
    const size_t taken = std::min(bytes.size(), static_cast<size_t>(kPiece));
    crc = static_cast<uint32_t>(
        crc32(crc, reinterpret_cast<const Bytef*>(bytes.data()), static_cast<uInt>(taken)));
    bytes = bytes.subspan(taken);
  }
  return crc;
}

absl::Status CompareCrc(const StoredTensor& tensor, uint32_t crc) {
  if (crc != tensor.checksum->crc32) {
    return Wrong(tensor, "its CRC-32 doesn't match: the file is damaged");
  }
  tensor.checksum->verified = true;
  return absl::OkStatus();
}

// Row-major without gaps: blocks in order. Put(first element, bytes of whole elements).
template <typename Put>
absl::Status DeliverRowMajor(const WeightFile& file, const StoredTensor& tensor, int64_t size,
                             Put&& put) {
  const int64_t bytes = tensor.elements() * size;
  const bool unchecked = tensor.checksum != nullptr && !tensor.checksum->verified;
  int64_t storage_bytes = 0;
  for (const Extent& extent : tensor.storage) storage_bytes += extent.bytes;
  const bool whole = bytes == storage_bytes;  // then the checksum is taken on the way
  if (unchecked && !whole) {
    ASSIGN_OR_RETURN(const uint32_t crc, Crc32OfExtents(*file.source, tensor.storage));
    RETURN_IF_ERROR(CompareCrc(tensor, crc));
  }
  uint32_t crc = 0;
  std::string buffer(static_cast<size_t>(std::min(bytes, kPiece)), '\0');
  for (int64_t done = 0; done < bytes;) {
    const std::span<char> piece(buffer.data(), static_cast<size_t>(std::min(bytes - done, kPiece)));
    RETURN_IF_ERROR(ReadStorage(file, tensor, tensor.first * size + done, piece));
    if (unchecked && whole) crc = UpdateCrc(crc, piece);
    put(done / size, std::span<const char>(piece));
    done += static_cast<int64_t>(piece.size());
  }
  return unchecked && whole ? CompareCrc(tensor, crc) : absl::OkStatus();
}

struct Axis {
  int64_t count = 0;
  int64_t from = 0;  // elements between neighbours in the storage
  int64_t to = 0;    // and in the result
};

// The axes longer than 1, widest stride first: elements then come in the storage's order, unless
// they overlap.
std::vector<Axis> AxesInStorageOrder(const StoredTensor& tensor) {
  std::vector<Axis> axes;
  int64_t step = 1;
  for (size_t axis = tensor.shape.size(); axis-- > 0;) {
    if (tensor.shape[axis] > 1) axes.push_back({tensor.shape[axis], tensor.strides[axis], step});
    step *= tensor.shape[axis];
  }
  std::stable_sort(axes.begin(), axes.end(),
                   [](const Axis& a, const Axis& b) { return a.from > b.from; });
  if (axes.empty()) axes.push_back({1, 1, 1});
  return axes;
}

// Any strides: one pass over the storage, element by element. Put(element, its bytes).
template <typename Put>
absl::Status DeliverStrided(const WeightFile& file, const StoredTensor& tensor, int64_t size,
                            Put&& put) {
  if (tensor.checksum != nullptr && !tensor.checksum->verified) {
    ASSIGN_OR_RETURN(const uint32_t crc, Crc32OfExtents(*file.source, tensor.storage));
    RETURN_IF_ERROR(CompareCrc(tensor, crc));
  }
  const std::vector<Axis> axes = AxesInStorageOrder(tensor);
  int64_t reach = 0;  // elements from the first to the last
  bool forward = true;
  for (size_t axis = axes.size(); axis-- > 0;) {
    forward = forward && (axes[axis].from >= reach);
    reach += (axes[axis].count - 1) * axes[axis].from;
  }
  // Elements that overlap would send the window back and forth: then it holds them all.
  const int64_t begin = tensor.first * size;
  const int64_t end = begin + (reach + 1) * size;
  const int64_t window_bytes = forward ? std::min(end - begin, kPiece) : end - begin;
  std::string window(static_cast<size_t>(window_bytes), '\0');
  int64_t window_begin = 0;
  int64_t window_end = 0;

  std::vector<int64_t> index(axes.size(), 0);
  const Axis& inner = axes.back();
  int64_t from = tensor.first;
  int64_t to = 0;
  while (true) {
    for (int64_t i = 0; i < inner.count; ++i) {
      const int64_t at = (from + i * inner.from) * size;
      if (at < window_begin || at + size > window_end) {
        window_begin = at;
        window_end = std::min(end, at + window_bytes);
        RETURN_IF_ERROR(ReadStorage(
            file, tensor, at, {window.data(), static_cast<size_t>(window_end - window_begin)}));
      }
      put(to + i * inner.to,
          std::span<const char>(window.data() + (at - window_begin), static_cast<size_t>(size)));
    }
    size_t axis = axes.size() - 1;
    while (true) {
      if (axis == 0) return absl::OkStatus();
      --axis;
      from += axes[axis].from;
      to += axes[axis].to;
      if (++index[axis] < axes[axis].count) break;
      from -= axes[axis].from * axes[axis].count;
      to -= axes[axis].to * axes[axis].count;
      index[axis] = 0;
    }
  }
}

template <typename Put>
absl::Status Deliver(const WeightFile& file, const StoredTensor& tensor, size_t out_elements,
                     Put&& put) {
  RETURN_IF_ERROR(CheckStoredTensor(tensor, file.source->size()));
  if (out_elements != static_cast<size_t>(tensor.elements())) {
    return absl::InvalidArgumentError(absl::StrCat("tensor \"", tensor.name, "\" has ",
                                                   tensor.elements(), " elements, the result ",
                                                   out_elements));
  }
  if (tensor.elements() == 0) return absl::OkStatus();
  const int64_t size = SafetensorsElementSize(tensor.dtype);
  return IsRowMajor(tensor) ? DeliverRowMajor(file, tensor, size, put)
                            : DeliverStrided(file, tensor, size, put);
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t fraction = half & 0x3ff;
  if (exponent == 0) {  // zero or denormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t wide = exponent == 0x1f ? 0xff : exponent + 112;
  return std::bit_cast<float>(sign | (wide << 23) | (fraction << 13));
}

struct Half {
  uint16_t bits;
  explicit operator float() const { return HalfToFloat(bits); }
};

struct BrainFloat {
  uint16_t bits;
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

template <typename Number>
absl::Status ReadNumbers(const WeightFile& file, const StoredTensor& tensor, std::span<float> out) {
  return Deliver(file, tensor, out.size(), [out](int64_t first, std::span<const char> bytes) {
    float* to = out.data() + first;
    for (size_t at = 0; at < bytes.size(); at += sizeof(Number)) {
      Number number;
      std::memcpy(&number, bytes.data() + at, sizeof(Number));
      *to++ = static_cast<float>(number);
    }
  });
}

bool IsUtf8(absl::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t at) { return static_cast<unsigned char>(text[at]); };
    const unsigned char lead = byte(i);
    const size_t length = lead < 0x80   ? 1
                          : lead < 0xc2 ? 0
                          : lead < 0xe0 ? 2
                          : lead < 0xf0 ? 3
                          : lead < 0xf5 ? 4
                                        : 0;
    if (length == 0 || length > text.size() - i) return false;
    for (size_t k = 1; k < length; ++k) {
      if ((byte(i + k) & 0xc0) != 0x80) return false;
    }
    if ((lead == 0xe0 && byte(i + 1) < 0xa0) || (lead == 0xed && byte(i + 1) > 0x9f) ||
        (lead == 0xf0 && byte(i + 1) < 0x90) || (lead == 0xf4 && byte(i + 1) > 0x8f)) {
      return false;  // longer than needed, a surrogate, or beyond U+10FFFF
    }
    i += length;
  }
  return true;
}

// At most `bytes`, not within a character.
absl::string_view Cut(absl::string_view text, size_t bytes) {
  if (text.size() <= bytes) return text;
  while (bytes > 0 && (static_cast<unsigned char>(text[bytes]) & 0xc0) == 0x80) --bytes;
  return text.substr(0, bytes);
}

absl::Status NoFormat(absl::string_view head, int64_t size) {
  std::string guess;
  if (absl::StartsWith(head, "version https://git-lfs")) guess = ": it is a Git LFS pointer";
  if (absl::StartsWithIgnoreCase(head, "<!doctype") || absl::StartsWithIgnoreCase(head, "<html")) {
    guess = ": it is a web page";
  }
  if (absl::StartsWith(head, "\x80")) guess = ": it is a pickle, but not one of torch.save";
  if (absl::StartsWith(head, "\x1f\x8b")) guess = ": it is a gzip archive, unpack it first";
  return absl::InvalidArgumentError(
      absl::StrCat("none of the formats of weights", guess, " (", size,
                   " bytes; safetensors, PyTorch's .pth and MindSpore's .ckpt are read)"));
}

// The encryption of MindSpore's save_checkpoint: each block begins with a magic number.
bool IsEncrypted(absl::string_view head) {
  return absl::StartsWith(head, "\xd8\x5e\x3a\x7f") || absl::StartsWith(head, "\xd9\x5e\x3a\x7f");
}

absl::StatusOr<WeightFile> IndexByContent(const ByteSource& source) {
  if (source.size() == 0) return absl::DataLossError("the file is empty");
  std::string head(static_cast<size_t>(std::min<int64_t>(source.size(), 64)), '\0');
  RETURN_IF_ERROR(source.Read(0, std::span<char>(head)));
  std::string tail(static_cast<size_t>(std::min(source.size(), kCrcTrailerBytes)), '\0');
  RETURN_IF_ERROR(
      source.Read(source.size() - static_cast<int64_t>(tail.size()), std::span<char>(tail)));

  if (absl::StartsWith(head, kZipMagic)) return IndexTorchZip(source);
  if (head[0] == '\x80' && absl::StrContains(head, kLegacyMagic)) return IndexTorchLegacy(source);
  if (IsEncrypted(head)) {
    return absl::InvalidArgumentError(
        "MindSpore ckpt: encrypted (its blocks carry the AES magic number); save it again without "
        "enc_key, keys aren't taken here");
  }
  // A header's length has 4 zero bytes above, and a header begins with a brace.
  if (head.size() > 8 && head[8] == '{' && head.compare(4, 4, std::string(4, '\0')) == 0) {
    return IndexSafetensors(source);
  }
  if (head[0] == '\n' || absl::StartsWith(tail, kCrcTrailer)) return IndexMindSpore(source);
  return NoFormat(head, source.size());
}

}  // namespace

int64_t StoredTensor::elements() const {
  int64_t product = 1;
  bool overflow = false;
  for (const int64_t dimension : shape) {
    if (dimension <= 0) return 0;
    overflow = __builtin_mul_overflow(product, dimension, &product) || overflow;
  }
  return overflow ? std::numeric_limits<int64_t>::max() : product;
}

const char* WeightFormatName(WeightFormat format) {
  switch (format) {
    case WeightFormat::kSafetensors:
      return "safetensors";
    case WeightFormat::kTorchZip:
      return "PyTorch zip";
    case WeightFormat::kTorchLegacy:
      return "PyTorch legacy pickle";
    case WeightFormat::kMindSpore:
      return "MindSpore ckpt";
  }
  return "unknown";
}

absl::Status CheckStoredTensor(const StoredTensor& tensor, int64_t source_size) {
  const int64_t size = SafetensorsElementSize(tensor.dtype);
  if (size == 0) {
    return absl::InvalidArgumentError(absl::StrCat("tensor \"", absl::CHexEscape(tensor.name),
                                                   "\": dtype \"", absl::CHexEscape(tensor.dtype),
                                                   "\" isn't supported"));
  }
  const auto shape_text = [&] { return absl::StrCat("[", absl::StrJoin(tensor.shape, ", "), "]"); };
  if (tensor.shape.size() > kMaxTensorRank) {
    return Wrong(tensor,
                 absl::StrCat(tensor.shape.size(), " dimensions, more than ", kMaxTensorRank));
  }
  for (const int64_t dimension : tensor.shape) {
    if (dimension < 0) return Wrong(tensor, absl::StrCat("shape ", shape_text(), " is negative"));
  }
  const std::optional<int64_t> storage = StorageBytes(tensor, source_size);
  if (!storage) return Wrong(tensor, "its storage isn't within the file");
  int64_t bytes = 0;
  if (__builtin_mul_overflow(tensor.elements(), size, &bytes) || bytes - kExpansion > *storage) {
    return Wrong(tensor, absl::StrCat("shape ", shape_text(), " of ", tensor.dtype,
                                      " is too much for ", *storage, " bytes of storage"));
  }
  if (!tensor.strides.empty() && tensor.strides.size() != tensor.shape.size()) {
    return Wrong(tensor, absl::StrCat(tensor.strides.size(), " strides for shape ", shape_text()));
  }
  int64_t last = tensor.first;
  bool overflow = false;
  if (tensor.strides.empty()) {
    overflow = __builtin_add_overflow(last, std::max<int64_t>(tensor.elements() - 1, 0), &last);
  }
  for (size_t axis = 0; axis < tensor.strides.size(); ++axis) {
    if (tensor.strides[axis] < 0) return Wrong(tensor, "a negative stride");
    int64_t reach = 0;
    overflow = __builtin_mul_overflow(std::max<int64_t>(tensor.shape[axis] - 1, 0),
                                      tensor.strides[axis], &reach) ||
               __builtin_add_overflow(last, reach, &last) || overflow;
  }
  const bool any = tensor.elements() > 0;
  if (tensor.first < 0 || (any && (overflow || last >= *storage / size))) {
    return Wrong(tensor, absl::StrCat("shape ", shape_text(), ", strides [",
                                      absl::StrJoin(tensor.strides, ", "), "] from element ",
                                      tensor.first, " of ", tensor.dtype, " don't lie in its ",
                                      *storage, " bytes of storage"));
  }
  return absl::OkStatus();
}

std::string PrintableText(absl::string_view text) {
  return IsUtf8(text) ? std::string(text) : absl::CHexEscape(text);
}

void AddNote(WeightFile& file, absl::string_view name, absl::string_view text) {
  if (file.notes.size() >= kMaxNotes) return;
  file.notes.emplace_back(PrintableText(Cut(name, kMaxNoteBytes)),
                          PrintableText(Cut(text, kMaxNoteBytes)));
}

absl::StatusOr<uint32_t> Crc32OfExtents(const ByteSource& source, std::span<const Extent> extents) {
  uint32_t crc = 0;
  std::string buffer;
  for (const Extent& extent : extents) {
    for (int64_t done = 0; done < extent.bytes;) {
      buffer.resize(static_cast<size_t>(std::min(extent.bytes - done, kChecksumPiece)));
      RETURN_IF_ERROR(source.Read(extent.offset + done, std::span<char>(buffer)));
      crc = UpdateCrc(crc, buffer);
      done += static_cast<int64_t>(buffer.size());
    }
  }
  return crc;
}

absl::StatusOr<WeightFile> OpenWeightFile(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(std::shared_ptr<const ByteSource> source, OpenByteSource(path));
  absl::StatusOr<WeightFile> file = OpenWeightBytes(std::move(source));
  if (!file.ok()) return Annotate(file.status(), path.string());
  return file;
}

absl::StatusOr<WeightFile> OpenWeightBytes(std::shared_ptr<const ByteSource> source) {
  ASSIGN_OR_RETURN(WeightFile file, IndexByContent(*source));
  for (const StoredTensor& tensor : file.tensors) {
    if (absl::Status fits = CheckStoredTensor(tensor, source->size()); !fits.ok()) {
      return Annotate(fits, WeightFormatName(file.format));
    }
  }
  file.source = std::move(source);
  return file;
}

absl::Status ReadTensor(const WeightFile& file, const StoredTensor& tensor, std::span<char> out) {
  const auto size = static_cast<size_t>(SafetensorsElementSize(tensor.dtype));
  if (size != 0 && out.size() % size != 0) {
    return absl::InvalidArgumentError(absl::StrCat("tensor \"", tensor.name, "\": a result of ",
                                                   out.size(), " bytes isn't whole elements of ",
                                                   tensor.dtype));
  }
  return Deliver(file, tensor, size == 0 ? 0 : out.size() / size,
                 [out, size](int64_t first, std::span<const char> bytes) {
                   std::memcpy(out.data() + static_cast<size_t>(first) * size, bytes.data(),
                               bytes.size());
                 });
}

absl::Status ReadTensorAsFloat(const WeightFile& file, const StoredTensor& tensor,
                               std::span<float> out) {
  using Reader = absl::Status (*)(const WeightFile&, const StoredTensor&, std::span<float>);
  constexpr std::array<std::pair<absl::string_view, Reader>, 12> kReaders = {
      {{"F32", &ReadNumbers<float>},
       {"F64", &ReadNumbers<double>},
       {"F16", &ReadNumbers<Half>},
       {"BF16", &ReadNumbers<BrainFloat>},
       {"I64", &ReadNumbers<int64_t>},
       {"I32", &ReadNumbers<int32_t>},
       {"I16", &ReadNumbers<int16_t>},
       {"I8", &ReadNumbers<int8_t>},
       {"U64", &ReadNumbers<uint64_t>},
       {"U32", &ReadNumbers<uint32_t>},
       {"U16", &ReadNumbers<uint16_t>},
       {"U8", &ReadNumbers<uint8_t>}}};
  for (const auto& [dtype, read] : kReaders) {
    if (dtype == tensor.dtype) return read(file, tensor, out);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("tensor \"", tensor.name, "\": ", tensor.dtype, " isn't a number's type"));
}

}  // namespace pyramid
