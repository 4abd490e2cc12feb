#include "server/rpc/rest_v2.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/time/clock.h"
#include "server/serving/pushback.h"
#include "tests/server/rpc/inference_fixture.h"

namespace pyramid {
namespace {

using nlohmann::json;
using ::testing::Contains;
using ::testing::ElementsAre;
using testing::FloatsOf;
using testing::GreyPng;
using ::testing::HasSubstr;
using testing::InferenceTest;
using testing::kSide;
using ::testing::Pair;
using testing::Sample;

constexpr char kLength[] = "Inference-Header-Content-Length";

class RestV2Test : public InferenceTest {
 protected:
  using Headers = std::map<std::string, std::string>;

  RestReply Ask(const std::string& method, const std::string& path, const std::string& body = "",
                const Headers& headers = {}) {
    const auto header = [&](absl::string_view name) {
      const auto found = headers.find(std::string(name));
      return found == headers.end() ? std::string() : found->second;
    };
    RestRequest request{.method = method, .path = path, .body = body, .header = header};
    return RestV2(*protocol_).Answer(request);
  }
  RestReply Get(const std::string& path) { return Ask("GET", path); }
  json GetJson(const std::string& path) {
    const RestReply reply = Get(path);
    EXPECT_EQ(reply.status, 200) << reply.body;
    EXPECT_EQ(reply.content_type, "application/json");
    return json::parse(reply.body, nullptr, false);
  }
  RestReply Infer(const std::string& body, const Headers& headers = {}) {
    return Ask("POST", "/v2/models/fashion/infer", body, headers);
  }
  static std::string ErrorOf(const RestReply& reply) {
    return json::parse(reply.body).at("error").get<std::string>();
  }
  // An FP32 picture of this value in JSON.
  static std::string JsonPicture(float value, const std::string& more = "") {
    return absl::StrCat(
        R"({"id":"7","inputs":[{"name":"image","datatype":"FP32","shape":[1,1,32,32],"data":)",
        json(std::vector<float>(kSide * kSide, value)).dump(), "}]", more, "}");
  }
};

TEST_F(RestV2Test, ServerAndHealth) {
  const json server = GetJson("/v2");
  EXPECT_EQ(server.at("name"), "pyramid");
  EXPECT_EQ(server.at("version"), "1.2.3");
  EXPECT_THAT(server.at("extensions").get<std::vector<std::string>>(),
              Contains("binary_tensor_data"));
  EXPECT_EQ(Get("/v2/").status, 200);
  EXPECT_EQ(GetJson("/v2/health/live").at("live"), true);
  EXPECT_EQ(GetJson("/v2/health/ready").at("ready"), true);
  ready_ = false;
  EXPECT_EQ(Get("/v2/health/ready").status, 503);
  EXPECT_EQ(Get("/v2/health/live").status, 200);
}

TEST_F(RestV2Test, WhoHangsUpCostsNoForwardPass) {
  network_.Shut();
  std::thread first([this] { Infer(JsonPicture(0.5F)); });  // occupies the network
  ASSERT_TRUE(network_.AwaitBatches(1));
  std::atomic<bool> asked{false};
  std::thread second([&] {
    const auto none = [](absl::string_view) { return std::string(); };
    const std::string body = JsonPicture(0.5F);
    RestRequest request{
        .method = "POST", .path = "/v2/models/fashion/infer", .body = body, .header = none};
    request.gone = [&asked] {
      asked = true;
      return true;
    };
    EXPECT_EQ(RestV2(*protocol_).Answer(request).status, 499);
  });
  while (!asked) absl::SleepFor(absl::Milliseconds(1));
  absl::SleepFor(absl::Milliseconds(10));  // the flag is set right after
  network_.Open();
  first.join();
  second.join();
  EXPECT_THAT(network_.batches(), ElementsAre(1));
  EXPECT_EQ(Sample(metrics_,
                   R"(pyramid_serving_rejected_images_total{model="fashion",reason="cancelled"})"),
            1);
}

TEST_F(RestV2Test, ABodyThatCannotBeReadIsCounted) {
  EXPECT_EQ(Infer("{nonsense").status, 400);
  EXPECT_EQ(
      Sample(
          metrics_,
          R"(pyramid_serving_requests_total{code="InvalidArgument",model="fashion",version="0"})"),
      1);
}

TEST_F(RestV2Test, ModelPathsWithAndWithoutVersion) {
  for (const std::string model : {"/v2/models/fashion", "/v2/models/fashion/versions/1",
                                  "/v2/models/fashion/versions/stable"}) {
    EXPECT_EQ(GetJson(model).at("inputs")[0].at("shape"), json({-1, 1, 32, 32})) << model;
    EXPECT_EQ(GetJson(model + "/config").at("max_batch_size"), testing::kMaxPictures) << model;
    EXPECT_EQ(GetJson(model + "/ready").at("ready"), true) << model;
    EXPECT_EQ(GetJson(model + "/stats").at("model_stats")[0].at("version"), "1") << model;
    EXPECT_EQ(Ask("POST", model + "/infer", JsonPicture(0.5F)).status, 200) << model;
  }
  EXPECT_EQ(GetJson("/v2/models/stats").at("model_stats").size(), 1u);
  EXPECT_EQ(Get("/v2/models/nosuch").status, 404);
  EXPECT_EQ(Get("/v2/models/nosuch/ready").status, 404);
  EXPECT_EQ(Get("/v2/models/fashion/versions/9/config").status, 404);
  EXPECT_EQ(Get("/v2/models/fashion/versions/-9/stats").status, 400);
}

// Whoever asks for that has shown no key.
TEST_F(RestV2Test, ReadyTellsNoNames) {
  for (const char* path :
       {"/v2/models/nosuch/ready", "/v2/models/fashion/versions/9/ready",
        "/v2/models/fashion/versions/nosuch/ready", "/v2/models/nosuch/versions/1/ready"}) {
    const RestReply reply = Get(path);
    EXPECT_EQ(reply.status, 404) << path;
    EXPECT_EQ(ErrorOf(reply), "there is no such model, version or alias") << path;
  }
  EXPECT_THAT(ErrorOf(Get("/v2/models/nosuch")), HasSubstr("fashion")) << "with a key";
  EXPECT_EQ(Get("/v2/models/fashion/versions/-9/ready").status, 400);
}

TEST_F(RestV2Test, JsonInJsonOut) {
  const RestReply reply =
      Infer(JsonPicture(0.5F, R"(,"outputs":[{"name":"logits"},{"name":"probabilities",
          "parameters":{"classification":1}}])"));
  ASSERT_EQ(reply.status, 200) << reply.body;
  const json body = json::parse(reply.body);
  EXPECT_EQ(body.at("id"), "7");
  EXPECT_EQ(body.at("model_version"), "1");
  EXPECT_EQ(body.at("outputs")[0].at("data"), json({0.5, -0.5, -1.5}));
  EXPECT_EQ(body.at("outputs")[1].at("data"), json({"0.665241:0:ankle boot"}));
}

TEST_F(RestV2Test, BinaryInBinaryOut) {
  const std::string head =
      R"({"inputs":[{"name":"image","datatype":"FP32","shape":[1,1,32,32],)"
      R"("parameters":{"binary_data_size":4096}}],"outputs":[{"name":"logits",)"
      R"("parameters":{"binary_data":true}}]})";
  const std::string raw = testing::RawFloats(std::vector<float>(kSide * kSide, 0.5F));
  const RestReply reply = Infer(head + raw, {{kLength, absl::StrCat(head.size())}});
  ASSERT_EQ(reply.status, 200) << reply.body;
  EXPECT_EQ(reply.content_type, "application/octet-stream");
  ASSERT_THAT(reply.headers, Contains(Pair(kLength, ::testing::_)));
  const size_t length = std::stoul(reply.headers[0].second);
  EXPECT_EQ(json::parse(reply.body.substr(0, length))
                .at("outputs")[0]
                .at("parameters")
                .at("binary_data_size"),
            12);
  EXPECT_THAT(FloatsOf(reply.body.substr(length)), ElementsAre(0.5F, -0.5F, -1.5F));
  EXPECT_EQ(Infer(head + raw, {{kLength, "many"}}).status, 400);
  EXPECT_EQ(Infer(head + raw, {{kLength, "999999"}}).status, 400);
}

TEST_F(RestV2Test, APictureAsItIs) {
  const std::string png = GreyPng(kSide, 51);
  // curl --data-binary @cat.jpg, whatever content type it sends.
  for (const char* type : {"application/x-www-form-urlencoded", "image/jpeg", ""}) {
    const RestReply reply = Infer(png, {{"Content-Type", type}});
    ASSERT_EQ(reply.status, 200) << reply.body;
    const json output = json::parse(reply.body).at("outputs")[0];
    EXPECT_EQ(output.at("shape"), json({1, 3})) << "the five best of three";
    EXPECT_EQ(output.at("data")[0], "0.665241:0:ankle boot");
  }
  // Triton's short form: the whole body is the input, the answer is binary.
  const RestReply reply = Infer(png, {{kLength, "0"}});
  ASSERT_EQ(reply.status, 200) << reply.body;
  ASSERT_THAT(reply.headers, Contains(Pair(kLength, ::testing::_)));
  const size_t length = std::stoul(reply.headers[0].second);
  EXPECT_EQ(FloatsOf(reply.body.substr(length)).size(), 3u);
  EXPECT_THAT(ErrorOf(Infer("not a picture", {{"Content-Type", "image/png"}})),
              HasSubstr("input image[0]: picture: "));
  EXPECT_THAT(ErrorOf(Infer("not JSON", {{"Content-Type", "application/json"}})),
              HasSubstr("isn't JSON"));
}

TEST_F(RestV2Test, TheErrorsStatusIsItsCodes) {
  EXPECT_EQ(Ask("POST", "/v2/models/nosuch/infer", JsonPicture(0)).status, 404);
  EXPECT_EQ(Ask("POST", "/v2/models/fashion/versions/9/infer", JsonPicture(0)).status, 404);
  const RestReply bad = Infer("{}");
  EXPECT_EQ(bad.status, 400);
  EXPECT_THAT(ErrorOf(bad), HasSubstr("input image is missing"));
  network_.Fail(absl::InternalError("the network failed"));
  EXPECT_EQ(Infer(JsonPicture(0)).status, 500);
  EXPECT_TRUE(pipeline_->Drain(absl::Now() + absl::Seconds(10)));
  EXPECT_EQ(Infer(JsonPicture(0)).status, 503);
}

TEST_F(RestV2Test, StatusesOfEveryCode) {
  const std::pair<absl::StatusCode, int> statuses[] = {{absl::StatusCode::kOk, 200},
                                                       {absl::StatusCode::kInvalidArgument, 400},
                                                       {absl::StatusCode::kAlreadyExists, 400},
                                                       {absl::StatusCode::kFailedPrecondition, 400},
                                                       {absl::StatusCode::kUnauthenticated, 401},
                                                       {absl::StatusCode::kPermissionDenied, 403},
                                                       {absl::StatusCode::kNotFound, 404},
                                                       {absl::StatusCode::kResourceExhausted, 429},
                                                       {absl::StatusCode::kCancelled, 499},
                                                       {absl::StatusCode::kInternal, 500},
                                                       {absl::StatusCode::kUnknown, 500},
                                                       {absl::StatusCode::kDataLoss, 500},
                                                       {absl::StatusCode::kUnimplemented, 501},
                                                       {absl::StatusCode::kUnavailable, 503},
                                                       {absl::StatusCode::kDeadlineExceeded, 504}};
  for (const auto& [code, status] : statuses) EXPECT_EQ(HttpStatusOf(code), status);
  const RestReply full =
      ErrorReply(WithPushback(absl::ResourceExhaustedError("full"), absl::Milliseconds(2500)));
  EXPECT_EQ(full.status, 429);
  EXPECT_THAT(full.headers, ElementsAre(Pair("Retry-After", "3"), Pair("retry-after-ms", "2500")))
      << "who came back after two would be refused again";
  for (const auto& [millis, seconds] :
       {std::pair{0, "1"}, {1, "1"}, {1000, "1"}, {1001, "2"}, {2000, "2"}}) {
    const RestReply reply =
        ErrorReply(WithPushback(absl::ResourceExhaustedError("full"), absl::Milliseconds(millis)));
    EXPECT_THAT(reply.headers, Contains(Pair("Retry-After", seconds))) << millis;
  }
}

TEST_F(RestV2Test, TheRepository) {
  RestReply index = Ask("POST", "/v2/repository/index");
  ASSERT_EQ(index.status, 200) << index.body;
  EXPECT_EQ(json::parse(index.body),
            json::parse(R"([{"name":"fashion","version":"1","state":"READY","reason":""}])"));
  EXPECT_EQ(Ask("POST", "/v2/repository/models/fashion/unload",
                R"({"parameters":{"unload_dependents":true}})")
                .status,
            200);
  EXPECT_EQ(Get("/v2/models/fashion/ready").status, 503);
  EXPECT_EQ(Infer(JsonPicture(0)).status, 503);
  index = Ask("POST", "/v2/repository/index", R"({"ready":true})");
  EXPECT_EQ(index.body, "[]");
  EXPECT_EQ(Ask("POST", "/v2/repository/models/fashion/load", "{}").status, 200);
  EXPECT_EQ(Get("/v2/models/fashion/ready").status, 200);
  EXPECT_EQ(Ask("POST", "/v2/repository/models/nosuch/load").status, 404);
  EXPECT_EQ(
      Ask("POST", "/v2/repository/models/fashion/load", R"({"parameters":{"config":"{}"}})").status,
      400);
  EXPECT_EQ(Ask("POST", "/v2/repository/index", "x").status, 400);
}

TEST_F(RestV2Test, OtherPathsAreNotFound) {
  for (const char* path :
       {"", "/", "/v1/models/fashion", "/v2/nothing", "/v2/models", "/v2/models/fashion/versions",
        "/v2/models/fashion/nothing", "/v2/models/fashion/infer", "/v2/health", "//v2"}) {
    const RestReply reply = Get(path);
    EXPECT_EQ(reply.status, 404) << path;
    EXPECT_THAT(ErrorOf(reply), HasSubstr(path));
  }
  for (const char* path : {"/v2", "/v2/models/fashion", "/v2/repository", "/v2/repository/models",
                           "/v2/repository/models/fashion/reload"}) {
    EXPECT_EQ(Ask("POST", path).status, 404) << path;
  }
  EXPECT_EQ(Ask("DELETE", "/v2/models/fashion").status, 405);
}

}  // namespace
}  // namespace pyramid
