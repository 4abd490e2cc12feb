// Following one job.
#ifndef PYRAMID_SERVER_TRAINING_JOB_WATCH_H_
#define PYRAMID_SERVER_TRAINING_JOB_WATCH_H_

#include <cstdint>
#include <deque>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/training.pb.h"

namespace pyramid {

class JobManager;

// One follower of a job. It pulls, so a slow one costs nothing: what is stored is read from the
// store, progress between two calls is skipped but for the newest. Not thread-safe; must not
// outlive the manager.
class JobWatch {
 public:
  // Waits for the next event, at most until `deadline`.
  //   OutOfRange        there won't be another one: the job has ended (or history_only)
  //   DeadlineExceeded  nothing new yet; call again
  //   Unavailable       the server is stopping
  absl::StatusOr<v1::JobEvent> Next(absl::Time deadline);

 private:
  friend class JobManager;
  JobWatch(JobManager& manager, const v1::WatchJobRequest& request)
      : manager_(&manager), request_(request), cursor_(request.after_event()) {}
  JobManager* manager_;
  v1::WatchJobRequest request_;
  int64_t cursor_;  // number of the last stored event handed out
  int64_t seen_progress_ = 0;
  int64_t seen_reason_ = 0;
  std::deque<v1::JobEvent> buffer_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_JOB_WATCH_H_
