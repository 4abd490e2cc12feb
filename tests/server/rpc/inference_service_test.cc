#include "server/rpc/inference_service.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/time/clock.h"
#include "server/rpc/handle.h"
#include "tests/server/rpc/inference_fixture.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::InferenceTest;
using testing::kQueue;
using testing::Sample;
using testing::TensorRequest;

constexpr int kMaxMessageBytes = 1 << 20;

// A real server on a free port of the loopback interface.
class InferenceServiceTest : public InferenceTest {
 protected:
  using Stub = inference::GRPCInferenceService::Stub;

  void SetUp() override {
    InferenceTest::SetUp();
    service_ = std::make_unique<InferenceService>(*protocol_, metrics_);
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    service_->AddTo(large_calls_);
    builder.RegisterCallbackGenericService(&large_calls_);
    builder.RegisterService(service_.get());
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    stub_ = inference::GRPCInferenceService::NewStub(
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials()));
  }
  void TearDown() override {
    network_.Open();
    if (server_ != nullptr) {
      server_->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(5));
    }
    server_ = nullptr;
    InferenceTest::TearDown();
  }

  struct Reply {
    grpc::Status status;
    inference::ModelInferResponse response;
    std::multimap<std::string, std::string> trailers;
  };
  Reply Call(const inference::ModelInferRequest& request,
             absl::Duration timeout = absl::Seconds(20)) {
    Reply reply;
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    reply.status = stub_->ModelInfer(&context, request, &reply.response);
    for (const auto& [key, value] : context.GetServerTrailingMetadata()) {
      reply.trailers.emplace(std::string(key.data(), key.size()),
                             std::string(value.data(), value.size()));
    }
    return reply;
  }
  // The code of an RPC with this request.
  template <typename Request, typename Response>
  grpc::StatusCode CodeOf(grpc::Status (Stub::*rpc)(grpc::ClientContext*, const Request&,
                                                    Response*),
                          const Request& request, Response* response) {
    grpc::ClientContext context;
    return (stub_.get()->*rpc)(&context, request, response).error_code();
  }
  double Handled(const std::string& method, const std::string& code) {
    return Sample(
        metrics_,
        absl::StrCat(R"(grpc_server_handled_total{grpc_code=")", code, R"(",grpc_method=")", method,
                     R"(",grpc_service="inference.GRPCInferenceService",grpc_type="unary"})"));
  }

  LargeCalls large_calls_;
  std::unique_ptr<InferenceService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Stub> stub_;
};

TEST_F(InferenceServiceTest, AnswersAndEchoesTheId) {
  EXPECT_EQ(Handled("ModelInfer", "OK"), 0) << "the series is there from the start";
  const Reply reply = Call(TensorRequest(2));
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.response.id(), "r-7");
  EXPECT_EQ(reply.response.outputs_size(), 1);
  EXPECT_EQ(reply.response.raw_output_contents(0).size(), 2 * 3 * sizeof(float));
  EXPECT_EQ(Handled("ModelInfer", "OK"), 1);
}

TEST_F(InferenceServiceTest, RefusalsHaveTheirCodes) {
  inference::ModelInferRequest request = TensorRequest(1);
  request.set_model_name("nosuch");
  EXPECT_EQ(Call(request).status.error_code(), grpc::StatusCode::NOT_FOUND);
  request = TensorRequest(1);
  request.set_model_version("9");
  EXPECT_EQ(Call(request).status.error_code(), grpc::StatusCode::NOT_FOUND);
  request.set_model_version("-9");
  EXPECT_EQ(Call(request).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  const Reply many = Call(TensorRequest(5));
  EXPECT_EQ(many.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(many.status.error_message(), HasSubstr("at most 4"));
  network_.Fail(absl::InternalError("the network failed"));
  EXPECT_EQ(Call(TensorRequest(1)).status.error_code(), grpc::StatusCode::INTERNAL);
}

// Beyond 8 KiB of trailing metadata a client sees RESOURCE_EXHAUSTED, and would come again.
TEST_F(InferenceServiceTest, AShapeOfManyDimensionsIsInvalid) {
  inference::ModelInferRequest request = TensorRequest(1);
  request.mutable_inputs(0)->mutable_shape()->Resize(5000, 1'000'000);
  const Reply reply = Call(request);
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(reply.status.error_message(), HasSubstr("has 5000 dimensions"));
}

TEST_F(InferenceServiceTest, LargeTensorsGoWhereTheyBelong) {
  inference::ModelInferRequest request = TensorRequest(1);
  request.mutable_inputs(0)->clear_shape();
  for (const int dimension : {2, 1, 120, 130}) request.mutable_inputs(0)->add_shape(dimension);
  std::vector<float> values(2 * 120 * 130, 0.25F);
  std::fill(values.begin() + 120 * 130, values.end(), 0.75F);
  request.set_raw_input_contents(0, testing::RawFloats(values));
  testing::WantOutput(request, "logits");
  const Reply reply = Call(request);
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  const std::vector<float> logits = testing::FloatsOf(reply.response.raw_output_contents(0));
  ASSERT_EQ(logits.size(), 6u);
  EXPECT_FLOAT_EQ(logits[0], 0.25F);
  EXPECT_FLOAT_EQ(logits[3], 0.75F);

  request.mutable_inputs(0)->set_shape(2, 121);
  EXPECT_THAT(Call(request).status.error_message(),
              HasSubstr("there are 124800 bytes of data; shape [2,1,121,130] of FP32"));
  request.add_raw_input_contents("more");
  EXPECT_THAT(Call(request).status.error_message(), HasSubstr("raw_input_contents has 2 entries"));
}

TEST_F(InferenceServiceTest, LargeFilesAreWhole) {
  std::string file = testing::GoldenImage("portrait.png");
  file.resize((file.size() + 3) / 4 * 4);  // as tensors are, so that they are taken for one first
  inference::ModelInferRequest request = testing::FilesRequest({file, file});
  testing::WantOutput(request, "logits");
  ASSERT_GT(request.ByteSizeLong(), 64u << 10);
  const Reply reply = Call(request);
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  const std::vector<float> logits = testing::FloatsOf(reply.response.raw_output_contents(0));
  ASSERT_EQ(logits.size(), 6u);
  EXPECT_EQ(logits[0], logits[3]);
}

TEST_F(InferenceServiceTest, AMessageOverTheLimitIsResourceExhausted) {
  inference::ModelInferRequest request = TensorRequest(1);
  request.set_raw_input_contents(0, std::string(kMaxMessageBytes + 1, 'x'));
  EXPECT_EQ(Call(request).status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(InferenceServiceTest, AFullQueueTellsWhenToComeBack) {
  network_.Shut();
  std::thread first([&] { Call(TensorRequest(1)); });
  ASSERT_TRUE(network_.AwaitBatches(1));
  std::thread second([&] { Call(TensorRequest(kQueue)); });
  while (Sample(metrics_, R"(pyramid_serving_queue_images{model="fashion"})") < kQueue) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  const Reply reply = Call(TensorRequest(1));
  network_.Open();
  first.join();
  second.join();
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  ASSERT_EQ(reply.trailers.count(kPushbackKey), 1u);
  int millis = 0;
  ASSERT_TRUE(absl::SimpleAtoi(reply.trailers.find(kPushbackKey)->second, &millis));
  EXPECT_GT(millis, 0);
}

TEST_F(InferenceServiceTest, DeadlinesAndCancellationsCostNoForward) {
  network_.Shut();
  std::thread first([&] { Call(TensorRequest(1)); });
  ASSERT_TRUE(network_.AwaitBatches(1));
  EXPECT_EQ(Call(TensorRequest(2), absl::Milliseconds(50)).status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  grpc::ClientContext context;
  std::thread second([&] {
    inference::ModelInferResponse response;
    EXPECT_EQ(stub_->ModelInfer(&context, TensorRequest(1), &response).error_code(),
              grpc::StatusCode::CANCELLED);
  });
  while (Sample(metrics_, R"(pyramid_serving_queue_images{model="fashion"})") < 3) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  context.TryCancel();
  second.join();
  absl::SleepFor(absl::Milliseconds(200));  // the server's side hears of it
  network_.Open();
  first.join();
  EXPECT_TRUE(pipeline_->Drain(absl::Now() + absl::Seconds(10)));
  EXPECT_EQ(network_.pictures(), 1);
  EXPECT_EQ(Handled("ModelInfer", "Canceled"), 1);
  EXPECT_EQ(Call(TensorRequest(1)).status.error_code(), grpc::StatusCode::UNAVAILABLE)
      << "draining";
}

TEST_F(InferenceServiceTest, EveryOtherCallAnswers) {
  inference::ServerLiveResponse live;
  EXPECT_EQ(CodeOf(&Stub::ServerLive, {}, &live), grpc::OK);
  EXPECT_TRUE(live.live());
  inference::ServerReadyResponse ready;
  EXPECT_EQ(CodeOf(&Stub::ServerReady, {}, &ready), grpc::OK);
  EXPECT_TRUE(ready.ready());
  inference::ModelReadyRequest model;
  model.set_name("fashion");
  inference::ModelReadyResponse model_ready;
  EXPECT_EQ(CodeOf(&Stub::ModelReady, model, &model_ready), grpc::OK);
  EXPECT_TRUE(model_ready.ready());
  inference::ServerMetadataResponse server;
  EXPECT_EQ(CodeOf(&Stub::ServerMetadata, {}, &server), grpc::OK);
  EXPECT_EQ(server.name(), "pyramid");
  inference::ModelMetadataRequest wanted;
  inference::ModelMetadataResponse metadata;
  wanted.set_name("fashion");
  EXPECT_EQ(CodeOf(&Stub::ModelMetadata, wanted, &metadata), grpc::OK);
  EXPECT_EQ(metadata.inputs_size(), 1);
  wanted.set_name("nosuch");
  EXPECT_EQ(CodeOf(&Stub::ModelMetadata, wanted, &metadata), grpc::NOT_FOUND);
  inference::ModelConfigRequest config_request;
  inference::ModelConfigResponse config;
  config_request.set_name("fashion");
  EXPECT_EQ(CodeOf(&Stub::ModelConfig, config_request, &config), grpc::OK);
  EXPECT_GT(config.config().max_batch_size(), 0);
  inference::ModelStatisticsResponse statistics;
  EXPECT_EQ(CodeOf(&Stub::ModelStatistics, {}, &statistics), grpc::OK);
  EXPECT_EQ(statistics.model_stats_size(), 1);
  inference::RepositoryIndexResponse index;
  EXPECT_EQ(CodeOf(&Stub::RepositoryIndex, {}, &index), grpc::OK);
  EXPECT_EQ(index.models_size(), 1);
  inference::RepositoryModelUnloadRequest unload;
  inference::RepositoryModelUnloadResponse unloaded;
  unload.set_model_name("fashion");
  EXPECT_EQ(CodeOf(&Stub::RepositoryModelUnload, unload, &unloaded), grpc::OK);
  EXPECT_EQ(Call(TensorRequest(1)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  inference::RepositoryModelLoadRequest load;
  inference::RepositoryModelLoadResponse loaded;
  load.set_model_name("fashion");
  EXPECT_EQ(CodeOf(&Stub::RepositoryModelLoad, load, &loaded), grpc::OK);
  EXPECT_TRUE(Call(TensorRequest(1)).status.ok());
  EXPECT_EQ(Handled("ModelStatistics", "OK"), 1);
}

}  // namespace
}  // namespace pyramid
