// What lies in a file of weights, whoever wrote it: safetensors, PyTorch's zip and legacy pickles,
// MindSpore's .ckpt. Torch-free.
//
// Opening reads names, types, shapes and where the bytes lie; values are read on demand, so that a
// file costs no more memory than the tensors that are taken from it. Lengths and counts in headers
// are never trusted. A pickle never runs anything: only tensors, containers, numbers and texts are
// built, any other global is refused by its name.
#ifndef PYRAMID_MODEL_FORMATS_WEIGHT_FILE_H_
#define PYRAMID_MODEL_FORMATS_WEIGHT_FILE_H_

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/formats/byte_source.h"

namespace pyramid {

struct Extent {
  int64_t offset = 0;  // bytes from the source's beginning
  int64_t bytes = 0;
};

// CRC-32 of a storage's bytes. Tensors of one storage share it, so that it is checked once.
struct StorageChecksum {
  uint32_t crc32 = 0;
  std::atomic<bool> verified = false;
};

struct StoredTensor {
  // Containers around it, outermost first, joined by '.': "" for a bare state dict, "model",
  // "state_dict_ema", "optimizer.state.0" …
  std::string group;
  std::string name;   // as in the file
  std::string dtype;  // safetensors' spelling: "F32" "F64" "F16" "BF16" "I64" … "U8" "BOOL"
  std::vector<int64_t> shape;                 // {}: a scalar
  std::vector<int64_t> strides;               // elements; empty: row-major without gaps
  int64_t first = 0;                          // element of the storage it begins at
  std::vector<Extent> storage;                // pieces of the file that together are the storage
  std::shared_ptr<StorageChecksum> checksum;  // null: the format has none, or elsewhere
  int64_t elements() const;                   // product of shape
};

enum class WeightFormat { kSafetensors, kTorchZip, kTorchLegacy, kMindSpore };

// "safetensors", "PyTorch zip", "PyTorch legacy pickle", "MindSpore ckpt".
const char* WeightFormatName(WeightFormat format);

struct WeightFile {
  WeightFormat format = WeightFormat::kSafetensors;
  std::vector<StoredTensor> tensors;  // in the file's order
  // Numbers, texts and metadata that aren't tensors: {"epoch", "300"}, {"format", "pt"}; the name
  // carries its group ("args.lr"). A PyTorch zip's records under extra/ are notes too, by their
  // name. At most 1,000; texts are cut at 1,024 bytes.
  std::vector<std::pair<std::string, std::string>> notes;
  bool has_checksum = false;  // the format carries one (MindSpore's CRC trailer, zip's CRC-32)
  std::shared_ptr<const ByteSource> source;
};

// By content, not by the file's name.
//   InvalidArgument  none of the formats; encrypted; a pickle with a foreign global (its name);
//                    an unsupported type or compression
//   DataLoss         truncated, contradicting itself, or the checksum is wrong (MindSpore's CRC is
//                    verified here, zip entries' in ReadTensor)
//   NotFound, PermissionDenied
absl::StatusOr<WeightFile> OpenWeightFile(const std::filesystem::path& path);
absl::StatusOr<WeightFile> OpenWeightBytes(std::shared_ptr<const ByteSource> source);

// The tensor's values in its own dtype, row-major without gaps; `out` has elements() x element size
// bytes. Needs at most 16 MiB beside `out` where strides are regular, else the storage's size.
absl::Status ReadTensor(const WeightFile& file, const StoredTensor& tensor, std::span<char> out);

// The same as float32, from any number type (f64 and integers are rounded to nearest). `out` has
// elements() floats. InvalidArgument: the dtype isn't a number's.
absl::Status ReadTensorAsFloat(const WeightFile& file, const StoredTensor& tensor,
                               std::span<float> out);

// One format each; OpenWeightBytes chooses, checks every tensor with CheckStoredTensor and fills in
// `source`.
absl::StatusOr<WeightFile> IndexSafetensors(const ByteSource& source);
absl::StatusOr<WeightFile> IndexTorchZip(const ByteSource& source);
absl::StatusOr<WeightFile> IndexTorchLegacy(const ByteSource& source);
absl::StatusOr<WeightFile> IndexMindSpore(const ByteSource& source);

// Limits of every format, far above any model's: what a file claims costs no more than this.
inline constexpr size_t kMaxStoredTensors = 100'000;
inline constexpr size_t kMaxTensorRank = 16;

// Shape, strides and storage fit each other and a source of this size (DataLoss; InvalidArgument
// for an unknown dtype). A tensor has at most its storage's bytes + 16 MiB, though expanded ones
// (stride 0) could claim any number.
absl::Status CheckStoredTensor(const StoredTensor& tensor, int64_t source_size);

// Appends within the limits above; what isn't UTF-8 is escaped.
void AddNote(WeightFile& file, absl::string_view name, absl::string_view text);

// The text, escaped if it isn't UTF-8.
std::string PrintableText(absl::string_view text);

// CRC-32 of the extents' bytes, in pieces of 1 MiB.
absl::StatusOr<uint32_t> Crc32OfExtents(const ByteSource& source, std::span<const Extent> extents);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FORMATS_WEIGHT_FILE_H_
