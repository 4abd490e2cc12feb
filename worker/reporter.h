// Whom a running job tells about itself: a person at a console, or the coordinator that started it;
// and the lines for people.
#ifndef PYRAMID_WORKER_REPORTER_H_
#define PYRAMID_WORKER_REPORTER_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "model/recipe.h"
#include "proto/training.pb.h"
#include "worker/coordinator_client.h"

namespace pyramid {

// Called from the training thread only; never blocks on a network.
class Reporter {
 public:
  virtual ~Reporter() = default;
  virtual void OnProgress(const v1::Progress& progress) = 0;
  virtual void OnCheckpoint(const v1::Checkpoint& checkpoint) = 0;
  virtual void OnLine(absl::string_view line) = 0;  // for people, in MindCV's wording

  // What it was asked meanwhile.
  virtual bool StopAsked() const = 0;
  virtual bool SaveAsked() const = 0;
  virtual void SaveDone() = 0;  // a SAVE was carried out
};

// Lines on standard output as MindCV prints them, "[2024-05-01 12:00:00] pyramid.train INFO -
// text", and into `log_file` unless empty. Without `speak` into the file only. Nobody asks it for
// anything.
std::unique_ptr<Reporter> MakeConsoleReporter(bool speak, const std::filesystem::path& log_file);

// Lines on standard output (the launcher keeps them), and everything to the coordinator. Rank 0
// alone sends progress and lines and hears SAVE; its wish becomes everyone's. `client` must outlive
// it.
std::unique_ptr<Reporter> MakeCoordinatorReporter(CoordinatorClient& client, int rank);

// What the block "Essential Experiment Configurations" of MindCV's train.py says, and our own
// facts.
struct RunFacts {
  std::string launcher;
  std::string device;
  int world = 1;
  int threads = 1;
  int classes = 0;
  int64_t train_pictures = 0;
  int64_t val_pictures = -1;  // -1: not validated
  int64_t steps_per_epoch = 0;
  int64_t global_batch = 0;
  int64_t parameters = 0;
  std::string kernels;  // "fused amx-f32math", "plain"
  std::string checkpoints;
};
std::vector<std::string> ExperimentLines(const Recipe& recipe, const RunFacts& facts);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_REPORTER_H_
