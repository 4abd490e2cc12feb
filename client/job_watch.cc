#include "client/job_watch.h"

#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/format.h"

namespace pyramid {
namespace {

constexpr absl::Duration kFirstDelay = absl::Milliseconds(100);
constexpr absl::Duration kLongestDelay = absl::Seconds(2);

// What a stream ends with when its server stops, dies or is cut off.
bool IsLost(grpc::StatusCode code) {
  return code == grpc::StatusCode::UNAVAILABLE || code == grpc::StatusCode::CANCELLED ||
         code == grpc::StatusCode::UNKNOWN || code == grpc::StatusCode::INTERNAL;
}

}  // namespace

bool HasEnded(v1::JobState state) {
  return state == v1::SUCCEEDED || state == v1::CANCELED || state == v1::FAILED;
}

absl::StatusOr<v1::Job> FollowJob(Connection& connection, const std::string& job_id,
                                  const FollowOptions& options,
                                  absl::FunctionRef<void(const v1::JobEvent&)> on_event,
                                  absl::FunctionRef<void(absl::string_view)> on_note) {
  v1::WatchJobRequest request;
  request.set_job_id(job_id);
  request.set_no_logs(!options.logs);
  request.set_history_only(options.history_only);
  v1::Job job;
  bool was_there = false;
  absl::Time lost = absl::InfiniteFuture();  // since when there is no server
  absl::Duration delay = kFirstDelay;
  while (true) {
    grpc::ClientContext context;
    const std::unique_ptr<grpc::ClientReader<v1::JobEvent>> reader =
        connection.training()->WatchJob(&context, request);
    v1::JobEvent event;
    while (reader->Read(&event)) {
      if (lost != absl::InfiniteFuture()) {
        on_note(absl::StrCat("the server is back at ", connection.address().target));
      }
      was_there = true;
      lost = absl::InfiniteFuture();
      delay = kFirstDelay;
      request.set_after_event(std::max(request.after_event(), event.number()));
      if (event.has_job()) job = event.job();
      on_event(event);
    }
    const grpc::Status status = reader->Finish();
    if (status.ok() && (options.history_only || HasEnded(job.state()))) return job;
    if (!status.ok() && (!was_there || !IsLost(status.error_code()))) {
      return connection.ToStatus(status);
    }
    const absl::Time now = absl::Now();
    if (lost == absl::InfiniteFuture()) {
      lost = now;
      on_note(absl::StrCat("lost the server; the job goes on, trying again for ",
                           FormatSeconds(absl::ToDoubleSeconds(options.patience))));
    }
    if (now - lost >= options.patience) {
      if (!status.ok()) return connection.ToStatus(status);
      return absl::UnavailableError("the server keeps ending the stream before the job's end");
    }
    absl::SleepFor(delay);
    delay = std::min(delay * 2, kLongestDelay);
    connection.Refresh();
  }
}

}  // namespace pyramid
