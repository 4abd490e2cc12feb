// What lies in a file of weights, whoever wrote it: safetensors, PyTorch's zip and legacy pickles,
// MindSpore's .ckpt. Torch-free.
//
// Opening reads names, types, shapes and where the bytes lie; values are read on demand, so that a
// file costs no more memory than the tensors that are taken from it. Lengths and counts in headers
// are never trusted. A pickle never runs anything: only tensors, containers, numbers and texts are
// built, any other global is refused by its name.
#ifndef PYRAMID_MODEL_FORMATS_WEIGHT_FILE_H_
#define PYRAMID_MODEL_FORMATS_WEIGHT_FILE_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/formats/byte_source.h"

namespace pyramid {

struct Extent {
  int64_t offset = 0;  // bytes from the source's beginning
  int64_t bytes = 0;
};

struct StoredTensor {
  // Containers around it, outermost first, joined by '.': "" for a bare state dict, "model",
  // "state_dict_ema", "optimizer.state.0" …
  std::string group;
  std::string name;   // as in the file
  std::string dtype;  // safetensors' spelling: "F32" "F64" "F16" "BF16" "I64" … "U8" "BOOL"
  std::vector<int64_t> shape;    // {}: a scalar
  std::vector<int64_t> strides;  // elements; empty: row-major without gaps
  int64_t first = 0;             // element of the storage it begins at
  std::vector<Extent> storage;   // pieces of the file that together are the storage
  int64_t elements() const;      // product of shape
};

enum class WeightFormat { kSafetensors, kTorchZip, kTorchLegacy, kMindSpore };

// "safetensors", "PyTorch zip", "PyTorch legacy pickle", "MindSpore ckpt".
const char* WeightFormatName(WeightFormat format);

struct WeightFile {
  WeightFormat format = WeightFormat::kSafetensors;
  std::vector<StoredTensor> tensors;  // in the file's order
  // Numbers, texts and metadata that aren't tensors: {"epoch", "300"}, {"format", "pt"}; the name
  // carries its group ("args.lr"). At most 1,000; long texts are cut.
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

// One format each; OpenWeightBytes chooses. They fill in everything but `source`.
absl::StatusOr<WeightFile> IndexSafetensors(const ByteSource& source);
absl::StatusOr<WeightFile> IndexTorchZip(const ByteSource& source);
absl::StatusOr<WeightFile> IndexTorchLegacy(const ByteSource& source);
absl::StatusOr<WeightFile> IndexMindSpore(const ByteSource& source);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FORMATS_WEIGHT_FILE_H_
