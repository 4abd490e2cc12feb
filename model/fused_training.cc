// Each function below works picture by picture (small pictures in chunks), so that a picture's
// intermediate maps stay in the cache; threads take pictures. Gradients of parameters go to one
// buffer a thread and are summed by rank.
#include "model/fused_training.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include "model/kernels/cpu_kernels.h"
#include "model/kernels/patches.h"
#include "model/thread_team.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

using kernels::CpuKernels;
using kernels::MapWindows;
using kernels::Output;
using kernels::TrainKernels;
using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kChunkTokens = 768;  // pictures of fewer tokens are computed several at a time

// ---- Memory ----

// Kernels may read kSlack bytes behind a buffer.
Tensor WithSlack(torch::IntArrayRef sizes, torch::ScalarType type) {
  const int64_t count = c10::multiply_integers(sizes);
  const auto element = static_cast<int64_t>(c10::elementSize(type));
  return torch::empty({count + kernels::kSlack / element}, torch::TensorOptions(type))
      .narrow(0, 0, count)
      .view(sizes);
}

bool HasSlack(const Tensor& t) {
  const auto end =
      static_cast<int64_t>(t.storage_offset() + t.numel()) * static_cast<int64_t>(t.element_size());
  return static_cast<int64_t>(t.storage().nbytes()) >= end + kernels::kSlack;
}

// `t` as kernels take it: contiguous, of `type`, with slack.
Tensor Activation(const Tensor& t, torch::ScalarType type) {
  if (t.scalar_type() == type && t.is_contiguous() && HasSlack(t)) return t;
  Tensor copy = WithSlack(t.sizes(), type);
  copy.copy_(t);
  return copy;
}

char* Bytes(const Tensor& t) { return static_cast<char*>(t.data_ptr()); }

// Scratch of every thread, added up first and made once.
class Scratch {
 public:
  int64_t Add(int64_t bytes) {
    const int64_t at = total_;
    total_ += (bytes + kernels::kSlack + 63) / 64 * 64 + 64 * (2 * (++count_ % 8) + 1);
    return at;
  }
  void Make(int threads) { memory_ = torch::empty({threads, total_}, torch::kByte); }
  char* At(int rank, int64_t offset) const { return Bytes(memory_) + rank * total_ + offset; }
  float* FloatsAt(int rank, int64_t offset) const {
    return reinterpret_cast<float*>(At(rank, offset));
  }

 private:
  int64_t total_ = 0;
  int count_ = 0;
  Tensor memory_;
};

// Gradients of a function's parameters: a row of floats a thread.
class ParameterGradients {
 public:
  int64_t Add(int64_t floats) {
    offsets_.push_back(total_);
    total_ += (floats + 15) / 16 * 16;
    return offsets_.back();
  }
  void Make(int threads) {
    threads_ = threads;
    rows_ = torch::empty({threads, total_}, torch::kFloat32);
    RunOnTeam(threads, [&](int rank, int size) {
      const Share mine = ShareOf(threads * total_, 1024, rank, size);
      float* rows = rows_.data_ptr<float>();
      std::fill(rows + mine.begin, rows + mine.end, 0.0f);
    });
  }
  float* At(int rank, int64_t offset) const {
    return rows_.data_ptr<float>() + rank * total_ + offset;
  }
  void Sum() {
    RunOnTeam(threads_, [&](int rank, int size) {
      const Share mine = ShareOf(total_, 1024, rank, size);
      float* sum = rows_.data_ptr<float>();
      for (int64_t row = 1; row < threads_; ++row) {
        const float* more = sum + row * total_;
        for (int64_t i = mine.begin; i < mine.end; ++i) sum[i] += more[i];
      }
    });
  }
  Tensor Get(int64_t offset, torch::IntArrayRef sizes) const {
    return rows_[0].narrow(0, offset, c10::multiply_integers(sizes)).view(sizes);
  }

 private:
  std::vector<int64_t> offsets_;
  int64_t total_ = 0;
  int threads_ = 1;
  Tensor rows_;
};

int ThreadsOf(const FusedOps& ops) { return ops.threads > 0 ? ops.threads : at::get_num_threads(); }

// ---- Linear layers ----

// A weight packed for y = x·Wᵀ + b.
struct Packed {
  Tensor weight, bias;
  int n = 0;
  int k = 0;  // a multiple of 32
};

// `weight` [n, k] f32, in any order in memory.
Packed Pack(const FusedOps& ops, const Tensor& weight, const Tensor& bias, double scale = 1) {
  const CpuKernels& kernels = *ops.forward;
  const Tensor w = weight.stride(0) == 1 || weight.stride(1) == 1 ? weight : weight.contiguous();
  Packed packed;
  packed.n = static_cast<int>(w.size(0));
  packed.k = static_cast<int>((w.size(1) + 31) / 32 * 32);
  const auto block_bytes = static_cast<int64_t>(kernels.packed_linear_bytes(32, packed.k));
  const int64_t blocks = (packed.n + 31) / 32;
  packed.weight = torch::empty({blocks * block_bytes}, torch::kByte);
  RunOnTeam(ThreadsOf(ops), [&](int rank, int size) {
    const Share mine = ShareOf(blocks, 1, rank, size);
    if (mine.begin == mine.end) return;
    const int64_t first = 32 * mine.begin;
    kernels.pack_linear({.weight = w.const_data_ptr<float>() + first * w.stride(0),
                         .output_stride = w.stride(0),
                         .input_stride = w.stride(1),
                         .n = static_cast<int>(std::min(32 * mine.end, int64_t{packed.n}) - first),
                         .inputs = static_cast<int>(w.size(1)),
                         .k = packed.k,
                         .scale = static_cast<float>(scale),
                         .packed = Bytes(packed.weight) + mine.begin * block_bytes});
  });
  packed.bias = torch::zeros({blocks * 32}, torch::kFloat32);
  if (bias.defined()) packed.bias.narrow(0, 0, packed.n).copy_(scale == 1 ? bias : bias * scale);
  return packed;
}

// For dx = dy·W.
Packed PackTransposed(const FusedOps& ops, const Tensor& weight, double scale = 1) {
  return Pack(ops, weight.t(), Tensor(), scale);
}

void Linear(const CpuKernels& kernels, const Packed& w, const char* a, char* out, int64_t rows,
            Output output = Output::kActivation, const char* residual = nullptr,
            bool relu = false) {
  if (rows == 0) return;
  kernels.linear({.a = a,
                  .lda = w.k,
                  .weight = w.weight.data_ptr(),
                  .bias = w.bias.const_data_ptr<float>(),
                  .residual = residual,
                  .out = out,
                  .ldo = w.n,
                  .m = rows,
                  .n = w.n,
                  .k = w.k,
                  .output = output,
                  .relu = relu});
}

void LinearGrad(const TrainKernels& kernels, const char* dy, const char* x, int64_t rows, int64_t n,
                int64_t k, float* dw, float* db) {
  kernels.linear_grad({.dy = dy,
                       .ldy = n,
                       .x = x,
                       .ldx = k,
                       .m = rows,
                       .n = static_cast<int>(n),
                       .k = static_cast<int>(k),
                       .dw = dw,
                       .db = db});
}

struct NormView {
  const float* gamma;
  const float* beta;
  float eps;
};

void Norm(const TrainKernels& kernels, const NormView& norm, const char* in, char* out,
          int64_t rows, int64_t c, float* mean, float* inverse) {
  kernels.layer_norm({.in = in,
                      .out = out,
                      .gamma = norm.gamma,
                      .beta = norm.beta,
                      .eps = norm.eps,
                      .rows = rows,
                      .c = static_cast<int>(c),
                      .mean = mean,
                      .inverse = inverse});
}

void NormGrad(const TrainKernels& kernels, const NormView& norm, const char* dy, const char* in,
              const float* mean, const float* inverse, const char* add, char* dx, int64_t rows,
              int64_t c, float* dgamma, float* dbeta) {
  kernels.layer_norm_grad({.dy = dy,
                           .in = in,
                           .gamma = norm.gamma,
                           .mean = mean,
                           .inverse = inverse,
                           .add = add,
                           .dx = dx,
                           .rows = rows,
                           .c = static_cast<int>(c),
                           .dgamma = dgamma,
                           .dbeta = dbeta});
}

// ---- Pictures ----

// Consecutive pictures of one drop path scale.
struct Run {
  int64_t first = 0, count = 0;
  float scale = 1;
};

// Pictures [begin, end) in runs of at most `chunk`. `scale`: null or one a picture.
std::vector<Run> RunsOf(int64_t begin, int64_t end, int64_t chunk, const float* scale) {
  std::vector<Run> runs;
  for (int64_t i = begin; i < end; ++i) {
    const float s = scale == nullptr ? 1 : scale[i];
    if (!runs.empty() && runs.back().scale == s && (s == 0 || runs.back().count < chunk)) {
      ++runs.back().count;
    } else {
      runs.push_back({i, 1, s});
    }
  }
  return runs;
}

int64_t ChunkOf(int64_t tokens, int64_t pictures) {
  return std::clamp<int64_t>(kChunkTokens / tokens, 1, std::max<int64_t>(1, pictures));
}

// Calls fn(rank, run) for all pictures, in parallel.
template <typename Fn>
void ForRuns(const CpuKernels& kernels, int threads, int64_t pictures, int64_t chunk,
             const Tensor& scale, const Fn& fn) {
  const float* scales =
      scale.defined() && scale.numel() > 0 ? scale.const_data_ptr<float>() : nullptr;
  RunOnTeam(threads, [&](int rank, int size) {
    kernels.prepare_thread();
    const Share mine = ShareOf(pictures, 1, rank, size);
    for (const Run& run : RunsOf(mine.begin, mine.end, chunk, scales)) fn(rank, run);
  });
}

// Carries what isn't a tensor from forward to backward.
template <typename Spec>
struct Held : torch::CustomClassHolder {
  explicit Held(Spec s) : spec(std::move(s)) {}
  Spec spec;
};

template <typename Spec>
void Hold(AutogradContext* ctx, const Spec& spec) {
  ctx->saved_data["spec"] = c10::IValue::make_capsule(c10::make_intrusive<Held<Spec>>(spec));
}

template <typename Spec>
Spec HeldBy(AutogradContext* ctx) {
  return static_cast<const Held<Spec>&>(*ctx->saved_data["spec"].toCapsule()).spec;
}

NormView View(const Tensor& gamma, const Tensor& beta, double eps) {
  return {gamma.const_data_ptr<float>(), beta.const_data_ptr<float>(), static_cast<float>(eps)};
}

// ---- Norm ----

struct NormSpec {
  FusedOps ops;
  double eps = 0;
};

class NormFunction : public torch::autograd::Function<NormFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& gamma,
                        const Tensor& beta, const NormSpec& spec) {
    const Tensor x = Activation(input, spec.ops.type);
    const int64_t c = x.size(-1), rows = x.numel() / c;
    const Tensor out = WithSlack(x.sizes(), spec.ops.type);
    const Tensor stats = torch::empty({2, rows}, torch::kFloat32);
    float* mean = stats.data_ptr<float>();
    const int64_t row = c * spec.ops.train->activation_bytes;
    RunOnTeam(ThreadsOf(spec.ops), [&](int rank, int size) {
      const Share mine = ShareOf(rows, 16, rank, size);
      if (mine.begin == mine.end) return;
      Norm(*spec.ops.train, View(gamma, beta, spec.eps), Bytes(x) + mine.begin * row,
           Bytes(out) + mine.begin * row, mine.end - mine.begin, c, mean + mine.begin,
           mean + rows + mine.begin);
    });
    ctx->save_for_backward({x, gamma, beta, stats});
    Hold(ctx, spec);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto spec = HeldBy<NormSpec>(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &gamma = saved[1], &beta = saved[2];
    const int64_t c = x.size(-1), rows = x.numel() / c;
    const Tensor dout = Activation(grads[0], spec.ops.type);
    const Tensor dx = WithSlack(x.sizes(), spec.ops.type);
    const float* mean = saved[3].const_data_ptr<float>();
    const int64_t row = c * spec.ops.train->activation_bytes;
    const int threads = ThreadsOf(spec.ops);
    ParameterGradients parameters;
    const int64_t dgamma = parameters.Add(c), dbeta = parameters.Add(c);
    parameters.Make(threads);
    RunOnTeam(threads, [&](int rank, int size) {
      const Share mine = ShareOf(rows, 16, rank, size);
      if (mine.begin == mine.end) return;
      const int64_t at = mine.begin * row;
      NormGrad(*spec.ops.train, View(gamma, beta, spec.eps), Bytes(dout) + at, Bytes(x) + at,
               mean + mine.begin, mean + rows + mine.begin, nullptr, Bytes(dx) + at,
               mine.end - mine.begin, c, parameters.At(rank, dgamma), parameters.At(rank, dbeta));
    });
    parameters.Sum();
    return {dx, parameters.Get(dgamma, {c}), parameters.Get(dbeta, {c}), Tensor()};
  }
};

// ---- Patch embedding ----

struct PatchSpec {
  FusedOps ops;
  MapSize size;  // of the input
  int64_t kernel = 0, stride = 0;
  bool pad_same = false;
  double eps = 0;

  bool pictures() const { return kernel == 7; }
  kernels::WindowSide top() const {
    return kernels::PatchSide(size.height, kernel, stride, pad_same);
  }
  kernels::WindowSide left() const {
    return kernels::PatchSide(size.width, kernel, stride, pad_same);
  }
};

// Gathers patches of either kind of input.
class PatchSource {
 public:
  PatchSource(const PatchSpec& spec, int64_t channels, int64_t element)
      : spec_(spec), channels_(channels), element_(element) {
    windows_ = {.height = spec.size.height,
                .width = spec.size.width,
                .token_bytes = channels * element,
                .kernel = spec.kernel,
                .stride = spec.stride,
                .top = spec.top(),
                .left = spec.left()};
    planes_ = {.planes = channels,
               .plane_height = (spec.size.height + 3) / 4 * 4 + 8,
               .plane_width = (spec.size.width + 3) / 4 * 4 + 16,
               .element_bytes = element,
               .outputs_wide = windows_.left.outputs,
               .patch_elements = row_elements()};
  }

  int64_t outputs() const { return windows_.outputs(); }
  const MapWindows& windows() const { return windows_; }
  int64_t row_elements() const {  // a multiple of 32
    return (channels_ * spec_.kernel * spec_.kernel + 31) / 32 * 32;
  }
  int64_t plane_bytes() const {
    return spec_.pictures() ? channels_ * planes_.plane_height * planes_.plane_width * element_ : 0;
  }

  // All patches of one picture. `planes`: plane_bytes() of scratch, zeros around.
  void Gather(const char* picture, char* planes, char* out) const {
    if (!spec_.pictures()) {
      kernels::GatherPatches(windows_, picture, 0, outputs(), out);
      return;
    }
    for (int64_t r = 0; r < channels_ * spec_.size.height; ++r) {
      const int64_t p = r / spec_.size.height, y = r % spec_.size.height + windows_.top.before;
      spec_.ops.forward->from_float(
          reinterpret_cast<const float*>(picture) + r * spec_.size.width,
          planes + ((p * planes_.plane_height + y) * planes_.plane_width + windows_.left.before) *
                       element_,
          spec_.size.width);
    }
    kernels::GatherPlanePatches(planes_, planes, 0, outputs(), out);
  }

 private:
  const PatchSpec& spec_;
  int64_t channels_, element_;
  MapWindows windows_;
  kernels::PlaneWindows planes_;
};

// The convolution's weight as rows that fit the gathered patches: [C, K].
Tensor PatchWeight(const PatchSpec& spec, const Tensor& weight) {
  return (spec.pictures() ? weight : weight.permute({0, 2, 3, 1})).reshape({weight.size(0), -1});
}

class PatchFunction : public torch::autograd::Function<PatchFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const Tensor& bias, const Tensor& gamma, const Tensor& beta,
                        const PatchSpec& spec) {
    const CpuKernels& k = *spec.ops.forward;
    const int64_t act = k.activation_bytes;
    const Tensor in = spec.pictures() ? input.contiguous() : Activation(input, spec.ops.type);
    const int64_t pictures = in.size(0), c = weight.size(0);
    const PatchSource source(spec, weight.size(1), act);
    const int64_t tokens = source.outputs(), k_row = source.row_elements() * act;
    const Packed conv = Pack(spec.ops, PatchWeight(spec, weight), bias);
    const Tensor before = WithSlack({pictures, tokens, c}, spec.ops.type);  // the norm
    const Tensor out = WithSlack({pictures, tokens, c}, spec.ops.type);
    const int64_t in_bytes = in.numel() / pictures * static_cast<int64_t>(in.element_size());
    const int threads = ThreadsOf(spec.ops);
    Scratch scratch;
    const int64_t patches = scratch.Add(tokens * k_row), planes = scratch.Add(source.plane_bytes()),
                  stats = scratch.Add(2 * tokens * 4);
    scratch.Make(threads);
    for (int t = 0; t < threads; ++t)
      std::memset(scratch.At(t, planes), 0, static_cast<size_t>(source.plane_bytes()));
    ForRuns(k, threads, pictures, 1, Tensor(), [&](int rank, const Run& run) {
      char* to = Bytes(before) + run.first * tokens * c * act;
      float* mean = scratch.FloatsAt(rank, stats);
      source.Gather(Bytes(in) + run.first * in_bytes, scratch.At(rank, planes),
                    scratch.At(rank, patches));
      Linear(k, conv, scratch.At(rank, patches), to, tokens);
      Norm(*spec.ops.train, View(gamma, beta, spec.eps), to,
           Bytes(out) + run.first * tokens * c * act, tokens, c, mean, mean + tokens);
    });
    ctx->save_for_backward({in, weight, gamma, beta, before});
    Hold(ctx, spec);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto spec = HeldBy<PatchSpec>(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &in = saved[0], &weight = saved[1], &gamma = saved[2], &beta = saved[3],
                 &before = saved[4];
    const CpuKernels& k = *spec.ops.forward;
    const int64_t act = k.activation_bytes;
    const int64_t pictures = in.size(0), c = weight.size(0), c_in = weight.size(1);
    const PatchSource source(spec, c_in, act);
    const int64_t tokens = source.outputs(), elements = source.row_elements();
    const Tensor dout = Activation(grads[0], spec.ops.type);
    const bool wants_input = !spec.pictures();
    const Packed back =
        wants_input ? PackTransposed(spec.ops, PatchWeight(spec, weight)) : Packed();
    const Tensor din = wants_input ? WithSlack(in.sizes(), spec.ops.type) : Tensor();
    const int64_t in_bytes = in.numel() / pictures * static_cast<int64_t>(in.element_size());
    const int64_t in_elements = in.numel() / pictures;

    const int threads = ThreadsOf(spec.ops);
    ParameterGradients parameters;
    const int64_t dw = parameters.Add(c * elements), db = parameters.Add(c),
                  dgamma = parameters.Add(c), dbeta = parameters.Add(c);
    parameters.Make(threads);
    Scratch scratch;
    const int64_t patches = scratch.Add(tokens * elements * act),
                  planes = scratch.Add(source.plane_bytes()), stats = scratch.Add(2 * tokens * 4),
                  normed = scratch.Add(tokens * c * act), dconv = scratch.Add(tokens * c * act),
                  dpatches = scratch.Add(wants_input ? tokens * elements * 4 : 0),
                  dmap = scratch.Add(wants_input ? in_elements * 4 : 0);
    scratch.Make(threads);
    for (int t = 0; t < threads; ++t)
      std::memset(scratch.At(t, planes), 0, static_cast<size_t>(source.plane_bytes()));
    ForRuns(k, threads, pictures, 1, Tensor(), [&](int rank, const Run& run) {
      const int64_t at = run.first * tokens * c * act;
      const NormView norm = View(gamma, beta, spec.eps);
      float* mean = scratch.FloatsAt(rank, stats);
      char* const dr = scratch.At(rank, dconv);
      Norm(*spec.ops.train, norm, Bytes(before) + at, scratch.At(rank, normed), tokens, c, mean,
           mean + tokens);
      NormGrad(*spec.ops.train, norm, Bytes(dout) + at, Bytes(before) + at, mean, mean + tokens,
               nullptr, dr, tokens, c, parameters.At(rank, dgamma), parameters.At(rank, dbeta));
      source.Gather(Bytes(in) + run.first * in_bytes, scratch.At(rank, planes),
                    scratch.At(rank, patches));
      LinearGrad(*spec.ops.train, dr, scratch.At(rank, patches), tokens, c, elements,
                 parameters.At(rank, dw), parameters.At(rank, db));
      if (!wants_input) return;
      float* map = scratch.FloatsAt(rank, dmap);
      std::fill(map, map + in_elements, 0.0f);
      Linear(k, back, dr, scratch.At(rank, dpatches), tokens, Output::kFloat);
      MapWindows windows = source.windows();
      windows.token_bytes = c_in * 4;
      kernels::ScatterPatches(windows, scratch.FloatsAt(rank, dpatches), map);
      k.from_float(map, Bytes(din) + run.first * in_bytes, in_elements);
    });
    parameters.Sum();
    // [C, K padded] → [C, C', kernel, kernel]
    const Tensor rows =
        parameters.Get(dw, {c, elements}).narrow(1, 0, c_in * spec.kernel * spec.kernel);
    const Tensor dweight =
        spec.pictures()
            ? rows.reshape(weight.sizes())
            : rows.reshape({c, spec.kernel, spec.kernel, c_in}).permute({0, 3, 1, 2}).contiguous();
    return {din,
            dweight,
            parameters.Get(db, {c}),
            parameters.Get(dgamma, {c}),
            parameters.Get(dbeta, {c}),
            Tensor()};
  }
};

// ---- MLP ----

kernels::Gelu GeluOf(bool tanh) { return tanh ? kernels::Gelu::kTanh : kernels::Gelu::kErf; }

struct MlpSpec {
  FusedOps ops;
  FusedMlpShape shape;
};

// Depthwise weights as kernels' gradients take them: [9, hidden].
Tensor Taps(const Tensor& weight) { return weight.reshape({weight.size(0), 9}).t().contiguous(); }

class MlpFunction : public torch::autograd::Function<MlpFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& scale,
                        const Tensor& gamma, const Tensor& beta, const Tensor& w1, const Tensor& b1,
                        const Tensor& dw, const Tensor& db, const Tensor& w2, const Tensor& b2,
                        const MlpSpec& spec) {
    const CpuKernels& k = *spec.ops.forward;
    const int64_t act = k.activation_bytes;
    const Tensor x = Activation(input, spec.ops.type);
    const int64_t pictures = x.size(0), tokens = x.size(1), c = x.size(2), wide = w1.size(0);
    const Tensor hidden = WithSlack({pictures, tokens, wide}, spec.ops.type);
    const Tensor out = WithSlack(x.sizes(), spec.ops.type);
    const Packed fc1 = Pack(spec.ops, w1, b1), fc2 = Pack(spec.ops, w2, b2);
    const Conv conv(spec, dw, db);
    const int threads = ThreadsOf(spec.ops);
    const int64_t chunk = ChunkOf(tokens, pictures / threads);
    Scratch scratch;
    const int64_t normed = scratch.Add(chunk * tokens * c * act),
                  gelu = scratch.Add(chunk * tokens * wide * act),
                  path = scratch.Add(chunk * tokens * c * act),
                  stats = scratch.Add(2 * chunk * tokens * 4);
    scratch.Make(threads);
    ForRuns(k, threads, pictures, chunk, scale, [&](int rank, const Run& run) {
      const int64_t rows = run.count * tokens;
      const char* from = Bytes(x) + run.first * tokens * c * act;
      char* to = Bytes(out) + run.first * tokens * c * act;
      if (run.scale == 0) {
        std::memcpy(to, from, static_cast<size_t>(rows * c * act));
        return;
      }
      char* map = Bytes(hidden) + run.first * tokens * wide * act;
      float* mean = scratch.FloatsAt(rank, stats);
      Norm(*spec.ops.train, View(gamma, beta, spec.shape.eps), from, scratch.At(rank, normed), rows,
           c, mean, mean + rows);
      Linear(k, fc1, scratch.At(rank, normed), map, rows, Output::kHidden, nullptr,
             spec.shape.relu);
      conv.Forward(map, scratch.At(rank, gelu), run.count);
      if (run.scale == 1) {
        Linear(k, fc2, scratch.At(rank, gelu), to, rows, Output::kActivation, from);
      } else {
        Linear(k, fc2, scratch.At(rank, gelu), scratch.At(rank, path), rows);
        spec.ops.train->add_scaled(from, scratch.At(rank, path), run.scale, to, rows * c);
      }
    });
    ctx->save_for_backward({x, scale, gamma, beta, w1, dw, db, w2, hidden});
    Hold(ctx, spec);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto spec = HeldBy<MlpSpec>(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &scale = saved[1], &gamma = saved[2], &beta = saved[3],
                 &w1 = saved[4], &dw = saved[5], &db = saved[6], &w2 = saved[7], &hidden = saved[8];
    const CpuKernels& k = *spec.ops.forward;
    const TrainKernels& t = *spec.ops.train;
    const int64_t act = k.activation_bytes;
    const int64_t pictures = x.size(0), tokens = x.size(1), c = x.size(2), wide = w1.size(0);
    const Tensor dout = Activation(grads[0], spec.ops.type);
    const Tensor dx = WithSlack(x.sizes(), spec.ops.type);
    const Packed back1 = PackTransposed(spec.ops, w1), back2 = PackTransposed(spec.ops, w2);
    const Tensor taps = Taps(dw);

    const int threads = ThreadsOf(spec.ops);
    const int64_t chunk = ChunkOf(tokens, pictures / threads);
    ParameterGradients parameters;
    const int64_t dgamma = parameters.Add(c), dbeta = parameters.Add(c),
                  dw1 = parameters.Add(wide * c), db1 = parameters.Add(wide),
                  dtaps = parameters.Add(9 * wide), ddb = parameters.Add(wide),
                  dw2 = parameters.Add(c * wide), db2 = parameters.Add(c);
    parameters.Make(threads);
    Scratch scratch;
    const int64_t normed = scratch.Add(chunk * tokens * c * act),
                  stats = scratch.Add(2 * chunk * tokens * 4),
                  gelu = scratch.Add(chunk * tokens * wide * act),
                  dgelu = scratch.Add(chunk * tokens * wide * act),
                  dhidden = scratch.Add(chunk * tokens * wide * act),
                  dpath = scratch.Add(chunk * tokens * c * act),
                  work = scratch.Add(
                      4 * static_cast<int64_t>(t.dwconv_grad_scratch_floats(
                              static_cast<int>(spec.shape.size.width), static_cast<int>(wide))));
    scratch.Make(threads);
    ForRuns(k, threads, pictures, chunk, scale, [&](int rank, const Run& run) {
      const int64_t rows = run.count * tokens, at = run.first * tokens * c * act;
      const char* dy = Bytes(dout) + at;
      if (run.scale == 0) {
        std::memcpy(Bytes(dx) + at, dy, static_cast<size_t>(rows * c * act));
        return;
      }
      if (run.scale != 1) {
        std::memset(scratch.At(rank, dpath), 0, static_cast<size_t>(rows * c * act));
        t.add_scaled(scratch.At(rank, dpath), dy, run.scale, scratch.At(rank, dpath), rows * c);
        dy = scratch.At(rank, dpath);
      }
      const char* map = Bytes(hidden) + run.first * tokens * wide * act;
      float* mean = scratch.FloatsAt(rank, stats);
      const NormView norm = View(gamma, beta, spec.shape.eps);
      // fc2's input, GELU and the depthwise convolution
      Linear(k, back2, dy, scratch.At(rank, dgelu), rows);
      t.dwconv_gelu_grad({.hidden = map,
                          .dout = scratch.At(rank, dgelu),
                          .weight = taps.const_data_ptr<float>(),
                          .bias = db.const_data_ptr<float>(),
                          .dhidden = scratch.At(rank, dhidden),
                          .dweight = parameters.At(rank, dtaps),
                          .dbias = parameters.At(rank, ddb),
                          .scratch = scratch.FloatsAt(rank, work),
                          .n = static_cast<int>(run.count),
                          .height = static_cast<int>(spec.shape.size.height),
                          .width = static_cast<int>(spec.shape.size.width),
                          .c_first = 0,
                          .c_last = static_cast<int>(wide),
                          .c = static_cast<int>(wide),
                          .gelu = GeluOf(spec.shape.gelu_tanh),
                          .relu = spec.shape.relu,
                          .gelu_out = scratch.At(rank, gelu)});
      // fc2's parameters
      LinearGrad(t, dy, scratch.At(rank, gelu), rows, c, wide, parameters.At(rank, dw2),
                 parameters.At(rank, db2));
      // fc1
      Norm(t, norm, Bytes(x) + at, scratch.At(rank, normed), rows, c, mean, mean + rows);
      LinearGrad(t, scratch.At(rank, dhidden), scratch.At(rank, normed), rows, wide, c,
                 parameters.At(rank, dw1), parameters.At(rank, db1));
      char* dnormed = scratch.At(rank, normed);  // not needed any more
      Linear(k, back1, scratch.At(rank, dhidden), dnormed, rows);
      NormGrad(t, norm, dnormed, Bytes(x) + at, mean, mean + rows, Bytes(dout) + at, Bytes(dx) + at,
               rows, c, parameters.At(rank, dgamma), parameters.At(rank, dbeta));
    });
    parameters.Sum();
    return {dx,
            Tensor(),
            parameters.Get(dgamma, {c}),
            parameters.Get(dbeta, {c}),
            parameters.Get(dw1, {wide, c}),
            parameters.Get(db1, {wide}),
            parameters.Get(dtaps, {9, wide}).t().reshape(dw.sizes()),
            parameters.Get(ddb, {wide}),
            parameters.Get(dw2, {c, wide}),
            parameters.Get(db2, {c}),
            Tensor()};
  }

 private:
  // The depthwise convolution and GELU over whole maps.
  class Conv {
   public:
    Conv(const MlpSpec& spec, const Tensor& weight, const Tensor& bias)
        : spec_(spec), wide_(weight.size(0)) {
      const CpuKernels& k = *spec.ops.forward;
      weight_ = torch::empty({static_cast<int64_t>(k.packed_dwconv_bytes(static_cast<int>(wide_)))},
                             torch::kByte);
      const Tensor w = weight.contiguous();
      k.pack_dwconv(w.const_data_ptr<float>(), bias.const_data_ptr<float>(),
                    static_cast<int>(wide_), weight_.data_ptr());
      zeros_ = torch::zeros({spec.shape.size.width * wide_ * k.hidden_bytes + kernels::kSlack},
                            torch::kByte);
    }

    void Forward(const char* map, char* out, int64_t pictures) const {
      const CpuKernels& k = *spec_.ops.forward;
      const int64_t height = spec_.shape.size.height;
      const int64_t row = spec_.shape.size.width * wide_ * k.hidden_bytes;
      std::vector<const void*> rows(static_cast<size_t>(height) + 2, zeros_.data_ptr());
      for (int64_t i = 0; i < pictures; ++i) {
        for (int64_t y = 0; y < height; ++y)
          rows[static_cast<size_t>(y) + 1] = map + (i * height + y) * row;
        k.dwconv_gelu(
            {.rows = rows.data(),
             .weight = weight_.data_ptr(),
             .out = out + i * height * spec_.shape.size.width * wide_ * k.activation_bytes,
             .count = static_cast<int>(height),
             .width = static_cast<int>(spec_.shape.size.width),
             .c = static_cast<int>(wide_),
             .gelu = GeluOf(spec_.shape.gelu_tanh)});
      }
    }

   private:
    const MlpSpec& spec_;
    int64_t wide_;
    Tensor weight_, zeros_;
  };
};

// ---- Attention ----

struct AttentionSpec {
  FusedOps ops;
  FusedAttentionShape shape;

  bool reduces() const { return pools() || shape.reduction > 1; }
  bool pools() const { return shape.pooled_side > 0; }
};

// The reduction of a picture's map to a row a key, which a linear layer takes: windows without
// overlap, or the linear variant's means.
class KeyRows {
 public:
  KeyRows(const AttentionSpec& spec, int64_t c, int64_t element)
      : spec_(spec), c_(static_cast<int>(c)) {
    const FusedAttentionShape& shape = spec.shape;
    windows_ = {.height = shape.size.height,
                .width = shape.size.width,
                .token_bytes = c * element,
                .kernel = shape.reduction,
                .stride = shape.reduction,
                .top = kernels::ReductionSide(shape.size.height, shape.reduction, shape.pad_same),
                .left = kernels::ReductionSide(shape.size.width, shape.reduction, shape.pad_same)};
  }

  // Without a reduction every token is a key.
  int64_t keys() const {
    return spec_.pools() ? spec_.shape.pooled_side * spec_.shape.pooled_side : windows_.outputs();
  }
  int64_t elements() const {  // of a row
    return spec_.reduces() ? windows_.kernel * windows_.kernel * c_ : 0;
  }

  void Gather(const char* map, char* rows) const {
    if (!spec_.pools()) {
      kernels::GatherPatches(windows_, map, 0, keys(), rows);
      return;
    }
    spec_.ops.train->pool({.in = map,
                           .out = rows,
                           .height = static_cast<int>(windows_.height),
                           .width = static_cast<int>(windows_.width),
                           .cells = static_cast<int>(spec_.shape.pooled_side),
                           .c = c_});
  }

  // The map's gradient from that of the rows. `work`: as many floats as the map has numbers; not
  // used where the map is pooled.
  void Scatter(const float* rows, float* work, char* map) const {
    if (spec_.pools()) {
      spec_.ops.train->pool_grad({.dout = rows,
                                  .dx = map,
                                  .height = static_cast<int>(windows_.height),
                                  .width = static_cast<int>(windows_.width),
                                  .cells = static_cast<int>(spec_.shape.pooled_side),
                                  .c = c_});
      return;
    }
    const int64_t numbers = windows_.height * windows_.width * c_;
    MapWindows f32 = windows_;
    f32.token_bytes = int64_t{c_} * 4;
    std::fill(work, work + numbers, 0.0f);
    kernels::ScatterPatches(f32, rows, work);
    spec_.ops.forward->from_float(work, map, numbers);
  }

 private:
  const AttentionSpec& spec_;
  int c_;
  MapWindows windows_;
};

// softmax(s / sqrt(d)) as a power of two.
double QueryScale(int64_t d) { return std::numbers::log2e / std::sqrt(static_cast<double>(d)); }

Tensor ReductionWeight(const Tensor& sr) {  // [C, sr·sr·C]
  return sr.permute({0, 2, 3, 1}).reshape({sr.size(0), -1});
}

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& scale,
                        const Tensor& gamma, const Tensor& beta, const Tensor& wq, const Tensor& bq,
                        const Tensor& wkv, const Tensor& bkv, const Tensor& wp, const Tensor& bp,
                        const Tensor& wsr, const Tensor& bsr, const Tensor& sr_gamma,
                        const Tensor& sr_beta, const AttentionSpec& spec) {
    const CpuKernels& k = *spec.ops.forward;
    const TrainKernels& t = *spec.ops.train;
    const int64_t act = k.activation_bytes;
    const Tensor x = Activation(input, spec.ops.type);
    const int64_t pictures = x.size(0), tokens = x.size(1), c = x.size(2);
    const int64_t heads = spec.shape.heads, d = c / heads;
    const bool reduces = spec.reduces();
    const KeyRows key_rows(spec, c, act);
    const int64_t keys = key_rows.keys(), key_row = key_rows.elements() * act;
    TORCH_CHECK(keys <= kernels::kMostKeys, "Attention has ", keys, " keys; fused training takes ",
                kernels::kMostKeys, ".");
    const Packed q = Pack(spec.ops, wq, bq, QueryScale(d)), kv = Pack(spec.ops, wkv, bkv),
                 proj = Pack(spec.ops, wp, bp);
    const Packed sr = reduces ? Pack(spec.ops, ReductionWeight(wsr), bsr) : Packed();
    const Tensor queries = WithSlack(x.sizes(), spec.ops.type);
    const Tensor pairs = WithSlack({pictures, keys, 2 * c}, spec.ops.type);
    const Tensor mixed = WithSlack(x.sizes(), spec.ops.type);
    const Tensor reduced =
        reduces ? WithSlack({pictures, keys, c}, spec.ops.type) : torch::empty({0});
    const Tensor out = WithSlack(x.sizes(), spec.ops.type);

    const int threads = ThreadsOf(spec.ops);
    const int64_t most_rows =
        std::max(tokens, keys);  // of a picture; small maps are pooled to more
    const int64_t chunk = ChunkOf(most_rows, pictures / threads);
    Scratch scratch;
    const int64_t normed = scratch.Add(chunk * tokens * c * act),
                  stats = scratch.Add(2 * chunk * most_rows * 4),
                  gathered = scratch.Add(chunk * keys * key_row),
                  source = scratch.Add(chunk * keys * c * act),
                  packed = scratch.Add(static_cast<int64_t>(
                      k.packed_keys_bytes(static_cast<int>(keys), static_cast<int>(d)))),
                  path = scratch.Add(chunk * tokens * c * act);
    scratch.Make(threads);
    ForRuns(k, threads, pictures, chunk, scale, [&](int rank, const Run& run) {
      const int64_t rows = run.count * tokens, at = run.first * tokens * c * act;
      const char* from = Bytes(x) + at;
      if (run.scale == 0) {
        std::memcpy(Bytes(out) + at, from, static_cast<size_t>(rows * c * act));
        return;
      }
      float* mean = scratch.FloatsAt(rank, stats);
      const char* key_source = scratch.At(rank, normed);
      Norm(t, View(gamma, beta, spec.shape.eps_block), from, scratch.At(rank, normed), rows, c,
           mean, mean + rows);
      Linear(k, q, scratch.At(rank, normed), Bytes(queries) + at, rows);
      if (reduces) {
        char* r = Bytes(reduced) + run.first * keys * c * act;
        for (int64_t i = 0; i < run.count; ++i) {
          key_rows.Gather(scratch.At(rank, normed) + i * tokens * c * act,
                          scratch.At(rank, gathered) + i * keys * key_row);
        }
        Linear(k, sr, scratch.At(rank, gathered), r, run.count * keys);
        Norm(t, View(sr_gamma, sr_beta, spec.shape.eps_outer), r, scratch.At(rank, source),
             run.count * keys, c, mean, mean + run.count * keys);
        key_source = scratch.At(rank, source);
        if (spec.pools()) {
          t.gelu({.in = key_source,
                  .out = scratch.At(rank, source),
                  .n = run.count * keys * c,
                  .gelu = GeluOf(spec.shape.gelu_tanh)});
        }
      }
      char* pair = Bytes(pairs) + run.first * keys * 2 * c * act;
      Linear(k, kv, key_source, pair, run.count * keys);
      for (int64_t i = 0; i < run.count; ++i) {
        for (int64_t h = 0; h < heads; ++h) {
          const char* first_key = pair + (i * keys * 2 * c + h * d) * act;
          k.pack_keys({.k = first_key,
                       .v = first_key + c * act,
                       .ld = 2 * c,
                       .keys = static_cast<int>(keys),
                       .d = static_cast<int>(d),
                       .packed = scratch.At(rank, packed)});
          k.attention({.q = Bytes(queries) + at + (i * tokens * c + h * d) * act,
                       .packed = scratch.At(rank, packed),
                       .out = Bytes(mixed) + at + (i * tokens * c + h * d) * act,
                       .ld = c,
                       .queries = tokens,
                       .keys = static_cast<int>(keys),
                       .d = static_cast<int>(d)});
        }
      }
      if (run.scale == 1) {
        Linear(k, proj, Bytes(mixed) + at, Bytes(out) + at, rows, Output::kActivation, from);
      } else {
        Linear(k, proj, Bytes(mixed) + at, scratch.At(rank, path), rows);
        t.add_scaled(from, scratch.At(rank, path), run.scale, Bytes(out) + at, rows * c);
      }
    });
    ctx->save_for_backward({x, scale, gamma, beta, wq, wkv, wp, wsr, sr_gamma, sr_beta, queries,
                            pairs, mixed, reduced});
    Hold(ctx, spec);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto spec = HeldBy<AttentionSpec>(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &scale = saved[1], &gamma = saved[2], &beta = saved[3],
                 &wq = saved[4], &wkv = saved[5], &wp = saved[6], &wsr = saved[7],
                 &sr_gamma = saved[8], &sr_beta = saved[9], &queries = saved[10],
                 &pairs = saved[11], &mixed = saved[12], &reduced = saved[13];
    const CpuKernels& k = *spec.ops.forward;
    const TrainKernels& t = *spec.ops.train;
    const int64_t act = k.activation_bytes;
    const int64_t pictures = x.size(0), tokens = x.size(1), c = x.size(2);
    const int64_t heads = spec.shape.heads, d = c / heads;
    const bool reduces = spec.reduces(), pools = spec.pools();
    const KeyRows key_rows(spec, c, act);
    const int64_t keys = key_rows.keys(), elements = key_rows.elements();
    const Tensor dout = Activation(grads[0], spec.ops.type);
    const Tensor dx = WithSlack(x.sizes(), spec.ops.type);
    const double query_scale = QueryScale(d);
    const Packed back_q = PackTransposed(spec.ops, wq, query_scale),
                 back_kv = PackTransposed(spec.ops, wkv), back_p = PackTransposed(spec.ops, wp);
    const Packed back_sr = reduces ? PackTransposed(spec.ops, ReductionWeight(wsr)) : Packed();

    const int threads = ThreadsOf(spec.ops);
    const int64_t chunk = ChunkOf(std::max(tokens, keys), pictures / threads);
    ParameterGradients parameters;
    const int64_t dgamma = parameters.Add(c), dbeta = parameters.Add(c),
                  dwq = parameters.Add(c * c), dbq = parameters.Add(c),
                  dwkv = parameters.Add(2 * c * c), dbkv = parameters.Add(2 * c),
                  dwp = parameters.Add(c * c), dbp = parameters.Add(c),
                  dwsr = parameters.Add(c * elements), dbsr = parameters.Add(c),
                  dsr_gamma = parameters.Add(c), dsr_beta = parameters.Add(c);
    parameters.Make(threads);
    Scratch scratch;
    const int64_t map = chunk * tokens * c * act, small = chunk * keys * c * act;
    const int64_t normed = scratch.Add(map), stats = scratch.Add(2 * chunk * tokens * 4),
                  dpath = scratch.Add(map), dmixed = scratch.Add(map), dq = scratch.Add(map),
                  dnormed = scratch.Add(map), dpairs = scratch.Add(2 * small),
                  source = scratch.Add(small), dsource = scratch.Add(small),
                  activated = scratch.Add(pools ? small : 0),
                  key_stats = scratch.Add(2 * chunk * keys * 4),
                  gathered = scratch.Add(chunk * keys * elements * act),
                  dgathered = scratch.Add(keys * elements * 4),
                  dmap = scratch.Add(reduces && !pools ? tokens * c * 4 : 0),
                  dkeys = scratch.Add(2 * keys * d * 4),
                  work = scratch.Add(4 * static_cast<int64_t>(t.attention_grad_scratch_floats(
                                             static_cast<int>(keys), static_cast<int>(d))));
    scratch.Make(threads);
    ForRuns(k, threads, pictures, chunk, scale, [&](int rank, const Run& run) {
      const int64_t rows = run.count * tokens, all_keys = run.count * keys;
      const int64_t at = run.first * tokens * c * act, pair_at = run.first * keys * 2 * c * act;
      const auto own = [&](int64_t offset) { return scratch.At(rank, offset); };
      const auto grad = [&](int64_t offset) { return parameters.At(rank, offset); };
      const char* dy = Bytes(dout) + at;
      if (run.scale == 0) {
        std::memcpy(Bytes(dx) + at, dy, static_cast<size_t>(rows * c * act));
        return;
      }
      if (run.scale != 1) {
        std::memset(own(dpath), 0, static_cast<size_t>(rows * c * act));
        t.add_scaled(own(dpath), dy, run.scale, own(dpath), rows * c);
        dy = own(dpath);
      }
      // proj
      LinearGrad(t, dy, Bytes(mixed) + at, rows, c, c, grad(dwp), grad(dbp));
      Linear(k, back_p, dy, own(dmixed), rows);
      // softmax(q·kᵀ)·v
      for (int64_t i = 0; i < run.count; ++i) {
        for (int64_t h = 0; h < heads; ++h) {
          const char* first_key = Bytes(pairs) + pair_at + (i * keys * 2 * c + h * d) * act;
          const int64_t query = (i * tokens * c + h * d) * act;
          float* dk = scratch.FloatsAt(rank, dkeys);
          float* dv = dk + keys * d;
          std::fill(dk, dk + 2 * keys * d, 0.0f);
          t.attention_grad({.q = Bytes(queries) + at + query,
                            .k = first_key,
                            .v = first_key + c * act,
                            .out = Bytes(mixed) + at + query,
                            .dout = own(dmixed) + query,
                            .ld = c,
                            .ld_kv = 2 * c,
                            .dq = own(dq) + query,
                            .dk = dk,
                            .dv = dv,
                            .scratch = scratch.FloatsAt(rank, work),
                            .queries = tokens,
                            .keys = static_cast<int>(keys),
                            .d = static_cast<int>(d)});
          for (int64_t j = 0; j < keys; ++j) {
            char* to = own(dpairs) + ((i * keys + j) * 2 * c + h * d) * act;
            k.from_float(dk + j * d, to, d);
            k.from_float(dv + j * d, to + c * act, d);
          }
        }
      }
      // q, kv and the reduction
      const NormView norm = View(gamma, beta, spec.shape.eps_block);
      float* mean = scratch.FloatsAt(rank, stats);
      Norm(t, norm, Bytes(x) + at, own(normed), rows, c, mean, mean + rows);
      LinearGrad(t, own(dq), own(normed), rows, c, c, grad(dwq), grad(dbq));
      if (!reduces) {
        LinearGrad(t, own(dpairs), own(normed), rows, 2 * c, c, grad(dwkv), grad(dbkv));
        Linear(k, back_kv, own(dpairs), own(dnormed), rows);
      } else {
        const NormView sr_norm = View(sr_gamma, sr_beta, spec.shape.eps_outer);
        const kernels::Gelu gelu = GeluOf(spec.shape.gelu_tanh);
        const char* r = Bytes(reduced) + run.first * keys * c * act;
        float* key_mean = scratch.FloatsAt(rank, key_stats);
        Norm(t, sr_norm, r, own(source), all_keys, c, key_mean, key_mean + all_keys);
        if (pools)
          t.gelu({.in = own(source), .out = own(activated), .n = all_keys * c, .gelu = gelu});
        LinearGrad(t, own(dpairs), own(pools ? activated : source), all_keys, 2 * c, c, grad(dwkv),
                   grad(dbkv));
        Linear(k, back_kv, own(dpairs), own(dsource), all_keys);
        if (pools) {
          t.gelu_grad({.in = own(source),
                       .dout = own(dsource),
                       .dx = own(dsource),
                       .n = all_keys * c,
                       .gelu = gelu});
        }
        NormGrad(t, sr_norm, own(dsource), r, key_mean, key_mean + all_keys, nullptr, own(dsource),
                 all_keys, c, grad(dsr_gamma), grad(dsr_beta));
        for (int64_t i = 0; i < run.count; ++i) {
          key_rows.Gather(own(normed) + i * tokens * c * act,
                          own(gathered) + i * keys * elements * act);
        }
        LinearGrad(t, own(dsource), own(gathered), all_keys, c, elements, grad(dwsr), grad(dbsr));
        for (int64_t i = 0; i < run.count; ++i) {
          Linear(k, back_sr, own(dsource) + i * keys * c * act, own(dgathered), keys,
                 Output::kFloat);
          key_rows.Scatter(scratch.FloatsAt(rank, dgathered), scratch.FloatsAt(rank, dmap),
                           own(dnormed) + i * tokens * c * act);
        }
      }
      Linear(k, back_q, own(dq), own(dnormed), rows, Output::kActivation, own(dnormed));
      NormGrad(t, norm, own(dnormed), Bytes(x) + at, mean, mean + rows, Bytes(dout) + at,
               Bytes(dx) + at, rows, c, grad(dgamma), grad(dbeta));
    });
    parameters.Sum();
    variable_list result = {dx,
                            Tensor(),
                            parameters.Get(dgamma, {c}),
                            parameters.Get(dbeta, {c}),
                            parameters.Get(dwq, {c, c}) * query_scale,
                            parameters.Get(dbq, {c}) * query_scale,
                            parameters.Get(dwkv, {2 * c, c}),
                            parameters.Get(dbkv, {2 * c}),
                            parameters.Get(dwp, {c, c}),
                            parameters.Get(dbp, {c})};
    if (reduces) {
      const int64_t side = wsr.size(2);
      result.push_back(parameters.Get(dwsr, {c, side, side, c}).permute({0, 3, 1, 2}).contiguous());
      result.push_back(parameters.Get(dbsr, {c}));
      result.push_back(parameters.Get(dsr_gamma, {c}));
      result.push_back(parameters.Get(dsr_beta, {c}));
    } else {
      result.insert(result.end(), 4, Tensor());
    }
    result.emplace_back();
    return result;
  }
};

// Autograd functions take no undefined tensors.
Tensor OrEmpty(const Tensor& t) { return t.defined() ? t : torch::empty({0}); }

const TrainKernels* TrainKernelsFor(absl::string_view name) {
  const TrainKernels* sets[] = {
    &kernels::kPortableTrainKernels,
#if defined(__x86_64__)
    &kernels::kAvx2TrainKernels,
    &kernels::kAvx512TrainKernels,
    &kernels::kAmxTrainKernels
#endif
  };
  for (const TrainKernels* set : sets) {
    if (name == set->name) return set;
  }
  return nullptr;
}

}  // namespace

absl::StatusOr<FusedOps> ChooseFusedOps(absl::string_view dtype) {
  ASSIGN_OR_RETURN(
      const CpuKernels* chosen,
      kernels::ChooseCpuKernels(kernels::DetectCpu(), dtype, kernels::ForcedCpuKernels()));
  FusedOps ops{.forward = chosen};
#if defined(__x86_64__)
  // Hidden rows are kept for the backward pass as activations, so fp16 ones won't do. Without tiles
  // gradients are computed in f32.
  if (chosen == &kernels::kAmxKernels) ops.forward = &kernels::kAmxF32MathKernels;
  if (chosen == &kernels::kAvx512Bf16Kernels) ops.forward = &kernels::kAvx512Kernels;
#endif
  ops.train = TrainKernelsFor(ops.forward->name);
  if (ops.train == nullptr) {
    return absl::InternalError(std::string("no training kernels go with ") + ops.forward->name);
  }
  ops.type = ops.forward->activation_bytes == 2 ? torch::kBFloat16 : torch::kFloat32;
  return ops;
}

Tensor FusedPatchEmbed(const FusedOps& ops, const Tensor& input, MapSize size, int64_t kernel,
                       int64_t stride, bool pad_same, const FusedParameter& conv,
                       const FusedParameter& norm, double eps) {
  return PatchFunction::apply(input, conv.weight, conv.bias, norm.weight, norm.bias,
                              PatchSpec{ops, size, kernel, stride, pad_same, eps});
}

Tensor FusedAttention(const FusedOps& ops, const Tensor& x, const Tensor& scale,
                      const FusedAttentionShape& shape, const FusedParameter& norm1,
                      const FusedParameter& q, const FusedParameter& kv, const FusedParameter& proj,
                      const FusedParameter& sr, const FusedParameter& sr_norm) {
  return AttentionFunction::apply(x, OrEmpty(scale), norm1.weight, norm1.bias, q.weight, q.bias,
                                  kv.weight, kv.bias, proj.weight, proj.bias, OrEmpty(sr.weight),
                                  OrEmpty(sr.bias), OrEmpty(sr_norm.weight), OrEmpty(sr_norm.bias),
                                  AttentionSpec{ops, shape});
}

Tensor FusedMlp(const FusedOps& ops, const Tensor& x, const Tensor& scale,
                const FusedMlpShape& shape, const FusedParameter& norm2, const FusedParameter& fc1,
                const FusedParameter& dwconv, const FusedParameter& fc2) {
  return MlpFunction::apply(x, OrEmpty(scale), norm2.weight, norm2.bias, fc1.weight, fc1.bias,
                            dwconv.weight, dwconv.bias, fc2.weight, fc2.bias, MlpSpec{ops, shape});
}

Tensor FusedNorm(const FusedOps& ops, const Tensor& x, const FusedParameter& norm, double eps) {
  return NormFunction::apply(x, norm.weight, norm.bias, NormSpec{ops, eps});
}

void FusedAdamW(const FusedOps& ops, const AdamWStep& step, torch::TensorList parameters,
                torch::TensorList gradients, torch::TensorList first, torch::TensorList second) {
  const size_t count = parameters.size();
  TORCH_CHECK(gradients.size() == count && first.size() == count && second.size() == count,
              "AdamW was given ", count, " parameters, ", gradients.size(), " gradients, ",
              first.size(), " and ", second.size(), " moments.");
  struct Span {
    float *p, *m, *v;
    const float* g;
    int64_t begin;  // of all numbers
  };
  std::vector<Span> spans;
  std::vector<Tensor> held;  // gradients in their parameters' layout
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = parameters[i];
    for (const Tensor& t : {p, gradients[i], first[i], second[i]}) {
      TORCH_CHECK(t.defined() && t.scalar_type() == torch::kFloat32 && t.device().is_cpu() &&
                      t.sizes() == p.sizes(),
                  "AdamW's parameter ", i,
                  " isn't f32 on the CPU, or its gradient and moments aren't like it.");
    }
    TORCH_CHECK(p.is_non_overlapping_and_dense() && first[i].strides() == p.strides() &&
                    second[i].strides() == p.strides(),
                "AdamW's parameter ", i, " has gaps, or its moments lie differently.");
    held.push_back(gradients[i].strides() == p.strides()
                       ? gradients[i]
                       : torch::empty_like(p).copy_(gradients[i]));
    spans.push_back({p.data_ptr<float>(), first[i].data_ptr<float>(), second[i].data_ptr<float>(),
                     held.back().const_data_ptr<float>(), total});
    total += p.numel();
  }
  kernels::AdamWParams params{.p = nullptr,
                              .m = nullptr,
                              .v = nullptr,
                              .g = nullptr,
                              .n = 0,
                              .grad_scale = 1,
                              .lr = step.learning_rate,
                              .weight_decay = step.weight_decay,
                              .beta1 = step.beta1,
                              .beta2 = step.beta2,
                              .eps = step.eps,
                              .bias1 = 1 - std::pow(step.beta1, static_cast<double>(step.step)),
                              .bias2 = 1 - std::pow(step.beta2, static_cast<double>(step.step))};
  RunOnTeam(ThreadsOf(ops), [&](int rank, int size) {
    const Share mine = ShareOf(total, 4096, rank, size);
    for (size_t i = 0; i < count; ++i) {
      const Span& span = spans[i];
      const int64_t end = i + 1 < count ? spans[i + 1].begin : total;
      const int64_t from = std::max(mine.begin, span.begin), to = std::min(mine.end, end);
      if (from >= to) continue;
      const int64_t at = from - span.begin;
      kernels::AdamWParams part = params;
      part.p = span.p + at;
      part.m = span.m + at;
      part.v = span.v + at;
      part.g = span.g + at;
      part.n = to - from;
      ops.train->adamw(part);
    }
  });
}

}  // namespace pyramid
