#include "model/tensors.h"

#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "model/exception_guard.h"
#include "model/formats/safetensors.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr std::pair<torch::ScalarType, absl::string_view> kDtypes[] = {
    {torch::kFloat32, "F32"},   {torch::kFloat64, "F64"}, {torch::kFloat16, "F16"},
    {torch::kBFloat16, "BF16"}, {torch::kInt64, "I64"},   {torch::kInt32, "I32"},
    {torch::kUInt8, "U8"},      {torch::kBool, "BOOL"},
};

// Empty: not one of ours.
absl::string_view DtypeName(torch::ScalarType type) {
  for (const auto& [dtype, name] : kDtypes) {
    if (dtype == type) return name;
  }
  return {};
}

std::string ShapeText(torch::IntArrayRef shape) {
  return absl::StrCat("[", absl::StrJoin(shape.begin(), shape.end(), ", "), "]");
}

// "3 missing (a, b, c)"; at most eight names, and how many more there are.
void AppendList(absl::string_view what, const std::vector<std::string>& names,
                std::vector<std::string>& parts) {
  if (names.empty()) return;
  constexpr size_t kShown = 8;
  const size_t shown = std::min(names.size(), kShown);
  std::string text = absl::StrCat(names.size(), " ", what, " (",
                                  absl::StrJoin(names.begin(), names.begin() + shown, ", "));
  if (names.size() > shown) absl::StrAppend(&text, " and ", names.size() - shown, " more");
  parts.push_back(text + ")");
}

// InvalidArgument unless `given` has each tensor of `state` once, of its shape, and nothing else.
absl::Status CheckFits(const NamedTensors& state,
                       const std::vector<std::pair<absl::string_view, torch::IntArrayRef>>& given) {
  std::map<absl::string_view, torch::IntArrayRef> shapes;
  std::vector<std::string> missing, unused, misshapen, twice;
  for (const auto& [name, shape] : given) {
    if (!shapes.emplace(name, shape).second) twice.emplace_back(name);
  }
  std::set<absl::string_view> known;
  for (const auto& [name, target] : state) {
    known.insert(name);
    const auto found = shapes.find(name);
    if (found == shapes.end()) {
      missing.push_back(name);
    } else if (found->second != target.sizes()) {
      misshapen.push_back(absl::StrCat(name, " is ", ShapeText(found->second), ", not ",
                                       ShapeText(target.sizes())));
    }
  }
  for (const auto& [name, shape] : given) {
    if (known.count(name) == 0) unused.emplace_back(name);
  }
  std::vector<std::string> parts;
  AppendList("missing", missing, parts);
  AppendList("unused", unused, parts);
  AppendList("misshapen", misshapen, parts);
  AppendList("twice", twice, parts);
  if (parts.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("these tensors don't fit the network: ", absl::StrJoin(parts, "; ")));
}

}  // namespace

absl::StatusOr<std::string> TensorsToSafetensors(
    const NamedTensors& tensors, const std::map<std::string, std::string>& metadata) {
  return Guard(
      "writing tensors", absl::StatusCode::kInternal, [&]() -> absl::StatusOr<std::string> {
        std::vector<torch::Tensor> kept;  // own the bytes until they are written
        std::vector<TensorBytes> bytes;
        for (const auto& [name, tensor] : tensors) {
          const absl::string_view dtype = DtypeName(tensor.scalar_type());
          if (dtype.empty()) {
            return absl::InvalidArgumentError(
                absl::StrCat("tensor ", name, " is of type ", c10::toString(tensor.scalar_type()),
                             ", which isn't written; use f32 f64 f16 bf16 i64 i32 u8 or bool"));
          }
          kept.push_back(tensor.detach().to(torch::kCPU).contiguous());
          bytes.push_back(
              {.name = name,
               .dtype = std::string(dtype),
               .shape = tensor.sizes().vec(),
               .data = absl::string_view(static_cast<const char*>(kept.back().const_data_ptr()),
                                         kept.back().nbytes())});
        }
        return SerializeSafetensors(bytes, metadata);
      });
}

absl::StatusOr<NamedTensors> TensorsFromSafetensors(absl::string_view file) {
  ASSIGN_OR_RETURN(const SafetensorsView view, ParseSafetensors(file));
  return Guard(
      "reading tensors", absl::StatusCode::kDataLoss, [&]() -> absl::StatusOr<NamedTensors> {
        NamedTensors tensors;
        for (const TensorBytes& bytes : view.tensors) {
          const auto* dtype =
              std::find_if(std::begin(kDtypes), std::end(kDtypes),
                           [&](const auto& known) { return known.second == bytes.dtype; });
          if (dtype == std::end(kDtypes)) {
            return absl::DataLossError(
                absl::StrCat("tensor ", bytes.name, " is of type ", bytes.dtype,
                             ", which isn't read; use F32 F64 F16 BF16 I64 I32 U8 or BOOL"));
          }
          torch::Tensor tensor = torch::empty(bytes.shape, dtype->first);
          if (tensor.nbytes() != bytes.data.size()) {
            return absl::DataLossError(
                absl::StrCat("tensor ", bytes.name, " has ", bytes.data.size(),
                             " bytes; its shape asks for ", tensor.nbytes()));
          }
          if (!bytes.data.empty())
            std::memcpy(tensor.data_ptr(), bytes.data.data(), bytes.data.size());
          tensors.emplace_back(bytes.name, std::move(tensor));
        }
        return tensors;
      });
}

NamedTensors StateOf(const torch::nn::Module& module) {
  NamedTensors state;
  for (const auto& item : module.named_parameters()) state.emplace_back(item.key(), item.value());
  for (const auto& item : module.named_buffers()) state.emplace_back(item.key(), item.value());
  return state;
}

absl::Status LoadState(torch::nn::Module& module, const NamedTensors& tensors) {
  const NamedTensors state = StateOf(module);
  std::vector<std::pair<absl::string_view, torch::IntArrayRef>> shapes;
  std::map<absl::string_view, const torch::Tensor*> given;
  for (const auto& [name, tensor] : tensors) {
    shapes.emplace_back(name, tensor.sizes());
    given.emplace(name, &tensor);
  }
  RETURN_IF_ERROR(CheckFits(state, shapes));
  return Guard("loading tensors", absl::StatusCode::kInternal, [&] {
    torch::NoGradGuard no_grad;
    for (auto [name, target] : state) target.copy_(*given.at(name));
    return absl::OkStatus();
  });
}

absl::Status LoadWeightsInto(torch::nn::Module& module, const Weights& weights) {
  const NamedTensors state = StateOf(module);
  std::vector<std::pair<absl::string_view, torch::IntArrayRef>> shapes;
  std::map<absl::string_view, const WeightParameter*> given;
  for (const WeightParameter& parameter : weights.parameters()) {
    shapes.emplace_back(parameter.name, parameter.shape);
    given.emplace(parameter.name, &parameter);
  }
  RETURN_IF_ERROR(CheckFits(state, shapes));
  return Guard("loading weights", absl::StatusCode::kInternal, [&]() -> absl::Status {
    torch::NoGradGuard no_grad;
    for (auto [name, target] : state) {
      const WeightParameter& parameter = *given.at(name);
      if (parameter.fresh) continue;
      const bool direct = target.device().is_cpu() && target.is_contiguous() &&
                          target.scalar_type() == torch::kFloat32;
      torch::Tensor values = direct ? target : torch::empty(target.sizes(), torch::kFloat32);
      RETURN_IF_ERROR(weights.Read(
          parameter, {values.mutable_data_ptr<float>(), static_cast<size_t>(values.numel())}));
      if (!direct) target.copy_(values);
    }
    return absl::OkStatus();
  });
}

}  // namespace pyramid
