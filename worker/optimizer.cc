#include "worker/optimizer.h"

#include <cmath>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace pyramid {
namespace {

constexpr double kBeta1 = 0.9;
constexpr double kBeta2 = 0.999;
constexpr double kEps = 1e-8;

}  // namespace

bool IsDecayed(absl::string_view parameter, absl::string_view filter) {
  const bool norm = absl::StrContains(parameter, "norm");
  const bool bias = absl::EndsWith(parameter, "bias");
  if (filter == "norm_and_bias") return !norm && !bias;
  if (filter == "auto") return !norm;
  return true;
}

AdamW::AdamW(const NamedTensors& parameters, double weight_decay,
             absl::string_view weight_decay_filter)
    : groups_(2) {
  groups_[0].weight_decay = weight_decay;
  for (const auto& [name, parameter] : parameters) {
    const torch::Tensor first =
        torch::zeros_like(parameter, torch::MemoryFormat::Preserve).detach();
    const torch::Tensor second =
        torch::zeros_like(parameter, torch::MemoryFormat::Preserve).detach();
    names_.push_back(name);
    parameters_.push_back(parameter);
    first_.push_back(first);
    second_.push_back(second);
    Group& group = groups_[IsDecayed(name, weight_decay_filter) ? 0 : 1];
    group.parameters.push_back(parameter);
    group.first.push_back(first);
    group.second.push_back(second);
  }
  steps_ = torch::zeros({}, torch::TensorOptions().dtype(torch::kFloat));
}

void AdamW::Step(double learning_rate) {
  const torch::NoGradGuard no_grad;
  steps_.add_(1);
  for (Group& group : groups_) {
    if (group.parameters.empty()) continue;
    group.gradients.clear();
    for (const torch::Tensor& parameter : group.parameters)
      group.gradients.push_back(parameter.grad());
    if (fused_.has_value()) {
      FusedAdamW(*fused_,
                 {.step = std::llround(steps_.item<float>()),
                  .learning_rate = learning_rate,
                  .weight_decay = group.weight_decay,
                  .beta1 = kBeta1,
                  .beta2 = kBeta2,
                  .eps = kEps},
                 group.parameters, group.gradients, group.first, group.second);
    } else {
      const std::vector<torch::Tensor> steps(group.parameters.size(), steps_);
      at::_fused_adamw_(group.parameters, group.gradients, group.first, group.second, {}, steps,
                        learning_rate, kBeta1, kBeta2, group.weight_decay, kEps, /*amsgrad=*/false,
                        /*maximize=*/false);
    }
    group.gradients.clear();
  }
}

void AdamW::DropGradients() {
  for (torch::Tensor& parameter : parameters_) parameter.mutable_grad() = torch::Tensor();
}

double AdamW::GradientNorm(double clip) {
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> gradients;
  for (const torch::Tensor& parameter : parameters_) gradients.push_back(parameter.grad());
  const double norm = torch::stack(at::_foreach_norm(gradients)).norm().item<double>();
  // 1e-6: as torch's clip_grad_norm_.
  if (clip > 0 && norm > clip) at::_foreach_mul_(gradients, clip / (norm + 1e-6));
  return norm;
}

NamedTensors AdamW::State() const {
  NamedTensors state;
  for (size_t i = 0; i < names_.size(); ++i)
    state.emplace_back(absl::StrCat("exp_avg.", names_[i]), first_[i]);
  for (size_t i = 0; i < names_.size(); ++i)
    state.emplace_back(absl::StrCat("exp_avg_sq.", names_[i]), second_[i]);
  return state;
}

absl::Status AdamW::LoadState(const NamedTensors& state, int64_t steps_done) {
  const torch::NoGradGuard no_grad;
  const std::map<std::string, torch::Tensor> given(state.begin(), state.end());
  std::vector<std::string> wrong;
  for (const auto& [name, mine] : State()) {
    const auto found = given.find(name);
    if (found == given.end() || found->second.sizes() != mine.sizes()) wrong.push_back(name);
  }
  if (!wrong.empty()) {
    if (wrong.size() > 5) wrong.resize(5);
    return absl::InvalidArgumentError(
        absl::StrCat("optimizer state: missing or misshapen: ", absl::StrJoin(wrong, ", ")));
  }
  for (auto& [name, mine] : State()) torch::Tensor(mine).copy_(given.at(name));
  steps_.fill_(static_cast<double>(steps_done));
  return absl::OkStatus();
}

}  // namespace pyramid
