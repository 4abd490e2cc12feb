// pyramid-worker train: this process is one rank, or, where the recipe asks for several workers and
// nobody launched them, their launcher.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "model/device.h"
#include "proto/base/status.h"
#include "worker/commands.h"
#include "worker/failure.h"
#include "worker/local_launcher.h"
#include "worker/recipe_flags.h"
#include "worker/run_job.h"

namespace pyramid {
namespace {

struct TrainFlags {
  std::string job, folder, server_file, device;
  int64_t epoch = 0;
  int rank = 0;
  int world = 1;
  int threads = 0;
  int workers = 0;
};

// The coordinator's arguments, else the environment's.
absl::StatusOr<Placement> PlacementOf(const TrainFlags& flags) {
  if (flags.job.empty())
    return PlacementFrom([](const char* name) -> const char* { return std::getenv(name); });
  if (flags.world < 1 || flags.rank < 0 || flags.rank >= flags.world) {
    return absl::InvalidArgumentError(
        absl::StrCat("--rank is ", flags.rank, " but --world is ", flags.world));
  }
  if (flags.folder.empty() || flags.epoch < 1)
    return absl::InvalidArgumentError("--job needs --folder and --epoch");
  Placement placement{.source = "coordinator", .rank = flags.rank, .world = flags.world};
  placement.local_rank = flags.rank;
  placement.local_world = flags.world;
  return placement;
}

absl::StatusOr<JobOptions> JobFrom(const TrainFlags& flags, const RecipeFlags& recipe_flags,
                                   const Placement& placement) {
  std::vector<std::string> overrides;
  if (flags.workers > 0) overrides.push_back(absl::StrCat("workers=", flags.workers));
  if (!flags.device.empty()) {
    ASSIGN_OR_RETURN(const DeviceName name, ParseDevice(flags.device));
    overrides.push_back(absl::StrCat("device=", name.kind));
  }
  ASSIGN_OR_RETURN(ParsedRecipe parsed, recipe_flags.Parse(overrides));
  JobOptions job{.recipe = std::move(parsed.recipe),
                 .warnings = std::move(parsed.warnings),
                 .placement = placement};
  job.device = flags.device.empty() ? job.recipe.device : flags.device;
  job.job_id = flags.job;
  job.attempt_epoch = flags.epoch;
  job.server_file = flags.server_file;
  job.checkpoints = job.recipe.ckpt_save_dir;
  if (!flags.job.empty()) {
    const std::filesystem::path folder = flags.folder;
    job.checkpoints = folder / "checkpoints";
    job.attempt_folder = folder / "attempts" / absl::StrCat(flags.epoch);
  }
  return job;
}

}  // namespace

int TrainCommand(const Arguments& arguments) {
  CLI::App app(
      "Trains a network: one rank of a job. Launched by mpirun, srun or torchrun it finds its rank "
      "in the environment; alone it starts\n"
      "recipe.workers ranks itself. Going on from the newest checkpoint in ckpt_save_dir, if there "
      "is one.\n"
      "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 10 saved and stopped as asked.",
      "pyramid-worker train");
  RecipeFlags recipe_flags(app, {"device", "workers"});
  TrainFlags flags;
  app.add_option("--device", flags.device, "cpu, cuda:N or npu:N; default: the recipe's");
  app.add_option("--workers", flags.workers,
                 "Ranks to start on this machine; default: the recipe's")
      ->check(CLI::Range(1, 1024));
  app.add_option("--threads", flags.threads,
                 "Inside an operation; default: the machine's cores shared among the ranks")
      ->check(CLI::Range(1, 1024));
  const char* group = "Given by the coordinator";
  app.add_option("--job", flags.job, "Job id")->group(group);
  app.add_option("--epoch", flags.epoch, "Of the attempt")->group(group);
  app.add_option("--rank", flags.rank)->group(group);
  app.add_option("--world", flags.world)->group(group);
  app.add_option(BothSpellings("--server_file"), flags.server_file, "server.json")->group(group);
  app.add_option("--folder", flags.folder, "The job's")->group(group);
  int code = 0;
  if (!ParseOrExplain(app, arguments, code)) return code;

  const absl::StatusOr<Placement> placement = PlacementOf(flags);
  if (!placement.ok()) return Fail(placement.status());
  absl::StatusOr<JobOptions> job = JobFrom(flags, recipe_flags, *placement);
  if (!job.ok()) return Fail(job.status());

  if (placement->source == "none" && job->recipe.workers > 1) {
    if (const absl::StatusOr<DeviceName> device = OpenDevice(job->device); !device.ok())
      return Fail(device.status());
    std::fprintf(stderr, "pyramid-worker: no launcher found; starting %d ranks on this machine\n",
                 job->recipe.workers);
    const absl::StatusOr<int> result = LaunchLocally(
        [&] {
          Arguments copy = {"train"};
          copy.insert(copy.end(), arguments.begin(), arguments.end());
          return copy;
        }(),
        job->recipe.workers);
    return result.ok() ? *result : Fail(result.status());
  }
  if (placement->source == "none" && job->recipe.distribute) {
    job->warnings.push_back(
        "distribute is True but no launcher started this process and workers is 1: training with "
        "one rank");
  }
  if (placement->world != job->recipe.workers) {
    job->warnings.push_back(absl::StrCat("the launcher started ", placement->world,
                                         " ranks, the recipe says workers: ", job->recipe.workers,
                                         "; a step takes ",
                                         int64_t{job->recipe.batch_size} * placement->world *
                                             job->recipe.gradient_accumulation_steps,
                                         " pictures"));
    job->recipe.workers = placement->world;
  }
  job->threads = flags.threads > 0 ? flags.threads : ComputeThreads(placement->local_world);
  RunJob(*job);
}

}  // namespace pyramid
