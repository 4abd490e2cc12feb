// One thread's part of a forward pass reads, from the bottom up, as the network does: Forward →
// Group (four pictures) → Stage → Block → Attend, Mlp. Everything between is rows of tokens that a
// thread takes its share of.
//
// What decides the shape of this, measured on b0 at 224x224 in bf16 (docs/performance.md):
//   - The MLP's hidden map doesn't fit the cache in stages 1 and 2: it is computed in bands of rows
//     that a ring of rows keeps for the depthwise convolution.
//   - Stages 3 and 4 have few tokens and most of the weights: four pictures share each pass over
//     them.
//   - Convolutions are linear layers over gathered patches; gathering costs about 2 %.
#include "model/packed_network.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numbers>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/strings/str_cat.h"
#include "model/kernels/cpu_kernels.h"
#include "model/kernels/patches.h"
#include "model/thread_team.h"
#include "model/variants.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

using kernels::CpuKernels;
using kernels::MapWindows;
using kernels::Output;
using kernels::PatchSide;
using kernels::ReductionSide;
using kernels::WindowSide;

constexpr int kGroup = 4;            // pictures that share a pass over the weights of stages 3, 4
constexpr int kPooledSide = 7;       // of the linear variant's key map
constexpr int64_t kTokenGrain = 32;  // rows of a GEMM's block
constexpr int64_t kStripBytes = 192 << 10;  // gathered patches at a time
constexpr int64_t kBandBytes = 128 << 10;   // hidden rows of a band at a time
constexpr int64_t kWholeBytes = 512 << 10;  // hidden maps up to this size stay whole
constexpr int64_t kLargestBand = 64;        // rows

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory for all of something, aligned to huge pages where it is large, zeroed, with kSlack behind.
class Arena {
 public:
  explicit Arena(int64_t bytes) : bytes_(RoundUp(bytes + kernels::kSlack, kPage)) {
    memory_ = static_cast<char*>(std::aligned_alloc(kPage, static_cast<size_t>(bytes_)));
    if (memory_ == nullptr) std::abort();  // as new does without memory; sizes are checked before
    madvise(memory_, static_cast<size_t>(bytes_), MADV_HUGEPAGE);
    std::memset(memory_, 0, static_cast<size_t>(bytes_));
  }
  ~Arena() { std::free(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  char* data() const { return memory_; }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kPage = 2 << 20;
  int64_t bytes_;
  char* memory_;
};

// Hands out pieces of an arena that is made afterwards: first add up, then place.
class Layout {
 public:
  // Buffers begin at odd multiples of 64 bytes apart, so that equal rows of two buffers don't fall
  // into the same cache set.
  int64_t Add(int64_t bytes) {
    const int64_t at = total_;
    total_ += RoundUp(bytes + kernels::kSlack, 64) + 64 * (2 * (++count_ % 16) + 1);
    return at;
  }
  int64_t total() const { return total_; }

 private:
  int64_t total_ = 0;
  int count_ = 0;
};

// ---- Packed weights ----

struct PackedLinear {
  int64_t weight = 0;  // offset in the weights' arena
  int64_t bias = 0;
  int n = 0;
  int k = 0;  // as packed: a multiple of 32
};

struct PackedNorm {
  int64_t gamma = 0;
  int64_t beta = 0;
  float eps = 0;
};

struct PackedBlock {
  PackedNorm norm1, norm2;
  PackedLinear q, sr, kv, proj, fc1, fc2;
  PackedNorm sr_norm;
  int64_t dwconv = 0;
};

struct PackedStage {
  PackedLinear patch_embed;
  PackedNorm patch_norm, norm;
  std::vector<PackedBlock> blocks;
};

// ---- Sizes ----

struct StageSize {
  int64_t height = 0, width = 0, tokens = 0;
  int64_t key_height = 0, key_width = 0, keys = 0;
  int64_t band = 0;  // rows of an MLP's band; 0: whole
};

// Where each buffer of a workspace lies. `x` … are shared by the threads that work on one group,
// the rest is each thread's own.
struct Plan {
  int height = 0, width = 0;
  int64_t plane_height = 0, plane_width = 0;  // the padded input
  std::array<StageSize, 4> stages;
  // Offsets
  int64_t image, x, y, x_late, normed, q, mixed, reduced, kv, hidden, gelu, stage_out, mean;
  int64_t strip, ring, band_gelu, zeros, keys, row_floats, fresh_rows;
  int64_t total = 0;
};

struct Workspace {
  explicit Workspace(const Plan& p) : plan(p), arena(p.total) {}
  const Plan plan;
  const Arena arena;
  char* At(int64_t offset) const { return arena.data() + offset; }
};

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Adapts parameters to what kernels take: [O, I, kh, kw] → [O, kh, kw, I].
std::vector<float> ChannelsLast(const std::vector<float>& w, int out, int in, int side) {
  std::vector<float> result(w.size());
  const int area = side * side;
  for (int o = 0; o < out; ++o) {
    for (int i = 0; i < in; ++i) {
      for (int s = 0; s < area; ++s) {
        result[(static_cast<size_t>(o) * area + s) * in + i] =
            w[(static_cast<size_t>(o) * in + i) * area + s];
      }
    }
  }
  return result;
}

class Packer;

class Network : public PackedNetwork {
 public:
  Network(const v1::NetworkConfig& config, const Variant& variant, const CpuKernels& kernels,
          const CpuKernels& head_kernels)
      : config_(config),
        variant_(variant),
        k_(kernels),
        head_k_(head_kernels),
        same_(config.numerics().pad_style() == "same"),
        gelu_(config.numerics().gelu() == "tanh" ? kernels::Gelu::kTanh : kernels::Gelu::kErf) {}

  absl::Status Pack(ReadParameter read);

  bool Takes(int height, int width) const override {
    for (const StageSize& stage : SizesFor(height, width)) {
      if (stage.keys > kernels::kMostKeys) return false;
    }
    return true;
  }

  using PackedNetwork::Forward;
  void Forward(std::span<const Pieces> pictures, int height, int width, int threads,
               std::span<float> logits, std::span<uint8_t> finite,
               ForwardProfile* profile) const override;

  const CpuKernels& kernels() const override { return k_; }
  int64_t packed_bytes() const override { return weights_ == nullptr ? 0 : weights_->bytes(); }

 private:
  friend class Pass;

  absl::Status Place(Packer& packer);
  std::array<StageSize, 4> SizesFor(int height, int width) const;
  Plan PlanFor(int height, int width) const;
  std::unique_ptr<Workspace> Acquire(int height, int width) const;
  void Release(std::unique_ptr<Workspace> workspace) const;

  const char* Weight(int64_t offset) const { return weights_->data() + offset; }
  const float* Floats(int64_t offset) const {
    return reinterpret_cast<const float*>(weights_->data() + offset);
  }

  const v1::NetworkConfig config_;
  const Variant& variant_;
  const CpuKernels& k_;
  const CpuKernels& head_k_;  // f32
  const bool same_;
  const kernels::Gelu gelu_;
  std::array<PackedStage, 4> stages_;
  PackedLinear head_;
  std::unique_ptr<Arena> weights_;

  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> free_;  // by mutex_
  mutable std::mutex profile_mutex_;
};

// ---- Packing ----

// Lays the packed weights out. Goes over the network twice: without an arena it only adds sizes up,
// then it reads and packs straight into the arena, so that one parameter is in memory twice at a
// time.
class Packer {
 public:
  static constexpr int kRows = 32;

  Packer(PackedNetwork::ReadParameter read, const Arena* arena) : read_(read), arena_(arena) {}

  // Zeros without an arena.
  absl::StatusOr<std::vector<float>> Read(const std::string& name, int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    if (arena_ != nullptr) RETURN_IF_ERROR(read_(name, values));
    return values;
  }

  // The offset of `bytes` in the arena; fn(place) fills them, if there is an arena.
  template <typename Fn>
  int64_t Add(size_t bytes, const Fn& fn) {
    const int64_t at = layout_.Add(static_cast<int64_t>(bytes));
    if (arena_ != nullptr) fn(arena_->data() + at);
    return at;
  }

  int64_t AddFloats(const std::vector<float>& values, int64_t padded) {
    return Add(static_cast<size_t>(padded) * sizeof(float), [&](char* to) {
      std::memcpy(to, values.data(), values.size() * sizeof(float));  // the arena is zeros
    });
  }

  // `weight` [n, k]; packed with zeros behind each row, up to a multiple of 32.
  PackedLinear Linear(const CpuKernels& k, const std::vector<float>& weight,
                      const std::vector<float>& bias, int n) {
    PackedLinear packed;
    packed.n = n;
    const int inputs = static_cast<int>(weight.size() / static_cast<size_t>(n));
    packed.k = static_cast<int>(RoundUp(inputs, 32));
    packed.weight = Add(k.packed_linear_bytes(n, packed.k), [&](char* to) {
      k.pack_linear({.weight = weight.data(),
                     .output_stride = inputs,
                     .input_stride = 1,
                     .n = n,
                     .inputs = inputs,
                     .k = packed.k,
                     .scale = 1,
                     .packed = to});
    });
    packed.bias = AddFloats(bias, RoundUp(n, 32));
    return packed;
  }

  // The layer `name` of f32 kernels, k a multiple of 32, without a second copy: the values are read
  // to where they will lie, and packed there kRows at a time, which take as many bytes packed and
  // are a layer of their own.
  absl::StatusOr<PackedLinear> LargeLinear(const CpuKernels& kernels, const std::string& name,
                                           int n, int k) {
    PackedLinear packed{.n = n, .k = k};
    const size_t row = static_cast<size_t>(k);
    assert(kernels.packed_linear_bytes(kRows, k) == kRows * row * sizeof(float));
    absl::Status status;
    packed.weight = Add(kernels.packed_linear_bytes(n, k), [&](char* to) {
      float* values = reinterpret_cast<float*>(to);
      status = read_(name + ".weight", {values, static_cast<size_t>(n) * row});
      if (!status.ok()) return;
      std::vector<float> block(kRows * row);
      for (int first = 0; first < n; first += kRows) {
        const int rows = std::min(kRows, n - first);
        float* const at = values + static_cast<size_t>(first) * row;
        std::copy_n(at, static_cast<size_t>(rows) * row, block.data());
        kernels.pack_linear(kernels::RowMajor(block.data(), rows, k, at));
      }
    });
    RETURN_IF_ERROR(status);
    ASSIGN_OR_RETURN(const std::vector<float> bias, Read(name + ".bias", n));
    packed.bias = AddFloats(bias, RoundUp(n, kRows));
    return packed;
  }

  absl::StatusOr<PackedNorm> Norm(const std::string& name, int c, double eps) {
    PackedNorm norm{.eps = static_cast<float>(eps)};
    ASSIGN_OR_RETURN(std::vector<float> gamma, Read(name + ".weight", c));
    ASSIGN_OR_RETURN(std::vector<float> beta, Read(name + ".bias", c));
    norm.gamma = AddFloats(std::move(gamma), c);
    norm.beta = AddFloats(std::move(beta), c);
    return norm;
  }

  int64_t bytes() const { return layout_.total(); }

 private:
  PackedNetwork::ReadParameter read_;
  const Arena* const arena_;
  Layout layout_;
};

absl::Status Network::Pack(ReadParameter read) {
  Packer measure(read, nullptr);
  RETURN_IF_ERROR(Place(measure));
  weights_ = std::make_unique<Arena>(measure.bytes());
  Packer packer(read, weights_.get());
  return Place(packer);
}

absl::Status Network::Place(Packer& packer) {
  const double eps_outer = config_.numerics().eps_outer();
  const double eps_block = config_.numerics().eps_block();
  int inputs = config_.in_channels();
  for (int s = 0; s < 4; ++s) {
    const std::string number = absl::StrCat(s + 1);
    PackedStage& stage = stages_[static_cast<size_t>(s)];
    stage.blocks.clear();
    const int c = variant_.dims[s], heads = variant_.heads[s];
    const int hidden = c * variant_.mlp_ratios[s];
    const int side = s == 0 ? 7 : 3;
    const std::string patch = absl::StrCat("patch_embed", number, ".");
    {
      ASSIGN_OR_RETURN(std::vector<float> w,
                       packer.Read(patch + "proj.weight", int64_t{c} * inputs * side * side));
      ASSIGN_OR_RETURN(std::vector<float> b, packer.Read(patch + "proj.bias", c));
      // The input's planes are gathered plane by plane, maps token by token.
      if (s > 0) w = ChannelsLast(w, c, inputs, side);
      stage.patch_embed = packer.Linear(k_, w, b, c);
    }
    ASSIGN_OR_RETURN(stage.patch_norm, packer.Norm(patch + "norm", c, eps_outer));
    for (int j = 0; j < variant_.depths[s]; ++j) {
      const std::string name = absl::StrCat("block", number, ".", j, ".");
      PackedBlock block;
      const auto linear = [&](const std::string& part, int n, int k, float scale,
                              PackedLinear& out) -> absl::Status {
        ASSIGN_OR_RETURN(std::vector<float> w,
                         packer.Read(name + part + ".weight", int64_t{n} * k));
        ASSIGN_OR_RETURN(std::vector<float> b, packer.Read(name + part + ".bias", n));
        for (float& value : w) value *= scale;
        for (float& value : b) value *= scale;
        out = packer.Linear(k_, w, b, n);
        return absl::OkStatus();
      };
      ASSIGN_OR_RETURN(block.norm1, packer.Norm(name + "norm1", c, eps_block));
      // softmax of s / sqrt(d) is 2^(s · log2(e) / sqrt(d)), normalised.
      const float scale =
          static_cast<float>(std::numbers::log2e / std::sqrt(static_cast<double>(c / heads)));
      RETURN_IF_ERROR(linear("attn.q", c, c, scale, block.q));
      RETURN_IF_ERROR(linear("attn.kv", 2 * c, c, 1, block.kv));
      RETURN_IF_ERROR(linear("attn.proj", c, c, 1, block.proj));
      const int sr = variant_.linear ? 1 : variant_.sr_ratios[s];
      if (variant_.linear || sr > 1) {
        ASSIGN_OR_RETURN(std::vector<float> w,
                         packer.Read(name + "attn.sr.weight", int64_t{c} * c * sr * sr));
        ASSIGN_OR_RETURN(std::vector<float> b, packer.Read(name + "attn.sr.bias", c));
        block.sr = packer.Linear(k_, ChannelsLast(w, c, c, sr), b, c);
        ASSIGN_OR_RETURN(block.sr_norm, packer.Norm(name + "attn.norm", c, eps_outer));
      }
      ASSIGN_OR_RETURN(block.norm2, packer.Norm(name + "norm2", c, eps_block));
      RETURN_IF_ERROR(linear("mlp.fc1", hidden, c, 1, block.fc1));
      RETURN_IF_ERROR(linear("mlp.fc2", c, hidden, 1, block.fc2));
      ASSIGN_OR_RETURN(const std::vector<float> dw,
                       packer.Read(name + "mlp.dwconv.dwconv.weight", int64_t{hidden} * 9));
      ASSIGN_OR_RETURN(const std::vector<float> db,
                       packer.Read(name + "mlp.dwconv.dwconv.bias", hidden));
      block.dwconv = packer.Add(k_.packed_dwconv_bytes(hidden), [&](char* to) {
        k_.pack_dwconv(dw.data(), db.data(), hidden, to);
      });
      stage.blocks.push_back(block);
    }
    ASSIGN_OR_RETURN(stage.norm, packer.Norm(absl::StrCat("norm", number), c, eps_block));
    inputs = c;
  }
  ASSIGN_OR_RETURN(head_, packer.LargeLinear(head_k_, "head", config_.num_classes(), inputs));
  return absl::OkStatus();
}

// ---- Planning ----

std::array<StageSize, 4> Network::SizesFor(int height, int width) const {
  std::array<StageSize, 4> sizes;
  int64_t h = height, w = width;
  for (int s = 0; s < 4; ++s) {
    const int64_t stride = s == 0 ? 4 : 2;
    h = (h + stride - 1) / stride;
    w = (w + stride - 1) / stride;
    StageSize& size = sizes[static_cast<size_t>(s)];
    size.height = h;
    size.width = w;
    size.tokens = h * w;
    const int64_t sr = variant_.sr_ratios[s];
    if (variant_.linear) {
      size.key_height = size.key_width = kPooledSide;
    } else {
      size.key_height = ReductionSide(h, sr, same_).outputs;
      size.key_width = ReductionSide(w, sr, same_).outputs;
    }
    size.keys = size.key_height * size.key_width;
    const int64_t hidden_row = w * variant_.dims[s] * variant_.mlp_ratios[s] * k_.hidden_bytes;
    if (s < 2 && hidden_row * h > kWholeBytes) {
      size.band = std::clamp<int64_t>(kBandBytes / hidden_row, 2, kLargestBand);
    }
  }
  return sizes;
}

Plan Network::PlanFor(int height, int width) const {
  Plan plan;
  plan.height = height;
  plan.width = width;
  plan.stages = SizesFor(height, width);
  // Any window of the input lies in the padded planes: 3 before and up to 6 behind.
  plan.plane_height = RoundUp(height, 4) + 8;
  plan.plane_width = RoundUp(width, 4) + 16;
  const int64_t act = k_.activation_bytes;
  int64_t map = 0, early = 0, late = 0, reduced = 0, kv = 0, whole = 0, whole_out = 0, strip = 0,
          ring = 0, band = 0, zeros = 0, keys = 0, widest = 0, band_rows = 0;
  for (size_t s = 0; s < 4; ++s) {
    const StageSize& size = plan.stages[s];
    const int64_t c = variant_.dims[s], hidden = c * variant_.mlp_ratios[s];
    const int64_t n = s < 2 ? 1 : kGroup;
    map = std::max(map, n * size.tokens * c * act);
    (s == 2 ? late : early) = std::max(s == 2 ? late : early, n * size.tokens * c * act);
    reduced = std::max(reduced, n * size.keys * c * act);
    kv = std::max(kv, n * size.keys * 2 * c * act);
    if (size.band == 0) {
      whole = std::max(whole, n * size.tokens * hidden * k_.hidden_bytes);
      whole_out = std::max(whole_out, n * size.tokens * hidden * act);
    } else {
      ring = std::max(ring, (size.band + 2) * size.width * hidden * k_.hidden_bytes);
      band = std::max(band, size.band * size.width * hidden * act);
      band_rows = std::max(band_rows, (size.band + 2) * size.width * c * act);
    }
    zeros = std::max(zeros, size.width * hidden * k_.hidden_bytes);
    keys = std::max(keys, static_cast<int64_t>(k_.packed_keys_bytes(
                              static_cast<int>(std::min<int64_t>(size.keys, kernels::kMostKeys)),
                              variant_.dims[s] / variant_.heads[s])));
    const int64_t row = std::max(stages_[s].patch_embed.k, stages_[s].blocks[0].sr.k) * act;
    strip = std::max({strip, kStripBytes, kTokenGrain * row});
    if (variant_.linear) strip = std::max(strip, n * size.keys * c * act);  // the pooled tokens
    widest = std::max(widest, c);
  }
  Layout layout;
  plan.image =
      layout.Add(int64_t{config_.in_channels()} * plan.plane_height * plan.plane_width * act);
  plan.x = layout.Add(early);
  plan.y = layout.Add(early);
  plan.x_late = layout.Add(late);
  plan.normed = layout.Add(map);
  plan.q = layout.Add(map);
  plan.mixed = layout.Add(map);
  plan.reduced = layout.Add(reduced);
  plan.kv = layout.Add(kv);
  plan.hidden = layout.Add(whole);
  plan.gelu = layout.Add(whole_out);
  plan.stage_out = layout.Add(map);
  plan.mean = layout.Add(kGroup * widest * int64_t{sizeof(float)});
  plan.strip = layout.Add(strip);
  plan.ring = layout.Add(ring);
  plan.band_gelu = layout.Add(band);
  plan.fresh_rows = layout.Add(band_rows);
  plan.zeros = layout.Add(zeros);
  plan.keys = layout.Add(keys);
  plan.row_floats = layout.Add(std::max<int64_t>(2 * widest, width) * int64_t{sizeof(float)});
  plan.total = layout.total();
  return plan;
}

std::unique_ptr<Workspace> Network::Acquire(int height, int width) const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < free_.size(); ++i) {
      if (free_[i]->plan.height == height && free_[i]->plan.width == width) {
        std::unique_ptr<Workspace> found = std::move(free_[i]);
        free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
        return found;
      }
    }
    if (!free_.empty()) free_.erase(free_.begin());  // of another size, the longest unused
  }
  return std::make_unique<Workspace>(PlanFor(height, width));
}

void Network::Release(std::unique_ptr<Workspace> workspace) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(workspace));
}

// ---- The pass ----

// One thread's part in the forward pass of a group of pictures. `shared` holds the group's maps,
// `own` this thread's scratch; with a team of one they are the same.
class Pass {
 public:
  Pass(const Network& net, const Workspace& shared, const Workspace& own, const TeamMember& team,
       ForwardProfile* profile)
      : net_(net),
        k_(net.k_),
        plan_(shared.plan),
        shared_(shared),
        own_(own),
        team_(team),
        profile_(profile),
        act_(net.k_.activation_bytes),
        lap_(profile == nullptr ? 0 : Now()) {}

  // `n` ≤ kGroup pictures. `finite`: null, or one a picture.
  void Group(const Pieces* pictures, int n, float* logits, uint8_t* finite) {
    const int64_t late = plan_.stages[2].tokens * net_.variant_.dims[2] * act_;
    for (int i = 0; i < n; ++i) {
      Image(pictures[i], finite == nullptr ? nullptr : finite + i);
      PatchEmbedImage(shared_.At(plan_.x));
      Stage(0, 1, plan_.x, plan_.y);
      PatchEmbed(1, 1, shared_.At(plan_.x));
      Stage(1, 1, plan_.x, plan_.y);
      PatchEmbed(2, 1, shared_.At(plan_.x_late) + i * late);
    }
    Stage(2, n, plan_.x_late, plan_.x_late);  // in place
    PatchEmbed(3, n, shared_.At(plan_.x));
    Stage(3, n, plan_.x, plan_.y);
    Head(n, logits);
  }

 private:
  const StageSize& Size(int s) const { return plan_.stages[static_cast<size_t>(s)]; }
  const PackedStage& Packed(int s) const { return net_.stages_[static_cast<size_t>(s)]; }
  int64_t Channels(int s) const { return net_.variant_.dims[static_cast<size_t>(s)]; }

  void Lap(int stage, ForwardProfile::Part part) {
    if (profile_ == nullptr) return;
    const double now = Now();
    profile_->seconds[static_cast<size_t>(stage * ForwardProfile::kParts + part)] += now - lap_;
    lap_ = now;
  }

  void Linear(const PackedLinear& w, const char* a, char* out, int64_t rows, int64_t ldo,
              Output output = Output::kActivation, const char* residual = nullptr,
              bool relu = false) const {
    if (rows <= 0) return;
    k_.linear({.a = a,
               .lda = w.k,
               .weight = net_.Weight(w.weight),
               .bias = net_.Floats(w.bias),
               .residual = residual,
               .out = out,
               .ldo = ldo,
               .m = rows,
               .n = w.n,
               .k = w.k,
               .output = output,
               .relu = relu});
  }

  void Norm(const PackedNorm& norm, const char* in, char* out, int64_t rows, int64_t c) const {
    if (rows <= 0) return;
    k_.layer_norm({.in = in,
                   .out = out,
                   .gamma = net_.Floats(norm.gamma),
                   .beta = net_.Floats(norm.beta),
                   .eps = norm.eps,
                   .rows = rows,
                   .c = static_cast<int>(c)});
  }

  // The input's planes as activations with zeros around them.
  void Image(const Pieces& picture, uint8_t* finite) {
    const int64_t channels = net_.config_.in_channels();
    const WindowSide top = PatchSide(plan_.height, 7, 4, net_.same_);
    const WindowSide left = PatchSide(plan_.width, 7, 4, net_.same_);
    const Share rows = team_.Mine(channels * plan_.height, 1);
    constexpr int64_t kMost = FloatReader::kMost;
    FloatReader floats(picture, static_cast<size_t>(rows.begin * plan_.width));
    bool all_finite = true;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t c = r / plan_.height, y = r % plan_.height + top.before;
      char* out = shared_.At(plan_.image) +
                  ((c * plan_.plane_height + y) * plan_.plane_width + left.before) * act_;
      for (int64_t x = 0; x < plan_.width; x += kMost) {
        const int64_t count = std::min(kMost, plan_.width - x);
        const float* const values = floats.Next(static_cast<size_t>(count));
        k_.from_float(values, out + x * act_, count);
        // Each value is read from far away once.
        if (finite != nullptr) all_finite &= AllFinite(values, static_cast<size_t>(count));
      }
    }
    // The team's threads may find the same.
    if (!all_finite) std::atomic_ref<uint8_t>(*finite).store(0, std::memory_order_relaxed);
    team_.Sync();
    Lap(0, ForwardProfile::kImage);
  }

  // The next strip of tokens of `share` whose patches fit the scratch.
  int64_t StripRows(const PackedLinear& w) const {
    return std::max(kTokenGrain, kStripBytes / (w.k * act_) / kTokenGrain * kTokenGrain);
  }

  void PatchEmbedImage(char* out) {
    const PackedStage& stage = Packed(0);
    const int64_t c = Channels(0);
    const kernels::PlaneWindows windows{.planes = net_.config_.in_channels(),
                                        .plane_height = plan_.plane_height,
                                        .plane_width = plan_.plane_width,
                                        .element_bytes = act_,
                                        .outputs_wide = Size(0).width,
                                        .patch_elements = stage.patch_embed.k};
    char* strip = own_.At(plan_.strip);
    const Share mine = team_.Mine(Size(0).tokens, kTokenGrain);
    for (int64_t first = mine.begin; first < mine.end;) {
      const int64_t rows = std::min(StripRows(stage.patch_embed), mine.end - first);
      char* to = out + first * c * act_;
      kernels::GatherPlanePatches(windows, shared_.At(plan_.image), first, rows, strip);
      Linear(stage.patch_embed, strip, to, rows, c);
      Norm(stage.patch_norm, to, to, rows, c);
      first += rows;
    }
    team_.Sync();
    Lap(0, ForwardProfile::kPatchEmbed);
  }

  // Convolution of n maps and the norm behind it: out [n, outputs, c_out].
  void ConvAndNorm(const PackedLinear& conv, const PackedNorm& norm, const MapWindows& windows,
                   const char* maps, int n, char* out) const {
    const int64_t outputs = windows.outputs(), c = conv.n;
    const int64_t map_bytes = windows.height * windows.width * windows.token_bytes;
    char* strip = own_.At(plan_.strip);
    const Share mine = team_.Mine(n * outputs, kTokenGrain);
    for (int64_t first = mine.begin; first < mine.end;) {
      const int64_t rows = std::min(StripRows(conv), mine.end - first);
      for (int64_t r = first; r < first + rows;) {  // picture by picture
        const int64_t picture = r / outputs;
        const int64_t count = std::min(first + rows, (picture + 1) * outputs) - r;
        kernels::GatherPatches(windows, maps + picture * map_bytes, r - picture * outputs, count,
                               strip + (r - first) * conv.k * act_);
        r += count;
      }
      char* to = out + first * c * act_;
      Linear(conv, strip, to, rows, c);
      Norm(norm, to, to, rows, c);
      first += rows;
    }
  }

  // Stage s's tokens from stage s - 1's output, n pictures.
  void PatchEmbed(int s, int n, char* out) {
    const StageSize& in = Size(s - 1);
    const MapWindows windows{.height = in.height,
                             .width = in.width,
                             .token_bytes = Channels(s - 1) * act_,
                             .kernel = 3,
                             .stride = 2,
                             .top = PatchSide(in.height, 3, 2, net_.same_),
                             .left = PatchSide(in.width, 3, 2, net_.same_)};
    ConvAndNorm(Packed(s).patch_embed, Packed(s).patch_norm, windows, shared_.At(plan_.stage_out),
                n, out);
    team_.Sync();
    Lap(s, ForwardProfile::kPatchEmbed);
  }

  // All blocks of n pictures and the norm behind them, into stage_out.
  void Stage(int s, int n, int64_t x_offset, int64_t y_offset) {
    char* x = shared_.At(x_offset);
    char* y = shared_.At(y_offset);
    for (const PackedBlock& block : Packed(s).blocks) {
      Attend(s, block, n, x);
      if (Mlp(s, block, n, x, y)) std::swap(x, y);
    }
    const int64_t c = Channels(s);
    const Share mine = team_.Mine(n * Size(s).tokens, kTokenGrain);
    const int64_t at = mine.begin * c * act_;
    Norm(Packed(s).norm, x + at, shared_.At(plan_.stage_out) + at, mine.end - mine.begin, c);
    team_.Sync();
    Lap(s, ForwardProfile::kNorm);
  }

  // x += proj(attention(norm1(x)))
  void Attend(int s, const PackedBlock& block, int n, char* x) {
    const StageSize& size = Size(s);
    const int64_t c = Channels(s), tokens = size.tokens, row = c * act_;
    char* normed = shared_.At(plan_.normed);
    char* q = shared_.At(plan_.q);
    {
      const Share mine = team_.Mine(n * tokens, kTokenGrain);
      for (int64_t first = mine.begin; first < mine.end;) {  // while the rows are in the cache
        const int64_t rows = std::min<int64_t>(8 * kTokenGrain, mine.end - first);
        Norm(block.norm1, x + first * row, normed + first * row, rows, c);
        Linear(block.q, normed + first * row, q + first * row, rows, c);
        first += rows;
      }
    }
    team_.Sync();
    Lap(s, ForwardProfile::kQuery);

    const char* source = normed;
    if (block.sr.n > 0) {
      char* reduced = shared_.At(plan_.reduced);
      if (net_.variant_.linear) {
        ReducePooled(s, block, n, normed, reduced);
      } else {
        const int64_t sr = net_.variant_.sr_ratios[static_cast<size_t>(s)];
        const MapWindows windows{.height = size.height,
                                 .width = size.width,
                                 .token_bytes = row,
                                 .kernel = sr,
                                 .stride = sr,
                                 .top = ReductionSide(size.height, sr, net_.same_),
                                 .left = ReductionSide(size.width, sr, net_.same_)};
        ConvAndNorm(block.sr, block.sr_norm, windows, normed, n, reduced);
        team_.Sync();
      }
      source = reduced;
    }
    char* kv = shared_.At(plan_.kv);
    {
      const Share mine = team_.Mine(n * size.keys, kTokenGrain);
      Linear(block.kv, source + mine.begin * row, kv + mine.begin * 2 * row, mine.end - mine.begin,
             2 * c);
    }
    team_.Sync();
    Lap(s, ForwardProfile::kReduce);

    const int heads = net_.variant_.heads[static_cast<size_t>(s)];
    const int64_t d = c / heads;
    char* mixed = shared_.At(plan_.mixed);
    char* packed = own_.At(plan_.keys);
    const Share mine = team_.Mine(n * tokens, kTokenGrain);
    for (int64_t i = mine.begin / tokens; i * tokens < mine.end; ++i) {
      const int64_t first = std::max(mine.begin, i * tokens);
      const int64_t last = std::min(mine.end, (i + 1) * tokens);
      const char* keys = kv + i * size.keys * 2 * row;
      for (int64_t h = 0; h < heads; ++h) {
        k_.pack_keys({.k = keys + h * d * act_,
                      .v = keys + (c + h * d) * act_,
                      .ld = 2 * c,
                      .keys = static_cast<int>(size.keys),
                      .d = static_cast<int>(d),
                      .packed = packed});
        k_.attention({.q = q + first * row + h * d * act_,
                      .packed = packed,
                      .out = mixed + first * row + h * d * act_,
                      .ld = c,
                      .queries = last - first,
                      .keys = static_cast<int>(size.keys),
                      .d = static_cast<int>(d)});
      }
    }
    Lap(s, ForwardProfile::kAttention);
    Linear(block.proj, mixed + mine.begin * row, x + mine.begin * row, mine.end - mine.begin, c,
           Output::kActivation, x + mine.begin * row);
    team_.Sync();
    Lap(s, ForwardProfile::kQuery);
  }

  // The linear variant: pooled to 7x7, then a 1x1 convolution, norm and GELU. reduced [n, 49, c].
  void ReducePooled(int s, const PackedBlock& block, int n, const char* normed,
                    char* reduced) const {
    const StageSize& size = Size(s);
    const int64_t c = Channels(s), row = c * act_;
    float* sum = reinterpret_cast<float*>(own_.At(plan_.row_floats));
    float* one = sum + c;
    char* pooled = own_.At(plan_.strip);  // [rows, c]: at most kGroup * 49, which the strip holds
    const Share mine = team_.Mine(n * size.keys, 1);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t picture = r / size.keys, cell = r % size.keys;
      const int64_t cy = cell / kPooledSide, cx = cell % kPooledSide;
      const int64_t y0 = cy * size.height / kPooledSide;
      const int64_t y1 = ((cy + 1) * size.height + kPooledSide - 1) / kPooledSide;
      const int64_t x0 = cx * size.width / kPooledSide;
      const int64_t x1 = ((cx + 1) * size.width + kPooledSide - 1) / kPooledSide;
      std::fill(sum, sum + c, 0.0f);
      for (int64_t y = y0; y < y1; ++y) {
        for (int64_t x = x0; x < x1; ++x) {
          k_.to_float(normed + (picture * size.tokens + y * size.width + x) * row, one, c);
          for (int64_t i = 0; i < c; ++i) sum[i] += one[i];
        }
      }
      const float scale = 1.0f / static_cast<float>((y1 - y0) * (x1 - x0));
      for (int64_t i = 0; i < c; ++i) sum[i] *= scale;
      k_.from_float(sum, pooled + (r - mine.begin) * row, c);
    }
    char* out = reduced + mine.begin * row;
    Linear(block.sr, pooled, out, mine.end - mine.begin, c);
    Norm(block.sr_norm, out, out, mine.end - mine.begin, c);
    for (int64_t r = 0; r < mine.end - mine.begin; ++r) {
      k_.to_float(out + r * row, one, c);
      for (int64_t i = 0; i < c; ++i) one[i] = Gelu(one[i]);
      k_.from_float(one, out + r * row, c);
    }
    team_.Sync();
  }

  float Gelu(float x) const {
    if (net_.gelu_ == kernels::Gelu::kErf) {
      return 0.5f * x * (1 + std::erf(x * static_cast<float>(std::numbers::sqrt2 / 2)));
    }
    const float inner = 0.7978845608f * (x + 0.044715f * x * x * x);  // sqrt(2 / pi)
    return 0.5f * x * (1 + std::tanh(inner));
  }

  // x + fc2(gelu(dwconv(fc1(norm2(x))))). True: the sum is in y, else in x.
  bool Mlp(int s, const PackedBlock& block, int n, char* x, char* y) {
    const bool bands = Size(s).band > 0;
    const bool swap = bands && team_.size() > 1;
    if (bands) {
      for (int i = 0; i < n; ++i) {
        const int64_t at = i * Size(s).tokens * Channels(s) * act_;
        MlpBands(s, block, x + at, (swap ? y : x) + at);
      }
    } else {
      MlpWhole(s, block, n, x);
    }
    team_.Sync();
    Lap(s, ForwardProfile::kMlp);
    return swap;
  }

  // Rows [mine) of one picture, in bands: hidden rows live in a ring of band + 2. In place (out =
  // x) if no other thread needs x's rows beside ours.
  void MlpBands(int s, const PackedBlock& block, const char* x, char* out) const {
    const StageSize& size = Size(s);
    const int64_t c = Channels(s), width = size.width, height = size.height;
    const int64_t hidden = block.fc1.n, row = width * c * act_;
    const int64_t hidden_row = width * hidden * k_.hidden_bytes;
    const int64_t slots = size.band + 2;
    char* ring = own_.At(plan_.ring);
    char* gelu = own_.At(plan_.band_gelu);
    char* normed = own_.At(plan_.fresh_rows);
    const char* zeros = own_.At(plan_.zeros);
    const Share mine = team_.Mine(height, 1);
    const auto hidden_at = [&](int64_t r) -> char* {
      return r < 0 || r >= height ? const_cast<char*>(zeros) : ring + r % slots * hidden_row;
    };
    std::array<const void*, kLargestBand + 2> rows;
    int64_t next = std::max<int64_t>(mine.begin - 1, 0);  // first hidden row not computed
    for (int64_t first = mine.begin; first < mine.end;) {
      const int64_t last = std::min({first + size.band, mine.end});
      const int64_t need = std::min(last + 1, height);
      while (next < need) {  // up to the ring's end at once
        const int64_t count = std::min(need - next, slots - next % slots);
        Norm(block.norm2, x + next * row, normed, count * width, c);
        Linear(block.fc1, normed, hidden_at(next), count * width, hidden, Output::kHidden, nullptr,
               net_.variant_.linear);
        next += count;
      }
      for (int64_t r = first - 1; r <= last; ++r)
        rows[static_cast<size_t>(r - first + 1)] = hidden_at(r);
      DwconvGelu(block, rows.data(), gelu, last - first, width, hidden);
      Linear(block.fc2, gelu, out + first * row, (last - first) * width, c, Output::kActivation,
             x + first * row);
      first = last;
    }
  }

  // n pictures layer by layer.
  void MlpWhole(int s, const PackedBlock& block, int n, char* x) const {
    const StageSize& size = Size(s);
    const int64_t c = Channels(s), width = size.width, height = size.height;
    const int64_t hidden = block.fc1.n, row = c * act_;
    const int64_t hidden_row = width * hidden * k_.hidden_bytes;
    char* normed = shared_.At(plan_.normed);
    char* map = shared_.At(plan_.hidden);
    char* gelu = shared_.At(plan_.gelu);
    {
      const Share mine = team_.Mine(n * size.tokens, kTokenGrain);
      const int64_t rows = mine.end - mine.begin;
      Norm(block.norm2, x + mine.begin * row, normed + mine.begin * row, rows, c);
      Linear(block.fc1, normed + mine.begin * row, map + mine.begin * hidden * k_.hidden_bytes,
             rows, hidden, Output::kHidden, nullptr, net_.variant_.linear);
    }
    team_.Sync();
    // A picture's rows, then the next one's: [n · height) rows in all.
    const Share mine = team_.Mine(n * height, 1);
    std::array<const void*, kLargestBand + 2> rows;
    for (int64_t first = mine.begin; first < mine.end;) {
      const int64_t picture = first / height, top = picture * height;
      const int64_t last = std::min({first + kLargestBand, mine.end, top + height});
      for (int64_t r = first - 1; r <= last; ++r) {
        rows[static_cast<size_t>(r - first + 1)] =
            r < top || r >= top + height ? own_.At(plan_.zeros) : map + r * hidden_row;
      }
      DwconvGelu(block, rows.data(), gelu + first * width * hidden * act_, last - first, width,
                 hidden);
      first = last;
    }
    const int64_t at = mine.begin * width, count = (mine.end - mine.begin) * width;
    Linear(block.fc2, gelu + at * hidden * act_, x + at * row, count, c, Output::kActivation,
           x + at * row);
  }

  void DwconvGelu(const PackedBlock& block, const void* const* rows, char* out, int64_t count,
                  int64_t width, int64_t hidden) const {
    k_.dwconv_gelu({.rows = rows,
                    .weight = net_.Weight(block.dwconv),
                    .out = out,
                    .count = static_cast<int>(count),
                    .width = static_cast<int>(width),
                    .c = static_cast<int>(hidden),
                    .gelu = net_.gelu_});
  }

  // Mean over the tokens, then the classifier, in f32. Each thread has all means (they are few) and
  // a part of the classes.
  void Head(int n, float* logits) {
    const int64_t c = Channels(3), tokens = Size(3).tokens;
    float* means = reinterpret_cast<float*>(own_.At(plan_.mean));
    float* one = reinterpret_cast<float*>(own_.At(plan_.row_floats));
    for (int64_t i = 0; i < n; ++i) {
      float* mean = means + i * c;
      std::fill(mean, mean + c, 0.0f);
      for (int64_t t = 0; t < tokens; ++t) {
        k_.to_float(shared_.At(plan_.stage_out) + (i * tokens + t) * c * act_, one, c);
        for (int64_t j = 0; j < c; ++j) mean[j] += one[j];
      }
      for (int64_t j = 0; j < c; ++j) mean[j] /= static_cast<float>(tokens);
    }
    const PackedLinear& head = net_.head_;
    const Share mine = team_.Mine(head.n, Packer::kRows);
    if (mine.begin < mine.end) {
      net_.head_k_.linear({.a = means,
                           .lda = head.k,
                           .weight = net_.Weight(head.weight) + mine.begin * head.k * 4,
                           .bias = net_.Floats(head.bias) + mine.begin,
                           .residual = nullptr,
                           .out = logits + mine.begin,
                           .ldo = head.n,
                           .m = n,
                           .n = static_cast<int>(mine.end - mine.begin),
                           .k = head.k,
                           .output = Output::kFloat,
                           .relu = false});
    }
    team_.Sync();
    Lap(3, ForwardProfile::kHead);
  }

  const Network& net_;
  const CpuKernels& k_;
  const Plan& plan_;
  const Workspace& shared_;
  const Workspace& own_;
  const TeamMember team_;
  ForwardProfile* const profile_;
  const int64_t act_;  // bytes of an activation
  double lap_;
};

void Network::Forward(std::span<const Pieces> pictures, int height, int width, int threads,
                      std::span<float> logits, std::span<uint8_t> finite,
                      ForwardProfile* profile) const {
  const int batch = static_cast<int>(pictures.size());
  const int64_t classes = config_.num_classes();
  absl::InlinedVector<std::unique_ptr<Workspace>, 16> spaces;
  for (int t = 0; t < std::max(1, threads); ++t) spaces.push_back(Acquire(height, width));
  TeamBarrier barrier;
  barrier.Reset(static_cast<int>(spaces.size()));

  RunOnTeam(static_cast<int>(spaces.size()), [&](int rank, int size) {
    k_.prepare_thread();
    ForwardProfile mine;
    ForwardProfile* const laps = profile == nullptr ? nullptr : &mine;
    const auto pass = [&](int first, int count, const TeamMember& team, const Workspace& shared) {
      for (int i = first; i < first + count; i += kGroup) {
        const int n = std::min(kGroup, first + count - i);
        Pass(*this, shared, *spaces[static_cast<size_t>(rank)], team, laps)
            .Group(&pictures[static_cast<size_t>(i)], n, logits.data() + i * classes,
                   finite.empty() ? nullptr : &finite[static_cast<size_t>(i)]);
      }
    };
    // As many pictures for each thread; what is left over is shared, if by few, row by row.
    const int each = batch / size, rest = batch % size;
    const TeamMember alone(0, 1, nullptr);
    const Workspace& own = *spaces[static_cast<size_t>(rank)];
    pass(rank * each, each, alone, own);
    if (rest == 0) {
    } else if (2 * rest > size && rest > 1) {
      if (rank < rest) pass(size * each + rank, 1, alone, own);
    } else {
      const TeamMember together(rank, size, &barrier);
      together.Sync();  // spaces[0] is rank 0's own until then
      for (int i = 0; i < rest; ++i) pass(size * each + i, 1, together, *spaces[0]);
    }
    if (profile != nullptr) {
      const std::lock_guard<std::mutex> lock(profile_mutex_);
      for (size_t i = 0; i < mine.seconds.size(); ++i) profile->seconds[i] += mine.seconds[i];
    }
  });
  for (auto& space : spaces) Release(std::move(space));
}

}  // namespace

const char* ForwardProfile::Name(int part) {
  static constexpr const char* kNames[kParts] = {"image",  "patch embed", "norm", "q and proj",
                                                 "reduce", "attention",   "MLP",  "head"};
  return kNames[part];
}

std::array<double, 4 * ForwardProfile::kParts> ForwardWork(const Variant& variant, int height,
                                                           int width, int num_classes) {
  std::array<double, 4 * ForwardProfile::kParts> work{};
  int64_t h = height, w = width;
  double inputs = 3;
  for (int s = 0; s < 4; ++s) {
    const int64_t stride = s == 0 ? 4 : 2, sr = variant.linear ? 1 : variant.sr_ratios[s];
    h = (h + stride - 1) / stride;
    w = (w + stride - 1) / stride;
    const double tokens = static_cast<double>(h * w), c = variant.dims[s];
    const double keys =
        variant.linear ? kPooledSide * kPooledSide : static_cast<double>((h / sr) * (w / sr));
    const double blocks = variant.depths[s], hidden = c * variant.mlp_ratios[s];
    const auto at = [&](ForwardProfile::Part part) -> double& {
      return work[static_cast<size_t>(s * ForwardProfile::kParts + part)];
    };
    at(ForwardProfile::kPatchEmbed) = 2 * tokens * c * inputs * (s == 0 ? 49 : 9);
    at(ForwardProfile::kQuery) = blocks * 2 * tokens * c * c * 2;
    at(ForwardProfile::kReduce) =
        blocks * 2 * keys *
        ((variant.linear || sr > 1 ? c * c * static_cast<double>(sr * sr) : 0) + 2 * c * c);
    at(ForwardProfile::kAttention) = blocks * 2 * tokens * keys * c * 2;
    at(ForwardProfile::kMlp) = blocks * 2 * tokens * hidden * (2 * c + 9);
    inputs = c;
  }
  work[static_cast<size_t>(3 * ForwardProfile::kParts + ForwardProfile::kHead)] =
      2 * inputs * num_classes;
  return work;
}

absl::StatusOr<std::unique_ptr<const PackedNetwork>> PackedNetwork::Create(
    const v1::NetworkConfig& config, const kernels::CpuKernels& kernels, ReadParameter read) {
  const Variant* variant = FindVariant(config.variant());
  if (variant == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("network.variant is \"", config.variant(), "\", which isn't known"));
  }
  ASSIGN_OR_RETURN(const CpuKernels* head,
                   kernels::ChooseCpuKernels(kernels::DetectCpu(), "fp32", ""));
  // A forced f32 set computes everything.
  const CpuKernels& head_kernels = kernels.activation_bytes == 4 ? kernels : *head;
  auto network = std::make_unique<Network>(config, *variant, kernels, head_kernels);
  RETURN_IF_ERROR(network->Pack(read));
  return network;
}

}  // namespace pyramid
