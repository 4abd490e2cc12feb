#include "worker/bench_model.h"

#include <torch/torch.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <filesystem>
#include <system_error>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "model/checkpoint.h"
#include "model/classifier.h"
#include "model/packed_network.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"
#include "model/tensors.h"
#include "model/variants.h"
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

// Each part's time, its work and the rate, beside what the machine does at most.
absl::StatusOr<std::string> ProfileTable(Classifier& classifier, std::span<const float> pixels,
                                         const BenchOptions& options) {
  constexpr int kCalls = 20;
  ForwardProfile profile;
  for (int call = 0; call < kCalls; ++call) {
    RETURN_IF_ERROR(
        classifier.Profile(pixels, options.batch, options.size, options.size, &profile));
  }
  const std::array<double, 4 * ForwardProfile::kParts> work =
      ForwardWork(*FindVariant(options.variant), options.size, options.size, options.classes);
  double sum = 0;
  for (const double seconds : profile.seconds) sum += seconds;
  std::string table = absl::StrFormat("%-8s %-12s %10s %7s %10s\n", "stage", "part", "us/image",
                                      "share", "GFLOP/s");
  for (int i = 0; i < 4 * ForwardProfile::kParts; ++i) {
    const double seconds = profile.seconds[i] / (kCalls * options.batch);
    if (seconds == 0) continue;
    absl::StrAppendFormat(&table, "%-8d %-12s %10.1f %6.1f%% %10s\n",
                          i / ForwardProfile::kParts + 1,
                          ForwardProfile::Name(i % ForwardProfile::kParts), seconds * 1e6,
                          100 * profile.seconds[i] / sum,
                          work[i] > 0 ? absl::StrFormat("%.0f", work[i] / seconds / 1e9) : "");
  }
  absl::StrAppendFormat(&table, "thread time %.1f us/image; GFLOP/s are a thread's\n",
                        sum / (kCalls * options.batch) * 1e6);
  return table;
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
                   LoadClassifier(folder, {.plain = options.mode == "F",
                                           .dtype = options.dtype,
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
  result.path = classifier->path();
  if (options.profile) {
    ASSIGN_OR_RETURN(result.profile, ProfileTable(*classifier, pixels, options));
  }
  return result;
}

}  // namespace pyramid
