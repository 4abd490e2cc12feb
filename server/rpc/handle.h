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

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/status.h"
#include "proto/base/grpc_status.h"
#include "server/metrics.h"
#include "server/security/trace.h"
#include "server/serving/pushback.h"

namespace pyramid {

// The key of the trailing metadata that says when to come back, in milliseconds, with
// RESOURCE_EXHAUSTED.
inline constexpr char kPushbackKey[] = "grpc-retry-pushback-ms";

// The client's deadline; a client that sets none has the largest time there is.
inline absl::Time DeadlineOf(const grpc::ServerContextBase& context) {
  const auto deadline = context.deadline();
  return deadline == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture()
                                                                  : absl::FromChrono(deadline);
}

// Before the call is finished with `status`.
inline void AddPushback(const absl::Status& status, grpc::ServerContextBase& context) {
  const int64_t millis = PushbackMillis(status);
  if (millis >= 0) context.AddTrailingMetadata(kPushbackKey, absl::StrCat(millis));
}

// An id that the request itself holds is the call's, in the log and in the trailing metadata.
inline void AddRequestId(absl::string_view id, grpc::ServerContextBase& context) {
  if (!id.empty() && RequestIdFrom(id) == id)
    context.AddTrailingMetadata(kRequestId, std::string(id));
}

// One call in progress. Not thread-safe.
class RpcCall {
 public:
  // Names as in the protocol: "pyramid.v1.TrainingService", "GetJob".
  RpcCall(Metrics& metrics, absl::string_view service, absl::string_view method)
      : rpc_(metrics.StartRpc(service, method)), started_(absl::Now()) {}

  // A message of the call has been read, or is being sent.
  void Received() { Metrics::CountReceived(rpc_); }
  void Sending() { Metrics::CountSent(rpc_); }

  absl::Duration age() const { return absl::Now() - started_; }

  // Counts the call and gives the status to finish it with. Once. server/security/call_log.h writes
  // the log.
  grpc::Status End(const absl::Status& status) {
    Metrics::EndRpc(rpc_, status.code(), age());
    return ToGrpc(status);
  }

 private:
  const Metrics::Rpc& rpc_;
  absl::Time started_;
};

// Runs `function`, which returns absl::Status, as one call with one message each way.
template <typename Function>
grpc::Status Handle(Metrics& metrics, absl::string_view service, absl::string_view method,
                    Function&& function) {
  RpcCall call(metrics, service, method);
  call.Received();
  const absl::Status status = std::forward<Function>(function)();
  if (status.ok()) call.Sending();
  return call.End(status);
}

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_HANDLE_H_
