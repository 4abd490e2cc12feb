// The Open Inference Protocol through the real server: perf_analyzer's sequence of calls and every
// row of what makes it fail (docs/open-inference.md), both transports against the native service.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <httplib.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "proto/open_inference.grpc.pb.h"
#include "tests/integration/cluster.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/weight_file.h"

namespace pyramid {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kSide = 32;  // of pictures sent as floats; the model's own is 224
constexpr int kClasses = 10;

std::string Picture(const std::string& name) {
  return ReadFile(absl::StrCat(PYRAMID_SOURCE_DIR, "/tests/golden/images/", name)).value();
}

std::vector<float> FloatsOf(const std::string& raw) {
  std::vector<float> values(raw.size() / sizeof(float));
  std::memcpy(values.data(), raw.data(), values.size() * sizeof(float));
  return values;
}

std::string Element(const std::string& bytes) {  // of a BYTES tensor
  const auto length = static_cast<uint32_t>(bytes.size());
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + bytes;
}

// A server whose only model, "formula", has formula weights.
class FormulaServer {
 public:
  explicit FormulaServer(const std::string& yaml = "") {
    EXPECT_OK(testing::WriteFormulaFile(cluster.folder() / "in.safetensors"));
    std::filesystem::create_directories(cluster.data() / "models/formula");
    const testing::RunResult convert =
        cluster.Cli({"convert", (cluster.folder() / "in.safetensors").string(),
                     (cluster.data() / "models/formula/1").string()});
    EXPECT_EQ(convert.exit_code, 0) << convert.err;
    if (!yaml.empty()) std::ofstream(cluster.folder() / "server.yaml") << yaml;
    cluster.Start();
    stub = inference::GRPCInferenceService::NewStub(
        grpc::CreateChannel(cluster.grpc_address(), grpc::InsecureChannelCredentials()));
  }
  testing::Cluster cluster;
  std::unique_ptr<inference::GRPCInferenceService::Stub> stub;
};

// The tests share a server; those that need their own make one with Use.
class OpenInferenceServerTest : public ::testing::Test {
 protected:
  using Stub = inference::GRPCInferenceService::Stub;

  static void TearDownTestSuite() { shared_ = nullptr; }
  void SetUp() override {
    if (shared_ == nullptr) shared_ = std::make_unique<FormulaServer>();
    server_ = shared_.get();
  }
  void TearDown() override { own_ = nullptr; }
  void Use(const std::string& yaml) {
    own_ = std::make_unique<FormulaServer>(yaml);
    server_ = own_.get();
  }
  testing::Cluster& cluster() { return server_->cluster; }

  // Calls an RPC that has to work.
  template <typename Request, typename Response>
  Response Call(grpc::Status (Stub::*rpc)(grpc::ClientContext*, const Request&, Response*),
                const Request& request) {
    grpc::ClientContext context;
    Response response;
    const grpc::Status status = (server_->stub.get()->*rpc)(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  grpc::Status Infer(const inference::ModelInferRequest& request,
                     inference::ModelInferResponse* response) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    return server_->stub->ModelInfer(&context, request, response);
  }
  inference::ModelStatistics Statistics() {
    inference::ModelStatisticsRequest request;
    request.set_name("formula");
    const auto response = Call(&Stub::ModelStatistics, request);
    EXPECT_EQ(response.model_stats_size(), 1);
    return response.model_stats_size() == 1 ? response.model_stats(0)
                                            : inference::ModelStatistics();
  }

  // As perf_analyzer sends it: raw, with an id, and a parameter that nobody here knows.
  static inference::ModelInferRequest FloatRequest(const std::string& id, int batch = 1) {
    inference::ModelInferRequest request;
    request.set_model_name("formula");
    request.set_id(id);
    (*request.mutable_parameters())["triton_enable_empty_final_response"].set_bool_param(true);
    auto& input = *request.add_inputs();
    input.set_name("image");
    input.set_datatype("FP32");
    for (const int dimension : {batch, 3, kSide, kSide}) input.add_shape(dimension);
    std::vector<float> values(static_cast<size_t>(batch * 3 * kSide * kSide));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 97) / 97;
    request.add_raw_input_contents(reinterpret_cast<const char*>(values.data()),
                                   values.size() * sizeof(float));
    request.add_outputs()->set_name("probabilities");
    return request;
  }
  static inference::ModelInferRequest FileRequest(const std::vector<std::string>& elements) {
    inference::ModelInferRequest request;
    request.set_model_name("formula");
    auto& input = *request.add_inputs();
    input.set_name("image");
    input.set_datatype("BYTES");
    input.add_shape(static_cast<int64_t>(elements.size()));
    input.add_shape(1);
    std::string& raw = *request.add_raw_input_contents();
    for (const std::string& element : elements) raw += element;
    request.add_outputs()->set_name("logits");
    return request;
  }
  std::vector<float> NativeLogits(const std::string& file) {
    v1::ClassifyRequest request;
    request.add_pictures()->set_encoded(file);
    request.set_return_logits(true);
    grpc::ClientContext context;
    v1::ClassifyResponse response;
    EXPECT_TRUE(cluster().classification().Classify(&context, request, &response).ok());
    return {response.results(0).logits().begin(), response.results(0).logits().end()};
  }
  httplib::Client Http() {
    httplib::Client client("http://" + cluster().http_address());
    client.set_read_timeout(30);
    client.set_keep_alive(true);
    client.set_tcp_nodelay(true);
    return client;
  }

  inline static std::unique_ptr<FormulaServer> shared_;
  std::unique_ptr<FormulaServer> own_;
  FormulaServer* server_ = nullptr;
};

TEST_F(OpenInferenceServerTest, PerfAnalyzersSequenceOfCalls) {
  // 1 and 2: metadata and configuration.
  inference::ModelMetadataRequest metadata_request;
  metadata_request.set_name("formula");
  const auto metadata = Call(&Stub::ModelMetadata, metadata_request);
  inference::ModelConfigRequest config_request;
  config_request.set_name("formula");
  const auto config = Call(&Stub::ModelConfig, config_request);
  // No config, or max_batch_size 0: "contains dynamic shape", and it stops.
  ASSERT_TRUE(config.has_config());
  EXPECT_EQ(config.config().max_batch_size(), 64);
  ASSERT_EQ(metadata.inputs_size(), 1);
  ASSERT_EQ(config.config().input_size(), 1);
  // Without the leading -1 it strips the first real dimension and sends wrong shapes.
  EXPECT_THAT(metadata.inputs(0).shape(), ElementsAre(-1, 3, 224, 224));
  EXPECT_THAT(config.config().input(0).dims(), ElementsAre(3, 224, 224));
  EXPECT_EQ(metadata.inputs(0).datatype(), "FP32");
  EXPECT_THAT(metadata.outputs(0).shape(), ElementsAre(-1, kClasses));

  // 3: extensions. If statistics is among them, the call has to work.
  const auto server = Call(&Stub::ServerMetadata, {});
  const std::set<std::string> extensions(server.extensions().begin(), server.extensions().end());
  ASSERT_EQ(extensions.count("statistics"), 1u);

  // 4: statistics before; the version is read with stoll, and anything else ends the tool.
  const inference::ModelStatistics before = Statistics();
  int64_t version = 0;
  EXPECT_TRUE(absl::SimpleAtoi(before.version(), &version)) << before.version();

  // 5: requests, sync and async. Async answers are found by their id; without it the tool hangs.
  constexpr int kRequests = 20;
  for (int i = 0; i < kRequests; ++i) {
    inference::ModelInferResponse response;
    const grpc::Status status = Infer(FloatRequest(absl::StrCat(i)), &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(response.id(), absl::StrCat(i));
    ASSERT_EQ(response.raw_output_contents_size(), 1) << "raw, whatever the request was";
    EXPECT_EQ(response.raw_output_contents(0).size(), kClasses * sizeof(float));
  }
  grpc::CompletionQueue queue;
  struct AsyncCall {
    grpc::ClientContext context;
    inference::ModelInferResponse response;
    grpc::Status status;
    std::unique_ptr<grpc::ClientAsyncResponseReader<inference::ModelInferResponse>> reader;
  };
  std::vector<AsyncCall> calls(kRequests);
  for (int i = 0; i < kRequests; ++i) {
    AsyncCall& call = calls[static_cast<size_t>(i)];
    call.reader =
        server_->stub->AsyncModelInfer(&call.context, FloatRequest(absl::StrCat("a", i)), &queue);
    call.reader->Finish(&call.response, &call.status, &call);
  }
  for (int i = 0; i < kRequests; ++i) {
    void* tag = nullptr;
    bool ok = false;
    ASSERT_EQ(
        queue.AsyncNext(&tag, &ok, std::chrono::system_clock::now() + std::chrono::seconds(60)),
        grpc::CompletionQueue::GOT_EVENT);
  }
  std::set<std::string> ids;
  for (const AsyncCall& call : calls) {
    EXPECT_TRUE(call.status.ok()) << call.status.error_message();
    ids.insert(call.response.id());
  }
  EXPECT_EQ(ids.size(), calls.size());

  // 4 again: the queue's count must have advanced.
  const inference::ModelStatistics after = Statistics();
  EXPECT_EQ(after.inference_stats().queue().count() - before.inference_stats().queue().count(),
            2u * kRequests);
  EXPECT_EQ(after.inference_count() - before.inference_count(), 2u * kRequests);
  EXPECT_GT(after.execution_count(), before.execution_count());
  EXPECT_GT(after.inference_stats().compute_infer().ns(), 0u);
  EXPECT_GT(after.last_inference(), before.last_inference());
  // --collect-metrics reads the metrics port.
  int status = 0;
  EXPECT_THAT(
      testing::HttpGet(cluster().metrics_address(), "/metrics", &status),
      HasSubstr(R"(pyramid_serving_requests_total{code="OK",model="formula",version="1"} )"));
  EXPECT_EQ(status, 200);
}

// Counts that differ in one snapshot are an assertion in perf_analyzer.
TEST_F(OpenInferenceServerTest, StatisticsAreConsistentWhileRequestsRun) {
  const inference::ModelStatistics before = Statistics();
  std::atomic<bool> stop{false};
  std::vector<std::thread> load;
  for (int i = 0; i < 3; ++i) {
    load.emplace_back([&] {
      inference::ModelInferResponse response;
      while (!stop) EXPECT_TRUE(Infer(FloatRequest("x", 2), &response).ok());
    });
  }
  uint64_t last = 0;
  for (const absl::Time until = absl::Now() + absl::Seconds(2); absl::Now() < until;) {
    const inference::ModelStatistics now = Statistics();
    const inference::InferStatistics& stats = now.inference_stats();
    EXPECT_EQ(stats.queue().count(), stats.success().count());
    EXPECT_EQ(stats.compute_input().count(), stats.success().count());
    EXPECT_EQ(stats.compute_infer().count(), stats.success().count());
    EXPECT_EQ(stats.compute_output().count(), stats.success().count());
    last = stats.success().count() - before.inference_stats().success().count();
    EXPECT_EQ(now.inference_count() - before.inference_count(), 2 * last);
  }
  stop = true;
  for (std::thread& thread : load) thread.join();
  EXPECT_GT(last, 0u);
}

// What perf_analyzer sends for a BYTES input: random text unless it is given files, whose length
// stands inside their base64.
TEST_F(OpenInferenceServerTest, FilesAreDecodedAndRandomTextIsRefused) {
  inference::ModelInferResponse response;
  const grpc::Status refused = Infer(
      FileRequest({Element(Picture("scene.jpg")), Element(std::string(128, 'k'))}), &response);
  EXPECT_EQ(refused.error_code(), grpc::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), HasSubstr("image[1]"));
  const std::string file = Picture("exif_6.jpg");
  const grpc::Status status =
      Infer(FileRequest({Element(Picture("scene.jpg")), Element(file)}), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_THAT(response.outputs(0).shape(), ElementsAre(2, kClasses));
  const std::vector<float> logits = FloatsOf(response.raw_output_contents(0));
  const std::vector<float> native = NativeLogits(file);
  for (size_t c = 0; c < kClasses; ++c) EXPECT_NEAR(logits[kClasses + c], native[c], 1e-5);
}

TEST_F(OpenInferenceServerTest, CurlClassifiesAPicture) {
  const std::string file = Picture("scene.jpg");
  const std::vector<float> native = NativeLogits(file);
  const auto best = std::max_element(native.begin(), native.end()) - native.begin();
  httplib::Client http = Http();
  // curl --data-binary @scene.jpg http://…/v2/models/formula/infer
  auto answer = http.Post("/v2/models/formula/infer", file, "application/x-www-form-urlencoded");
  ASSERT_TRUE(answer);
  ASSERT_EQ(answer->status, 200) << answer->body;
  const json output = json::parse(answer->body).at("outputs")[0];
  EXPECT_EQ(output.at("shape"), json({1, 5}));
  EXPECT_THAT(output.at("data")[0].get<std::string>(), HasSubstr(absl::StrCat(":", best, ":")));
  // With Triton's header the answer is binary.
  answer = http.Post("/v2/models/formula/infer", {{"Inference-Header-Content-Length", "0"}}, file,
                     "application/octet-stream");
  ASSERT_TRUE(answer);
  ASSERT_EQ(answer->status, 200) << answer->body;
  const size_t head = std::stoul(answer->get_header_value("Inference-Header-Content-Length"));
  const std::vector<float> probabilities = FloatsOf(answer->body.substr(head));
  ASSERT_EQ(probabilities.size(), static_cast<size_t>(kClasses));
  EXPECT_EQ(std::max_element(probabilities.begin(), probabilities.end()) - probabilities.begin(),
            best);
  answer = http.Post("/v2/models/formula/infer", "GIF89a and no more", "image/gif");
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->status, 400);
  EXPECT_THAT(answer->body, HasSubstr("input image[0]: picture: "));
}

TEST_F(OpenInferenceServerTest, BothTransportsGiveTheSameNumbers) {
  inference::ModelInferRequest request = FloatRequest("7");
  inference::ModelInferResponse response;
  ASSERT_TRUE(Infer(request, &response).ok());
  const std::vector<float> by_grpc = FloatsOf(response.raw_output_contents(0));
  json body = {{"id", "7"},
               {"inputs",
                {{{"name", "image"},
                  {"datatype", "FP32"},
                  {"shape", {1, 3, kSide, kSide}},
                  {"data", FloatsOf(request.raw_input_contents(0))}}}}};
  auto answer = Http().Post("/v2/models/formula/versions/1/infer", body.dump(), "application/json");
  ASSERT_TRUE(answer);
  ASSERT_EQ(answer->status, 200) << answer->body;
  const json parsed = json::parse(answer->body);
  EXPECT_EQ(parsed.at("id"), "7");
  const auto by_rest = parsed.at("outputs")[0].at("data").get<std::vector<float>>();
  ASSERT_EQ(by_rest.size(), by_grpc.size());
  for (size_t c = 0; c < by_rest.size(); ++c) EXPECT_EQ(by_rest[c], by_grpc[c]);
}

TEST_F(OpenInferenceServerTest, AFiveMegabyteRequestWorks) {
  inference::ModelInferRequest request = FloatRequest("", 64);
  request.mutable_inputs(0)->set_shape(0, 9);
  request.mutable_inputs(0)->set_shape(2, 224);
  request.mutable_inputs(0)->set_shape(3, 224);
  request.mutable_raw_input_contents(0)->assign(size_t{9} * 3 * 224 * 224 * 4, '\0');
  ASSERT_GT(request.ByteSizeLong(), size_t{5} << 20);
  inference::ModelInferResponse response;
  const grpc::Status status = Infer(request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
}

TEST_F(OpenInferenceServerTest, MessagesOverTheLimitAreRefusedByBoth) {
  Use("serving: {max_message_bytes: 1048576}\n");
  const std::string large(2 << 20, 'x');
  inference::ModelInferResponse response;
  EXPECT_EQ(Infer(FileRequest({Element(large)}), &response).error_code(), grpc::RESOURCE_EXHAUSTED);
  httplib::Client http = Http();
  auto answer = http.Post("/v2/models/formula/infer", large, "image/jpeg");
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->status, 413);
  EXPECT_TRUE(json::parse(answer->body).contains("error"));
  answer = http.Get("/v2/models/formula/ready");
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->status, 200);
}

TEST_F(OpenInferenceServerTest, AModelLeavesServiceAndComesBackOverHttp) {
  httplib::Client http = Http();
  EXPECT_EQ(http.Post("/v2/repository/models/formula/unload", "{}", "application/json")->status,
            200);
  EXPECT_EQ(http.Get("/v2/models/formula/ready")->status, 503);
  inference::ModelInferResponse response;
  EXPECT_EQ(Infer(FloatRequest(""), &response).error_code(), grpc::UNAVAILABLE);
  EXPECT_EQ(json::parse(http.Post("/v2/repository/index", "", "")->body)[0].at("state"),
            "UNAVAILABLE");
  EXPECT_EQ(http.Post("/v2/repository/models/formula/load", "{}", "application/json")->status, 200);
  EXPECT_EQ(http.Get("/v2/models/formula/ready")->status, 200);
  EXPECT_TRUE(Infer(FloatRequest(""), &response).ok());
}

TEST_F(OpenInferenceServerTest, LiveAndReadyUntilItDrainsAndOpenConnectionsDoNotHoldItUp) {
  Use("");
  EXPECT_TRUE(Call(&Stub::ServerLive, {}).live());
  EXPECT_TRUE(Call(&Stub::ServerReady, {}).ready());
  httplib::Client http = Http();
  EXPECT_EQ(http.Get("/v2/health/live")->status, 200);
  EXPECT_EQ(http.Get("/v2/health/ready")->status, 200);
  const testing::RunResult stopped = cluster().Stop();  // `http` keeps its connection
  EXPECT_EQ(stopped.exit_code, 0);
  EXPECT_FALSE(http.Get("/v2/health/live"));
}

}  // namespace
}  // namespace pyramid
