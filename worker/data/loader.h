// Batches made ahead by threads of its own, handed out in order through a bounded queue.
#ifndef PYRAMID_WORKER_DATA_LOADER_H_
#define PYRAMID_WORKER_DATA_LOADER_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "model/recipe.h"
#include "worker/data/augment.h"
#include "worker/data/dataset.h"

namespace pyramid {

// What one forward pass of one rank takes.
struct BatchPlan {
  std::vector<int64_t> indices;  // of the dataset
  int64_t epoch = 0;
  int64_t first_position = 0;  // of the first picture in the epoch's order
  int64_t first_in_batch = 0;  // of the first picture in the global batch
  int64_t step_pictures = 0;   // pictures of this optimizer step, all ranks
  bool last_of_step = true;    // the optimizer steps after this one
  bool weightless = false;     // a rank without pictures in a small last batch computes along; its
                               // result doesn't count
};

struct Batch {
  BatchPlan plan;
  std::vector<float> pixels;    // [count, channels, side, side]
  std::vector<int64_t> labels;  // [count]
  std::vector<int64_t>
      pictures;  // [count], of the dataset: not as planned where replaced or left out
  int64_t count =
      0;  // pictures in `pixels`; fewer than planned where undecodable ones were left out
};

class Loader {
 public:
  using Planner = std::function<std::optional<BatchPlan>()>;  // the next batch; none: the end. One
                                                              // caller at a time
  using Filler = std::function<absl::Status(const BatchPlan&, Batch&)>;  // many at once

  // `threads` ≥ 1 fill up to `queue` ≥ 2 batches ahead.
  Loader(Planner planner, Filler filler, int threads, int queue);
  ~Loader();

  // The next batch, null after the last. It stays valid until the next call. Waits for it. The
  // first error ends the run of batches.
  absl::StatusOr<const Batch*> Take();

  double waited_seconds() const { return waited_seconds_; }  // in Take, so far

 private:
  enum class SlotState { kFree, kFilling, kReady };
  struct Slot {
    SlotState state = SlotState::kFree;
    bool end = false;
    absl::Status status;
    Batch batch;
  };

  void Work();
  bool MayPlan() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool NextIsReady() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Planner planner_;
  Filler filler_;
  double waited_seconds_ = 0;
  bool holding_ = false;  // the caller has slot taken_ - 1
  absl::Mutex mutex_;
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mutex_);
  int64_t planned_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t taken_ ABSL_GUARDED_BY(mutex_) = 0;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

// Undecodable training pictures are replaced by others, chosen by a seeded rule, and counted. More
// than max(1, 0.1 %) of a dataset's pictures: DataLoss, naming the last.
class BadPictures {
 public:
  explicit BadPictures(int64_t dataset_size) : limit_(std::max<int64_t>(1, dataset_size / 1000)) {}
  absl::Status Count(int64_t index, const absl::Status& why);
  int64_t count() const;

 private:
  const int64_t limit_;
  mutable absl::Mutex mutex_;
  std::vector<int64_t> seen_ ABSL_GUARDED_BY(mutex_);
};

struct TrainLoaderOptions {
  Recipe recipe;
  int rank = 0;
  int world = 1;
  int64_t first_step = 0;  // optimizer step to begin with, counted over all epochs
  int threads = 1;
};

// Augmented batches from first_step on, to the end of the last epoch. `dataset` and `bad` must
// outlive the loader.
std::unique_ptr<Loader> MakeTrainLoader(const Dataset& dataset, const TrainLoaderOptions& options,
                                        BadPictures& bad);

struct EvalLoaderOptions {
  v1::Preprocessing preprocessing;
  int batch = 128;
  int64_t begin = 0;  // the pictures [begin, end)
  int64_t end = 0;
  int threads = 1;
};

// Preprocessed batches in the dataset's order. Undecodable pictures are counted and left out.
std::unique_ptr<Loader> MakeEvalLoader(const Dataset& dataset, const EvalLoaderOptions& options,
                                       BadPictures& bad);

// Loader threads of one of `local_world` ranks: the recipe's wish, at most the cores it may use.
int LoaderThreads(const Recipe& recipe, int local_world);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_DATA_LOADER_H_
