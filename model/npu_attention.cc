#include "model/npu_attention.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/string_view.h"

namespace pyramid {
namespace {

using torch::Tensor;

// What torch_npu's documentation of the operator allows (Ascend/op-plugin, docs/context/
// torch_npu-npu_fusion_attention.md).
constexpr int64_t kMostPictures = 2'000'000;
constexpr int64_t kMostTokens = 1'000'000;
constexpr int64_t kMostHeads = 256;
constexpr int64_t kMostDepth = 768;

bool Takes(const Tensor& q, const Tensor& kv, int64_t heads) {
  const torch::ScalarType type = q.scalar_type();
  const auto within = [](int64_t value, int64_t most) { return value >= 1 && value <= most; };
  return (type == torch::kFloat32 || type == torch::kHalf || type == torch::kBFloat16) &&
         kv.scalar_type() == type && within(q.size(0), kMostPictures) &&
         within(q.size(1), kMostTokens) && within(kv.size(1), kMostTokens) &&
         within(heads, kMostHeads) && within(q.size(2) / heads, kMostDepth);
}

std::optional<c10::OperatorHandle> FindOperator() {
  const auto op = c10::Dispatcher::singleton().findSchema({"npu::npu_fusion_attention", ""});
  if (!op.has_value() || !op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) {
    return std::nullopt;
  }
  return op;
}

}  // namespace

std::optional<std::vector<c10::IValue>> NpuAttentionArguments(const c10::FunctionSchema& schema,
                                                              const Tensor& query,
                                                              const Tensor& key,
                                                              const Tensor& value, int64_t heads,
                                                              double scale) {
  using Argument = std::pair<absl::string_view, c10::IValue>;
  const std::array<Argument, 7> ours = {
      Argument("query", query),        Argument("key", key),
      Argument("value", value),        Argument("head_num", heads),
      Argument("input_layout", "BSH"), Argument("scale", scale),
      Argument("keep_prob", 1.0)};
  std::vector<c10::IValue> arguments;
  size_t found = 0;
  for (const c10::Argument& argument : schema.arguments()) {
    const auto same = [&](const Argument& one) { return one.first == argument.name().c_str(); };
    const auto* given = std::find_if(ours.begin(), ours.end(), same);
    if (given != ours.end()) {
      if (!given->second.type()->isSubtypeOf(*argument.type())) return std::nullopt;
      arguments.push_back(given->second);
      ++found;
    } else if (argument.default_value().has_value()) {
      arguments.push_back(*argument.default_value());
    } else {
      return std::nullopt;
    }
  }
  if (found != ours.size() || schema.returns().empty() ||
      schema.returns()[0].type()->kind() != c10::TypeKind::TensorType) {
    return std::nullopt;
  }
  return arguments;
}

bool HasNpuAttention() { return FindOperator().has_value(); }

std::optional<Tensor> NpuAttention(const Tensor& q, const Tensor& kv, int64_t heads, double scale) {
  const std::optional<c10::OperatorHandle> op = FindOperator();
  if (!op.has_value() || !Takes(q, kv, heads)) return std::nullopt;
  // The documentation promises nothing for strided inputs; copies of a few keys cost little.
  const int64_t channels = q.size(2);
  const Tensor key = kv.narrow(2, 0, channels).contiguous();           // [B, M, C]
  const Tensor value = kv.narrow(2, channels, channels).contiguous();  // [B, M, C]
  std::optional<std::vector<c10::IValue>> stack =
      NpuAttentionArguments(op->schema(), q.contiguous(), key, value, heads, scale);
  if (!stack.has_value()) return std::nullopt;
  // Boxed, so that arguments which other versions append don't matter.
  op->callBoxed(&*stack);
  return stack->front().toTensor();  // [B, N, C]
}

}  // namespace pyramid
