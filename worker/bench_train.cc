#include "worker/bench_train.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/recipe.h"
#include "proto/base/status.h"
#include "worker/collective.h"
#include "worker/data/loader.h"
#include "worker/data/random.h"
#include "worker/signals.h"
#include "worker/trainer.h"

namespace pyramid {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The same noise in every batch.
std::unique_ptr<Loader> NoiseLoader(const Recipe& recipe, int classes, int rank, int world) {
  const int64_t count = recipe.batch_size;
  const int64_t floats = count * recipe.in_channels * recipe.image_resize * recipe.image_resize;
  auto pixels = std::make_shared<std::vector<float>>(floats);
  CounterRandom random(RandomStream::kAugment, 0, 0, rank);
  for (float& value : *pixels) value = static_cast<float>(random.Normal());
  BatchPlan plan{.indices = std::vector<int64_t>(count),
                 .first_in_batch = rank * count,
                 .step_pictures = count * world};
  return std::make_unique<Loader>([plan] { return plan; },
                                  [pixels, classes](const BatchPlan& p, Batch& batch) {
                                    batch.count = static_cast<int64_t>(p.indices.size());
                                    batch.pixels = *pixels;
                                    batch.labels.resize(batch.count);
                                    for (int64_t i = 0; i < batch.count; ++i)
                                      batch.labels[i] = (i * 7 + p.first_in_batch) % classes;
                                    return absl::OkStatus();
                                  },
                                  /*threads=*/1, /*queue=*/2);
}

}  // namespace

double PeakRssMb() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024;
}

absl::StatusOr<BenchResult> BenchTrain(const BenchOptions& options, const Placement& placement) {
  InstallSignals();
  const int world = placement.world;
  if (options.batch % world != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--batch is ", options.batch, "; use a multiple of --workers ", world));
  }
  PrepareProcess(std::max(1, (options.threads > 0 ? options.threads : ComputeThreads(1)) / world));
  std::vector<std::string> overrides = {absl::StrCat("model=", options.variant),
                                        absl::StrCat("batch_size=", options.batch / world),
                                        absl::StrCat("image_resize=", options.size),
                                        absl::StrCat("workers=", world),
                                        absl::StrCat("num_classes=", options.classes),
                                        absl::StrCat("mode=", options.mode),
                                        "drop_path_rate=0.1",
                                        "label_smoothing=0.1",
                                        "weight_decay=0.05"};
  if (options.dtype == "bf16") overrides.push_back("amp_level=O1");
  ASSIGN_OR_RETURN(const ParsedRecipe parsed, ParseRecipe("", overrides));
  const Recipe& recipe = parsed.recipe;
  Collective::Options join{.rank = placement.rank, .world = world, .prefix = "bench"};
  join.meeting_file = std::filesystem::temp_directory_path() /
                      absl::StrCat("pyramid-bench-", placement.meeting_key);
  ASSIGN_OR_RETURN(const std::unique_ptr<Collective> collective, Collective::Join(join));
  ASSIGN_OR_RETURN(const std::unique_ptr<Trainer> trainer,
                   Trainer::Create(recipe, NetworkOf(recipe, options.classes), "cpu", *collective));
  const std::unique_ptr<Loader> loader =
      NoiseLoader(recipe, options.classes, placement.rank, world);

  BenchResult result;
  double begin = 0;
  Wishes wishes;
  for (int64_t step = 0;; ++step) {
    if (step == 2) begin = Now();
    const double before = Now();
    wishes.stop = StopSignalled() || (step >= 4 && before - begin > options.seconds);
    ASSIGN_OR_RETURN(const StepReport report,
                     trainer->RunStep(*loader, step, 1e-3, wishes, /*measure_norm=*/false));
    if (step >= 2) result.step_seconds.push_back(Now() - before);
    if (report.agreed.stop) break;
  }
  std::vector<double> memory = {PeakRssMb()};
  RETURN_IF_ERROR(trainer->Sum(std::span<double>(memory)));
  result.peak_rss_mb = memory[0];
  result.path = trainer->path();
  return result;
}

}  // namespace pyramid
