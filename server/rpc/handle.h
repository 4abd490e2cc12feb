// What every RPC handler does around its work: times it, maps absl::Status to grpc::Status, counts
// it (grpc_server_* metrics).
//
//   grpc::Status GetJob(grpc::ServerContext*, const v1::GetJobRequest* request, v1::Job* job)
//   override {
//     return Handle(metrics_, kService, "GetJob", [&]() -> absl::Status {
//       ASSIGN_OR_RETURN(*job, manager_.Get(request->job_id()));
//       return absl::OkStatus();
//     });
//   }
//
// A streaming or asynchronous handler keeps an RpcCall and ends it itself.
#ifndef PYRAMID_SERVER_RPC_HANDLE_H_
#define PYRAMID_SERVER_RPC_HANDLE_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/support/status.h"
#include "proto/base/grpc_status.h"
#include "proto/base/log.h"
#include "server/metrics.h"

namespace pyramid {

// One call in progress. Not thread-safe.
class RpcCall {
 public:
  // Names as in the protocol: "pyramid.v1.TrainingService", "GetJob".
  RpcCall(Metrics& metrics, absl::string_view service, absl::string_view method)
      : metrics_(metrics), service_(service), method_(method), started_(absl::Now()) {}

  // Counts the call and gives the status to finish it with. Once. What points at us or at a broken
  // store goes to the log as well.
  grpc::Status End(const absl::Status& status) {
    metrics_.CountRpc(service_, method_, status.code(), absl::Now() - started_);
    if (status.code() == absl::StatusCode::kInternal ||
        status.code() == absl::StatusCode::kUnknown ||
        status.code() == absl::StatusCode::kDataLoss) {
      log::Error("rpc_failed", {{"method", method_},
                                {"code", GrpcCodeName(status.code())},
                                {"error", status.message()}});
    }
    return ToGrpc(status);
  }

 private:
  Metrics& metrics_;
  std::string service_;
  std::string method_;
  absl::Time started_;
};

// Runs `function`, which returns absl::Status, as one call.
template <typename Function>
grpc::Status Handle(Metrics& metrics, absl::string_view service, absl::string_view method,
                    Function&& function) {
  RpcCall call(metrics, service, method);
  return call.End(std::forward<Function>(function)());
}

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_HANDLE_H_
