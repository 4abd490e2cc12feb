// PVT v2: Improved Baselines with Pyramid Vision Transformer. Wenhai Wang, Enze Xie, Xiang Li,
// Deng-Ping Fan, Kaitao Song, Ding Liang, Tong Lu, Ping Luo, Ling Shao. Computational Visual Media
// 8 (2022), arXiv 2106.13797.
//
// Written from the paper; checked against the official code (whai362/PVT, classification/pvt_v2.py,
// commit 57e2dfa), timm 1.0.31 and, with its numerics, MindCV 0.3.0 (tests/golden). Names and order
// of the parameters are the official ones.
//
//   picture → 4 x (patch embedding → blocks → norm) → mean over the tokens → head
//   block:  x += attention(norm1(x));  x += mlp(norm2(x))
//
// Shapes: B pictures, C channels, N = H·W tokens, M keys, h heads of D channels. Tokens are [B, N,
// C], contiguous; a map [B, C, H, W] is a view of them (channels last), so going between the two
// copies nothing.
#include "model/pvt_v2.h"

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/device_ops.h"
#include "model/exception_guard.h"
#include "model/kernels/patches.h"

namespace pyramid {
namespace {

using torch::Tensor;
namespace nn = torch::nn;

// Where code bases differ, and nothing else (docs/models.md).
struct Numerics {
  bool pad_same = false;   // MindSpore's "same" padding of patch embeddings and reductions; else
                           // torch's symmetric
  bool gelu_tanh = false;  // else erf
  double eps_outer = 1e-5;
  double eps_block = 1e-6;
  // Not a matter of code bases: the network's switch for a device plug-in's operations.
  const bool* device_ops = nullptr;

  bool UseDeviceOps() const { return device_ops != nullptr && *device_ops; }
  Tensor Gelu(const Tensor& x) const { return torch::gelu(x, gelu_tanh ? "tanh" : "none"); }
};

constexpr int64_t kPooledSide = 7;  // of the linear variant's key map

Tensor TokensToMap(const Tensor& x, int64_t height, int64_t width) {
  return x.view({x.size(0), height, width, x.size(2)}).permute({0, 3, 1, 2});  // [B, C, H, W]
}

Tensor MapToTokens(const Tensor& x) {
  return x.permute({0, 2, 3, 1}).flatten(1, 2);  // [B, N, C]
}

// The same values in the type of the layer that takes them: with bf16 weights, norms and the
// residual sum stay f32.
Tensor For(const nn::Linear& layer, const Tensor& x) { return x.to(layer->weight.scalar_type()); }
Tensor For(const nn::Conv2d& layer, const Tensor& x) { return x.to(layer->weight.scalar_type()); }
Tensor For(const nn::LayerNorm& layer, const Tensor& x) {
  return x.to(layer->weight.scalar_type());
}

// Zeros so that a window of `kernel` every `stride` gives ceil(side / stride) outputs; the odd one
// goes after (MindSpore Conv2d).
Tensor PadSame(const Tensor& x, int64_t kernel, int64_t stride) {
  auto pads = [&](int64_t side) {
    const int64_t outputs = (side + stride - 1) / stride;
    const int64_t total = std::max<int64_t>((outputs - 1) * stride + kernel - side, 0);
    return std::pair(total / 2, total - total / 2);
  };
  const auto [top, bottom] = pads(x.size(2));
  const auto [left, right] = pads(x.size(3));
  if (top + bottom + left + right == 0) return x;
  return torch::constant_pad_nd(x, {left, right, top, bottom});
}

nn::LayerNorm MakeNorm(int64_t channels, double eps) {
  return nn::LayerNorm(nn::LayerNormOptions({channels}).eps(eps));
}

// layer(x), by the device's own operation where there is one. For norms whose result a linear layer
// takes: under autocast it is rounded to that layer's type at once. The norms that begin a stage's
// residual sum stay plain, and f32.
Tensor Normalised(nn::LayerNorm layer, const Tensor& x, const Numerics& numerics) {
  if (numerics.UseDeviceOps()) {
    const std::optional<Tensor> fused =
        DeviceLayerNorm(x, layer->weight, layer->bias, layer->options.eps());
    if (fused.has_value()) return *fused;
  }
  return layer->forward(x);
}

// x + path, or in training x + path·scale with a scale per picture, 0 where the path is dropped.
// `scale` [B, 1, 1], undefined: 1.
Tensor AddPath(const Tensor& x, const Tensor& path, const Tensor& scale) {
  return scale.defined() ? torch::addcmul(x, path.to(x.scalar_type()), scale) : x + path;
}

// ---- Parts, from the inside out ----

// A depthwise 3x3 convolution lets neighbouring tokens see each other; its zero padding is what
// tells positions apart, so there is no positional embedding.
struct DepthwiseConvImpl : nn::Module {
  explicit DepthwiseConvImpl(int64_t channels)
      : dwconv(nn::Conv2dOptions(channels, channels, 3).padding(1).groups(channels)) {
    register_module("dwconv", dwconv);
  }

  // x [B, N, C] → [B, N, C]
  Tensor forward(const Tensor& x, int64_t height, int64_t width) {
    Tensor map = TokensToMap(x, height, width);
    // oneDNN's fast weight gradient needs three rows (at 2x2, 64 pictures, 640 channels: 3.1 ms,
    // padded 0.3 ms). More zeros below change nothing.
    const bool pad = height < 3 && torch::GradMode::is_enabled();
    if (pad) map = torch::constant_pad_nd(map, {0, 0, 0, 3 - height});
    map = dwconv(map);
    if (pad) map = map.narrow(2, 0, height);
    return MapToTokens(map);
  }

  nn::Conv2d dwconv;
};
TORCH_MODULE(DepthwiseConv);

struct MlpImpl : nn::Module {
  MlpImpl(int64_t channels, int64_t ratio, bool linear, const Numerics& numerics)
      : fc1(channels, channels * ratio),
        dwconv(channels * ratio),
        fc2(channels * ratio, channels),
        linear_(linear),
        numerics_(numerics) {
    register_module("fc1", fc1);
    register_module("dwconv", dwconv);
    register_module("fc2", fc2);
  }

  Tensor forward(const Tensor& x, int64_t height, int64_t width) {
    Tensor hidden = fc1(For(fc1, x));     // [B, N, rC]
    if (linear_) hidden = hidden.relu();  // the linear variant only
    if (numerics_.UseDeviceOps()) {
      const std::optional<Tensor> fused = DeviceDwconvGelu(
          hidden, dwconv->dwconv->weight, dwconv->dwconv->bias, height, width, numerics_.gelu_tanh);
      if (fused.has_value()) return fc2(*fused);
    }
    hidden = dwconv(hidden, height, width);  // [B, N, rC]
    return fc2(numerics_.Gelu(hidden));      // [B, N, C]
  }

  nn::Linear fc1;
  DepthwiseConv dwconv;
  nn::Linear fc2;

 private:
  bool linear_;
  Numerics numerics_;
};
TORCH_MODULE(Mlp);

// Every token asks, but only M keys answer: the map is reduced first, by a convolution with stride
// `sr`, or in the linear variant by pooling to 7x7. Without a reduction (sr 1, stage 4) this is
// ordinary attention.
struct AttentionImpl : nn::Module {
  AttentionImpl(int64_t channels, int64_t heads, int64_t sr, bool linear, const Numerics& numerics)
      : q(channels, channels),
        kv(channels, 2 * channels),
        proj(channels, channels),
        heads_(heads),
        sr_ratio_(linear ? 1 : sr),
        linear_(linear),
        numerics_(numerics) {
    register_module("q", q);
    register_module("kv", kv);
    register_module("proj", proj);
    if (linear_ || sr_ratio_ > 1) {
      sr_ = register_module(
          "sr", nn::Conv2d(nn::Conv2dOptions(channels, channels, sr_ratio_).stride(sr_ratio_)));
      norm_ = register_module("norm", MakeNorm(channels, numerics.eps_outer));
    }
  }

  Tensor forward(const Tensor& input, int64_t height, int64_t width) {
    const Tensor x = For(q, input);
    const int64_t pictures = x.size(0), channels = x.size(2), depth = channels / heads_;
    const Tensor source = sr_.is_empty() ? x : Reduce(x, height, width);  // [B, M, C]

    // Official order of kv's outputs: keys of all heads, then values of all heads.
    const Tensor asked = q(x), answering = kv(source);  // [B, N, C], [B, M, 2C]
    if (numerics_.UseDeviceOps()) {
      const std::optional<Tensor> fused =
          DeviceAttention(asked, answering, heads_, 1 / std::sqrt(static_cast<double>(depth)));
      if (fused.has_value()) return proj(*fused);
    }
    const Tensor queries =
        asked.view({pictures, -1, heads_, depth}).transpose(1, 2);  // [B, h, N, D]
    const Tensor pair = answering.view({pictures, -1, 2, heads_, depth});
    const Tensor keys = pair.select(2, 0).transpose(1, 2);    // [B, h, M, D]
    const Tensor values = pair.select(2, 1).transpose(1, 2);  // [B, h, M, D]
    // softmax(q·kᵀ / sqrt(D))·v; sums in f32 also for bf16.
    const Tensor mixed = torch::scaled_dot_product_attention(queries, keys, values);
    return proj(mixed.transpose(1, 2).reshape({pictures, -1, channels}));  // [B, N, C]
  }

  int64_t reduction() const { return sr_ratio_; }
  // Null where there is no reduction.
  const nn::Conv2d& sr() const { return sr_; }
  const nn::LayerNorm& sr_norm() const { return norm_; }

  nn::Linear q;
  nn::Linear kv;
  nn::Linear proj;

 private:
  // [B, N, C] → [B, M, C]
  Tensor Reduce(const Tensor& x, int64_t height, int64_t width) {
    Tensor map = TokensToMap(x, height, width);
    if (linear_) {
      map = torch::adaptive_avg_pool2d(map, {kPooledSide, kPooledSide});  // [B, C, 7, 7]
      return For(kv,
                 numerics_.Gelu(Normalised(norm_, For(norm_, MapToTokens(sr_(map))), numerics_)));
    }
    if (numerics_.pad_same) map = PadSame(map, sr_ratio_, sr_ratio_);
    return For(kv, Normalised(norm_, For(norm_, ConvolveTiles(map)), numerics_));
  }

  // sr_(map) as tokens. Its windows don't overlap, so it is a linear layer over them: forward and
  // backward take a quarter of the convolution's time at 32x32 pixels, the same at 224x224. Torch's
  // numerics leave out the rows and columns that fill no window.
  Tensor ConvolveTiles(const Tensor& map) {
    const int64_t pictures = map.size(0), channels = map.size(1), side = sr_ratio_;
    const int64_t rows = map.size(2) / side, columns = map.size(3) / side;
    const Tensor tiles = map.permute({0, 2, 3, 1})  // [B, H, W, C]
                             .narrow(1, 0, rows * side)
                             .narrow(2, 0, columns * side)
                             .reshape({pictures, rows, side, columns, side, channels})
                             .transpose(2, 3)  // [B, rows, columns, side, side, C]
                             .reshape({pictures, rows * columns, side * side * channels});
    const Tensor weight = sr_->weight.permute({0, 2, 3, 1}).reshape({channels, -1});
    return torch::linear(tiles, weight, sr_->bias);  // [B, M, C]
  }

  nn::Conv2d sr_{nullptr};
  nn::LayerNorm norm_{nullptr};
  int64_t heads_;
  int64_t sr_ratio_;
  bool linear_;
  Numerics numerics_;
};
TORCH_MODULE(Attention);

struct BlockImpl : nn::Module {
  BlockImpl(int64_t channels, int64_t heads, int64_t mlp_ratio, int64_t sr, bool linear,
            const Numerics& numerics)
      : norm1(MakeNorm(channels, numerics.eps_block)),
        attn(channels, heads, sr, linear, numerics),
        norm2(MakeNorm(channels, numerics.eps_block)),
        mlp(channels, mlp_ratio, linear, numerics),
        numerics_(numerics) {
    register_module("norm1", norm1);
    register_module("attn", attn);
    register_module("norm2", norm2);
    register_module("mlp", mlp);
  }

  // x [B, N, C] → [B, N, C]; the scales as in AddPath.
  Tensor forward(const Tensor& x, int64_t height, int64_t width, const Tensor& attn_scale,
                 const Tensor& mlp_scale) {
    const Tensor seen =
        AddPath(x, attn(Normalised(norm1, x, numerics_), height, width), attn_scale);
    return AddPath(seen, mlp(Normalised(norm2, seen, numerics_), height, width), mlp_scale);
  }

  nn::LayerNorm norm1;
  Attention attn;
  nn::LayerNorm norm2;
  Mlp mlp;

 private:
  Numerics numerics_;
};
TORCH_MODULE(Block);

// Overlapping patches: a strided convolution whose windows overlap, then a norm.
struct PatchEmbedImpl : nn::Module {
  PatchEmbedImpl(int64_t in_channels, int64_t channels, int64_t kernel, int64_t stride,
                 const Numerics& numerics)
      : proj(nn::Conv2dOptions(in_channels, channels, kernel)
                 .stride(stride)
                 .padding(numerics.pad_same ? 0 : kernel / 2)),
        norm(MakeNorm(channels, numerics.eps_outer)),
        kernel_(kernel),
        stride_(stride),
        pad_same_(numerics.pad_same) {
    register_module("proj", proj);
    register_module("norm", norm);
  }

  // map [B, C', H', W'] → tokens [B, N, C]; H = ceil(H' / stride), W alike, with either padding.
  Tensor forward(const Tensor& map) {
    const Tensor patches = proj(For(proj, pad_same_ ? PadSame(map, kernel_, stride_) : map));
    return norm(For(norm, MapToTokens(patches)));
  }

  nn::Conv2d proj;
  nn::LayerNorm norm;

 private:
  int64_t kernel_;
  int64_t stride_;
  bool pad_same_;
};
TORCH_MODULE(PatchEmbed);

// ---- Numbers without a generator's state ----

// SplitMix64's finaliser (Steele, Lea, Flood 2014): every bit of the result depends on every bit of
// x.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

uint64_t Combine(uint64_t hash, uint64_t value) { return Mix(hash + 0x9E3779B97F4A7C15u + value); }

// In (0, 1), from the upper 53 bits.
double Unit(uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53; }

// FNV-1a.
uint64_t HashOf(absl::string_view text) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001B3u;
  return hash;
}

// Element i of the tensor `name` depends on (seed, name, i) alone.
Tensor Normal(torch::IntArrayRef shape, double deviation, uint64_t seed, absl::string_view name) {
  constexpr double kTwoPi = 6.283185307179586;
  const Tensor values = torch::empty(shape, torch::kFloat32);
  float* out = values.data_ptr<float>();
  const uint64_t key = Combine(HashOf(name), seed);
  const int64_t count = values.numel();
  for (int64_t i = 0; i < count; i += 2) {  // Box-Muller makes two at a time
    const double radius = deviation * std::sqrt(-2 * std::log(Unit(Combine(key, i))));
    const double angle = kTwoPi * Unit(Combine(key, i + 1));
    out[i] = static_cast<float>(radius * std::cos(angle));
    if (i + 1 < count) out[i + 1] = static_cast<float>(radius * std::sin(angle));
  }
  return values;
}

Numerics NumericsFrom(const v1::Numerics& config) {
  return {.pad_same = config.pad_style() == "same",
          .gelu_tanh = config.gelu() == "tanh",
          .eps_outer = config.eps_outer(),
          .eps_block = config.eps_block()};
}

}  // namespace

// ---- The network ----

struct PvtV2Impl::Parts {
  struct Stage {
    PatchEmbed patch_embed{nullptr};
    std::vector<Block> blocks;
    nn::LayerNorm norm{nullptr};
  };

  // What each path of each block is multiplied by: [blocks, 2, B, 1, 1] (attention, MLP), 0 or 1 /
  // keep.
  Tensor DropPathScales(int64_t pictures, const torch::TensorOptions& options) const {
    const auto blocks = static_cast<int64_t>(drop_rates.size());
    const Tensor scales = torch::empty({blocks, 2, pictures, 1, 1}, torch::kFloat32);
    float* out = scales.data_ptr<float>();
    const uint64_t run = Combine(Combine(key.seed, key.step), HashOf("drop path"));
    for (int64_t path = 0; path < 2 * blocks; ++path) {
      const double rate = drop_rates[path / 2];
      for (int64_t b = 0; b < pictures; ++b) {
        const double u = Unit(Combine(Combine(run, path), key.first + b));
        *out++ = u < rate ? 0.0f : static_cast<float>(1 / (1 - rate));
      }
    }
    return scales.to(options);
  }

  v1::NetworkConfig config;
  const Variant* variant = nullptr;
  std::array<Stage, 4> stages;
  nn::Linear head{nullptr};
  std::vector<double> drop_rates;  // per block
  DropPathKey key;
  std::optional<FusedOps> fused;
  bool device_ops = false;
};

PvtV2Impl::PvtV2Impl(const v1::NetworkConfig& config, double drop_path_rate)
    : parts_(std::make_unique<Parts>()) {
  const Variant* variant = FindVariant(config.variant());
  TORCH_CHECK(variant != nullptr, "No variant of PVT v2 is called \"", config.variant(), "\".");
  Numerics numerics = NumericsFrom(config.numerics());
  numerics.device_ops = &parts_->device_ops;
  parts_->config = config;
  parts_->variant = variant;

  int64_t channels = config.in_channels();
  int64_t total_blocks = 0;
  for (int i = 0; i < 4; ++i) {
    Parts::Stage& stage = parts_->stages[i];
    const std::string number = std::to_string(i + 1);
    const int64_t dim = variant->dims[i];
    stage.patch_embed = register_module(
        "patch_embed" + number,
        PatchEmbed(channels, dim, /*kernel=*/i == 0 ? 7 : 3, /*stride=*/i == 0 ? 4 : 2, numerics));
    nn::ModuleList blocks;
    for (int k = 0; k < variant->depths[i]; ++k) {
      stage.blocks.emplace_back(dim, variant->heads[i], variant->mlp_ratios[i],
                                variant->sr_ratios[i], variant->linear, numerics);
      blocks->push_back(stage.blocks.back());
    }
    register_module("block" + number, blocks);
    stage.norm = register_module("norm" + number, MakeNorm(dim, numerics.eps_block));
    channels = dim;
    total_blocks += variant->depths[i];
  }
  parts_->head = register_module("head", nn::Linear(channels, config.num_classes()));

  for (int64_t k = 0; k < total_blocks; ++k) {
    parts_->drop_rates.push_back(drop_path_rate * static_cast<double>(k) / (total_blocks - 1));
  }
}

PvtV2Impl::~PvtV2Impl() = default;

Tensor PvtV2Impl::forward(Tensor x) {
  const int64_t in_channels = parts_->config.in_channels();
  TORCH_CHECK(x.dim() == 4 && x.size(1) == in_channels, "Pictures must be [B, ", in_channels,
              ", H, W], not ", x.sizes(), ".");
  const int64_t smallest = SmallestSide(*parts_->variant);
  TORCH_CHECK(x.size(2) >= smallest && x.size(3) >= smallest, "Pictures are ", x.size(2), "x",
              x.size(3), "; ", parts_->config.variant(), " takes ", smallest, "x", smallest,
              " pixels or more.");

  if (x.device().is_cpu() && x.scalar_type() == torch::kFloat32 && !x.requires_grad() &&
      Fuses(x.size(2), x.size(3))) {
    return FusedForward(x);
  }

  const int64_t pictures = x.size(0);
  Tensor scales;
  if (is_training() && parts_->drop_rates.back() > 0) {
    scales = parts_->DropPathScales(pictures, parts_->head->weight.options().requires_grad(false));
  }

  int64_t height = x.size(2), width = x.size(3);
  size_t block_index = 0;
  for (Parts::Stage& stage : parts_->stages) {
    const int64_t stride = stage.patch_embed->proj->options.stride()->at(0);
    height = (height + stride - 1) / stride;
    width = (width + stride - 1) / stride;
    Tensor tokens = stage.patch_embed(x);  // [B, N, C]
    for (Block& block : stage.blocks) {
      Tensor attn_scale, mlp_scale;
      if (parts_->drop_rates[block_index] > 0 && scales.defined()) {
        attn_scale = scales[block_index][0];
        mlp_scale = scales[block_index][1];
      }
      tokens = block(tokens, height, width, attn_scale, mlp_scale);
      ++block_index;
    }
    x = TokensToMap(stage.norm(tokens), height, width);  // [B, C, H, W]
  }
  return parts_->head(For(parts_->head, x.mean({2, 3})));  // [B, num_classes]
}

namespace {

FusedParameter Of(const nn::Linear& layer) { return {layer->weight, layer->bias}; }
FusedParameter Of(const nn::Conv2d& layer) { return {layer->weight, layer->bias}; }
FusedParameter Of(const nn::LayerNorm& layer) { return {layer->weight, layer->bias}; }

}  // namespace

Tensor PvtV2Impl::FirstBlock(int stage, const Tensor& tokens, int64_t height, int64_t width) {
  return parts_->stages.at(static_cast<size_t>(stage))
      .blocks.front()(tokens, height, width, Tensor(), Tensor());
}

bool PvtV2Impl::Fuses(int64_t height, int64_t width) const {
  if (!parts_->fused.has_value()) return false;
  if (parts_->variant->linear) return kPooledSide * kPooledSide <= kernels::kMostKeys;
  const bool same = NumericsFrom(parts_->config.numerics()).pad_same;
  for (int s = 0; s < 4; ++s) {
    const int64_t stride = s == 0 ? 4 : 2, sr = parts_->variant->sr_ratios[s];
    height = (height + stride - 1) / stride;
    width = (width + stride - 1) / stride;
    if (kernels::ReductionSide(height, sr, same).outputs *
            kernels::ReductionSide(width, sr, same).outputs >
        kernels::kMostKeys) {
      return false;
    }
  }
  return true;
}

Tensor PvtV2Impl::FusedForward(const Tensor& x) {
  const FusedOps& ops = *parts_->fused;
  const Numerics numerics = NumericsFrom(parts_->config.numerics());
  Tensor scales;
  if (is_training() && parts_->drop_rates.back() > 0) {
    scales = parts_->DropPathScales(x.size(0), torch::TensorOptions(torch::kFloat32)).flatten(2);
  }
  Tensor tokens = x;
  MapSize size{x.size(2), x.size(3)};
  int64_t index = 0;
  for (Parts::Stage& stage : parts_->stages) {
    const auto& options = stage.patch_embed->proj->options;
    const int64_t kernel = options.kernel_size()->at(0), stride = options.stride()->at(0);
    tokens = FusedPatchEmbed(ops, tokens, size, kernel, stride, numerics.pad_same,
                             Of(stage.patch_embed->proj), Of(stage.patch_embed->norm),
                             numerics.eps_outer);
    size = {(size.height + stride - 1) / stride, (size.width + stride - 1) / stride};
    for (Block& block : stage.blocks) {
      const bool drops = scales.defined() && parts_->drop_rates[index] > 0;
      const Attention& attention = block->attn;
      const bool reduces = !attention->sr().is_empty();
      const FusedAttentionShape shape{
          .size = size,
          .heads = parts_->variant->heads[&stage - parts_->stages.data()],
          .reduction = attention->reduction(),
          .pooled_side = parts_->variant->linear ? kPooledSide : 0,
          .pad_same = numerics.pad_same,
          .gelu_tanh = numerics.gelu_tanh,
          .eps_block = numerics.eps_block,
          .eps_outer = numerics.eps_outer};
      tokens = FusedAttention(ops, tokens, drops ? scales[index][0] : Tensor(), shape,
                              Of(block->norm1), Of(attention->q), Of(attention->kv),
                              Of(attention->proj), reduces ? Of(attention->sr()) : FusedParameter(),
                              reduces ? Of(attention->sr_norm()) : FusedParameter());
      const FusedMlpShape mlp_shape{.size = size,
                                    .relu = parts_->variant->linear,
                                    .gelu_tanh = numerics.gelu_tanh,
                                    .eps = numerics.eps_block};
      tokens =
          FusedMlp(ops, tokens, drops ? scales[index][1] : Tensor(), mlp_shape, Of(block->norm2),
                   Of(block->mlp->fc1), Of(block->mlp->dwconv->dwconv), Of(block->mlp->fc2));
      ++index;
    }
    tokens = FusedNorm(ops, tokens, Of(stage.norm), numerics.eps_block);
  }
  return parts_->head(tokens.to(torch::kFloat32).mean(1));
}

void PvtV2Impl::Fuse(const FusedOps& ops) { parts_->fused = ops; }

void PvtV2Impl::UseDeviceOps() { parts_->device_ops = true; }

void PvtV2Impl::Initialize(uint64_t seed) {
  // Official rules; the order and the generator are ours, so that the same seed gives the same
  // weights everywhere.
  torch::NoGradGuard no_grad;
  for (const auto& item : named_parameters()) {
    Tensor parameter = item.value();
    const auto shape = parameter.sizes();
    if (absl::EndsWith(item.key(), ".bias")) {
      parameter.zero_();
    } else if (shape.size() == 1) {
      parameter.fill_(1);
    } else {
      // A depthwise convolution has as many groups as outputs, so its fan-out is the kernel's area.
      const bool depthwise = absl::EndsWith(item.key(), ".dwconv.weight");
      const double fan_out =
          shape.size() == 4 ? static_cast<double>(shape[2] * shape[3] * (depthwise ? 1 : shape[0]))
                            : 0;
      const double deviation = shape.size() == 4 ? std::sqrt(2 / fan_out) : 0.02;
      parameter.copy_(Normal(shape, deviation, seed, item.key()));
    }
  }
}

void PvtV2Impl::set_drop_path_key(const DropPathKey& key) { parts_->key = key; }

const v1::NetworkConfig& PvtV2Impl::config() const { return parts_->config; }

absl::StatusOr<PvtV2> MakePvtV2(const v1::NetworkConfig& config, double drop_path_rate) {
  if (FindVariant(config.variant()) == nullptr) {
    const std::string known = absl::StrJoin(
        Variants(), ", ",
        [](std::string* out, const Variant& variant) { absl::StrAppend(out, variant.name); });
    return absl::InvalidArgumentError(
        absl::StrCat("network.variant is \"", config.variant(), "\"; use one of ", known));
  }
  if (config.num_classes() < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("network.num_classes is ", config.num_classes(), "; use 1 or more"));
  }
  if (config.in_channels() < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("network.in_channels is ", config.in_channels(), "; use 1 or more"));
  }
  const v1::Numerics& numerics = config.numerics();
  if (numerics.pad_style() != "torch" && numerics.pad_style() != "same") {
    return absl::InvalidArgumentError(absl::StrCat("network.numerics.pad_style is \"",
                                                   numerics.pad_style(), "\"; use torch or same"));
  }
  if (numerics.gelu() != "erf" && numerics.gelu() != "tanh") {
    return absl::InvalidArgumentError(
        absl::StrCat("network.numerics.gelu is \"", numerics.gelu(), "\"; use erf or tanh"));
  }
  for (const auto& [name, eps] : {std::pair("eps_outer", numerics.eps_outer()),
                                  std::pair("eps_block", numerics.eps_block())}) {
    if (!(eps > 0 && eps < 1)) {
      return absl::InvalidArgumentError(
          absl::StrCat("network.numerics.", name, " is ", eps, "; use a number in (0, 1)"));
    }
  }
  if (!(drop_path_rate >= 0 && drop_path_rate < 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("drop_path_rate is ", drop_path_rate, "; use 0 or more, less than 1"));
  }
  return Guard("building the network", absl::StatusCode::kInternal,
               [&]() -> absl::StatusOr<PvtV2> { return PvtV2(config, drop_path_rate); });
}

}  // namespace pyramid
