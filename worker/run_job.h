// One rank of one training job, from opening the data to the last call home.
#ifndef PYRAMID_WORKER_RUN_JOB_H_
#define PYRAMID_WORKER_RUN_JOB_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "model/recipe.h"
#include "worker/placement.h"

namespace pyramid {

struct JobOptions {
  Recipe recipe;                      // workers is the number of ranks
  std::vector<std::string> warnings;  // of the recipe; shown at the start
  Placement placement;
  std::string device = "cpu";         // "cuda:1"
  int threads = 1;                    // inside an operation
  std::filesystem::path checkpoints;  // folder

  // Set by the coordinator; empty without one.
  std::string job_id;
  int64_t attempt_epoch = 0;
  std::filesystem::path attempt_folder;
  std::filesystem::path server_file;
};

// Runs to the end. Errors are one line on standard error; with a coordinator the exit record lies
// in
// "<attempt_folder>/rank<R>.exit.json" before it is told. Ends the process with an exit code of
// failure.h: LibTorch's own clean-up could wait for ranks that are gone.
[[noreturn]] void RunJob(const JobOptions& options);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_RUN_JOB_H_
