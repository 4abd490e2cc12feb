#include "proto/base/read_request.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/lifecycle.grpc.pb.h"
#include "proto/open_inference.grpc.pb.h"
#include "tests/testing/raw_call.h"

namespace pyramid {
namespace {

using grpc::StatusCode;
using testing::BytesOf;
using ::testing::HasSubstr;

constexpr char kListModelEvents[] = "/pyramid.v1.ModelService/ListModelEvents";

std::string Repeated(const std::string& text, int64_t times) {
  std::string all;
  all.reserve(text.size() * static_cast<size_t>(times));
  for (int64_t i = 0; i < times; ++i) all += text;
  return all;
}

// A field of bytes, a message or packed numbers.
std::string Field(int number, const std::string& bytes) {
  std::string field(1, static_cast<char>(number << 3 | 2));
  size_t length = bytes.size();
  for (; length >= 0x80; length >>= 7) field.push_back(static_cast<char>(length | 0x80));
  field.push_back(static_cast<char>(length));
  return field + bytes;
}

grpc::Status Read(const std::string& bytes, inference::ModelInferRequest* request) {
  grpc::ByteBuffer message = BytesOf(bytes);
  return grpc::SerializationTraits<inference::ModelInferRequest>::Deserialize(&message, request);
}

// What a service of the synchronous kind makes of a request.
class ReadRequestTest : public ::testing::Test {
 protected:
  void SetUp() override {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.AddChannelArgument(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
    builder.RegisterService(&models_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    channel_ =
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials());
  }
  void TearDown() override { server_->Shutdown(std::chrono::system_clock::now()); }

  grpc::Status Call(const std::string& model, grpc_compression_algorithm compression) {
    grpc::ClientContext context;
    context.set_compression_algorithm(compression);
    v1::ListModelEventsRequest request;
    request.set_model(model);
    v1::ListModelEventsResponse response;
    return v1::ModelService::NewStub(channel_)->ListModelEvents(&context, request, &response);
  }

  class Models final : public v1::ModelService::Service {
   public:
    grpc::Status ListModelEvents(grpc::ServerContext*, const v1::ListModelEventsRequest* request,
                                 v1::ListModelEventsResponse*) override {
      return {StatusCode::NOT_FOUND, absl::StrCat(request->model().size(), " letters")};
    }
  };
  Models models_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(ReadRequestTest, CompressedMessagesAreReadLikeOthers) {
  for (const auto compression : {GRPC_COMPRESS_NONE, GRPC_COMPRESS_GZIP, GRPC_COMPRESS_DEFLATE}) {
    for (const size_t letters : {0, 1, 300, 3'000'000}) {
      const grpc::Status status = Call(std::string(letters, 'a'), compression);
      EXPECT_EQ(status.error_message(), absl::StrCat(letters, " letters")) << compression;
    }
  }
}

TEST_F(ReadRequestTest, WhatUnpacksToMuchMoreIsRefused) {
  const std::string large(20'000'000, 'a');
  EXPECT_EQ(Call(large, GRPC_COMPRESS_NONE).error_code(), StatusCode::RESOURCE_EXHAUSTED)
      << "gRPC's own limit";
  const grpc::Status status = Call(large, GRPC_COMPRESS_GZIP);
  EXPECT_EQ(status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("is compressed from over 8388608 to "));
}

TEST_F(ReadRequestTest, TheBoundGrowsWithWhatWasSent) {
  EXPECT_EQ(MostUnpacked(0), 8 << 20);
  EXPECT_EQ(MostUnpacked(1 << 20), 16 << 20);
  EXPECT_EQ(MostUnpacked(int64_t{1} << 40), 64 << 20);
}

TEST_F(ReadRequestTest, WhatIsNoMessageIsInvalid) {
  grpc::Status status = testing::RawCall(channel_, kListModelEvents, "\xff\xff");
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), "the message is no pyramid.v1.ListModelEventsRequest");
  status = testing::RawCall(channel_, kListModelEvents, Repeated("\x0a\x7f", 200'000));
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << "a large one, cut short";
}

TEST_F(ReadRequestTest, MessagesOfManyEntriesAreRefused) {
  const std::string unknown_field("\xf8\x01\x00", 3);
  const grpc::Status status =
      testing::RawCall(channel_, kListModelEvents, Repeated(unknown_field, kMostEntries + 1));
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("more than 262144 fields"));
}

TEST(ReadModelInferTest, EveryKindOfEntryCounts) {
  const std::string empty_input("\x2a\x00", 2);
  struct Case {
    const char* name;
    std::string one;  // an entry
    std::function<std::string(const std::string&)> within;
  };
  const auto as_it_is = [](const std::string& all) { return all; };
  const auto contents = [](const std::string& all) { return Field(5, Field(5, all)); };
  const Case cases[] = {
      {"inputs", empty_input, as_it_is},
      {"parameters of an input", std::string("\x22\x00", 2),
       [](const std::string& all) { return Field(5, all); }},
      {"bytes_contents", std::string("\x42\x00", 2), contents},
      {"packed int64_contents", std::string("\x01", 1),
       [&](const std::string& all) { return contents(Field(3, all)); }},
      {"unknown numbers", std::string("\xf8\x07\x00", 3), as_it_is},
      {"unknown texts", std::string("\xfa\x07\x00", 3), as_it_is},
      {"unknown groups", std::string("\xfb\x07\xfc\x07", 4), as_it_is},
      {"numbers of an unknown group", std::string("\xf8\x07\x00", 3),
       [](const std::string& all) { return "\xfb\x07" + all + "\xfc\x07"; }},
  };
  for (const Case& one : cases) {
    inference::ModelInferRequest request;
    const std::string many = one.within(Repeated(one.one, kMostEntries + 1));
    const grpc::Status refused = Read(many, &request);
    EXPECT_EQ(refused.error_code(), StatusCode::INVALID_ARGUMENT) << one.name;
    EXPECT_THAT(refused.error_message(), HasSubstr("more than 262144")) << one.name;
    const std::string fewer = one.within(Repeated(one.one, kMostEntries / 2 - 10));
    EXPECT_TRUE(Read(fewer, &request).ok()) << one.name;
  }
}

TEST(ReadModelInferTest, GroupsEndWhereTheyBegan) {
  const std::string padding(kMostEntries, 'x');  // or it isn't looked at
  inference::ModelInferRequest request;
  EXPECT_TRUE(Read("\xfb\x07\xfc\x07" + Field(7, padding), &request).ok());
  for (const std::string bad : {"\xfb\x07", "\xfc\x07", "\xfb\x07\xf4\x07"}) {
    EXPECT_EQ(Read(Field(7, padding) + bad, &request).error_code(), StatusCode::INVALID_ARGUMENT);
  }
}

TEST(ReadModelInferTest, LargeTensorsAreFewEntries) {
  inference::ModelInferRequest request;
  auto& contents = *request.add_inputs()->mutable_contents();
  contents.mutable_fp32_contents()->Resize(3'000'000, 1.0F);
  request.add_raw_input_contents(std::string(5'000'000, 'x'));
  inference::ModelInferRequest read;
  ASSERT_TRUE(Read(request.SerializeAsString(), &read).ok());
  EXPECT_EQ(read.inputs(0).contents().fp32_contents_size(), 3'000'000);
  EXPECT_EQ(read.raw_input_contents(0).size(), 5'000'000u);
}

TEST(ReadModelInferTest, OnlyRequestsHaveBounds) {
  inference::ModelInferResponse response;
  grpc::ByteBuffer message = BytesOf(Repeated(std::string("\x2a\x00", 2), kMostEntries + 1));
  EXPECT_TRUE(
      grpc::SerializationTraits<inference::ModelInferResponse>::Deserialize(&message, &response)
          .ok());
}

}  // namespace
}  // namespace pyramid
