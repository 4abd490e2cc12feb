// A message from the bytes of its pieces: what is found beside it and what is left are together
// what protobuf reads of the whole. The first byte chooses the message, the second the pieces'
// size.
#include <array>
#include <string>

#include "absl/strings/string_view.h"
#include "proto/classification.pb.h"
#include "proto/open_inference.pb.h"
#include "server/rpc/large_field.h"
#include "tests/fuzz/fuzz_target.h"

namespace pyramid {
namespace {

using fuzz::Require;

constexpr std::array<int, 3> kTensorValues = {3, 2, 4};
constexpr std::array<int, 1> kRaw = {7};

std::string Text(const Pieces& pieces) {
  std::string text;
  pieces.AppendTo(text);
  return text;
}

void PutBack(const LargeField& field, v1::ClassifyRequest& request) {
  Require(field.index < request.pictures_size(), "the picture is there");
  v1::Picture& picture = *request.mutable_pictures(field.index);
  if (!picture.has_tensor()) return;  // a file came after it
  Require(picture.tensor().values_size() == 0, "its values are left out");
  google::protobuf::RepeatedField<float>& values = *picture.mutable_tensor()->mutable_values();
  values.Resize(static_cast<int>(field.bytes.size() / sizeof(float)), 0);
  field.bytes.CopyTo(values.mutable_data());
}

void PutBack(const LargeField& field, inference::ModelInferRequest& request) {
  Require(field.index < request.raw_input_contents_size(), "the entry is there");
  Require(request.raw_input_contents(field.index).empty(), "it is left out");
  request.set_raw_input_contents(field.index, Text(field.bytes));
}

template <typename Request>
void Check(absl::string_view message, size_t each, std::span<const int> path) {
  Pieces pieces;
  for (size_t at = 0; at < message.size(); at += each) pieces.Add(message.substr(at, each));
  const auto around = FindLargeFields(pieces, path);
  if (!around.has_value()) return;
  Request whole;
  Request parts;
  const bool parsed = whole.ParseFromArray(message.data(), static_cast<int>(message.size()));
  Require(parts.ParseFromString(around->rest) == parsed, "both parse or neither");
  if (!parsed) return;
  for (const LargeField& field : around->large) PutBack(field, parts);
  Require(parts.SerializeAsString() == whole.SerializeAsString(), "the same message");
}

}  // namespace
}  // namespace pyramid

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  google::protobuf::SetLogHandler(nullptr);
  const absl::string_view message(reinterpret_cast<const char*>(data) + 2, size - 2);
  const size_t each = size_t{data[1]} * 8 + 1;
  if (data[0] % 2 == 0) {
    pyramid::Check<pyramid::v1::ClassifyRequest>(message, each, pyramid::kTensorValues);
  } else {
    pyramid::Check<inference::ModelInferRequest>(message, each, pyramid::kRaw);
  }
  return 0;
}
