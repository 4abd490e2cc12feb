// WorkerService over the job manager: conversion only.
#ifndef PYRAMID_SERVER_RPC_WORKER_SERVICE_H_
#define PYRAMID_SERVER_RPC_WORKER_SERVICE_H_

#include "grpcpp/server_context.h"
#include "proto/worker.grpc.pb.h"
#include "server/metrics.h"
#include "server/training/job_manager.h"

namespace pyramid {

// Thread-safe. `jobs` and `metrics` must outlive it.
class WorkerService final : public v1::WorkerService::Service {
 public:
  WorkerService(JobManager& jobs, Metrics& metrics) : jobs_(jobs), metrics_(metrics) {}

  grpc::Status Register(grpc::ServerContext* context, const v1::RegisterRequest* request,
                        v1::RegisterResponse* response) override;
  grpc::Status Report(grpc::ServerContext* context, const v1::ReportRequest* request,
                      v1::ReportResponse* response) override;
  grpc::Status Finish(grpc::ServerContext* context, const v1::FinishRequest* request,
                      v1::FinishResponse* response) override;

 private:
  JobManager& jobs_;
  Metrics& metrics_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_WORKER_SERVICE_H_
