// ModelService over the registry: conversion only.
#ifndef PYRAMID_SERVER_RPC_MODEL_SERVICE_H_
#define PYRAMID_SERVER_RPC_MODEL_SERVICE_H_

#include "grpcpp/server_context.h"
#include "proto/lifecycle.grpc.pb.h"
#include "proto/training.pb.h"
#include "server/metrics.h"
#include "server/serving/model_registry.h"

namespace pyramid {

// Thread-safe. `registry` and `metrics` must outlive it. A call that loads something holds a thread
// of the gRPC server until it is loaded.
class ModelService final : public v1::ModelService::Service {
 public:
  ModelService(ModelRegistry& registry, Metrics& metrics)
      : registry_(registry), metrics_(metrics) {}

  grpc::Status SetAlias(grpc::ServerContext* context, const v1::SetAliasRequest* request,
                        v1::ModelState* response) override;
  grpc::Status RemoveAlias(grpc::ServerContext* context, const v1::RemoveAliasRequest* request,
                           v1::ModelState* response) override;
  grpc::Status SetTraffic(grpc::ServerContext* context, const v1::SetTrafficRequest* request,
                          v1::ModelState* response) override;
  grpc::Status Rollback(grpc::ServerContext* context, const v1::RollbackRequest* request,
                        v1::ModelState* response) override;
  grpc::Status LoadModel(grpc::ServerContext* context, const v1::LoadModelRequest* request,
                         v1::ModelState* response) override;
  grpc::Status UnloadModel(grpc::ServerContext* context, const v1::UnloadModelRequest* request,
                           v1::ModelState* response) override;
  grpc::Status ListModelEvents(grpc::ServerContext* context,
                               const v1::ListModelEventsRequest* request,
                               v1::ListModelEventsResponse* response) override;

 private:
  ModelRegistry& registry_;
  Metrics& metrics_;
};

// A promotion as the registry takes it, and what came of it.
ModelRegistry::Promotion PromotionOf(const v1::PromoteCheckpointRequest& request);
v1::PromoteCheckpointResponse ResponseOf(const v1::PromoteCheckpointRequest& request,
                                         const ModelRegistry::Promoted& promoted);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_MODEL_SERVICE_H_
