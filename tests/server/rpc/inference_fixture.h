// The Open Inference Protocol over fake networks (tests/testing/fake_classifier.h): the logit of
// class c is the picture's mean - c. And requests for it.
#ifndef PYRAMID_TESTS_SERVER_RPC_INFERENCE_FIXTURE_H_
#define PYRAMID_TESTS_SERVER_RPC_INFERENCE_FIXTURE_H_

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "proto/open_inference.pb.h"
#include "server/rpc/infer_request.h"
#include "server/rpc/open_inference.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/images.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid::testing {

inline constexpr int kSide = 32;
inline constexpr int kMaxPictures = 4;
inline constexpr int kQueue = 4;

inline std::string RawFloats(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}
inline std::vector<float> FloatsOf(const std::string& raw) {
  std::vector<float> values(raw.size() / sizeof(float));
  std::memcpy(values.data(), raw.data(), values.size() * sizeof(float));
  return values;
}
inline std::vector<std::string> TextsOf(const std::string& raw) {
  std::vector<std::string> texts;
  const auto elements = SplitBytesElements(raw, raw.size());
  EXPECT_OK(elements.status());
  if (elements.ok()) {
    for (const absl::string_view element : *elements) texts.emplace_back(element);
  }
  return texts;
}

// `batch` grey pictures of this value, as a raw FP32 tensor.
inline inference::ModelInferRequest TensorRequest(int batch, float value = 0.5F) {
  inference::ModelInferRequest request;
  request.set_model_name("fashion");
  request.set_id("r-7");
  auto& input = *request.add_inputs();
  input.set_name("image");
  input.set_datatype("FP32");
  for (const int dimension : {batch, 1, kSide, kSide}) input.add_shape(dimension);
  request.add_raw_input_contents(
      RawFloats(std::vector<float>(static_cast<size_t>(batch * kSide * kSide), value)));
  return request;
}

// Files, as a raw BYTES tensor.
inline inference::ModelInferRequest FilesRequest(const std::vector<std::string>& files) {
  inference::ModelInferRequest request;
  request.set_model_name("fashion");
  auto& input = *request.add_inputs();
  input.set_name("image");
  input.set_datatype("BYTES");
  input.add_shape(static_cast<int64_t>(files.size()));
  input.add_shape(1);
  std::string& raw = *request.add_raw_input_contents();
  for (const std::string& file : files) AppendBytesElement(file, raw);
  return request;
}

// Asks for an output; `classes` 0: the vector.
inline void WantOutput(inference::ModelInferRequest& request, const std::string& name,
                       int64_t classes = 0) {
  auto& output = *request.add_outputs();
  output.set_name(name);
  if (classes > 0) (*output.mutable_parameters())["classification"].set_int64_param(classes);
}

// A model "fashion", a batch of one picture at a time, room for four.
class InferenceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ModelRegistry::Options options;
    options.folder = folder_ / "models";
    options.batching.max_batch = 1;
    options.batching.max_queue = kQueue;
    registry_ =
        std::make_unique<ModelRegistry>(options, FakeLoader(network_), PassingSelfTest, metrics_);
    ASSERT_OK(registry_->Start());
    Promote("fashion", 0);
    pipeline_ = std::make_unique<ClassifyPipeline>(
        ClassifyPipeline::Options{.max_pictures = kMaxPictures}, *registry_, metrics_);
    protocol_ = std::make_unique<OpenInference>(
        OpenInference::Options{.server_version = "1.2.3",
                               .max_message_bytes = 1 << 20,
                               .batching = options.batching,
                               .ready = [this] { return ready_.load(); }},
        *pipeline_, *registry_);
  }
  void TearDown() override {
    network_.Open();
    protocol_ = nullptr;
    pipeline_ = nullptr;
    registry_ = nullptr;
  }

  // Another version of a model.
  void Promote(const std::string& name, int bias) {
    const auto checkpoint = folder_ / absl::StrCat("checkpoint", bias);
    ASSERT_OK(WriteFakeCheckpoint(checkpoint, bias));
    ASSERT_OK(registry_->Promote(checkpoint, name, "").status());
    network_.Forget();
  }

  absl::StatusOr<inference::ModelInferResponse> Infer(const inference::ModelInferRequest& request,
                                                      OpenInference::Caller caller = {}) {
    absl::StatusOr<inference::ModelInferResponse> answer;
    absl::Notification done;
    protocol_->Infer(request, std::move(caller),
                     [&](absl::StatusOr<inference::ModelInferResponse> result) {
                       answer = std::move(result);
                       done.Notify();
                     });
    EXPECT_TRUE(done.WaitForNotificationWithTimeout(absl::Seconds(20)));
    return answer;
  }

  TempFolder folder_;
  FakeNetwork network_;
  Metrics metrics_;
  std::atomic<bool> ready_{true};
  std::unique_ptr<ModelRegistry> registry_;
  std::unique_ptr<ClassifyPipeline> pipeline_;
  std::unique_ptr<OpenInference> protocol_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_SERVER_RPC_INFERENCE_FIXTURE_H_
