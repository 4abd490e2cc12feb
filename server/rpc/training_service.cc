#include "server/rpc/training_service.h"

#include <utility>

#include "absl/time/clock.h"
#include "proto/base/status.h"
#include "server/rpc/actor.h"
#include "server/rpc/handle.h"

namespace pyramid {
namespace {

constexpr absl::string_view kService = "pyramid.v1.TrainingService";
// How late a stream sees that its client has gone.
constexpr absl::Duration kWatchPause = absl::Milliseconds(200);

}  // namespace

TrainingService::TrainingService(JobManager& jobs, PromoteFunction promote, Metrics& metrics)
    : jobs_(jobs), promote_(std::move(promote)), metrics_(metrics) {}

grpc::Status TrainingService::SubmitJob(grpc::ServerContext*, const v1::SubmitJobRequest* request,
                                        v1::SubmitJobResponse* response) {
  return Handle(metrics_, kService, "SubmitJob", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, jobs_.Submit(*request));
    return absl::OkStatus();
  });
}

grpc::Status TrainingService::GetJob(grpc::ServerContext*, const v1::GetJobRequest* request,
                                     v1::Job* response) {
  return Handle(metrics_, kService, "GetJob", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, jobs_.Get(request->job_id()));
    return absl::OkStatus();
  });
}

grpc::Status TrainingService::ListJobs(grpc::ServerContext*, const v1::ListJobsRequest* request,
                                       v1::ListJobsResponse* response) {
  return Handle(metrics_, kService, "ListJobs", [&]() -> absl::Status {
    for (v1::Job& job : jobs_.List(*request)) *response->add_jobs() = std::move(job);
    return absl::OkStatus();
  });
}

grpc::Status TrainingService::WatchJob(grpc::ServerContext* context,
                                       const v1::WatchJobRequest* request,
                                       grpc::ServerWriter<v1::JobEvent>* writer) {
  RpcCall call(metrics_, kService, "WatchJob");
  call.Received();
  const auto watch_job = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(const std::unique_ptr<JobWatch> watch, jobs_.Watch(*request));
    while (!context->IsCancelled()) {
      const absl::StatusOr<v1::JobEvent> event = watch->Next(absl::Now() + kWatchPause);
      if (event.ok()) {
        if (!writer->Write(*event)) return absl::CancelledError("the client has gone");
        call.Sending();
      } else if (absl::IsOutOfRange(event.status())) {
        return absl::OkStatus();
      } else if (!absl::IsDeadlineExceeded(event.status())) {
        return event.status();
      }
    }
    return absl::CancelledError("the client has gone");
  };
  return call.End(watch_job());
}

grpc::Status TrainingService::CancelJob(grpc::ServerContext*, const v1::CancelJobRequest* request,
                                        v1::Job* response) {
  return Handle(metrics_, kService, "CancelJob", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, jobs_.Cancel(*request));
    return absl::OkStatus();
  });
}

grpc::Status TrainingService::SaveCheckpoint(grpc::ServerContext*,
                                             const v1::SaveCheckpointRequest* request,
                                             v1::Job* response) {
  return Handle(metrics_, kService, "SaveCheckpoint", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, jobs_.Save(request->job_id()));
    return absl::OkStatus();
  });
}

grpc::Status TrainingService::PromoteCheckpoint(grpc::ServerContext* context,
                                                const v1::PromoteCheckpointRequest* request,
                                                v1::PromoteCheckpointResponse* response) {
  return Handle(metrics_, kService, "PromoteCheckpoint", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(const std::filesystem::path folder,
                     jobs_.CheckpointFolder(request->job_id(), request->checkpoint_id()));
    v1::PromoteCheckpointRequest promotion = *request;
    promotion.set_actor(ActorOf(*context, request->actor()));
    ASSIGN_OR_RETURN(*response, promote_(folder, promotion));
    return absl::OkStatus();
  });
}

}  // namespace pyramid
