// What a job trains on, and the numbers that follow from it.
#ifndef PYRAMID_WORKER_JOB_DATA_H_
#define PYRAMID_WORKER_JOB_DATA_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/recipe.h"
#include "worker/data/dataset.h"
#include "worker/data/loader.h"

namespace pyramid {

struct JobData {
  std::unique_ptr<Dataset> train;
  std::unique_ptr<Dataset> val;  // null: no validation while training
  std::unique_ptr<BadPictures> bad_train, bad_val;
  int classes = 0;                  // of the network
  std::vector<std::string> labels;  // one a class
  int64_t used = 0;                 // training pictures of an epoch
  int64_t global_batch = 0;
  int64_t steps_per_epoch = 0;
  int64_t total_steps = 0;
  int evaluations = 0;  // validations of the whole run

  // Is there a validation after epoch `epoch` (from 1)? MindCV's rule (epochs 1, 1 + val_interval,
  // …), and after the last.
  bool ValidatesAfter(const Recipe& recipe, int64_t epoch) const;
};

// Opens both splits and checks every label.
//   as OpenDataset, and InvalidArgument: a step takes more pictures than there are
absl::StatusOr<JobData> OpenJobData(const Recipe& recipe);

// The first pictures of a data set, prepared, one after the other; undecodable ones are passed
// over.
struct PreparedPictures {
  std::vector<float> pixels;
  int count = 0;
};
absl::StatusOr<PreparedPictures> PrepareFirst(const Dataset& dataset,
                                              const v1::Preprocessing& preprocessing, int count);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_JOB_DATA_H_
