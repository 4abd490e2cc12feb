// GRPCInferenceService, the Open Inference Protocol v2: conversion only, everything else is in
// open_inference.h. ModelInfer is asynchronous and comes in through LargeCalls: a
// server needs both; the other calls hold a thread of the gRPC server,
// which only RepositoryModelLoad does for long.
#ifndef PYRAMID_SERVER_RPC_INFERENCE_SERVICE_H_
#define PYRAMID_SERVER_RPC_INFERENCE_SERVICE_H_

#include "grpcpp/grpcpp.h"
#include "proto/open_inference.grpc.pb.h"
#include "server/metrics.h"
#include "server/rpc/large_calls.h"
#include "server/rpc/open_inference.h"
#include "server/rpc/rate_gate.h"

namespace pyramid {

class InferenceService final : public inference::GRPCInferenceService::WithGenericMethod_ModelInfer<
                                   inference::GRPCInferenceService::Service> {
 public:
  // All must outlive it. `rates` null: no limits.
  InferenceService(OpenInference& protocol, Metrics& metrics, const RateGate* rates = nullptr)
      : protocol_(protocol), metrics_(metrics), rates_(rates) {}

  void AddTo(LargeCalls& calls);

  grpc::Status ServerLive(grpc::ServerContext* context, const inference::ServerLiveRequest* request,
                          inference::ServerLiveResponse* response) override;
  grpc::Status ServerReady(grpc::ServerContext* context,
                           const inference::ServerReadyRequest* request,
                           inference::ServerReadyResponse* response) override;
  grpc::Status ModelReady(grpc::ServerContext* context, const inference::ModelReadyRequest* request,
                          inference::ModelReadyResponse* response) override;
  grpc::Status ServerMetadata(grpc::ServerContext* context,
                              const inference::ServerMetadataRequest* request,
                              inference::ServerMetadataResponse* response) override;
  grpc::Status ModelMetadata(grpc::ServerContext* context,
                             const inference::ModelMetadataRequest* request,
                             inference::ModelMetadataResponse* response) override;
  grpc::Status ModelConfig(grpc::ServerContext* context,
                           const inference::ModelConfigRequest* request,
                           inference::ModelConfigResponse* response) override;
  grpc::Status ModelStatistics(grpc::ServerContext* context,
                               const inference::ModelStatisticsRequest* request,
                               inference::ModelStatisticsResponse* response) override;
  grpc::Status RepositoryIndex(grpc::ServerContext* context,
                               const inference::RepositoryIndexRequest* request,
                               inference::RepositoryIndexResponse* response) override;
  grpc::Status RepositoryModelLoad(grpc::ServerContext* context,
                                   const inference::RepositoryModelLoadRequest* request,
                                   inference::RepositoryModelLoadResponse* response) override;
  grpc::Status RepositoryModelUnload(grpc::ServerContext* context,
                                     const inference::RepositoryModelUnloadRequest* request,
                                     inference::RepositoryModelUnloadResponse* response) override;

 private:
  OpenInference& protocol_;
  Metrics& metrics_;
  const RateGate* const rates_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_INFERENCE_SERVICE_H_
