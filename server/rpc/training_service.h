// TrainingService over the job manager: conversion only.
#ifndef PYRAMID_SERVER_RPC_TRAINING_SERVICE_H_
#define PYRAMID_SERVER_RPC_TRAINING_SERVICE_H_

#include <filesystem>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/sync_stream.h"
#include "proto/training.grpc.pb.h"
#include "server/metrics.h"
#include "server/training/job_manager.h"

namespace pyramid {

// Puts the checkpoint in a folder into service. Called by several threads at once.
using PromoteFunction = absl::AnyInvocable<absl::StatusOr<v1::PromoteCheckpointResponse>(
    const std::filesystem::path& checkpoint, const v1::PromoteCheckpointRequest& request)>;

// Thread-safe. `jobs` and `metrics` must outlive it. A WatchJob stream holds a thread of the gRPC
// server and ends within a fifth of a second when its client goes, or with Unavailable when the
// manager has drained.
class TrainingService final : public v1::TrainingService::Service {
 public:
  TrainingService(JobManager& jobs, PromoteFunction promote, Metrics& metrics);

  grpc::Status SubmitJob(grpc::ServerContext* context, const v1::SubmitJobRequest* request,
                         v1::SubmitJobResponse* response) override;
  grpc::Status GetJob(grpc::ServerContext* context, const v1::GetJobRequest* request,
                      v1::Job* response) override;
  grpc::Status ListJobs(grpc::ServerContext* context, const v1::ListJobsRequest* request,
                        v1::ListJobsResponse* response) override;
  grpc::Status WatchJob(grpc::ServerContext* context, const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::JobEvent>* writer) override;
  grpc::Status CancelJob(grpc::ServerContext* context, const v1::CancelJobRequest* request,
                         v1::Job* response) override;
  grpc::Status SaveCheckpoint(grpc::ServerContext* context,
                              const v1::SaveCheckpointRequest* request, v1::Job* response) override;
  grpc::Status PromoteCheckpoint(grpc::ServerContext* context,
                                 const v1::PromoteCheckpointRequest* request,
                                 v1::PromoteCheckpointResponse* response) override;

 private:
  JobManager& jobs_;
  PromoteFunction promote_;
  Metrics& metrics_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_TRAINING_SERVICE_H_
