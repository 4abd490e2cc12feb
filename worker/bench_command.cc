// pyramid-worker bench: images per second of the network alone, or of whole training steps.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "model/classifier.h"
#include "model/kernels/probe.h"
#include "model/recipe.h"
#include "proto/base/status.h"
#include "worker/bench_model.h"
#include "worker/bench_train.h"
#include "worker/commands.h"
#include "worker/failure.h"
#include "worker/local_launcher.h"
#include "worker/placement.h"
#include "worker/recipe_flags.h"

namespace pyramid {
namespace {

void Print(const char* what, const BenchOptions& options, const BenchResult& result) {
  std::vector<double> sorted = result.step_seconds;
  std::sort(sorted.begin(), sorted.end());
  const double median = sorted[sorted.size() / 2];
  const double rate = options.batch / median;
  const int threads = options.threads > 0 ? options.threads : ComputeThreads(1);
  const nlohmann::json json = {{"bench", what},
                               {"variant", options.variant},
                               {"batch", options.batch},
                               {"size", options.size},
                               {"dtype", options.dtype},
                               {"threads", threads},
                               {"classes", options.classes},
                               {"workers", options.workers},
                               {"images_per_second", std::round(rate * 100) / 100},
                               {"calls", sorted.size()},
                               {"peak_rss_mb", std::round(result.peak_rss_mb)},
                               {"path", result.path}};
  if (!options.json) {
    std::printf(
        "%s %s, batch %d, %dx%d, %s, %d worker(s), %d thread(s), %s: %.1f images/s (median of "
        "%zu), %.0f MB\n%s",
        what, options.variant.c_str(), options.batch, options.size, options.size,
        options.dtype.c_str(), options.workers, threads, result.path.c_str(), rate, sorted.size(),
        result.peak_rss_mb, result.profile.c_str());
    return;
  }
  std::printf("%s\n", json.dump().c_str());
}

absl::Status RunModel(const BenchOptions& options) {
  ASSIGN_OR_RETURN(const BenchResult result, BenchModel(options));
  Print("model", options, result);
  return absl::OkStatus();
}

int PrintProbe(const BenchOptions& options) {
  const int threads = options.threads > 0 ? options.threads : ComputeThreads(1);
  const kernels::Probe probe = kernels::ProbeMachine(threads);
  if (options.json) {
    std::printf("%s\n", nlohmann::json({{"bench", "probe"},
                                        {"threads", threads},
                                        {"fma_gflops", std::round(probe.fma_gflops)},
                                        {"amx_gflops", std::round(probe.amx_gflops)}})
                            .dump()
                            .c_str());
  } else {
    std::printf(
        "probe, %d thread(s): f32 multiply-adds %.0f GFLOP/s, bf16 tile products %.0f GFLOP/s\n",
        threads, probe.fma_gflops, probe.amx_gflops);
  }
  return kExitDone;
}

}  // namespace

int BenchCommand(const Arguments& arguments) {
  CLI::App app("Measures speed on made-up pictures.", "pyramid-worker bench");
  app.require_subcommand(1);
  BenchOptions options;
  const auto add = [&](CLI::App* command) {
    command->add_option("--variant", options.variant, "pvt_v2_b0 …");
    command->add_option("--batch", options.batch, "Pictures a call, of all workers together")
        ->check(CLI::Range(1, 4096));
    command->add_option("--size", options.size, "Side of a picture, pixels")
        ->check(CLI::Range(29, 2048));
    command->add_option("--dtype", options.dtype, "fp32 or bf16")
        ->check(CLI::IsMember({"fp32", "bf16"}));
    command
        ->add_option("--threads", options.threads,
                     "Of all workers together; default: the machine's cores")
        ->check(CLI::Range(1, 1024));
    command->add_option("--seconds", options.seconds, "To measure")->check(CLI::Range(0.1, 3600.0));
    command->add_option("--classes", options.classes)->check(CLI::Range(1, 1000000));
    command->add_option("--mode", options.mode, "G: fused and packed kernels; F: plain LibTorch")
        ->check(CLI::IsMember({"G", "F"}));
    command->add_flag("--json", options.json, "One JSON object on standard output");
  };
  CLI::App* model =
      app.add_subcommand("model", "The network alone, as it serves: floats in, logits out.");
  CLI::App* train = app.add_subcommand(
      "train", "Whole training steps: forward, backward, gradients' sums over workers, AdamW.");
  CLI::App* probe = app.add_subcommand(
      "probe", "What the machine does at most right now: f32 multiply-adds, bf16 tile products.");
  add(model);
  add(train);
  model->add_flag("--profile", options.profile, "A table of the parts: time, GFLOP/s");
  probe->add_option("--threads", options.threads, "Default: the machine's cores")
      ->check(CLI::Range(1, 1024));
  probe->add_flag("--json", options.json, "One JSON object on standard output");
  train->add_option("--workers", options.workers, "Processes, data parallel")
      ->check(CLI::Range(1, 64));
  int code = 0;
  if (!ParseOrExplain(app, arguments, code)) return code;
  if (probe->parsed()) return PrintProbe(options);
  if (const auto known = VariantNames();
      std::find(known.begin(), known.end(), options.variant) == known.end()) {
    std::string names;
    for (const std::string& name : known) absl::StrAppend(&names, names.empty() ? "" : ", ", name);
    return Fail(absl::InvalidArgumentError(
        absl::StrCat("--variant is ", options.variant, "; use ", names)));
  }
  if (model->parsed()) {
    const absl::Status status = RunModel(options);
    return status.ok() ? kExitDone : Fail(status);
  }

  Placement placement;
  if (options.workers > 1) {
    if (std::getenv("PYRAMID_MEETING_KEY") == nullptr) {
      Arguments copy = {"bench"};
      copy.insert(copy.end(), arguments.begin(), arguments.end());
      const absl::StatusOr<int> result = LaunchLocally(copy, options.workers);
      return result.ok() ? *result : Fail(result.status());
    }
    const absl::StatusOr<Placement> found =
        PlacementFrom([](const char* name) -> const char* { return std::getenv(name); });
    if (!found.ok()) return Fail(found.status());
    placement = *found;
  }
  const absl::StatusOr<BenchResult> result = BenchTrain(options, placement);
  if (!result.ok()) {
    code = Fail(result.status());
  } else if (placement.rank == 0) {
    Print("train", options, *result);
  }
  std::fflush(nullptr);
  std::_Exit(code);  // a rank's clean-up could wait for the others
}

}  // namespace pyramid
