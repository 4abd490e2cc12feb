// Fused operations that a device plug-in brings along (libpyramid_cuda.so; of torch_npu the
// attention, npu_attention.h), found by name in LibTorch's dispatcher, so that the network needs
// nothing of the plug-in to compile or to run.
//
// Each gives nothing where no plug-in has it for the tensors' device, or the shapes or types are
// none it takes: the caller computes in the plain way. Differentiable.
#ifndef PYRAMID_MODEL_DEVICE_OPS_H_
#define PYRAMID_MODEL_DEVICE_OPS_H_

#include <torch/torch.h>

#include <optional>

namespace pyramid {

// softmax(q·kᵀ·scale)·v per head. q [B, N, C]; kv [B, M, 2C], keys of all heads, then values of all
// heads → [B, N, C]. CUDA takes M up to 256 and C / heads 32 or 64.
std::optional<torch::Tensor> DeviceAttention(const torch::Tensor& q, const torch::Tensor& kv,
                                             int64_t heads, double scale);

// gelu(depthwise 3x3 convolution of x + bias). x [B, H·W, C], weight [C, 1, 3, 3] → [B, H·W, C].
std::optional<torch::Tensor> DeviceDwconvGelu(const torch::Tensor& x, const torch::Tensor& weight,
                                              const torch::Tensor& bias, int64_t height,
                                              int64_t width, bool tanh);

// x [..., C] → the same in x's type, or under autocast, which asks for f32 in vain here, in
// autocast's type: a matrix multiply follows.
std::optional<torch::Tensor> DeviceLayerNorm(const torch::Tensor& x, const torch::Tensor& weight,
                                             const torch::Tensor& bias, double eps);

// Whether a plug-in has brought any of these for `device`.
bool HasDeviceOps(const torch::Device& device);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_DEVICE_OPS_H_
