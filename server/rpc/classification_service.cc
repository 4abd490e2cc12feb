#include "server/rpc/classification_service.h"

#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "server/rpc/handle.h"
#include "server/security/grpc_credentials.h"

namespace pyramid {
namespace {

const char* ServiceName() { return v1::ClassificationService::service_full_name(); }

// Lives from the call's arrival to gRPC's OnDone.
class ClassifyReactor final : public grpc::ServerUnaryReactor {
 public:
  ClassifyReactor(grpc::CallbackServerContext& context, v1::ClassifyResponse& response,
                  Metrics& metrics)
      : context_(context), response_(response), call_(metrics, ServiceName(), "Classify") {}

  void Run(ClassifyPipeline& pipeline, const v1::ClassifyRequest& request, const RateGate* rates) {
    AddRequestId(request.request_id(), context_);
    if (rates != nullptr) {
      const absl::Status passed =
          rates->Pass(CredentialsOf(context_), request.model(), request.pictures_size());
      if (!passed.ok()) {
        AddPushback(passed, context_);
        return Finish(call_.End(passed));
      }
    }
    // Nothing of this object may be touched after Finish, which may come before Classify returns.
    pipeline.Classify(request, DeadlineOf(context_), cancelled_,
                      [this](absl::StatusOr<v1::ClassifyResponse> result) {
                        if (result.ok()) response_ = *std::move(result);
                        AddPushback(result.status(), context_);
                        Finish(call_.End(result.status()));
                      });
  }

  void OnCancel() override { cancelled_->store(true); }
  void OnDone() override { delete this; }

 private:
  grpc::CallbackServerContext& context_;
  v1::ClassifyResponse& response_;
  RpcCall call_;
  const std::shared_ptr<std::atomic<bool>> cancelled_ = std::make_shared<std::atomic<bool>>(false);
};

}  // namespace

ClassificationService::ClassificationService(ClassifyPipeline& pipeline,
                                             const ModelRegistry& registry, Metrics& metrics,
                                             int64_t max_message_bytes, const RateGate* rates)
    : pipeline_(pipeline),
      registry_(registry),
      metrics_(metrics),
      max_message_bytes_(max_message_bytes),
      rates_(rates) {}

grpc::ServerUnaryReactor* ClassificationService::Classify(grpc::CallbackServerContext* context,
                                                          const v1::ClassifyRequest* request,
                                                          v1::ClassifyResponse* response) {
  auto* reactor = new ClassifyReactor(*context, *response, metrics_);  // deletes itself in OnDone
  reactor->Run(pipeline_, *request, rates_);
  return reactor;
}

grpc::ServerUnaryReactor* ClassificationService::ListModels(
    grpc::CallbackServerContext* context, const v1::ListModelsRequest* /*request*/,
    v1::ListModelsResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(Handle(metrics_, ServiceName(), "ListModels", [&] {
    for (v1::ModelVersion& version : registry_.List()) {
      *response->add_models() = std::move(version);
    }
    response->set_max_pictures(pipeline_.options().max_pictures);
    response->set_max_message_bytes(max_message_bytes_);
    return absl::OkStatus();
  }));
  return reactor;
}

}  // namespace pyramid
