// Following a job: its events in order, across restarts of the server.
#ifndef PYRAMID_CLIENT_JOB_WATCH_H_
#define PYRAMID_CLIENT_JOB_WATCH_H_

#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/connection.h"
#include "proto/training.pb.h"

namespace pyramid {

struct FollowOptions {
  bool logs = false;
  bool history_only = false;                    // end after what is known now
  absl::Duration patience = absl::Minutes(10);  // without a server, after it was there once
};

// Calls `on_event` for every event, each numbered one once. When the server goes away it waits,
// looks again where it is and goes on after the last event seen; `on_note` gets a line about that.
// Returns the job as last seen.
//   NotFound     no such job
//   Unavailable  no server at the start, or for `patience`
absl::StatusOr<v1::Job> FollowJob(Connection& connection, const std::string& job_id,
                                  const FollowOptions& options,
                                  absl::FunctionRef<void(const v1::JobEvent&)> on_event,
                                  absl::FunctionRef<void(absl::string_view)> on_note);

// SUCCEEDED, CANCELED, FAILED.
bool HasEnded(v1::JobState state);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_JOB_WATCH_H_
