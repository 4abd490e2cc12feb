// A job's checkpoints: writing, keeping the right ones, going on from the newest good one.
#ifndef PYRAMID_WORKER_SAVER_H_
#define PYRAMID_WORKER_SAVER_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/recipe.h"
#include "proto/model.pb.h"
#include "proto/training.pb.h"
#include "worker/evaluate.h"
#include "worker/trainer.h"

namespace pyramid {

// Where a run stands. With the weights and the moments it is everything that the next step depends
// on.
struct RunState {
  int64_t step = 0;           // optimizer steps done
  int64_t epochs_done = 0;    // whole passes over the data
  int64_t position = 0;       // pictures of the current epoch's order that were used
  int64_t images = 0;         // trained so far
  bool epoch_closed = true;   // nothing is left to do for the epochs done (validation)
  double epoch_loss_sum = 0;  // of the current epoch
  int64_t epoch_images = 0;
  double best_top1 = -1;  // -1: not validated yet
  int64_t best_epoch = 0;
};

// As numbers (f64 holds them exactly), in a fixed order, and back.
std::vector<double> StateNumbers(const RunState& state);
RunState StateFromNumbers(const std::vector<double>& numbers);

struct SaverOptions {
  std::filesystem::path folder;  // of checkpoints
  Recipe recipe;
  v1::NetworkConfig network;
  std::string origin = "pyramid";  // whose weights the run started from
  std::vector<std::string> labels;
  std::string job_id;
  int64_t attempt_epoch = 0;
  int64_t global_batch = 0;
  int64_t steps_per_epoch = 1;
  std::vector<float> self_test_pixels;  // the first validation pictures, preprocessed
  int self_test_count = 0;
};

// Rank 0's. Not thread-safe.
class Saver {
 public:
  explicit Saver(SaverOptions options) : options_(std::move(options)) {}

  // Writes the trainer and `state` as "step-…", with recipe.ckpt_format another format beside it,
  // then removes what the policy doesn't keep. A checkpoint of the same step is replaced.
  // `validation`: measured on these weights.
  //   ResourceExhausted  disk full (class DISK_FULL), with the bytes needed and free; older
  //   checkpoints stay
  absl::StatusOr<v1::Checkpoint> Save(Trainer& trainer, const RunState& state,
                                      const std::optional<EvalCounts>& validation);

  // Loads the newest checkpoint that is whole into the trainer; damaged ones are passed over with a
  // warning. None: no checkpoint.
  //   FailedPrecondition  made by another network, global batch or seed: says which
  absl::StatusOr<std::optional<RunState>> Resume(Trainer& trainer);

  // resume_opt: loads another run's checkpoint, the optimizer's state too.
  //   NotFound, DataLoss  as ReadManifest
  //   FailedPrecondition  as Resume
  absl::StatusOr<RunState> GoOnFrom(const std::filesystem::path& checkpoint, Trainer& trainer);

 private:
  absl::StatusOr<RunState> Load(const std::filesystem::path& checkpoint, Trainer& trainer);
  // "<model>-<epoch>_<steps>.ckpt", as MindCV names it; empty: ckpt_format is pyramid.
  std::filesystem::path OtherFormat(int64_t step) const;
  absl::Status WriteOtherFormat(Trainer& trainer, const v1::Manifest& manifest) const;
  absl::Status CheckSameRun(const v1::Manifest& manifest,
                            const std::filesystem::path& checkpoint) const;
  void RemoveOld();

  SaverOptions options_;
};

}  // namespace pyramid

#endif  // PYRAMID_WORKER_SAVER_H_
