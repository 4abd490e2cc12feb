#include "server/rpc/classification_service.h"

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "server/rpc/handle.h"
#include "server/security/grpc_credentials.h"

namespace pyramid {
namespace {

constexpr std::array<int, 3> kTensorValues = {v1::ClassifyRequest::kPicturesFieldNumber,
                                              v1::Picture::kTensorFieldNumber,
                                              v1::ImageTensor::kValuesFieldNumber};

const char* ServiceName() { return v1::ClassificationService::service_full_name(); }

class ClassifyCall final : public LargeCall<v1::ClassifyRequest, v1::ClassifyResponse> {
 public:
  ClassifyCall(grpc::GenericCallbackServerContext& context, ClassifyPipeline& pipeline,
               Metrics& metrics, const RateGate* rates)
      : LargeCall(context, metrics, ServiceName(), "Classify", kTensorValues),
        pipeline_(pipeline),
        rates_(rates) {}

 private:
  absl::StatusOr<Door::Pass> EnterDoor() override {
    return pipeline_.EnterDoor(DeadlineOf(context()));
  }

  void Run() override {
    AddRequestId(request().request_id(), context());
    pipeline_.Received(request().model(), received());
    if (rates_ != nullptr) {
      const absl::Status passed =
          rates_->Pass(CredentialsOf(context()), request().model(), request().pictures_size());
      if (!passed.ok()) return Answer(passed);
    }
    std::vector<PictureView> pictures = ViewsOf(request());
    for (LargeField& values : large()) {
      PictureView& picture = pictures[static_cast<size_t>(values.index)];
      // Of a picture that isn't a tensor in the end, they don't count.
      if (picture.kind == PictureView::Kind::kFloats) picture.bytes = std::move(values.bytes);
    }
    pipeline_.Classify(
        request(), std::move(pictures), DeadlineOf(context()), cancelled(),
        [this](absl::StatusOr<v1::ClassifyResponse> result) { Answer(std::move(result)); });
  }

  void Sent(absl::Duration time) override { pipeline_.Sent(time); }

  ClassifyPipeline& pipeline_;
  const RateGate* const rates_;
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

void ClassificationService::AddTo(LargeCalls& calls) {
  calls.Add(ServiceName(), "Classify", [this](grpc::GenericCallbackServerContext& context) {
    return new ClassifyCall(context, pipeline_, metrics_, rates_);
  });
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
