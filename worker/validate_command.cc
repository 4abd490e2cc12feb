// pyramid-worker validate: scores a checkpoint on a recipe's validation split, offline.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "model/classifier.h"
#include "model/weights.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "worker/commands.h"
#include "worker/evaluate.h"
#include "worker/placement.h"
#include "worker/recipe_flags.h"

namespace pyramid {
namespace {

struct ValidateFlags {
  std::string device;
  std::string dtype = "fp32";
  int threads = 0;
  WeightOptions weights;
  std::string pixels = "weights";
  std::string predictions;
  bool json = false;
};

// The network's first answer for each picture of a batch, a line each, as `index,label,prediction,
// probability`.
void AddPredictions(const Batch& batch, std::span<const float> logits, std::string& table) {
  const size_t classes = logits.size() / batch.labels.size();
  for (size_t i = 0; i < batch.labels.size(); ++i) {
    const std::span<const float> row = logits.subspan(i * classes, classes);
    const auto first = std::max_element(row.begin(), row.end());
    double sum = 0;
    for (const float logit : row) sum += std::exp(static_cast<double>(logit) - *first);
    absl::StrAppendFormat(&table, "%d,%d,%d,%.6f\n", batch.pictures[i], batch.labels[i],
                          first - row.begin(), 1 / sum);
  }
}

absl::Status Validate(const Recipe& recipe, const ValidateFlags& flags) {
  std::filesystem::path path = recipe.ckpt_path;
  if (recipe.pretrained) {
    ASSIGN_OR_RETURN(path, FindPretrained(recipe.model, recipe.compat));
  } else if (path.empty()) {
    return absl::InvalidArgumentError(
        "--ckpt_path is missing; use the folder of a checkpoint or a file of weights");
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> data,
                   OpenDataset(recipe.dataset, recipe.data_dir, recipe.val_split));
  ClassifierOptions options{.device = flags.device.empty() ? recipe.device : flags.device,
                            .dtype = flags.dtype};
  options.weights = flags.weights;
  options.threads = flags.threads > 0 ? flags.threads : ComputeThreads(1);
  ASSIGN_OR_RETURN(const std::unique_ptr<Classifier> classifier, LoadClassifier(path, options));
  const v1::Manifest& manifest = classifier->manifest();
  const bool by_recipe = flags.pixels == "recipe";
  const v1::Preprocessing preparation =
      by_recipe ? EvalPreprocessingOf(recipe) : manifest.preprocessing();
  if (preparation.channels() != manifest.network().in_channels()) {
    return absl::InvalidArgumentError(absl::StrCat("recipe.in_channels is ", preparation.channels(),
                                                   ", the weights take ",
                                                   manifest.network().in_channels()));
  }
  const int classes = manifest.network().num_classes();
  RETURN_IF_ERROR(CheckLabels(*data, classes));

  BadPictures bad(data->size());
  const std::unique_ptr<Loader> loader = MakeEvalLoader(*data,
                                                        {.preprocessing = preparation,
                                                         .batch = recipe.batch_size,
                                                         .end = data->size(),
                                                         .threads = LoaderThreads(recipe, 1)},
                                                        bad);
  std::fprintf(stderr, "Model: %s, origin %s, %s\nPictures: %s, as %s says\n",
               manifest.network().variant().c_str(), manifest.origin().c_str(),
               DescribeNumerics(manifest.network().numerics()).c_str(),
               DescribePreprocessing(preparation).c_str(),
               by_recipe ? "the recipe" : "what comes with the weights");
  std::fprintf(stderr, "Num batches: %ld\nStart validating...\n",
               static_cast<long>((data->size() + recipe.batch_size - 1) / recipe.batch_size));
  const absl::Time begin = absl::Now();
  std::string predictions = "index,label,prediction,probability\n";
  const int side = preparation.crop();
  const auto answer = [&](const Batch& batch) -> absl::StatusOr<std::vector<float>> {
    ASSIGN_OR_RETURN(std::vector<float> logits,
                     classifier->Forward(batch.pixels, static_cast<int>(batch.count), side, side));
    if (!flags.predictions.empty()) AddPredictions(batch, logits, predictions);
    return logits;
  };
  ASSIGN_OR_RETURN(const EvalCounts counts, Evaluate(*loader, recipe.label_smoothing, answer,
                                                     [](int64_t) { return false; }));
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  if (!flags.predictions.empty()) RETURN_IF_ERROR(WriteFileSynced(flags.predictions, predictions));
  if (flags.json) {
    nlohmann::json json = {{"top1", counts.Top1()},       {"loss", counts.Loss()},
                           {"images", counts.images},     {"correct", counts.top1},
                           {"bad_pictures", bad.count()}, {"seconds", seconds},
                           {"digest", manifest.digest()}};
    if (classes >= 5) json["top5"] = counts.Top5();
    std::printf("%s\n", json.dump().c_str());
    return absl::OkStatus();
  }
  std::printf("%ld of %ld right, %.1f images/s, %ld bad pictures\n", static_cast<long>(counts.top1),
              static_cast<long>(counts.images), static_cast<double>(counts.images) / seconds,
              static_cast<long>(bad.count()));
  const std::string top5 =
      classes >= 5 ? absl::StrCat(", 'Top_5_Accuracy': ", absl::StrFormat("%.17g", counts.Top5()))
                   : "";
  std::printf("{'Top_1_Accuracy': %.17g%s, 'loss': %.17g}\n", counts.Top1(), top5.c_str(),
              counts.Loss());
  return absl::OkStatus();
}

}  // namespace

int ValidateCommand(const Arguments& arguments) {
  CLI::App app(
      "Scores a checkpoint, or a file of weights (safetensors, PyTorch's .pth, MindSpore's .ckpt), "
      "on a recipe's validation split.",
      "pyramid-worker validate");
  RecipeFlags recipe_flags(app, {"device", "ckpt_path", "ema"});
  ValidateFlags flags;
  std::string checkpoint;
  app.add_option("--ckpt_path,--ckpt-path,--ckpt", checkpoint,
                 "A checkpoint's folder, or a file of weights");
  app.add_option("--origin", flags.weights.origin,
                 "Whose weights they are; default: by the names in the file")
      ->check(CLI::IsMember({"official", "timm", "transformers", "mindcv", "pyramid"}));
  app.add_flag("--ema", flags.weights.ema, "Take the averaged weights");
  app.add_option("--pixels", flags.pixels,
                 "How pictures are prepared: as what comes with the weights says (default), or the "
                 "recipe")
      ->check(CLI::IsMember({"weights", "recipe"}));
  app.add_option(
         "--predictions", flags.predictions,
         "Write each picture's first answer to this file: index,label,prediction,probability")
      ->type_name("FILE.csv");
  app.add_option("--device", flags.device, "cpu, cuda:N or npu:N; default: the recipe's");
  app.add_option("--dtype", flags.dtype, "fp32 or bf16");
  app.add_option("--threads", flags.threads, "Inside an operation")->check(CLI::Range(1, 1024));
  app.add_flag("--json", flags.json, "One JSON object on standard output");
  int code = 0;
  if (!ParseOrExplain(app, arguments, code)) return code;
  std::vector<std::string> overrides;
  if (!checkpoint.empty())
    overrides.push_back(absl::StrCat("ckpt_path=", nlohmann::json(checkpoint).dump()));
  const absl::StatusOr<ParsedRecipe> parsed = recipe_flags.Parse(overrides);
  if (!parsed.ok()) return Fail(parsed.status());
  const absl::Status status = Validate(parsed->recipe, flags);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace pyramid
