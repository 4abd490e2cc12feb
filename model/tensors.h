// LibTorch tensors as safetensors bytes and back, and a module's parameters from them.
#ifndef PYRAMID_MODEL_TENSORS_H_
#define PYRAMID_MODEL_TENSORS_H_

#include <torch/torch.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/weights.h"

namespace pyramid {

using NamedTensors = std::vector<std::pair<std::string, torch::Tensor>>;

// Contiguous copies on the CPU where needed; the result owns its bytes. Dtypes: f32 f64 f16 bf16
// i64 i32 u8 bool; any other is InvalidArgument.
absl::StatusOr<std::string> TensorsToSafetensors(
    const NamedTensors& tensors, const std::map<std::string, std::string>& metadata = {});

// Tensors that own their memory. DataLoss as ParseSafetensors.
absl::StatusOr<NamedTensors> TensorsFromSafetensors(absl::string_view file);

// A module's parameters and buffers by name, in its order.
NamedTensors StateOf(const torch::nn::Module& module);

// Copies `tensors` into the module's parameters by name. Strict: InvalidArgument lists missing,
// unused and misshapen tensors and names that come twice; then nothing is copied.
absl::Status LoadState(torch::nn::Module& module, const NamedTensors& tensors);

// Reads `weights` into the module's parameters one by one, straight into their memory where they
// are float32 on the CPU; else one parameter more is in memory. Fresh ones keep what they have.
//   InvalidArgument  the parameters aren't the module's (listed); then nothing is read
//   and what Weights::Read returns; then some parameters are read
absl::Status LoadWeightsInto(torch::nn::Module& module, const Weights& weights);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_TENSORS_H_
