#include "server/rpc/inference_service.h"

#include <utility>

#include "proto/base/status.h"
#include "server/rpc/actor.h"
#include "server/rpc/handle.h"
#include "server/rpc/infer_request.h"
#include "server/security/grpc_credentials.h"

namespace pyramid {
namespace {

const char* ServiceName() { return inference::GRPCInferenceService::service_full_name(); }

class InferCall final
    : public LargeCall<inference::ModelInferRequest, inference::ModelInferResponse> {
 public:
  InferCall(grpc::GenericCallbackServerContext& context, const OpenInference& protocol,
            Metrics& metrics, const RateGate* rates)
      : LargeCall(context, metrics, ServiceName(), "ModelInfer", kRawInputContents),
        protocol_(protocol),
        rates_(rates) {}

 private:
  absl::StatusOr<Door::Pass> EnterDoor() override {
    return protocol_.EnterDoor(DeadlineOf(context()));
  }

  void Run() override {
    AddRequestId(request().id(), context());
    if (request().inputs_size() != 1 || request().inputs(0).datatype() != "FP32") {
      PutBack(large(), request());
    }
    OpenInference::Caller caller{.deadline = DeadlineOf(context()),
                                 .cancelled = cancelled(),
                                 .received = received(),
                                 .large = std::move(large())};
    if (rates_ != nullptr) {
      caller.charge = [this](int pictures) {
        return rates_->Pass(CredentialsOf(context()), request().model_name(), pictures);
      };
    }
    protocol_.Infer(request(), std::move(caller),
                    [this](absl::StatusOr<inference::ModelInferResponse> answer) {
                      Answer(std::move(answer));
                    });
  }

  void Sent(absl::Duration time) override { protocol_.Sent(time); }

  const OpenInference& protocol_;
  const RateGate* const rates_;
};

}  // namespace

void InferenceService::AddTo(LargeCalls& calls) {
  calls.Add(ServiceName(), "ModelInfer", [this](grpc::GenericCallbackServerContext& context) {
    return new InferCall(context, protocol_, metrics_, rates_);
  });
}

grpc::Status InferenceService::ServerLive(grpc::ServerContext*, const inference::ServerLiveRequest*,
                                          inference::ServerLiveResponse* response) {
  return Handle(metrics_, ServiceName(), "ServerLive", [&] {
    response->set_live(true);
    return absl::OkStatus();
  });
}

grpc::Status InferenceService::ServerReady(grpc::ServerContext*,
                                           const inference::ServerReadyRequest*,
                                           inference::ServerReadyResponse* response) {
  return Handle(metrics_, ServiceName(), "ServerReady", [&] {
    response->set_ready(protocol_.ServerReady());
    return absl::OkStatus();
  });
}

grpc::Status InferenceService::ModelReady(grpc::ServerContext*,
                                          const inference::ModelReadyRequest* request,
                                          inference::ModelReadyResponse* response) {
  return Handle(metrics_, ServiceName(), "ModelReady", [&] {
    response->set_ready(protocol_.ModelReady(request->name(), request->version()));
    return absl::OkStatus();
  });
}

grpc::Status InferenceService::ServerMetadata(grpc::ServerContext*,
                                              const inference::ServerMetadataRequest*,
                                              inference::ServerMetadataResponse* response) {
  return Handle(metrics_, ServiceName(), "ServerMetadata", [&] {
    *response = protocol_.ServerMetadata();
    return absl::OkStatus();
  });
}

grpc::Status InferenceService::ModelMetadata(grpc::ServerContext*,
                                             const inference::ModelMetadataRequest* request,
                                             inference::ModelMetadataResponse* response) {
  return Handle(metrics_, ServiceName(), "ModelMetadata", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, protocol_.ModelMetadata(request->name(), request->version()));
    return absl::OkStatus();
  });
}

grpc::Status InferenceService::ModelConfig(grpc::ServerContext*,
                                           const inference::ModelConfigRequest* request,
                                           inference::ModelConfigResponse* response) {
  return Handle(metrics_, ServiceName(), "ModelConfig", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, protocol_.ModelConfig(request->name(), request->version()));
    return absl::OkStatus();
  });
}

grpc::Status InferenceService::ModelStatistics(grpc::ServerContext*,
                                               const inference::ModelStatisticsRequest* request,
                                               inference::ModelStatisticsResponse* response) {
  return Handle(metrics_, ServiceName(), "ModelStatistics", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, protocol_.ModelStatistics(request->name(), request->version()));
    return absl::OkStatus();
  });
}

grpc::Status InferenceService::RepositoryIndex(grpc::ServerContext*,
                                               const inference::RepositoryIndexRequest* request,
                                               inference::RepositoryIndexResponse* response) {
  return Handle(metrics_, ServiceName(), "RepositoryIndex", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, protocol_.RepositoryIndex(*request));
    return absl::OkStatus();
  });
}

grpc::Status InferenceService::RepositoryModelLoad(
    grpc::ServerContext* context, const inference::RepositoryModelLoadRequest* request,
    inference::RepositoryModelLoadResponse*) {
  return Handle(metrics_, ServiceName(), "RepositoryModelLoad",
                [&] { return protocol_.Load(*request, ActorOf(*context, "")); });
}

grpc::Status InferenceService::RepositoryModelUnload(
    grpc::ServerContext* context, const inference::RepositoryModelUnloadRequest* request,
    inference::RepositoryModelUnloadResponse*) {
  return Handle(metrics_, ServiceName(), "RepositoryModelUnload",
                [&] { return protocol_.Unload(*request, ActorOf(*context, "")); });
}

}  // namespace pyramid
