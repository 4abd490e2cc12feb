#include "worker/start.h"

#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/checkpoint.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

std::string FactOf(const Weights& weights, absl::string_view name) {
  for (const auto& [key, value] : weights.facts()) {
    if (absl::string_view(key) == name) return value;
  }
  return "?";
}

bool SameNumerics(const v1::Numerics& a, const v1::Numerics& b) {
  return google::protobuf::util::MessageDifferencer::Equals(a, b);
}

// The weights as the network needs them, and in words what had to change.
struct Fitted {
  std::unique_ptr<Weights> weights;
  std::vector<std::string> changes;
};

// Opened as they are first, to see what they are; once more where they have to change.
absl::StatusOr<Fitted> OpenFitting(const fs::path& path, int classes, int channels) {
  absl::StatusOr<std::unique_ptr<Weights>> own = OpenWeights(path);
  // A backbone without a classifier opens with a new one only.
  if (!own.ok() && !absl::IsInvalidArgument(own.status())) return own.status();
  Fitted fitted;
  WeightOptions options;
  if (!own.ok() || (*own)->manifest().network().num_classes() != classes) {
    options.head = "new";
    options.num_classes = classes;
    fitted.changes.push_back(absl::StrCat(
        "head new: ", own.ok() ? absl::StrCat((*own)->manifest().network().num_classes()) : "none",
        " → ", classes, " classes"));
  }
  if (own.ok() && (*own)->manifest().network().in_channels() != channels) {
    fitted.changes.push_back(
        absl::StrCat("first convolution adapted: ", (*own)->manifest().network().in_channels(),
                     " → ", channels, " channels"));
  }
  if (own.ok() && fitted.changes.empty()) {
    fitted.weights = *std::move(own);
    return fitted;
  }
  options.in_channels = channels;
  absl::StatusOr<std::unique_ptr<Weights>> changed = OpenWeights(path, options);
  if (!changed.ok()) return own.ok() ? changed.status() : own.status();
  fitted.weights = *std::move(changed);
  return fitted;
}

std::string StartLine(const fs::path& path, const Fitted& fitted) {
  const Weights& weights = *fitted.weights;
  const auto fresh =
      std::count_if(weights.parameters().begin(), weights.parameters().end(),
                    [](const WeightParameter& parameter) { return parameter.fresh; });
  std::vector<std::string> parts = {
      absl::StrCat(static_cast<int64_t>(weights.parameters().size()) - fresh, " tensors loaded")};
  parts.insert(parts.end(), fitted.changes.begin(), fitted.changes.end());
  return absl::StrCat("Starting from ", path.string(), " (", FactOf(weights, "format"), ", ",
                      FactOf(weights, "naming"), " naming, origin ", weights.manifest().origin(),
                      "): ", absl::StrJoin(parts, ", "));
}

// MindCV's users take the .ckpt home, where the network computes as MindCV does.
void WarnOfFormat(const Recipe& recipe, Start& start) {
  const v1::Numerics home = NumericsOf("mindcv");
  if (recipe.ckpt_format != "mindspore" || SameNumerics(start.network.numerics(), home)) return;
  start.lines.push_back(absl::StrCat(
      "WARNING: ckpt_format is mindspore, but this network computes with ",
      DescribeNumerics(start.network.numerics()), ", MindCV with ", DescribeNumerics(home),
      ": the .ckpt files answer differently there. Weights trained with compat: mindcv don't"));
}

}  // namespace

bool StartsFromWeights(const Recipe& recipe) {
  return recipe.pretrained || !recipe.ckpt_path.empty();
}

absl::StatusOr<Start> OpenStart(const Recipe& recipe, int classes) {
  Start start;
  start.path = recipe.ckpt_path;
  if (recipe.pretrained) {
    ASSIGN_OR_RETURN(start.path, FindPretrained(recipe.model, recipe.compat));
  }
  const std::string key = recipe.pretrained ? "recipe.pretrained" : "recipe.ckpt_path";
  std::error_code error;
  if (recipe.resume_opt && !fs::is_directory(start.path, error) && fs::exists(start.path, error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("recipe.resume_opt is True but ckpt_path ", start.path.string(),
                     " is a file, without the optimizer's state; name a checkpoint's folder"));
  }
  absl::StatusOr<Fitted> fitted = OpenFitting(start.path, classes, recipe.in_channels);
  if (!fitted.ok()) return Annotate(fitted.status(), key);
  const v1::Manifest& manifest = fitted->weights->manifest();
  if (manifest.network().variant() != recipe.model) {
    return absl::InvalidArgumentError(absl::StrCat(
        key, " ", start.path.string(), " is a ", manifest.network().variant(),
        ", this job trains a ", recipe.model, "; set model: ", manifest.network().variant()));
  }
  start.network = manifest.network();
  start.origin = manifest.origin();
  start.lines.push_back(StartLine(start.path, *fitted));
  const std::string compat = CompatOf(manifest.origin(), manifest.network().numerics());
  if (compat != recipe.compat) {
    // timm is the default, mindcv someone's wish.
    start.lines.push_back(
        absl::StrCat(recipe.compat == "timm" ? "" : "WARNING: ", "compat is ", recipe.compat,
                     ", but the weights go by ", compat, "'s conventions (",
                     DescribeNumerics(manifest.network().numerics()), "); the weights win"));
  }
  WarnOfFormat(recipe, start);
  start.weights = std::move(fitted->weights);
  return start;
}

absl::StatusOr<Start> FindStart(const Recipe& recipe, int classes, const fs::path& checkpoints) {
  Start start;
  start.network = NetworkOf(recipe, classes);
  if (StartsFromWeights(recipe)) {
    std::vector<fs::path> newest_first = ListCheckpoints(checkpoints);
    std::reverse(newest_first.begin(), newest_first.end());
    const auto found = [&]() -> absl::StatusOr<v1::Manifest> {
      for (const fs::path& checkpoint : newest_first) {
        absl::StatusOr<v1::Manifest> manifest = ReadManifest(checkpoint);
        if (manifest.ok()) return manifest;
      }
      return absl::NotFoundError("no checkpoint of this run");
    }();
    if (!found.ok()) return OpenStart(recipe, classes);
    *start.network.mutable_numerics() = found->network().numerics();
    start.origin = found->origin();
  }
  WarnOfFormat(recipe, start);
  return start;
}

}  // namespace pyramid
