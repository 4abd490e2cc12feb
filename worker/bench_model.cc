#include "worker/bench_model.h"

#include <torch/torch.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <system_error>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "model/classifier.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"
#include "model/tensors.h"
#include "proto/base/status.h"
#include "worker/data/random.h"
#include "worker/trainer.h"

namespace pyramid {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

absl::Status WriteFresh(const BenchOptions& options, const std::filesystem::path& folder) {
  ASSIGN_OR_RETURN(
      const ParsedRecipe parsed,
      ParseRecipe("", std::vector<std::string>{absl::StrCat("model=", options.variant),
                                               absl::StrCat("image_resize=", options.size)}));
  v1::Manifest manifest;
  *manifest.mutable_network() = NetworkOf(parsed.recipe, options.classes);
  *manifest.mutable_preprocessing() = EvalPreprocessingOf(parsed.recipe);
  manifest.set_origin("pyramid");
  ASSIGN_OR_RETURN(PvtV2 network, MakePvtV2(manifest.network()));
  network->Initialize(1);
  ASSIGN_OR_RETURN(const std::string weights, TensorsToSafetensors(StateOf(*network)));
  return WriteCheckpoint(folder, manifest, {{std::string(kWeightsFile), weights}}).status();
}

}  // namespace

absl::StatusOr<BenchResult> BenchModel(const BenchOptions& options) {
  PrepareProcess(options.threads > 0 ? options.threads : ComputeThreads(1));
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / absl::StrCat("pyramid-bench-model-", getpid());
  const absl::Cleanup remove = [&] {
    std::error_code ignored;
    std::filesystem::remove_all(folder, ignored);
  };
  RETURN_IF_ERROR(WriteFresh(options, folder));
  ASSIGN_OR_RETURN(const std::unique_ptr<Classifier> classifier,
                   LoadClassifier(folder, {.dtype = options.dtype,
                                           .threads = options.threads > 0 ? options.threads
                                                                          : ComputeThreads(1)}));
  std::vector<float> pixels(size_t{1} * options.batch * 3 * options.size * options.size);
  CounterRandom random(RandomStream::kAugment, 0, 0, 0);
  for (float& value : pixels) value = static_cast<float>(random.Normal());
  BenchResult result;
  double begin = Now();
  for (int call = 0; call < 5 || Now() - begin < options.seconds; ++call) {
    if (call == 2) begin = Now();
    const double before = Now();
    RETURN_IF_ERROR(
        classifier->Forward(pixels, options.batch, options.size, options.size).status());
    if (call >= 2) result.step_seconds.push_back(Now() - before);
  }
  result.peak_rss_mb = PeakRssMb();
  return result;
}

}  // namespace pyramid
