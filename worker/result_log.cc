#include "worker/result_log.h"

#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "proto/base/file.h"

namespace pyramid {
namespace {

std::string Cells(const std::vector<std::string>& cells) {
  std::string row;
  for (const std::string& cell : cells) absl::StrAppendFormat(&row, "%-20s", cell);
  return row + "\n";
}

}  // namespace

ResultLog::ResultLog(std::filesystem::path path, int64_t epochs_done) : path_(std::move(path)) {
  rows_ = Cells({"Epoch", "TrainLoss", "Top_1_Accuracy", "Top_5_Accuracy", "TrainTime", "EvalTime",
                 "TotalTime", "MeanLoss"});
  const absl::StatusOr<std::string> old = ReadFile(path_);
  if (!old.ok()) return;
  for (const absl::string_view row : absl::StrSplit(*old, '\n', absl::SkipEmpty())) {
    int64_t epoch = 0;
    if (absl::SimpleAtoi(row.substr(0, row.find(' ')), &epoch) && epoch <= epochs_done)
      absl::StrAppend(&rows_, row, "\n");
  }
}

absl::Status ResultLog::Add(const EpochRow& row) {
  absl::StrAppend(
      &rows_,
      Cells({absl::StrCat(row.epoch), absl::StrFormat("%.6f", row.last_loss),
             absl::StrFormat("%.4f", row.top1 * 100), absl::StrFormat("%.4f", row.top5 * 100),
             absl::StrFormat("%.2f", row.train_seconds), absl::StrFormat("%.2f", row.eval_seconds),
             absl::StrFormat("%.2f", row.train_seconds + row.eval_seconds),
             absl::StrFormat("%.6f", row.mean_loss)}));
  return WriteFileAtomically(path_, rows_);
}

}  // namespace pyramid
