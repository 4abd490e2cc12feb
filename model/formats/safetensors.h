// The safetensors format: u64 header length, JSON header {name: {dtype, shape, data_offsets}},
// data. Torch-free.
//
// Lengths and counts in the header are never trusted: offsets must lie in the file, not overlap,
// and fit shape and dtype.
#ifndef PYRAMID_MODEL_FORMATS_SAFETENSORS_H_
#define PYRAMID_MODEL_FORMATS_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pyramid {

// Names as in the file: "F32", "F64", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32",
// "U16", "U8", "BOOL".
int64_t SafetensorsElementSize(absl::string_view dtype);  // bytes; 0: unknown

struct TensorBytes {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  absl::string_view data;  // little-endian, row-major; points into bytes that someone else owns
};

struct SafetensorsView {
  std::vector<TensorBytes> tensors;             // by offset
  std::map<std::string, std::string> metadata;  // __metadata__

  const TensorBytes* Find(absl::string_view name) const;  // null: none
};

// Reads the header; the tensors point into `file`, which must outlive the view. DataLoss for
// anything malformed, with what and where.
absl::StatusOr<SafetensorsView> ParseSafetensors(absl::string_view file);

// The file's bytes. Tensors are written in the order given; the data begins at a multiple of 8.
// InvalidArgument: unknown dtype, a size that doesn't fit the shape, a name twice.
absl::StatusOr<std::string> SerializeSafetensors(
    const std::vector<TensorBytes>& tensors,
    const std::map<std::string, std::string>& metadata = {});

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FORMATS_SAFETENSORS_H_
