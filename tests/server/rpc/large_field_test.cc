#include "server/rpc/large_field.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <string>

#include "absl/strings/string_view.h"
#include "proto/classification.pb.h"
#include "proto/open_inference.pb.h"

namespace pyramid {
namespace {

constexpr std::array<int, 3> kTensorValues = {3, 2, 4};
constexpr std::array<int, 1> kRaw = {7};

Pieces Split(absl::string_view message, size_t each) {
  Pieces pieces;
  for (; !message.empty(); message.remove_prefix(std::min(each, message.size()))) {
    pieces.Add(message.substr(0, each));
  }
  return pieces;
}

std::string Text(const Pieces& pieces) {
  std::string text;
  pieces.AppendTo(text);
  return text;
}

void AddTensor(int count, float first, v1::ClassifyRequest& request) {
  v1::ImageTensor& tensor = *request.add_pictures()->mutable_tensor();
  tensor.set_channels(3);
  tensor.set_height(count);
  tensor.set_width(200);
  for (int i = 0; i < count; ++i) tensor.add_values(first + static_cast<float>(i));
}

std::string BytesOf(const v1::ImageTensor& tensor) {
  return {reinterpret_cast<const char*>(tensor.values().data()),
          static_cast<size_t>(tensor.values_size()) * sizeof(float)};
}

// A field of bytes as it is written.
std::string Field(int number, absl::string_view value) {
  std::string text(1, static_cast<char>(number << 3 | 2));
  size_t length = value.size();
  for (; length >= 0x80; length >>= 7) text.push_back(static_cast<char>(length | 0x80));
  text.push_back(static_cast<char>(length));
  return text + std::string(value);
}

std::string Floats(int count) { return std::string(static_cast<size_t>(count) * 4, 'f'); }

bool Finds(const std::string& message) {
  return FindLargeFields(absl::string_view(message), kTensorValues).has_value();
}

TEST(LargeFieldTest, TensorsStayWhereTheyAreHoweverTheMessageIsCut) {
  v1::ClassifyRequest request;
  request.set_model("net");
  AddTensor(5000, 1, request);
  request.add_pictures()->set_encoded("file");
  AddTensor(10, 2, request);  // small
  AddTensor(2000, 3, request);
  request.set_top_k(7);
  request.set_request_id("r");
  const std::string message = request.SerializeAsString();
  for (const size_t each : {size_t{1}, size_t{2}, size_t{3}, size_t{1021}, message.size()}) {
    const auto around = FindLargeFields(Split(message, each), kTensorValues);
    ASSERT_TRUE(around.has_value()) << each;
    ASSERT_EQ(around->large.size(), 2u);
    EXPECT_EQ(around->large[0].index, 0);
    EXPECT_EQ(Text(around->large[0].bytes), BytesOf(request.pictures(0).tensor()));
    EXPECT_EQ(around->large[1].index, 3);
    EXPECT_EQ(Text(around->large[1].bytes), BytesOf(request.pictures(3).tensor()));

    v1::ClassifyRequest rest;
    ASSERT_TRUE(rest.ParseFromString(around->rest));
    v1::ClassifyRequest without = request;
    without.mutable_pictures(0)->mutable_tensor()->clear_values();
    without.mutable_pictures(3)->mutable_tensor()->clear_values();
    EXPECT_EQ(rest.SerializeAsString(), without.SerializeAsString());
  }
}

TEST(LargeFieldTest, NothingIsCopied) {
  v1::ClassifyRequest request;
  AddTensor(5000, 1, request);
  const std::string message = request.SerializeAsString();
  const auto around = FindLargeFields(absl::string_view(message), kTensorValues);
  ASSERT_TRUE(around.has_value());
  ASSERT_TRUE(around->large[0].bytes.whole());
  const absl::string_view bytes = around->large[0].bytes.Whole();
  EXPECT_GE(bytes.data(), message.data());
  EXPECT_LE(bytes.data() + bytes.size(), message.data() + message.size());
}

TEST(LargeFieldTest, AnEntryIsAnElementOfItsOwn) {
  inference::ModelInferRequest request;
  request.set_model_name("net");
  request.add_raw_input_contents("small");
  request.add_raw_input_contents(Floats(3000));
  const std::string message = request.SerializeAsString();
  const auto around = FindLargeFields(Split(message, 100), kRaw);
  ASSERT_TRUE(around.has_value());
  ASSERT_EQ(around->large.size(), 1u);
  EXPECT_EQ(around->large[0].index, 1);
  EXPECT_EQ(Text(around->large[0].bytes), request.raw_input_contents(1));
  inference::ModelInferRequest rest;
  ASSERT_TRUE(rest.ParseFromString(around->rest));
  ASSERT_EQ(rest.raw_input_contents_size(), 2);
  EXPECT_EQ(rest.raw_input_contents(0), "small");
  EXPECT_EQ(rest.raw_input_contents(1), "");
}

TEST(LargeFieldTest, FieldsMayComeInAnyOrder) {
  const std::string tensor = Field(4, Floats(2000)) + "\x08\x03";
  EXPECT_TRUE(Finds(Field(3, Field(2, tensor)) + Field(1, "net")));
  EXPECT_TRUE(Finds(Field(3, Field(2, tensor)) + "\x20\x05" + Field(3, Field(1, "file"))));
  EXPECT_TRUE(Finds(Field(3, Field(2, tensor)) + "\x7d" + "1234"));          // unknown, 4 bytes
  EXPECT_TRUE(Finds(Field(3, Field(2, tensor)) + "\x79" + "12345678"));      // unknown, 8 bytes
  EXPECT_TRUE(Finds(std::string("\x18\x01") + Field(3, Field(2, tensor))));  // no element
}

TEST(LargeFieldTest, WhatIsUnusualIsParsedWhole) {
  const std::string values = Field(4, Floats(2000));
  const std::string usual = Field(3, Field(2, values));
  ASSERT_TRUE(Finds(usual));
  EXPECT_FALSE(Finds("")) << "nothing";
  EXPECT_FALSE(Finds(Field(3, Field(2, Field(4, Floats(1000)))))) << "small";
  EXPECT_TRUE(Finds(Field(3, Field(2, Field(4, Floats(1 << 19))))));
  EXPECT_FALSE(Finds(Field(3, Field(2, Field(4, Floats((1 << 19) + 1)))))) << "large";
  EXPECT_FALSE(Finds(Field(3, Field(2, values + values)))) << "values twice";
  EXPECT_FALSE(Finds(Field(3, Field(2, values + "\x25" + "1234")))) << "and one more";
  EXPECT_FALSE(Finds(Field(3, Field(2, values) + Field(2, "\x08\x03")))) << "a tensor in two parts";
  EXPECT_FALSE(Finds(Field(3, Field(2, Field(4, Floats(2000) + "f"))))) << "no whole floats";
  EXPECT_FALSE(Finds(usual + "\x0b")) << "a group";
  EXPECT_FALSE(Finds(usual + Field(0, "x"))) << "field 0";
  EXPECT_FALSE(Finds(usual + Field(1, std::string(100'000, 'n')))) << "much else";
  EXPECT_FALSE(Finds(usual + "\x20")) << "ends in a number";
  EXPECT_FALSE(Finds(usual + "\x0a\x05net")) << "ends in a text";
  EXPECT_FALSE(Finds(Field(3, Field(2, values + "\x08\x80") + "\x01"))) << "a number over an end";
  for (size_t length = usual.size() - 1; length > 0; length -= std::min<size_t>(length, 97)) {
    EXPECT_FALSE(Finds(usual.substr(0, length))) << length;
  }
}

}  // namespace
}  // namespace pyramid
