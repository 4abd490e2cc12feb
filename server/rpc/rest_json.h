// Bodies of the Open Inference Protocol's REST form: JSON, with tensors behind it in binary if the
// caller likes (Triton's binary tensor data extension). Pure; memory is a small multiple of the
// body.
#ifndef PYRAMID_SERVER_RPC_REST_JSON_H_
#define PYRAMID_SERVER_RPC_REST_JSON_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"
#include "proto/open_inference.pb.h"

namespace pyramid {

// Reads an infer request. The first `json_bytes` of the body are JSON; what follows are the tensors
// of inputs with the parameter binary_data_size, in their order. InvalidArgument.
absl::StatusOr<inference::ModelInferRequest> ParseInferBody(absl::string_view body,
                                                            size_t json_bytes);

struct InferBody {
  std::string body;
  int64_t json_bytes = -1;  // of the body, if tensors follow; else -1
};

// Writes the answer. An output is binary if `request` says so for it (binary_data) or for all
// (binary_data_output).
InferBody WriteInferBody(const inference::ModelInferRequest& request,
                         const inference::ModelInferResponse& response);

// Reads the parameters of a repository request ({"parameters": {…}}, or nothing), and `ready`.
absl::Status ParseRepositoryBody(
    absl::string_view body, bool& ready,
    google::protobuf::Map<std::string, inference::ModelRepositoryParameter>& parameters);

// A message as Triton writes it: fields by their names, integers as numbers, enumerators as text,
// nothing left out but what is unset in a oneof or a message that isn't there.
std::string MessageToJson(const google::protobuf::Message& message);

// {"error": "…"}
std::string ErrorJson(absl::string_view text);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_REST_JSON_H_
