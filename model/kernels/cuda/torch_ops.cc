#include "model/kernels/cuda/torch_ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "model/kernels/cuda/maps.h"
#include "model/kernels/cuda/params.h"

namespace pyramid::kernels::cuda {
namespace {

using at::Tensor;

Scalar ScalarOf(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return Scalar::kF16;
    case at::kBFloat16:
      return Scalar::kBf16;
    case at::kFloat:
      return Scalar::kF32;
    default:
      TORCH_CHECK(false, "pyramid's kernels take f32, f16 and bf16, not ", type, ".");
  }
}

// `x` with elements of a row side by side, and rows that begin at multiples of 16 bytes.
Tensor Aligned(const Tensor& x) {
  const int64_t unit = 16 / x.element_size();
  bool aligned = x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < x.dim() - 1; ++i) aligned = aligned && x.stride(i) % unit == 0;
  return aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}
// The same, without gaps.
Tensor Dense(const Tensor& x) { return Aligned(x.contiguous()); }

Tensor F32(const Tensor& x) { return Dense(x.to(at::kFloat)); }

at::TensorOptions Floats(const Tensor& like) { return like.options().dtype(at::kFloat); }

void CheckLaunch(int status, const char* what) {
  TORCH_CHECK(status == 0, "pyramid::", what, ": ", ErrorText(status), ".");
}

int Int(int64_t value, const char* what) {
  TORCH_CHECK(value >= 0 && value <= std::numeric_limits<int>::max(), what, " is ", value, ".");
  return static_cast<int>(value);
}

// ---- Attention ----

AttentionParams ParamsOf(const Tensor& q, const Tensor& kv, int64_t heads, double scale) {
  TORCH_CHECK(
      q.dim() == 3 && kv.dim() == 3 && kv.size(0) == q.size(0) && kv.size(2) == 2 * q.size(2),
      "pyramid::attention takes q [B, N, C] and kv [B, M, 2C], not ", q.sizes(), " and ",
      kv.sizes(), ".");
  TORCH_CHECK(q.scalar_type() == kv.scalar_type() && q.device() == kv.device(),
              "pyramid::attention: q and kv differ in type or device.");
  const int64_t c = q.size(2);
  TORCH_CHECK(heads > 0 && (c == heads * 32 || c == heads * 64),
              "pyramid::attention takes heads of 32 or 64 channels, not ", heads, " of ", c,
              " together.");
  TORCH_CHECK(kv.size(1) >= 1 && kv.size(1) <= kMostKeys, "pyramid::attention takes 1..", kMostKeys,
              " keys, not ", kv.size(1), ".");
  TORCH_CHECK(scale > 0, "pyramid::attention: scale is ", scale, "; use a positive number.");
  // The grid's limits.
  TORCH_CHECK(q.size(0) <= 65535 && heads <= 65535, "pyramid::attention: too many pictures.");
  const auto* k = static_cast<const char*>(kv.const_data_ptr());
  return {.q = q.const_data_ptr(),
          .k = k,
          .v = k + c * kv.element_size(),
          .q_batch = q.stride(0),
          .q_row = q.stride(1),
          .kv_batch = kv.stride(0),
          .kv_row = kv.stride(1),
          .out_batch = q.size(1) * c,
          .out_row = c,
          .batch = Int(q.size(0), "the number of pictures"),
          .heads = Int(heads, "heads"),
          .queries = Int(q.size(1), "the number of queries"),
          .keys = Int(kv.size(1), "the number of keys"),
          .d = Int(c / heads, "the head size"),
          .scale = static_cast<float>(scale),
          .type = ScalarOf(q.scalar_type())};
}

std::tuple<Tensor, Tensor> RunAttention(const Tensor& q_in, const Tensor& kv_in, int64_t heads,
                                        double scale, bool for_backward) {
  const c10::OptionalDeviceGuard guard(q_in.device());
  const Tensor q = Aligned(q_in), kv = Aligned(kv_in);
  AttentionParams params = ParamsOf(q, kv, heads, scale);
  Tensor out = at::empty(q.sizes(), q.options()), softmax;
  if (for_backward) softmax = at::empty({q.size(0), heads, q.size(1), 2}, Floats(q));
  params.out = out.mutable_data_ptr();
  params.softmax = for_backward ? softmax.mutable_data_ptr<float>() : nullptr;
  if (out.numel() > 0) CheckLaunch(LaunchAttention(params, CurrentStream(q)), "attention");
  return {out, softmax};
}

Tensor Attention(const Tensor& q, const Tensor& kv, int64_t heads, double scale) {
  return std::get<0>(RunAttention(q, kv, heads, scale, /*for_backward=*/false));
}

std::tuple<Tensor, Tensor> AttentionForward(const Tensor& q, const Tensor& kv, int64_t heads,
                                            double scale) {
  return RunAttention(q, kv, heads, scale, /*for_backward=*/true);
}

std::tuple<Tensor, Tensor> AttentionBackward(const Tensor& d_out_in, const Tensor& q_in,
                                             const Tensor& kv_in, const Tensor& out_in,
                                             const Tensor& softmax, int64_t heads, double scale) {
  const c10::OptionalDeviceGuard guard(q_in.device());
  const Tensor q = Aligned(q_in), kv = Aligned(kv_in), out = Dense(out_in);
  const Tensor d_out = Dense(d_out_in.to(q.scalar_type()));
  AttentionBackwardParams params = {.forward = ParamsOf(q, kv, heads, scale)};
  AttentionParams& f = params.forward;
  Tensor dq = at::empty(q.sizes(), q.options()), dkv = at::empty(kv.sizes(), kv.options());
  if (q.numel() == 0) return {dq, dkv.zero_()};
  const int tile = f.type == Scalar::kF32 ? kPlainTile : kQueryTile;
  const Tensor dkv_partial =
      at::empty({DkvPartialCount(f.batch, f.heads, f.queries, f.keys, f.d, tile)}, Floats(q));
  const Tensor dq_partial =
      at::empty({DqPartialCount(f.batch, f.heads, f.queries, f.keys, f.d)}, Floats(q));
  f.out = const_cast<void*>(out.const_data_ptr());
  f.softmax = const_cast<float*>(softmax.const_data_ptr<float>());
  params.d_out = d_out.const_data_ptr();
  params.dq = dq.mutable_data_ptr();
  params.dkv = dkv.mutable_data_ptr();
  params.dkv_partial = dkv_partial.mutable_data_ptr<float>();
  params.dq_partial = dq_partial.mutable_data_ptr<float>();
  CheckLaunch(LaunchAttentionBackward(params, CurrentStream(q)), "attention_backward");
  return {dq, dkv};
}

// ---- Depthwise convolution ----

// [C, 1, 3, 3] → [9, C] f32, so that neighbouring lanes read neighbouring weights.
Tensor TapsFirst(const Tensor& weight) { return F32(weight.reshape({weight.size(0), kTaps}).t()); }

DwconvParams ParamsOf(const Tensor& x, const Tensor& taps, const Tensor& bias, int64_t height,
                      int64_t width, bool tanh) {
  TORCH_CHECK(x.dim() == 3 && x.size(1) == height * width && x.size(2) % kGroup == 0 &&
                  taps.size(1) == x.size(2) && bias.numel() == x.size(2),
              "pyramid::dwconv_gelu takes x [B, height * width, C] with C a multiple of ", kGroup,
              " and weights for C, not ", x.sizes(), " as ", height, "x", width, ".");
  return {.in = x.const_data_ptr(),
          .weight = taps.const_data_ptr<float>(),
          .bias = bias.const_data_ptr<float>(),
          .batch = x.size(0),
          .height = Int(height, "height"),
          .width = Int(width, "width"),
          .c = Int(x.size(2), "the number of channels"),
          .tanh = tanh,
          .type = ScalarOf(x.scalar_type())};
}

Tensor DwconvGelu(const Tensor& x_in, const Tensor& weight, const Tensor& bias_in, int64_t height,
                  int64_t width, bool tanh) {
  const c10::OptionalDeviceGuard guard(x_in.device());
  const Tensor x = Dense(x_in), taps = TapsFirst(weight), bias = F32(bias_in);
  DwconvParams params = ParamsOf(x, taps, bias, height, width, tanh);
  Tensor out = at::empty_like(x);
  params.out = out.mutable_data_ptr();
  if (out.numel() > 0) CheckLaunch(LaunchDwconvGelu(params, CurrentStream(x)), "dwconv_gelu");
  return out;
}

std::tuple<Tensor, Tensor, Tensor> DwconvGeluBackward(const Tensor& d_out_in, const Tensor& x_in,
                                                      const Tensor& weight, const Tensor& bias_in,
                                                      int64_t height, int64_t width, bool tanh) {
  const c10::OptionalDeviceGuard guard(x_in.device());
  const Tensor x = Dense(x_in), taps = TapsFirst(weight), bias = F32(bias_in);
  const Tensor d_out = Dense(d_out_in.to(x.scalar_type()));
  DwconvBackwardParams params = {.forward = ParamsOf(x, taps, bias, height, width, tanh)};
  const int64_t c = x.size(2);
  Tensor dx = at::empty_like(x), d_weight = at::empty({kTaps + 1, c}, Floats(x));
  if (x.numel() > 0) {
    const Tensor d_hidden = at::empty_like(x);
    const Tensor partial = at::empty({DwconvPartialCount(x.size(0), params.forward.height,
                                                         params.forward.width, params.forward.c)},
                                     Floats(x));
    params.d_out = d_out.const_data_ptr();
    params.d_hidden = d_hidden.mutable_data_ptr();
    params.d_in = dx.mutable_data_ptr();
    params.d_weight = d_weight.mutable_data_ptr<float>();
    params.partial = partial.mutable_data_ptr<float>();
    CheckLaunch(LaunchDwconvGeluBackward(params, CurrentStream(x)), "dwconv_gelu_backward");
  } else {
    d_weight.zero_();
  }
  return {dx, d_weight.narrow(0, 0, kTaps).t().reshape(weight.sizes()).to(weight.scalar_type()),
          d_weight[kTaps].to(bias_in.scalar_type())};
}

// ---- LayerNorm ----

LayerNormParams ParamsOf(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps,
                         at::ScalarType dtype) {
  const int64_t c = x.size(-1);
  TORCH_CHECK(c % kGroup == 0 && c <= kNormMostChannels && gamma.numel() == c && beta.numel() == c,
              "pyramid::layer_norm takes rows of up to ", kNormMostChannels,
              " channels, a multiple of ", kGroup, ", and their weights, not ", x.sizes(), " and ",
              gamma.sizes(), ".");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == dtype,
              "pyramid::layer_norm: rows of ", x.scalar_type(), " give ", x.scalar_type(), ", not ",
              dtype, ".");
  return {.in = x.const_data_ptr(),
          .gamma = gamma.const_data_ptr<float>(),
          .beta = beta.const_data_ptr<float>(),
          .rows = x.numel() / c,
          .c = Int(c, "the number of channels"),
          .eps = static_cast<float>(eps),
          .in_type = ScalarOf(x.scalar_type()),
          .out_type = ScalarOf(dtype)};
}

std::tuple<Tensor, Tensor, Tensor> LayerNormForward(const Tensor& x_in, const Tensor& weight,
                                                    const Tensor& bias, double eps,
                                                    at::ScalarType dtype) {
  const c10::OptionalDeviceGuard guard(x_in.device());
  const Tensor x = Dense(x_in), gamma = F32(weight), beta = F32(bias);
  LayerNormParams params = ParamsOf(x, gamma, beta, eps, dtype);
  Tensor out = at::empty(x.sizes(), x.options().dtype(dtype));
  Tensor mean = at::empty({params.rows}, Floats(x)), rstd = at::empty({params.rows}, Floats(x));
  params.out = out.mutable_data_ptr();
  params.mean = mean.mutable_data_ptr<float>();
  params.rstd = rstd.mutable_data_ptr<float>();
  if (params.rows > 0) CheckLaunch(LaunchLayerNorm(params, CurrentStream(x)), "layer_norm");
  return {out, mean, rstd};
}

Tensor LayerNorm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                 at::ScalarType dtype) {
  return std::get<0>(LayerNormForward(x, weight, bias, eps, dtype));
}

std::tuple<Tensor, Tensor, Tensor> LayerNormBackward(const Tensor& d_out_in, const Tensor& x_in,
                                                     const Tensor& weight, const Tensor& mean,
                                                     const Tensor& rstd, at::ScalarType dtype) {
  const c10::OptionalDeviceGuard guard(x_in.device());
  const Tensor x = Dense(x_in), gamma = F32(weight), d_out = Dense(d_out_in.to(dtype));
  LayerNormBackwardParams params = {.forward = ParamsOf(x, gamma, gamma, /*eps=*/0, dtype)};
  LayerNormParams& f = params.forward;
  Tensor dx = at::empty_like(x), both = at::empty({2, f.c}, Floats(x));
  if (f.rows > 0) {
    const Tensor partial = at::empty({LayerNormPartialCount(f.rows, f.c)}, Floats(x));
    f.mean = const_cast<float*>(mean.const_data_ptr<float>());
    f.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
    params.d_out = d_out.const_data_ptr();
    params.d_in = dx.mutable_data_ptr();
    params.d_gamma_beta = both.mutable_data_ptr<float>();
    params.partial = partial.mutable_data_ptr<float>();
    CheckLaunch(LaunchLayerNormBackward(params, CurrentStream(x)), "layer_norm_backward");
  } else {
    both.zero_();
  }
  return {dx, both[0].to(weight.scalar_type()), both[1].to(weight.scalar_type())};
}

// ---- Gradients ----

template <typename Signature>
auto Op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct AttentionGradient : torch::autograd::Function<AttentionGradient> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& q,
                        const Tensor& kv, int64_t heads, double scale) {
    static const auto op = Op<decltype(AttentionForward)>("pyramid::attention_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, softmax] = op.call(q, kv, heads, scale);
    context->save_for_backward({q, kv, out, softmax});
    context->saved_data["heads"] = heads;
    context->saved_data["scale"] = scale;
    return out;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    static const auto op = Op<decltype(AttentionBackward)>("pyramid::attention_backward");
    const auto saved = context->get_saved_variables();
    const auto [dq, dkv] =
        op.call(gradients[0], saved[0], saved[1], saved[2], saved[3],
                context->saved_data["heads"].toInt(), context->saved_data["scale"].toDouble());
    return {dq, dkv, Tensor(), Tensor()};
  }
};

struct DwconvGradient : torch::autograd::Function<DwconvGradient> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const Tensor& weight, const Tensor& bias, int64_t height, int64_t width,
                        bool tanh) {
    static const auto op = Op<decltype(DwconvGelu)>("pyramid::dwconv_gelu");
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight, bias});
    context->saved_data["height"] = height;
    context->saved_data["width"] = width;
    context->saved_data["tanh"] = tanh;
    return op.call(x, weight, bias, height, width, tanh);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    static const auto op = Op<decltype(DwconvGeluBackward)>("pyramid::dwconv_gelu_backward");
    const auto saved = context->get_saved_variables();
    const auto [dx, dw, db] =
        op.call(gradients[0], saved[0], saved[1], saved[2], context->saved_data["height"].toInt(),
                context->saved_data["width"].toInt(), context->saved_data["tanh"].toBool());
    return {dx, dw, db, Tensor(), Tensor(), Tensor()};
  }
};

struct LayerNormGradient : torch::autograd::Function<LayerNormGradient> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const Tensor& weight, const Tensor& bias, double eps,
                        at::ScalarType dtype) {
    static const auto op = Op<decltype(LayerNormForward)>("pyramid::layer_norm_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, mean, rstd] = op.call(x, weight, bias, eps, dtype);
    context->save_for_backward({x, weight, mean, rstd});
    context->saved_data["dtype"] = dtype;
    return out;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    static const auto op = Op<decltype(LayerNormBackward)>("pyramid::layer_norm_backward");
    const auto saved = context->get_saved_variables();
    const auto [dx, dw, db] = op.call(gradients[0], saved[0], saved[1], saved[2], saved[3],
                                      context->saved_data["dtype"].toScalarType());
    return {dx, dw, db, Tensor(), Tensor()};
  }
};

Tensor DifferentiableAttention(const Tensor& q, const Tensor& kv, int64_t heads, double scale) {
  return AttentionGradient::apply(q, kv, heads, scale);
}
Tensor DifferentiableDwconvGelu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                int64_t height, int64_t width, bool tanh) {
  return DwconvGradient::apply(x, weight, bias, height, width, tanh);
}
Tensor DifferentiableLayerNorm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                               double eps, at::ScalarType dtype) {
  return LayerNormGradient::apply(x, weight, bias, eps, dtype);
}

}  // namespace

void DefineOps(torch::Library& m) {
  m.def("attention(Tensor q, Tensor kv, int heads, float scale) -> Tensor");
  m.def("attention_forward(Tensor q, Tensor kv, int heads, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor d_out, Tensor q, Tensor kv, Tensor out, Tensor softmax, int "
      "heads, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "dwconv_gelu(Tensor x, Tensor weight, Tensor bias, int height, int width, bool tanh) -> "
      "Tensor");
  m.def(
      "dwconv_gelu_backward(Tensor d_out, Tensor x, Tensor weight, Tensor bias, int height, int "
      "width, bool tanh) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor");
  m.def(
      "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor d_out, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
      "ScalarType dtype) -> (Tensor, Tensor, Tensor)");
}

void ImplementOps(torch::Library& m) {
  m.impl("attention", TORCH_FN(Attention));
  m.impl("attention_forward", TORCH_FN(AttentionForward));
  m.impl("attention_backward", TORCH_FN(AttentionBackward));
  m.impl("dwconv_gelu", TORCH_FN(DwconvGelu));
  m.impl("dwconv_gelu_backward", TORCH_FN(DwconvGeluBackward));
  m.impl("layer_norm", TORCH_FN(LayerNorm));
  m.impl("layer_norm_forward", TORCH_FN(LayerNormForward));
  m.impl("layer_norm_backward", TORCH_FN(LayerNormBackward));
}

void ImplementGradients(torch::Library& m) {
  m.impl("attention", TORCH_FN(DifferentiableAttention));
  m.impl("dwconv_gelu", TORCH_FN(DifferentiableDwconvGelu));
  m.impl("layer_norm", TORCH_FN(DifferentiableLayerNorm));
}

}  // namespace pyramid::kernels::cuda
