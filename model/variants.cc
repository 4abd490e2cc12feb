#include "model/variants.h"

#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

constexpr std::array<Variant, 7> kVariants = {{
    // name, channels, blocks, heads, MLP ratios, reductions, linear
    {"pvt_v2_b0",
     {32, 64, 160, 256},
     {2, 2, 2, 2},
     {1, 2, 5, 8},
     {8, 8, 4, 4},
     {8, 4, 2, 1},
     false},
    {"pvt_v2_b1",
     {64, 128, 320, 512},
     {2, 2, 2, 2},
     {1, 2, 5, 8},
     {8, 8, 4, 4},
     {8, 4, 2, 1},
     false},
    {"pvt_v2_b2",
     {64, 128, 320, 512},
     {3, 4, 6, 3},
     {1, 2, 5, 8},
     {8, 8, 4, 4},
     {8, 4, 2, 1},
     false},
    {"pvt_v2_b3",
     {64, 128, 320, 512},
     {3, 4, 18, 3},
     {1, 2, 5, 8},
     {8, 8, 4, 4},
     {8, 4, 2, 1},
     false},
    {"pvt_v2_b4",
     {64, 128, 320, 512},
     {3, 8, 27, 3},
     {1, 2, 5, 8},
     {8, 8, 4, 4},
     {8, 4, 2, 1},
     false},
    {"pvt_v2_b5",
     {64, 128, 320, 512},
     {3, 6, 40, 3},
     {1, 2, 5, 8},
     {4, 4, 4, 4},
     {8, 4, 2, 1},
     false},
    {"pvt_v2_b2_li",
     {64, 128, 320, 512},
     {3, 4, 6, 3},
     {1, 2, 5, 8},
     {8, 8, 4, 4},
     {8, 4, 2, 1},
     true},
}};

}  // namespace

std::span<const Variant> Variants() { return kVariants; }

const Variant* FindVariant(absl::string_view name) {
  for (const Variant& variant : kVariants) {
    if (variant.name == name) return &variant;
  }
  return nullptr;
}

int SmallestSide(const Variant& variant) {
  // The first reduction's 8x8 window must fit the first map, ceil(side / 4) wide. Pooling takes any
  // map.
  return variant.linear ? 1 : 29;
}

std::vector<ParameterShape> ParametersOf(const Variant& variant, int in_channels, int num_classes) {
  std::vector<ParameterShape> all;
  // A weight and the bias that goes with it: one number per output.
  const auto add = [&all](std::string name, std::vector<int64_t> shape) {
    const int64_t outputs = shape[0];
    all.push_back({absl::StrCat(name, ".weight"), std::move(shape)});
    all.push_back({absl::StrCat(name, ".bias"), {outputs}});
  };
  int64_t inputs = in_channels;
  for (size_t i = 0; i < 4; ++i) {
    const int64_t dim = variant.dims[i];
    const int64_t hidden = dim * variant.mlp_ratios[i];
    const int64_t kernel = i == 0 ? 7 : 3;
    const int64_t side = variant.linear ? 1 : variant.sr_ratios[i];
    const bool reduced = variant.linear || variant.sr_ratios[i] > 1;
    const std::string embed = absl::StrCat("patch_embed", i + 1);
    add(embed + ".proj", {dim, inputs, kernel, kernel});
    add(embed + ".norm", {dim});
    for (int k = 0; k < variant.depths[i]; ++k) {
      const std::string block = absl::StrCat("block", i + 1, ".", k);
      add(block + ".norm1", {dim});
      add(block + ".attn.q", {dim, dim});
      add(block + ".attn.kv", {2 * dim, dim});
      add(block + ".attn.proj", {dim, dim});
      if (reduced) {
        add(block + ".attn.sr", {dim, dim, side, side});
        add(block + ".attn.norm", {dim});
      }
      add(block + ".norm2", {dim});
      add(block + ".mlp.fc1", {hidden, dim});
      add(block + ".mlp.dwconv.dwconv", {hidden, 1, 3, 3});
      add(block + ".mlp.fc2", {dim, hidden});
    }
    add(absl::StrCat("norm", i + 1), {dim});
    inputs = dim;
  }
  add("head", {num_classes, inputs});
  return all;
}

}  // namespace pyramid
