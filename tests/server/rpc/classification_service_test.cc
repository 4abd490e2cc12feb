#include "server/rpc/classification_service.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "proto/base/key.h"
#include "server/rpc/handle.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/images.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/raw_call.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using testing::GreyPng;
using ::testing::HasSubstr;
using testing::Sample;

constexpr int64_t kMaxMessageBytes = 1 << 20;

// A real server on a free port of the loopback interface.
class ClassificationServiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ModelRegistry::Options options;
    options.folder = folder_ / "models";
    options.batching.max_batch = 1;
    options.batching.max_queue = 4;
    registry_ = std::make_unique<ModelRegistry>(options, testing::FakeLoader(network_),
                                                testing::PassingSelfTest, metrics_);
    ASSERT_OK(registry_->Start());
    ASSERT_OK(testing::WriteFakeCheckpoint(folder_ / "checkpoint", 0));
    ASSERT_OK(registry_->Promote(folder_ / "checkpoint", "fashion", ""));
    network_.Forget();
    pipeline_ = std::make_unique<ClassifyPipeline>(ClassifyPipeline::Options{.max_pictures = 4},
                                                   *registry_, metrics_);
    // Whoever shows this key may send 10 pictures a second; the server below lets everybody in.
    ASSERT_OK(WriteFileAtomically(
        folder_ / "keys.yaml",
        absl::StrCat("[{name: slow, sha256: ", KeyHash("slow-key"),
                     ", scopes: [infer], images_per_second: 10}, {name: fast, sha256: ",
                     KeyHash("fast-key"), ", scopes: [infer]}]")));
    auto access = Access::Create(
        {.keys = folder_ / "keys.yaml", .worker_secret = folder_ / "worker.secret"}, metrics_);
    ASSERT_OK(access);
    access_ = *std::move(access);
    rates_ = std::make_unique<RateGate>(*access_, *registry_);
    service_ = std::make_unique<ClassificationService>(*pipeline_, *registry_, metrics_,
                                                       kMaxMessageBytes, rates_.get());
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.SetMaxReceiveMessageSize(static_cast<int>(kMaxMessageBytes));
    service_->AddTo(large_calls_);
    builder.RegisterCallbackGenericService(&large_calls_);
    builder.RegisterService(service_.get());
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    address_ = absl::StrCat("127.0.0.1:", port);
    stub_ = v1::ClassificationService::NewStub(
        grpc::CreateChannel(address_, grpc::InsecureChannelCredentials()));
  }
  void TearDown() override {
    network_.Open();
    if (server_ != nullptr)
      server_->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(5));
    server_ = nullptr;
    pipeline_ = nullptr;
    registry_ = nullptr;
  }

  struct Reply {
    grpc::Status status;
    v1::ClassifyResponse response;
    std::multimap<std::string, std::string> trailers;
  };
  Reply Classify(const v1::ClassifyRequest& request, absl::Duration timeout = absl::Seconds(20)) {
    Reply reply;
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer slow-key");
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    reply.status = stub_->Classify(&context, request, &reply.response);
    for (const auto& [key, value] : context.GetServerTrailingMetadata()) {
      reply.trailers.emplace(std::string(key.data(), key.size()),
                             std::string(value.data(), value.size()));
    }
    return reply;
  }
  static v1::ClassifyRequest Request(int pictures) {
    v1::ClassifyRequest request;
    request.set_model("fashion");
    request.set_request_id("r-7");
    for (int i = 0; i < pictures; ++i) request.add_pictures()->set_encoded(GreyPng(32, 51));
    return request;
  }
  double OfRpc(const std::string& name) {
    return Sample(
        metrics_,
        absl::StrCat(
            name,
            R"({grpc_method="Classify",grpc_service="pyramid.v1.ClassificationService",grpc_type="unary"})"));
  }
  double Handled(const std::string& code) {
    return Sample(
        metrics_,
        absl::StrCat(
            R"(grpc_server_handled_total{grpc_code=")", code,
            R"(",grpc_method="Classify",grpc_service="pyramid.v1.ClassificationService",grpc_type="unary"})"));
  }

  testing::TempFolder folder_;
  testing::FakeNetwork network_;
  Metrics metrics_;
  std::unique_ptr<ModelRegistry> registry_;
  std::unique_ptr<ClassifyPipeline> pipeline_;
  std::unique_ptr<Access> access_;
  std::unique_ptr<RateGate> rates_;
  LargeCalls large_calls_;
  std::unique_ptr<ClassificationService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::unique_ptr<v1::ClassificationService::Stub> stub_;
};

TEST_F(ClassificationServiceTest, AnswersAndEchoesTheRequestId) {
  const Reply reply = Classify(Request(2));
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.response.request_id(), "r-7");
  EXPECT_EQ(reply.response.version(), 1);
  ASSERT_EQ(reply.response.results_size(), 2);
  EXPECT_EQ(reply.response.results(1).predictions(0).label(), "ankle boot");
  EXPECT_TRUE(reply.response.has_timings());
  EXPECT_EQ(Handled("OK"), 1);
  EXPECT_EQ(OfRpc("grpc_server_msg_received_total"), 1);
  EXPECT_EQ(OfRpc("grpc_server_msg_sent_total"), 1);
  EXPECT_EQ(OfRpc("grpc_server_handling_seconds_count"), 1);
  EXPECT_GT(OfRpc("grpc_server_handling_seconds_sum"), 0);
  EXPECT_LT(OfRpc("grpc_server_handling_seconds_sum"), 20);
  EXPECT_EQ(
      Sample(metrics_,
             R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage="receive"})"),
      1);
}

TEST_F(ClassificationServiceTest, RefusalsHaveTheirCodes) {
  EXPECT_EQ(Classify(Request(0)).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  const Reply many = Classify(Request(5));
  EXPECT_EQ(many.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(many.status.error_message(), HasSubstr("at most 4"));
  v1::ClassifyRequest request = Request(1);
  request.set_model("nosuch");
  EXPECT_EQ(Classify(request).status.error_code(), grpc::StatusCode::NOT_FOUND);
  request = Request(1);
  request.set_version(9);
  EXPECT_EQ(Classify(request).status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Handled("NotFound"), 2);
  EXPECT_EQ(Handled("InvalidArgument"), 2);
  EXPECT_EQ(OfRpc("grpc_server_msg_received_total"), 4);
  EXPECT_EQ(OfRpc("grpc_server_msg_sent_total"), 0) << "a status isn't a message";
}

TEST_F(ClassificationServiceTest, ABadPictureHasItsOwnCode) {
  v1::ClassifyRequest request = Request(1);
  request.add_pictures()->set_encoded("text");
  const Reply reply = Classify(request);
  ASSERT_TRUE(reply.status.ok());
  EXPECT_EQ(reply.response.results(0).code(), 0);
  EXPECT_EQ(reply.response.results(1).code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ClassificationServiceTest, LargeTensorsGoWhereTheyBelong) {
  v1::ClassifyRequest request = Request(1);
  request.set_return_logits(true);
  for (const float value : {0.25F, 0.75F}) {
    v1::ImageTensor& tensor = *request.add_pictures()->mutable_tensor();
    tensor.set_channels(1);
    tensor.set_height(129);
    tensor.set_width(151);
    for (int i = 0; i < 129 * 151; ++i) tensor.add_values(value);
  }
  request.mutable_pictures(2)->mutable_tensor()->set_values(
      17'000, std::numeric_limits<float>::quiet_NaN());
  request.add_pictures()->set_encoded(GreyPng(32, 51));
  const Reply reply = Classify(request);
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.response.request_id(), "r-7");
  ASSERT_EQ(reply.response.results_size(), 4);
  EXPECT_EQ(reply.response.results(0).code(), 0);
  EXPECT_FLOAT_EQ(reply.response.results(1).logits(0), 0.25F);
  EXPECT_EQ(reply.response.results(2).code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(reply.response.results(2).message(), HasSubstr("tensor.values[17000] isn't finite"));
  EXPECT_EQ(reply.response.results(3).logits(0), reply.response.results(0).logits(0));

  request.mutable_pictures(1)->mutable_tensor()->set_height(128);
  const Reply wrong = Classify(request);
  EXPECT_EQ(wrong.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(wrong.status.error_message(),
              HasSubstr("tensor.values has 19479 numbers; 1x128x151 is 19328"));
}

TEST_F(ClassificationServiceTest, AMessageOverTheLimitIsResourceExhausted) {
  v1::ClassifyRequest request;
  request.add_pictures()->set_encoded(std::string(kMaxMessageBytes + 1, 'x'));
  EXPECT_EQ(Classify(request).status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(ClassificationServiceTest, WhatCannotBeAnsweredIsRefusedBeforeItIsRead) {
  const auto unlimited = [&](const v1::ClassifyRequest& request) {
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer fast-key");
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
    v1::ClassifyResponse response;
    return stub_->Classify(&context, request, &response);
  };
  for (int i = 0; i < 32; ++i) ASSERT_EQ(unlimited(Request(1)).error_message(), "");
  v1::ClassifyRequest unreadable;
  unreadable.add_pictures()->set_encoded(std::string(kMaxMessageBytes + 1, 'x'));
  EXPECT_THAT(unlimited(unreadable).error_message(), HasSubstr("larger"));
  {
    ASSERT_OK_AND_ASSIGN(const auto model, registry_->Find("fashion", 0));
    const auto full = model->batcher().Admit({.pictures = 4});
    ASSERT_OK(full);
    const grpc::Status refused = unlimited(unreadable);
    EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_THAT(refused.error_message(), HasSubstr("the queue is full: 4 of 4"));
    EXPECT_EQ(Handled("ResourceExhausted"), 1) << "those that can't be read never get here";
  }
  EXPECT_TRUE(unlimited(Request(1)).ok());
}

TEST_F(ClassificationServiceTest, AMessageThatIsNoneIsInvalidArgument) {
  const auto channel = grpc::CreateChannel(address_, grpc::InsecureChannelCredentials());
  const std::string path = "/pyramid.v1.ClassificationService/Classify";
  const grpc::Status garbage = testing::RawCall(channel, path, "\xff\xff\xff");
  EXPECT_EQ(garbage.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(garbage.error_message(), HasSubstr("pyramid.v1.ClassifyRequest"));
  EXPECT_EQ(testing::RawCall(channel, path + "More", "").error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(ClassificationServiceTest, AFullQueueTellsWhenToComeBack) {
  network_.Shut();
  std::thread first([&] { Classify(Request(1)); });
  ASSERT_TRUE(network_.AwaitBatches(1));
  std::thread second([&] { Classify(Request(4)); });
  while (Sample(metrics_, R"(pyramid_serving_queue_images{model="fashion"})") < 4) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  const Reply reply = Classify(Request(1));
  network_.Open();
  first.join();
  second.join();
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  ASSERT_EQ(reply.trailers.count(kPushbackKey), 1u);
  int millis = 0;
  ASSERT_TRUE(absl::SimpleAtoi(reply.trailers.find(kPushbackKey)->second, &millis));
  EXPECT_GT(millis, 0);
  EXPECT_EQ(Classify(Request(0)).trailers.count(kPushbackKey), 0u);
}

TEST_F(ClassificationServiceTest, PicturesOverTheKeysRateAreRefusedAndCounted) {
  ASSERT_TRUE(Classify(Request(4)).status.ok());
  ASSERT_TRUE(Classify(Request(4)).status.ok());
  const int before = network_.pictures();
  const Reply refused = Classify(Request(4));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused.status.error_message(), HasSubstr("the key slow may send 10 images"));
  ASSERT_EQ(refused.trailers.count(kPushbackKey), 1u);
  int millis = 0;
  ASSERT_TRUE(absl::SimpleAtoi(refused.trailers.find(kPushbackKey)->second, &millis));
  EXPECT_GT(millis, 0);
  EXPECT_LE(millis, 200);
  EXPECT_EQ(network_.pictures(), before);
  EXPECT_EQ(
      Sample(metrics_, R"(pyramid_serving_rejected_images_total{model="fashion",reason="rate"})"),
      4);
  absl::SleepFor(absl::Milliseconds(millis));
  EXPECT_TRUE(Classify(Request(4)).status.ok()) << "it came back when it was told to";
}

TEST_F(ClassificationServiceTest, TheRequestsOwnIdIsInTheTrailers) {
  const Reply reply = Classify(Request(1));
  ASSERT_EQ(reply.trailers.count("x-request-id"), 1u);
  EXPECT_EQ(reply.trailers.find("x-request-id")->second, "r-7");
  v1::ClassifyRequest odd = Request(1);
  odd.set_request_id("no\nheader");
  EXPECT_EQ(Classify(odd).trailers.count("x-request-id"), 0u);
}

TEST_F(ClassificationServiceTest, ADeadlineThatPassesInTheQueueCostsNoForward) {
  network_.Shut();
  std::thread first([&] { Classify(Request(1)); });
  ASSERT_TRUE(network_.AwaitBatches(1));
  EXPECT_EQ(Classify(Request(2), absl::Milliseconds(50)).status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  absl::SleepFor(absl::Milliseconds(200));  // by the server's clock it passes later
  network_.Open();
  first.join();
  EXPECT_TRUE(pipeline_->Drain(absl::Now() + absl::Seconds(10)));
  EXPECT_EQ(network_.pictures(), 1);
  EXPECT_EQ(Sample(metrics_,
                   R"(pyramid_serving_rejected_images_total{model="fashion",reason="expired"})"),
            2);
}

TEST_F(ClassificationServiceTest, ACancelledCallCostsNoForward) {
  network_.Shut();
  std::thread first([&] { Classify(Request(1)); });
  ASSERT_TRUE(network_.AwaitBatches(1));
  grpc::ClientContext context;
  context.AddMetadata("authorization", "Bearer slow-key");
  std::thread second([&] {
    v1::ClassifyResponse response;
    EXPECT_EQ(stub_->Classify(&context, Request(1), &response).error_code(),
              grpc::StatusCode::CANCELLED);
  });
  while (Sample(metrics_, R"(pyramid_serving_queue_images{model="fashion"})") < 1) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  context.TryCancel();
  second.join();
  absl::SleepFor(absl::Milliseconds(200));  // the server's side hears of it
  network_.Open();
  first.join();
  EXPECT_TRUE(pipeline_->Drain(absl::Now() + absl::Seconds(10)));
  EXPECT_EQ(network_.pictures(), 1);
  EXPECT_EQ(Handled("Canceled"), 1);
}

TEST_F(ClassificationServiceTest, DrainingIsUnavailable) {
  EXPECT_TRUE(pipeline_->Drain(absl::Now() + absl::Seconds(10)));
  EXPECT_EQ(Classify(Request(1)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(ClassificationServiceTest, ListsModelsAndLimits) {
  grpc::ClientContext context;
  v1::ListModelsResponse response;
  ASSERT_TRUE(stub_->ListModels(&context, {}, &response).ok());
  ASSERT_EQ(response.models_size(), 1);
  EXPECT_EQ(response.models(0).name(), "fashion");
  EXPECT_TRUE(response.models(0).serving());
  EXPECT_EQ(response.max_pictures(), 4);
  EXPECT_EQ(response.max_message_bytes(), kMaxMessageBytes);
}

}  // namespace
}  // namespace pyramid
