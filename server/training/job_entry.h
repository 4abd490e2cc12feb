// What the job manager keeps of each job. Its own; nobody else includes this.
#ifndef PYRAMID_SERVER_TRAINING_JOB_ENTRY_H_
#define PYRAMID_SERVER_TRAINING_JOB_ENTRY_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "proto/training.pb.h"
#include "server/training/launcher.h"
#include "server/training/live_attempt.h"

namespace pyramid {

// A job with what is only in memory.
struct JobEntry {
  v1::Job job;
  std::unique_ptr<LiveAttempt> live;
  absl::Time not_before = absl::InfinitePast();
  absl::Time progress_stored = absl::InfinitePast();
  int64_t version = 1;                         // grows with everything a watcher may want
  int64_t progress_version = 0;                // `version` of the newest progress
  int64_t reason_version = 0;                  // … of the newest reason that isn't stored
  std::pair<int64_t, std::set<int>> finished;  // epoch of an ended attempt, ranks answered
};

// An attempt that is committed and whose workers are to be started.
struct GangLaunch {
  std::string job_id;
  int64_t epoch = 0;
  std::filesystem::path folder;
  std::string recipe;
  std::vector<WorkerLaunch> workers;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_JOB_ENTRY_H_
