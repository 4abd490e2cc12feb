// ClassificationService over gRPC's callback API: conversion only. No thread waits while a request
// is answered. Classify comes in through LargeCalls: a server needs both.
#ifndef PYRAMID_SERVER_RPC_CLASSIFICATION_SERVICE_H_
#define PYRAMID_SERVER_RPC_CLASSIFICATION_SERVICE_H_

#include <cstdint>

#include "grpcpp/grpcpp.h"
#include "proto/classification.grpc.pb.h"
#include "server/metrics.h"
#include "server/rpc/large_calls.h"
#include "server/rpc/rate_gate.h"
#include "server/serving/classify.h"
#include "server/serving/model_registry.h"

namespace pyramid {

class ClassificationService final : public v1::ClassificationService::WithGenericMethod_Classify<
                                        v1::ClassificationService::WithCallbackMethod_ListModels<
                                            v1::ClassificationService::Service>> {
 public:
  // All must outlive the service. `max_message_bytes`: what the server was built with; ListModels
  // tells it. `rates` null: no limits.
  ClassificationService(ClassifyPipeline& pipeline, const ModelRegistry& registry, Metrics& metrics,
                        int64_t max_message_bytes, const RateGate* rates = nullptr);

  void AddTo(LargeCalls& calls);

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;

 private:
  ClassifyPipeline& pipeline_;
  const ModelRegistry& registry_;
  Metrics& metrics_;
  const int64_t max_message_bytes_;
  const RateGate* const rates_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_CLASSIFICATION_SERVICE_H_
