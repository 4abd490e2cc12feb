// torch_npu's fused attention (npu::npu_fusion_attention), found by name in LibTorch's dispatcher:
// nothing of torch_npu is needed to compile or to run. Differentiable: the operator brings its
// gradient along.
//
// Never run on a real NPU. tests/testing/fake_npu.h stands for one, with the operators' schemas as
// torch_npu 2.11.0's library has them (tests/peers/npu_schema.py compares).
#ifndef PYRAMID_MODEL_NPU_ATTENTION_H_
#define PYRAMID_MODEL_NPU_ATTENTION_H_

#include <ATen/core/function_schema.h>
#include <torch/torch.h>

#include <optional>
#include <vector>

namespace pyramid {

// softmax(q·kᵀ·scale)·v per head, without dropout and mask. Tensors as DeviceAttention's. Nothing
// where the operator isn't registered, is another one than this code knows, or doesn't take the
// type (f32, f16 and bf16) or the sizes (any of PVT v2's).
std::optional<torch::Tensor> NpuAttention(const torch::Tensor& q, const torch::Tensor& kv,
                                          int64_t heads, double scale);

// Whether the operator is registered.
bool HasNpuAttention();

// The arguments of a call in `schema`'s order, which differs between versions of torch_npu: query
// [B, N, C], key and value [B, M, C] as layout "BSH", all kept, everything else by its default.
// Nothing if `schema` has not all of these or wants more than these.
std::optional<std::vector<c10::IValue>> NpuAttentionArguments(const c10::FunctionSchema& schema,
                                                              const torch::Tensor& query,
                                                              const torch::Tensor& key,
                                                              const torch::Tensor& value,
                                                              int64_t heads, double scale);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_NPU_ATTENTION_H_
