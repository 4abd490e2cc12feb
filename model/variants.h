// The variants of PVT v2 (table 1 of the paper), and the names and shapes of their parameters.
// Torch-free: what reads and writes weights needs no network.
#ifndef PYRAMID_MODEL_VARIANTS_H_
#define PYRAMID_MODEL_VARIANTS_H_

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace pyramid {

struct Variant {
  absl::string_view name;
  std::array<int, 4> dims;    // channels of the stages
  std::array<int, 4> depths;  // blocks
  std::array<int, 4> heads;
  std::array<int, 4> mlp_ratios;
  std::array<int, 4> sr_ratios;  // side of the spatial reduction
  bool linear;                   // pooled to 7x7 instead of reduced by a convolution
};

std::span<const Variant> Variants();  // "pvt_v2_b0" first

// Null: no such variant.
const Variant* FindVariant(absl::string_view name);

// Fewest pixels of a picture's height and width: 29, in the linear variant 1.
int SmallestSide(const Variant& variant);

struct ParameterShape {
  std::string name;            // official: "block1.0.attn.q.weight"
  std::vector<int64_t> shape;  // OIHW, [out, in] or [C]
};

// Every parameter of the network in the official order, as PvtV2 has them.
std::vector<ParameterShape> ParametersOf(const Variant& variant, int in_channels, int num_classes);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_VARIANTS_H_
