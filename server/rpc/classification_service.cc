#include "server/rpc/classification_service.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/rpc/handle.h"
#include "server/serving/pushback.h"

namespace pyramid {
namespace {

const char* ServiceName() { return v1::ClassificationService::service_full_name(); }

// The client's deadline; a client that sets none has the largest time there is.
absl::Time DeadlineOf(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  return deadline == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture()
                                                                  : absl::FromChrono(deadline);
}

// Lives from the call's arrival to gRPC's OnDone.
class ClassifyReactor final : public grpc::ServerUnaryReactor {
 public:
  ClassifyReactor(grpc::CallbackServerContext& context, v1::ClassifyResponse& response,
                  Metrics& metrics)
      : context_(context), response_(response), call_(metrics, ServiceName(), "Classify") {}

  void Run(ClassifyPipeline& pipeline, const v1::ClassifyRequest& request) {
    // Nothing of this object may be touched after Finish, which may come before Classify returns.
    pipeline.Classify(request, DeadlineOf(context_), cancelled_,
                      [this](absl::StatusOr<v1::ClassifyResponse> result) {
                        if (result.ok()) response_ = *std::move(result);
                        const int64_t pushback = PushbackMillis(result.status());
                        if (pushback >= 0) {
                          context_.AddTrailingMetadata(kPushbackKey, absl::StrCat(pushback));
                        }
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
                                             int64_t max_message_bytes)
    : pipeline_(pipeline),
      registry_(registry),
      metrics_(metrics),
      max_message_bytes_(max_message_bytes) {}

grpc::ServerUnaryReactor* ClassificationService::Classify(grpc::CallbackServerContext* context,
                                                          const v1::ClassifyRequest* request,
                                                          v1::ClassifyResponse* response) {
  auto* reactor = new ClassifyReactor(*context, *response, metrics_);  // deletes itself in OnDone
  reactor->Run(pipeline_, *request);
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
