// Weights as the commands see them: flags that say whose they are, and what is told of them.
#ifndef PYRAMID_CLIENT_ABOUT_WEIGHTS_H_
#define PYRAMID_CLIENT_ABOUT_WEIGHTS_H_

#include <CLI/CLI.hpp>
#include <string>

#include "absl/strings/string_view.h"
#include "model/formats/weight_file.h"
#include "model/weights.h"

namespace pyramid {

// --origin, --ema, --head with --num-classes, and --pad-style, --gelu, --eps-outer in place of the
// origin's. `needs`: a flag without which they make no sense; may be null.
void AddWeightFlags(CLI::App& command, WeightOptions& options, CLI::Option* needs = nullptr);

// "pvt_v2_b0, 10 classes, 1 channels".
std::string DescribeNetwork(const v1::NetworkConfig& network);

// One of Weights::facts(); empty: not among them.
std::string FactOf(const Weights& weights, absl::string_view name);

// Compares every checksum that lies in the file: MindSpore's was compared when it was opened, a
// zip's are here. DataLoss names the tensor.
absl::Status VerifyChecksums(const WeightFile& file);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_ABOUT_WEIGHTS_H_
