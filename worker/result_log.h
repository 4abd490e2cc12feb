// MindCV's result.log: a table for people and plotting scripts.
#ifndef PYRAMID_WORKER_RESULT_LOG_H_
#define PYRAMID_WORKER_RESULT_LOG_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace pyramid {

struct EpochRow {
  int64_t epoch = 0;     // from 1
  double last_loss = 0;  // of the epoch's last step
  double mean_loss = 0;  // of the epoch; MindCV hasn't this column
  double top1 = 0;       // 0..1; 0: not validated
  double top5 = 0;
  double train_seconds = 0;
  double eval_seconds = 0;
};

class ResultLog {
 public:
  // Goes on with the rows that are there up to epoch `epochs_done`: later ones are of work that is
  // done again.
  ResultLog(std::filesystem::path path, int64_t epochs_done);

  // Rewrites the file with one more row.
  absl::Status Add(const EpochRow& row);

 private:
  std::filesystem::path path_;
  std::string rows_;
};

}  // namespace pyramid

#endif  // PYRAMID_WORKER_RESULT_LOG_H_
