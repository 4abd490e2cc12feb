// Files of float32 weights that other programs read: safetensors, PyTorch's zip, MindSpore's .ckpt.
// Torch-free.
//
// A tensor at a time: beside the header the largest one is all that is in memory. Nothing here
// knows whose names they are.
#ifndef PYRAMID_MODEL_FORMATS_WEIGHT_WRITER_H_
#define PYRAMID_MODEL_FORMATS_WEIGHT_WRITER_H_

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace pyramid {

struct TensorHeader {
  std::string name;
  std::vector<int64_t> shape;
};

// Gives the values of tensor `index`; `out` has the product of its shape.
using TensorFiller = absl::FunctionRef<absl::Status(size_t index, std::span<float> out)>;
// Takes the file's next bytes.
using ByteSink = absl::FunctionRef<absl::Status(absl::string_view)>;
// Texts that lie beside the tensors.
using Notes = std::vector<std::pair<std::string, std::string>>;

// All three: InvalidArgument for a name that comes twice, and what `fill` and `sink` return.

// `notes` become __metadata__, beside format: "pt", which transformers asks for.
absl::Status StreamSafetensors(std::span<const TensorHeader> tensors, const Notes& notes,
                               TensorFiller fill, ByteSink sink);

// What torch.save writes for an OrderedDict of CPU tensors; torch.load(weights_only=True) reads it.
// `notes` become records extra/<name> of the zip, which PyTorch leaves alone.
// InvalidArgument over 4 GiB, before `sink` gets a byte.
absl::Status StreamTorchZip(std::span<const TensorHeader> tensors, const Notes& notes,
                            TensorFiller fill, ByteSink sink);

// What mindspore.save_checkpoint writes; `notes` (ASCII) are appended values (append_dict) of type
// str. A tensor over `slice_bytes` goes in slices of about equal size, as there.
inline constexpr int64_t kMindSporeSliceBytes = int64_t{512} << 20;  // serialization.py: SLICE_SIZE
absl::Status StreamMindSpore(std::span<const TensorHeader> tensors, const Notes& notes,
                             TensorFiller fill, ByteSink sink,
                             int64_t slice_bytes = kMindSporeSliceBytes);

// Runs `write` with a sink into "<path>.tmp", syncs it and renames it over `path`. On an error the
// old file stays and no temporary one is left. ResourceExhausted: disk full.
absl::Status WriteAside(const std::filesystem::path& path,
                        absl::FunctionRef<absl::Status(ByteSink sink)> write);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FORMATS_WEIGHT_WRITER_H_
