#include "model/formats/weight_writer.h"

#include <fcntl.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

int64_t ElementsOf(const TensorHeader& tensor) {
  int64_t elements = 1;
  for (const int64_t dimension : tensor.shape) elements *= dimension;
  return elements;
}

absl::Status CheckNames(std::span<const TensorHeader> tensors) {
  std::set<absl::string_view> names;
  for (const TensorHeader& tensor : tensors) {
    if (!names.insert(tensor.name).second) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name, " comes twice"));
    }
  }
  return absl::OkStatus();
}

// The values of tensor `index` as little-endian bytes, which is how they lie in memory on every
// machine that LibTorch runs on. `buffer` owns them.
absl::StatusOr<absl::string_view> Fill(std::span<const TensorHeader> tensors, size_t index,
                                       TensorFiller fill, std::vector<float>& buffer) {
  buffer.resize(static_cast<size_t>(ElementsOf(tensors[index])));
  RETURN_IF_ERROR(fill(index, buffer));
  return absl::string_view(reinterpret_cast<const char*>(buffer.data()), buffer.size() * 4);
}

void AppendLittleEndian(std::string& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out += static_cast<char>((value >> (8 * i)) & 0xff);
}

void AppendVarint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>((value & 0x7f) | 0x80);
  out += static_cast<char>(value);
}

// ---- PyTorch's zip ----

// Pickle opcodes, protocol 2 (CPython, Lib/pickle.py).
class Pickle {
 public:
  Pickle() : bytes_("\x80\x02") {}

  void Op(char code) { bytes_ += code; }
  void Global(absl::string_view module, absl::string_view name) {
    absl::StrAppend(&bytes_, "c", module, "\n", name, "\n");
  }
  void Text(absl::string_view text) {  // BINUNICODE
    bytes_ += 'X';
    AppendLittleEndian(bytes_, text.size(), 4);
    absl::StrAppend(&bytes_, text);
  }
  void Int(int64_t value) {
    if (value <= std::numeric_limits<int32_t>::max()) {  // BININT
      bytes_ += 'J';
      AppendLittleEndian(bytes_, static_cast<uint64_t>(value), 4);
    } else {  // LONG1
      absl::StrAppend(&bytes_, "\x8a\x08");
      AppendLittleEndian(bytes_, static_cast<uint64_t>(value), 8);
    }
  }
  void Tuple(std::span<const int64_t> values) {
    bytes_ += '(';
    for (const int64_t value : values) Int(value);
    bytes_ += 't';
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// The state dict: OrderedDict of torch._utils._rebuild_tensor_v2(storage, offset, size, stride,
// requires_grad, hooks), each tensor with a storage of its own, named by its number.
std::string StateDictPickle(std::span<const TensorHeader> tensors) {
  Pickle pickle;
  const auto ordered_dict = [&pickle] {
    pickle.Global("collections", "OrderedDict");
    pickle.Op(')');  // EMPTY_TUPLE
    pickle.Op('R');  // REDUCE
  };
  ordered_dict();
  pickle.Op('(');  // MARK
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::vector<int64_t>& shape = tensors[i].shape;
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t k = shape.size(); k-- > 1;) strides[k - 1] = strides[k] * shape[k];
    pickle.Text(tensors[i].name);
    pickle.Global("torch._utils", "_rebuild_tensor_v2");
    pickle.Op('(');
    pickle.Op('(');
    pickle.Text("storage");
    pickle.Global("torch", "FloatStorage");
    pickle.Text(absl::StrCat(i));
    pickle.Text("cpu");
    pickle.Int(ElementsOf(tensors[i]));
    pickle.Op('t');
    pickle.Op('Q');  // BINPERSID
    pickle.Int(0);
    pickle.Tuple(shape);
    pickle.Tuple(strides);
    pickle.Op('\x89');  // NEWFALSE
    ordered_dict();
    pickle.Op('t');
    pickle.Op('R');
  }
  pickle.Op('u');  // SETITEMS
  pickle.Op('.');  // STOP
  return pickle.bytes();
}

// A zip of stored records whose contents begin at multiples of 64 bytes, as PyTorch's own
// (caffe2/serialize/inline_container). No zip64: sizes and offsets stay under 4 GiB.
class ZipStream {
 public:
  explicit ZipStream(ByteSink sink) : sink_(sink) {}

  absl::Status Add(const std::string& name, absl::string_view content) {
    const uint64_t end = offset_ + 30 + name.size() + 4 + kAlignment + content.size();
    if (end + directory_.size() + (uint64_t{1} << 20) > kLargest) return TooLarge();
    const uint32_t crc = Crc(content);
    // The padding is an extra field of its own: id "FB", length, filler.
    const uint64_t unpadded = offset_ + 30 + name.size() + 4;
    const uint64_t padding = (kAlignment - unpadded % kAlignment) % kAlignment;

    std::string common;                // what local header and directory share
    AppendLittleEndian(common, 0, 2);  // flags
    AppendLittleEndian(common, 0, 2);  // stored
    AppendLittleEndian(common, 0, 2);  // time
    AppendLittleEndian(common, 0x5821,
                       2);  // date: 2024-01-01, so that equal weights give equal files
    AppendLittleEndian(common, crc, 4);
    AppendLittleEndian(common, content.size(), 4);
    AppendLittleEndian(common, content.size(), 4);
    AppendLittleEndian(common, name.size(), 2);

    std::string local = "PK\x03\x04";
    AppendLittleEndian(local, 20, 2);  // version needed
    absl::StrAppend(&local, common);
    AppendLittleEndian(local, 4 + padding, 2);
    absl::StrAppend(&local, name, "FB");
    AppendLittleEndian(local, padding, 2);
    local.append(padding, 'Z');

    absl::StrAppend(&directory_, "PK\x01\x02");
    AppendLittleEndian(directory_, 20, 2);  // made by
    AppendLittleEndian(directory_, 20, 2);
    absl::StrAppend(&directory_, common);
    AppendLittleEndian(directory_, 0, 2);  // extra
    AppendLittleEndian(directory_, 0, 2);  // comment
    AppendLittleEndian(directory_, 0, 2);  // disk
    AppendLittleEndian(directory_, 0, 2);  // internal attributes
    AppendLittleEndian(directory_, 0, 4);  // external attributes
    AppendLittleEndian(directory_, offset_, 4);
    absl::StrAppend(&directory_, name);
    ++records_;

    RETURN_IF_ERROR(Put(local));
    return Put(content);
  }

  // Whether tensors of `bytes` in all may fit, asked before the first of them is read.
  static absl::Status CheckSize(uint64_t bytes) {
    return bytes > kLargest ? TooLarge() : absl::OkStatus();
  }

  absl::Status Finish() {
    if (records_ > 0xffff) {
      return absl::InvalidArgumentError(
          absl::StrCat(records_, " tensors are too many for a PyTorch zip; use safetensors"));
    }
    std::string end = "PK\x05\x06";
    AppendLittleEndian(end, 0, 4);  // disks
    AppendLittleEndian(end, records_, 2);
    AppendLittleEndian(end, records_, 2);
    AppendLittleEndian(end, directory_.size(), 4);
    AppendLittleEndian(end, offset_, 4);
    AppendLittleEndian(end, 0, 2);  // comment
    RETURN_IF_ERROR(Put(directory_));
    return Put(end);
  }

 private:
  static constexpr uint64_t kAlignment = 64;
  static constexpr uint64_t kLargest = std::numeric_limits<uint32_t>::max();

  static absl::Status TooLarge() {
    return absl::InvalidArgumentError("a PyTorch zip over 4 GiB isn't written; use safetensors");
  }

  static uint32_t Crc(absl::string_view content) {
    return static_cast<uint32_t>(
        crc32_z(0, reinterpret_cast<const Bytef*>(content.data()), content.size()));
  }

  absl::Status Put(absl::string_view bytes) {
    offset_ += bytes.size();
    return sink_(bytes);
  }

  ByteSink sink_;
  uint64_t offset_ = 0;
  uint64_t records_ = 0;
  std::string directory_;
};

// ---- MindSpore's messages ----

// A field of a protobuf message with its length in front.
void AppendField(std::string& out, int number, absl::string_view content) {
  AppendVarint(out, static_cast<uint64_t>(number) << 3 | 2);
  AppendVarint(out, content.size());
  absl::StrAppend(&out, content);
}

// What comes before a tensor_content of `bytes` bytes in Checkpoint{value{tag, tensor{dims,
// tensor_type, tensor_content}}}: lengths nest, so they are known before the content is.
std::string ValueHeader(absl::string_view tag, std::span<const int64_t> dims,
                        absl::string_view type, uint64_t bytes) {
  std::string tensor;
  for (const int64_t dimension : dims) {
    tensor += '\x08';  // field 1, not packed
    AppendVarint(tensor, static_cast<uint64_t>(dimension));
  }
  AppendField(tensor, 2, type);
  tensor += '\x1a';  // field 3: content
  AppendVarint(tensor, bytes);

  std::string value;
  AppendField(value, 1, tag);
  value += '\x12';  // field 2: tensor
  AppendVarint(value, tensor.size() + bytes);
  absl::StrAppend(&value, tensor);

  std::string header;
  header += '\x0a';  // field 1: value
  AppendVarint(header, value.size() + bytes);
  absl::StrAppend(&header, value);
  return header;
}

// ASCII as numpy's unicode: four bytes a character.
std::string WideText(absl::string_view text) {
  std::string wide;
  for (const char c : text) AppendLittleEndian(wide, static_cast<unsigned char>(c), 4);
  return wide;
}

absl::Status WriteAll(int fd, absl::string_view bytes, const std::filesystem::path& path) {
  while (!bytes.empty()) {
    const ssize_t put = write(fd, bytes.data(), bytes.size());
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return ErrnoStatus(errno, "can't write", path);
    bytes.remove_prefix(static_cast<size_t>(put));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status StreamSafetensors(std::span<const TensorHeader> tensors, const Notes& notes,
                               TensorFiller fill, ByteSink sink) {
  RETURN_IF_ERROR(CheckNames(tensors));
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  auto& entries = header.get_ref<nlohmann::ordered_json::object_t&>();
  nlohmann::ordered_json metadata = {{"format", "pt"}};
  for (const auto& [name, text] : notes) metadata[name] = text;
  entries.emplace_back("__metadata__", std::move(metadata));
  int64_t offset = 0;
  for (const TensorHeader& tensor : tensors) {
    const int64_t end = offset + 4 * ElementsOf(tensor);
    // emplace_back, not operator[]: a look-up in an ordered_json walks all the keys before.
    entries.emplace_back(tensor.name, nlohmann::ordered_json{{"dtype", "F32"},
                                                             {"shape", tensor.shape},
                                                             {"data_offsets", {offset, end}}});
    offset = end;
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string length;
  AppendLittleEndian(length, text.size(), 8);
  RETURN_IF_ERROR(sink(length));
  RETURN_IF_ERROR(sink(text));
  std::vector<float> buffer;
  for (size_t i = 0; i < tensors.size(); ++i) {
    ASSIGN_OR_RETURN(const absl::string_view bytes, Fill(tensors, i, fill, buffer));
    RETURN_IF_ERROR(sink(bytes));
  }
  return absl::OkStatus();
}

absl::Status StreamTorchZip(std::span<const TensorHeader> tensors, const Notes& notes,
                            TensorFiller fill, ByteSink sink) {
  RETURN_IF_ERROR(CheckNames(tensors));
  uint64_t bytes = 0;
  for (const TensorHeader& tensor : tensors) {
    bytes += 4 * static_cast<uint64_t>(ElementsOf(tensor));
  }
  RETURN_IF_ERROR(ZipStream::CheckSize(bytes));
  const std::string top = "archive/";
  ZipStream zip(sink);
  RETURN_IF_ERROR(zip.Add(top + "data.pkl", StateDictPickle(tensors)));
  RETURN_IF_ERROR(zip.Add(top + "byteorder", "little"));
  std::vector<float> buffer;
  for (size_t i = 0; i < tensors.size(); ++i) {
    ASSIGN_OR_RETURN(const absl::string_view values, Fill(tensors, i, fill, buffer));
    RETURN_IF_ERROR(zip.Add(absl::StrCat(top, "data/", i), values));
  }
  RETURN_IF_ERROR(zip.Add(top + "version", "3\n"));
  for (const auto& [name, text] : notes) {
    RETURN_IF_ERROR(zip.Add(absl::StrCat(top, "extra/", name), text));
  }
  return zip.Finish();
}

absl::Status StreamMindSpore(std::span<const TensorHeader> tensors, const Notes& notes,
                             TensorFiller fill, ByteSink sink, int64_t slice_bytes) {
  RETURN_IF_ERROR(CheckNames(tensors));
  std::vector<float> buffer;
  for (size_t i = 0; i < tensors.size(); ++i) {
    ASSIGN_OR_RETURN(const absl::string_view bytes, Fill(tensors, i, fill, buffer));
    // numpy's array_split: the first slices are one element longer where it doesn't divide.
    const uint64_t elements = buffer.size();
    const uint64_t limit = static_cast<uint64_t>(slice_bytes);
    const uint64_t slices = std::max<uint64_t>(1, (bytes.size() + limit - 1) / limit);
    uint64_t first = 0;
    for (uint64_t s = 0; s < slices; ++s) {
      const uint64_t count = elements / slices + (s < elements % slices ? 1 : 0);
      RETURN_IF_ERROR(sink(ValueHeader(tensors[i].name, tensors[i].shape, "Float32", 4 * count)));
      RETURN_IF_ERROR(sink(bytes.substr(4 * first, 4 * count)));
      first += count;
    }
  }
  const int64_t scalar[] = {0};  // as save_checkpoint writes a str: dims [0]
  for (const auto& [name, text] : notes) {
    const std::string wide = WideText(text);
    RETURN_IF_ERROR(sink(ValueHeader(name, scalar, "str", wide.size())));
    RETURN_IF_ERROR(sink(wide));
  }
  return absl::OkStatus();
}

absl::Status WriteAside(const std::filesystem::path& path,
                        absl::FunctionRef<absl::Status(ByteSink sink)> write) {
  std::filesystem::path temporary = path;
  temporary += ".tmp";
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return ErrnoStatus(errno, "can't write", temporary);
  absl::Cleanup remove_rest = [&temporary] { unlink(temporary.c_str()); };

  // Small pieces are gathered: a MindSpore value has a header of 60 bytes.
  constexpr size_t kGathered = size_t{1} << 20;
  std::string gathered;
  absl::Status status = write([&](absl::string_view bytes) -> absl::Status {
    if (gathered.size() + bytes.size() <= kGathered) {
      absl::StrAppend(&gathered, bytes);
      return absl::OkStatus();
    }
    RETURN_IF_ERROR(WriteAll(fd, gathered, temporary));
    gathered.clear();
    return WriteAll(fd, bytes, temporary);
  });
  if (status.ok()) status = WriteAll(fd, gathered, temporary);
  if (status.ok() && fsync(fd) != 0) status = ErrnoStatus(errno, "can't sync", temporary);
  if (close(fd) != 0 && status.ok()) status = ErrnoStatus(errno, "can't close", temporary);
  RETURN_IF_ERROR(status);
  RETURN_IF_ERROR(RenameSynced(temporary, path));
  std::move(remove_rest).Cancel();
  return absl::OkStatus();
}

}  // namespace pyramid
