// Whom a running job tells about itself: a person at a console, or the coordinator that started it.
#ifndef PYRAMID_WORKER_REPORTER_H_
#define PYRAMID_WORKER_REPORTER_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "proto/training.pb.h"

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
// text", and into `log_file` unless empty. Rank 0 speaks; others write to their file only. Nobody
// asks it for anything.
std::unique_ptr<Reporter> MakeConsoleReporter(bool speak, const std::filesystem::path& log_file);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_REPORTER_H_
