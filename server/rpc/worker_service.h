// WorkerService over the job manager: conversion only.
#ifndef PYRAMID_SERVER_RPC_WORKER_SERVICE_H_
#define PYRAMID_SERVER_RPC_WORKER_SERVICE_H_

#include "grpcpp/server_context.h"
#include "proto/worker.grpc.pb.h"
#include "server/metrics.h"
#include "server/security/access.h"
#include "server/training/job_manager.h"

namespace pyramid {

// Thread-safe. `jobs`, `metrics` and `access` must outlive it. A token is good for calls about its
// own attempt only; `access` null: nobody asks for one.
class WorkerService final : public v1::WorkerService::Service {
 public:
  WorkerService(JobManager& jobs, Metrics& metrics, const Access* access = nullptr)
      : jobs_(jobs), metrics_(metrics), access_(access) {}

  grpc::Status Register(grpc::ServerContext* context, const v1::RegisterRequest* request,
                        v1::RegisterResponse* response) override;
  grpc::Status Report(grpc::ServerContext* context, const v1::ReportRequest* request,
                      v1::ReportResponse* response) override;
  grpc::Status Finish(grpc::ServerContext* context, const v1::FinishRequest* request,
                      v1::FinishResponse* response) override;

 private:
  absl::Status CheckToken(const grpc::ServerContext& context, const v1::WorkerId& worker) const;

  JobManager& jobs_;
  Metrics& metrics_;
  const Access* const access_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_WORKER_SERVICE_H_
