// The way of a Classify request from its bytes on: protobuf, admission, decoding, preprocessing,
// batch, ranking, with a network that a test understands. gRPC itself is left out.
#include <memory>
#include <string>

#include "absl/synchronization/notification.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "proto/classification.pb.h"
#include "server/metrics.h"
#include "server/serving/classify.h"
#include "server/serving/model_registry.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using fuzz::Require;

// One served model "fashion" of three classes.
class Service {
 public:
  Service() {
    log::Configure(log::Level::kOff);
    google::protobuf::SetLogHandler(nullptr);
    ModelRegistry::Options registry;
    registry.folder = folder_ / "models";
    registry_ = std::make_unique<ModelRegistry>(registry, testing::FakeLoader(network_),
                                                testing::PassingSelfTest, metrics_);
    Require(registry_->Start().ok(), "the registry starts");
    Require(testing::WriteFakeCheckpoint(folder_ / "checkpoint", 0).ok(), "a checkpoint is made");
    Require(registry_->Promote(folder_ / "checkpoint", "fashion", "").ok(), "and promoted");
    ClassifyPipeline::Options options;
    options.max_pictures = 8;
    options.decode_threads = 1;
    // Pictures larger than these are refused by their headers; ones up to these stay within the
    // memory bound, decoded twice over.
    options.decode.max_pixels = 4'000'000;
    options.decode.max_side = 8192;
    pipeline_ = std::make_unique<ClassifyPipeline>(options, *registry_, metrics_);
  }

  absl::StatusOr<v1::ClassifyResponse> Classify(const v1::ClassifyRequest& request) {
    absl::Notification answered;
    absl::StatusOr<v1::ClassifyResponse> result;
    pipeline_->Classify(request, absl::InfiniteFuture(), nullptr,
                        [&](absl::StatusOr<v1::ClassifyResponse> response) {
                          result = std::move(response);
                          answered.Notify();
                        });
    answered.WaitForNotification();
    network_.Forget();
    return result;
  }

 private:
  testing::TempFolder folder_;
  testing::FakeNetwork network_;
  Metrics metrics_;
  std::unique_ptr<ModelRegistry> registry_;
  std::unique_ptr<ClassifyPipeline> pipeline_;
};

void CheckResult(const v1::PictureResult& result) {
  if (result.code() != 0) {
    Require(!result.message().empty(), "a refused picture says why");
    return;
  }
  Require(result.predictions_size() >= 1 && result.predictions_size() <= 3,
          "one to three predictions");
  for (const v1::Prediction& prediction : result.predictions()) {
    Require(prediction.probability() >= 0 && prediction.probability() <= 1,
            "a probability lies in 0..1");
  }
}

}  // namespace
}  // namespace pyramid

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static pyramid::Service service;
  pyramid::v1::ClassifyRequest request;
  if (!request.ParseFromArray(data, static_cast<int>(size))) return 0;
  const auto response = service.Classify(request);
  if (!response.ok()) return 0;
  pyramid::fuzz::Require(response->results_size() == request.pictures_size(),
                         "one result a picture");
  pyramid::fuzz::Require(response->request_id() == request.request_id(), "the id comes back");
  for (const auto& result : response->results()) pyramid::CheckResult(result);
  return 0;
}
