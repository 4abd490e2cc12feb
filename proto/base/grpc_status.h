// The only mapping between absl::Status and grpc::Status. Codes have the same numbers in both.
#ifndef PYRAMID_PROTO_BASE_GRPC_STATUS_H_
#define PYRAMID_PROTO_BASE_GRPC_STATUS_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "grpcpp/support/status.h"

namespace pyramid {

grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

// "InvalidArgument", as in the label grpc_code of everybody's dashboards.
absl::string_view GrpcCodeName(absl::StatusCode code);

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_GRPC_STATUS_H_
