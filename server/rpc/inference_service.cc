#include "server/rpc/inference_service.h"

#include <atomic>
#include <memory>
#include <utility>

#include "proto/base/status.h"
#include "server/rpc/actor.h"
#include "server/rpc/handle.h"
#include "server/security/grpc_credentials.h"

namespace pyramid {
namespace {

const char* ServiceName() { return inference::GRPCInferenceService::service_full_name(); }

// Lives from the call's arrival to gRPC's OnDone.
class InferReactor final : public grpc::ServerUnaryReactor {
 public:
  InferReactor(grpc::CallbackServerContext& context, inference::ModelInferResponse& response,
               Metrics& metrics)
      : context_(context), response_(response), call_(metrics, ServiceName(), "ModelInfer") {}

  void Run(const OpenInference& protocol, const inference::ModelInferRequest& request,
           const RateGate* rates) {
    AddRequestId(request.id(), context_);
    OpenInference::Caller caller{.deadline = DeadlineOf(context_), .cancelled = cancelled_};
    if (rates != nullptr) {
      caller.charge = [this, rates, &request](int pictures) {
        return rates->Pass(CredentialsOf(context_), request.model_name(), pictures);
      };
    }
    // Nothing of this object may be touched after Finish, which may come before Infer returns.
    protocol.Infer(request, std::move(caller),
                   [this](absl::StatusOr<inference::ModelInferResponse> answer) {
                     if (answer.ok()) response_ = *std::move(answer);
                     AddPushback(answer.status(), context_);
                     Finish(call_.End(answer.status()));
                   });
  }

  void OnCancel() override { cancelled_->store(true); }
  void OnDone() override { delete this; }

 private:
  grpc::CallbackServerContext& context_;
  inference::ModelInferResponse& response_;
  RpcCall call_;
  const std::shared_ptr<std::atomic<bool>> cancelled_ = std::make_shared<std::atomic<bool>>(false);
};

}  // namespace

grpc::ServerUnaryReactor* InferenceService::ModelInfer(grpc::CallbackServerContext* context,
                                                       const inference::ModelInferRequest* request,
                                                       inference::ModelInferResponse* response) {
  auto* reactor = new InferReactor(*context, *response, metrics_);  // deletes itself in OnDone
  reactor->Run(protocol_, *request, rates_);
  return reactor;
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
