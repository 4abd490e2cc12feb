#include "model/device_ops.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "model/npu_attention.h"

namespace pyramid {
namespace {

using torch::Tensor;

constexpr int64_t kMostKeys = 256;
constexpr int64_t kMostNormChannels = 1024;

// The operator `name`, if it has a kernel for `device`. A plug-in is loaded before the first tensor
// of its device, so what isn't there then stays away.
template <typename Signature>
std::optional<c10::TypedOperatorHandle<Signature>> Find(const char* name,
                                                        const torch::Device& device) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  const c10::DispatchKey key = device.is_cuda()  ? c10::DispatchKey::CUDA
                               : device.is_cpu() ? c10::DispatchKey::CPU
                                                 : c10::DispatchKey::PrivateUse1;
  if (!op.has_value() || !op->hasKernelForDispatchKey(key)) return std::nullopt;
  return op->typed<Signature>();
}

bool Takes(torch::ScalarType type) {
  return type == torch::kFloat32 || type == torch::kHalf || type == torch::kBFloat16;
}

}  // namespace

std::optional<Tensor> DeviceAttention(const Tensor& q, const Tensor& kv, int64_t heads,
                                      double scale) {
  if (q.device().is_privateuseone()) return NpuAttention(q, kv, heads, scale);
  const int64_t depth = q.size(2) / heads;
  if ((depth != 32 && depth != 64) || kv.size(1) > kMostKeys || !Takes(q.scalar_type()) ||
      kv.scalar_type() != q.scalar_type()) {
    return std::nullopt;
  }
  const auto op =
      Find<Tensor(const Tensor&, const Tensor&, int64_t, double)>("pyramid::attention", q.device());
  if (!op.has_value()) return std::nullopt;
  return op->call(q, kv, heads, scale);
}

std::optional<Tensor> DeviceDwconvGelu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                       int64_t height, int64_t width, bool tanh) {
  if (x.size(2) % 4 != 0 || !Takes(x.scalar_type())) return std::nullopt;
  const auto op = Find<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool)>(
      "pyramid::dwconv_gelu", x.device());
  if (!op.has_value()) return std::nullopt;
  return op->call(x, weight, bias, height, width, tanh);
}

std::optional<Tensor> DeviceLayerNorm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                      double eps) {
  torch::ScalarType dtype = x.scalar_type();
  const c10::DeviceType device = x.device().type();
  if (dtype == torch::kFloat32 && at::autocast::is_autocast_enabled(device)) {
    dtype = at::autocast::get_autocast_dtype(device);
  }
  if (x.size(-1) % 4 != 0 || x.size(-1) > kMostNormChannels || !Takes(dtype)) return std::nullopt;
  const auto op =
      Find<Tensor(const Tensor&, const Tensor&, const Tensor&, double, torch::ScalarType)>(
          "pyramid::layer_norm", x.device());
  if (!op.has_value()) return std::nullopt;
  return op->call(x, weight, bias, eps, dtype);
}

bool HasDeviceOps(const torch::Device& device) {
  if (device.is_privateuseone()) return HasNpuAttention();
  return Find<Tensor(const Tensor&, const Tensor&, int64_t, double)>("pyramid::attention", device)
      .has_value();
}

}  // namespace pyramid
