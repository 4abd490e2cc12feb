#include "server/rpc/rest_json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/server/rpc/inference_fixture.h"

namespace pyramid {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::RawFloats;
using testing::StatusIs;

absl::StatusOr<inference::ModelInferRequest> Parse(const std::string& body) {
  return ParseInferBody(body, body.size());
}

TEST(ParseInferBodyTest, NestedAndFlatNumbersTextsAndParameters) {
  ASSERT_OK_AND_ASSIGN(const auto request, Parse(R"({
    "id": "42", "unknown": {"a": [1, {"b": null}]},
    "parameters": {"priority": 1, "timeout": 18446744073709551615, "x": true, "y": "text", "z": 0.5},
    "inputs": [{"data": [[1, 2.5], [[-3], []]], "shape": [2, 2], "datatype": "FP32", "name": "image",
                "parameters": {"binary": false, "deep": [{"er": 1}], "last": 7}, "more": [1]}],
    "outputs": [{"name": "logits", "parameters": {"classification": 3, "binary_data": true}},
                {"name": "probabilities"}]})"));
  EXPECT_EQ(request.id(), "42");
  EXPECT_EQ(request.parameters().at("priority").int64_param(), 1);
  EXPECT_EQ(request.parameters().at("timeout").uint64_param(), 18446744073709551615U);
  EXPECT_TRUE(request.parameters().at("x").bool_param());
  EXPECT_EQ(request.parameters().at("y").string_param(), "text");
  EXPECT_EQ(request.parameters().at("z").double_param(), 0.5);
  ASSERT_EQ(request.inputs_size(), 1);
  EXPECT_EQ(request.inputs(0).name(), "image");
  EXPECT_EQ(request.inputs(0).datatype(), "FP32");
  EXPECT_THAT(request.inputs(0).shape(), ElementsAre(2, 2));
  EXPECT_THAT(request.inputs(0).contents().fp32_contents(), ElementsAre(1, 2.5, -3));
  EXPECT_EQ(request.inputs(0).parameters().at("last").int64_param(), 7);
  ASSERT_EQ(request.outputs_size(), 2);
  EXPECT_EQ(request.outputs(0).parameters().at("classification").int64_param(), 3);
  EXPECT_EQ(request.outputs(1).name(), "probabilities");
}

TEST(ParseInferBodyTest, TextsAreBytes) {
  ASSERT_OK_AND_ASSIGN(const auto request, Parse(R"({"inputs":[{"data":["ab","\u00e9"]}]})"));
  EXPECT_THAT(request.inputs(0).contents().bytes_contents(), ElementsAre("ab", "\xc3\xa9"));
}

TEST(ParseInferBodyTest, TensorsFollowTheJson) {
  const std::string head =
      R"({"inputs":[{"name":"image","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":8}}]})";
  const std::string raw = RawFloats({1, 2});
  ASSERT_OK_AND_ASSIGN(const auto request, ParseInferBody(head + raw, head.size()));
  ASSERT_EQ(request.raw_input_contents_size(), 1);
  EXPECT_EQ(request.raw_input_contents(0), raw);
  EXPECT_THAT(ParseInferBody(head + raw + "x", head.size()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1 bytes are left")));
  EXPECT_THAT(ParseInferBody(head + raw.substr(1), head.size()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("7 bytes are left")));
  EXPECT_THAT(ParseInferBody(head, head.size() + 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("the body has")));
  EXPECT_THAT(Parse(R"({"inputs":[{"parameters":{"binary_data_size":-8}}]})"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("binary_data_size")));
  EXPECT_THAT(Parse(R"({"inputs":[{"parameters":{"binary_data_size":"8"}}]})"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("binary_data_size")));
}

TEST(ParseInferBodyTest, WhatIsNotARequestIsSaid) {
  const std::pair<const char*, const char*> bad[] = {
      {"", "isn't JSON"},
      {"{", "isn't JSON"},
      {R"({"a":1}x)", "isn't JSON"},
      {"[1]", "isn't a JSON object"},
      {"7", "isn't a JSON object"},
      {R"("text")", "isn't a JSON object"},
      {"null", "isn't a JSON object"},
      {R"({"inputs":5})", "inputs is a number"},
      {R"({"inputs":{}})", "inputs is an object"},
      {R"({"outputs":"x"})", "outputs is a string"},
      {R"({"parameters":[1]})", "parameters is an array"},
      {R"({"inputs":[1]})", "stands among the inputs"},
      {R"({"inputs":[{"shape":4}]})", "shape is a number"},
      {R"({"inputs":[{"shape":[1.5]}]})", "shape holds a number with a fraction"},
      {R"({"inputs":[{"shape":["1"]}]})", "shape holds a string"},
      {R"({"inputs":[{"shape":[18446744073709551615]}]})", "larger than 2^63"},
      {R"({"inputs":[{"shape":[[1]]}]})", "shape holds an array"},
      {R"({"inputs":[{"data":1}]})", "data is a number"},
      {R"({"inputs":[{"data":[true]}]})", "data holds a boolean"},
      {R"({"inputs":[{"data":[null]}]})", "data holds null"},
      {R"({"inputs":[{"data":[{}]}]})", "data holds an object"},
      {R"({"inputs":[{"data":[1e999]}]})", "isn't JSON"},
      {R"({"inputs":[{"data":[NaN]}]})", "isn't JSON"},
      {"{\"id\":\"\xff\"}", "isn't JSON"},
  };
  for (const auto& [body, text] : bad) {
    EXPECT_THAT(Parse(body), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text))) << body;
  }
}

// A few bytes of JSON mustn't become much memory.
TEST(ParseInferBodyTest, CountsAndDepthAreBounded) {
  const auto repeat = [](const std::string& text, int times) {
    std::string all;
    for (int i = 0; i < times; ++i) absl::StrAppend(&all, i > 0 ? "," : "", text);
    return all;
  };
  EXPECT_THAT(Parse(absl::StrCat(R"({"inputs":[)", repeat("{}", 100), "]}")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than 64 inputs")));
  EXPECT_THAT(Parse(absl::StrCat(R"({"outputs":[)", repeat("{}", 100), "]}")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than 64 inputs")));
  EXPECT_THAT(Parse(absl::StrCat(R"({"inputs":[{"shape":[)", repeat("1", 17), "]}]}")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("16 dimensions")));
  EXPECT_THAT(Parse(absl::StrCat(R"({"inputs":[{"data":[)", repeat(R"("")", 70'000), "]}]}")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("65536 texts")));
  const std::string half = absl::StrCat(R"({"data":[)", repeat(R"("")", 32'768), "]}");
  EXPECT_OK(Parse(absl::StrCat(R"({"inputs":[)", half, ",", half, "]}")));
  EXPECT_THAT(Parse(absl::StrCat(R"({"inputs":[)", half, ",", half, R"(,{"data":[""]}]})")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("65536 texts")))
      << "of all inputs";
  std::string parameters;
  for (int i = 0; i < 100; ++i) {
    absl::StrAppend(&parameters, i > 0 ? "," : "", "\"p", i, "\":1");
  }
  EXPECT_THAT(Parse(absl::StrCat(R"({"parameters":{)", parameters, "}}")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("64 parameters")));
  EXPECT_THAT(Parse(absl::StrCat(R"({"inputs":[{"data":)", std::string(100'000, '['))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("32 deep")));
  EXPECT_THAT(Parse(absl::StrCat(R"({"x":)", std::string(100'000, '['))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("32 deep")));
}

inference::ModelInferResponse Response() {
  inference::ModelInferResponse response;
  response.set_model_name("fashion");
  response.set_model_version("3");
  response.set_id("a\"b");
  (*response.mutable_parameters())["digest"].set_string_param("sha256:ab");
  auto& logits = *response.add_outputs();
  logits.set_name("logits");
  logits.set_datatype("FP32");
  logits.add_shape(1);
  logits.add_shape(2);
  response.add_raw_output_contents(RawFloats({0.1F, -2}));
  auto& classes = *response.add_outputs();
  classes.set_name("probabilities");
  classes.set_datatype("BYTES");
  classes.add_shape(1);
  classes.add_shape(1);
  std::string& raw = *response.add_raw_output_contents();
  AppendBytesElement("0.5:1:\xff bag", raw);
  return response;
}

TEST(WriteInferBodyTest, WritesJson) {
  const InferBody written = WriteInferBody({}, Response());
  EXPECT_EQ(written.json_bytes, -1);
  const json body = json::parse(written.body);
  EXPECT_EQ(body.at("model_name"), "fashion");
  EXPECT_EQ(body.at("model_version"), "3");
  EXPECT_EQ(body.at("id"), "a\"b");
  EXPECT_EQ(body.at("parameters").at("digest"), "sha256:ab");
  EXPECT_EQ(body.at("outputs")[0].at("shape"), json({1, 2}));
  EXPECT_EQ(body.at("outputs")[0].at("datatype"), "FP32");
  EXPECT_THAT(written.body, HasSubstr("\"data\":[0.1,-2.0]")) << "as short as a float can be";
  EXPECT_EQ(body.at("outputs")[1].at("data")[0], "0.5:1:\xef\xbf\xbd bag");
}

TEST(WriteInferBodyTest, BinaryWhereItIsAskedFor) {
  inference::ModelInferRequest request;
  (*request.mutable_parameters())["binary_data_output"].set_bool_param(true);
  auto& classes = *request.add_outputs();
  classes.set_name("probabilities");
  (*classes.mutable_parameters())["binary_data"].set_bool_param(false);
  const inference::ModelInferResponse response = Response();
  const InferBody written = WriteInferBody(request, response);
  ASSERT_GT(written.json_bytes, 0);
  const auto head = static_cast<size_t>(written.json_bytes);
  const json body = json::parse(written.body.substr(0, head));
  EXPECT_EQ(body.at("outputs")[0].at("parameters").at("binary_data_size"), 8);
  EXPECT_FALSE(body.at("outputs")[0].contains("data"));
  EXPECT_TRUE(body.at("outputs")[1].contains("data")) << "its own word wins";
  EXPECT_EQ(written.body.substr(head), response.raw_output_contents(0));
}

TEST(MessageToJsonTest, WritesNumbersNamesAndEmptyFields) {
  inference::ModelConfig config;
  config.set_name("fashion");
  inference::ModelInput& input = *config.add_input();
  input.set_format(inference::ModelInput::FORMAT_NCHW);
  input.add_dims(3);
  (*config.mutable_parameters())["digest"].set_string_value("x");
  const json body = json::parse(MessageToJson(config));
  EXPECT_EQ(body.at("max_batch_size"), 0);
  EXPECT_EQ(body.at("input")[0].at("format"), "FORMAT_NCHW");
  EXPECT_EQ(body.at("input")[0].at("dims"), json({3}));
  EXPECT_EQ(body.at("input")[0].at("data_type"), "TYPE_INVALID");
  EXPECT_EQ(body.at("parameters").at("digest").at("string_value"), "x");
  EXPECT_FALSE(body.contains("dynamic_batching")) << "not chosen";
  EXPECT_EQ(body.at("output"), json::array());
  inference::StatisticDuration large;
  large.set_ns(std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(MessageToJson(large), R"({"count":0,"ns":18446744073709551615})");
}

TEST(ParseRepositoryBodyTest, ReadsReadyAndParameters) {
  bool ready = false;
  google::protobuf::Map<std::string, inference::ModelRepositoryParameter> parameters;
  EXPECT_OK(ParseRepositoryBody("", ready, parameters));
  EXPECT_OK(ParseRepositoryBody(" \n", ready, parameters));
  EXPECT_OK(ParseRepositoryBody("{}", ready, parameters));
  EXPECT_FALSE(ready);
  EXPECT_OK(ParseRepositoryBody(R"({"ready":true,"parameters":{"a":true,"b":"x","c":3,"d":[]}})",
                                ready, parameters));
  EXPECT_TRUE(ready);
  EXPECT_TRUE(parameters.at("a").bool_param());
  EXPECT_EQ(parameters.at("b").string_param(), "x");
  EXPECT_EQ(parameters.at("c").int64_param(), 3);
  for (const char* bad : {"[", "[]", "x", R"({"ready":1})", R"({"parameters":1})"}) {
    EXPECT_THAT(ParseRepositoryBody(bad, ready, parameters),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("isn't")))
        << bad;
  }
  EXPECT_THAT(ParseRepositoryBody(std::string(1 << 20, ' '), ready, parameters),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 65536")));
}

TEST(ErrorJsonTest, EscapesWhatACallerSent) {
  EXPECT_EQ(ErrorJson("a\"\n"), R"({"error":"a\"\n"})");
}

}  // namespace
}  // namespace pyramid
