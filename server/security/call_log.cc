#include "server/security/call_log.h"

#include <grpcpp/server_context.h>

#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/base/grpc_status.h"
#include "proto/base/log.h"
#include "server/security/grpc_credentials.h"
#include "server/security/trace.h"

namespace pyramid {
namespace {

using grpc::experimental::InterceptionHookPoints;
using grpc::experimental::Interceptor;
using grpc::experimental::InterceptorBatchMethods;
using grpc::experimental::ServerInterceptorFactoryInterface;
using grpc::experimental::ServerRpcInfo;

// Our bug, or a broken store: somebody must look.
bool IsOurFault(grpc::StatusCode code) {
  return code == grpc::StatusCode::INTERNAL || code == grpc::StatusCode::UNKNOWN ||
         code == grpc::StatusCode::DATA_LOSS;
}

absl::string_view ViewOf(grpc::string_ref text) { return {text.data(), text.size()}; }

}  // namespace

// One call, from its metadata to its status.
class CallLog::Call final : public Interceptor {
 public:
  Call(CallLog& log, ServerRpcInfo& info) : log_(log), info_(info), started_(absl::Now()) {
    ++log_.begun_;
  }
  ~Call() override { ++log_.ended_; }

  void Intercept(InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      auto& metadata = *methods->GetRecvInitialMetadata();
      metadata.erase(kCallerKey);
      if (log_.access_.has_keys()) {
        const auto caller = log_.access_.Identify(CredentialsOf(*info_.server_context()));
        if (caller.ok() && *caller != nullptr) caller_ = (*caller)->name();
        if (!caller_.empty()) metadata.emplace(kCallerKey, caller_);
      }
      const auto trace = metadata.find(kTraceparent);
      trace_ = ContinueTrace(trace == metadata.end() ? "" : ViewOf(trace->second));
      const auto id = metadata.find(kRequestId);
      request_id_ = RequestIdFrom(id == metadata.end() ? "" : ViewOf(id->second));
    }
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      SendStatus(*methods);
    }
    methods->Proceed();
  }

 private:
  void SendStatus(InterceptorBatchMethods& methods) {
    auto& trailers = *methods.GetSendTrailingMetadata();
    // A handler that knows a better id, from the request itself, has put it there.
    if (const auto id = trailers.find(kRequestId); id != trailers.end()) {
      request_id_ = id->second;
    } else {
      trailers.emplace(kRequestId, request_id_);
    }
    trailers.emplace(kTraceparent, trace_.Header());
    const grpc::Status status = methods.GetSendStatus();
    Log(status);
    if (status.ok()) return;
    const std::string text = Public(status.error_message());
    if (text != status.error_message()) {
      methods.ModifySendStatus({status.error_code(), text, status.error_details()});
    }
  }

  std::string Public(const std::string& message) const {
    const Scopes needed = NeededForRpc(info_.method());
    return needed.Has(Scope::kInfer) || needed.empty() ? log_.text_.ForPictures(message)
                                                       : log_.text_.ForJobs(message);
  }

  void Log(const grpc::Status& status) const {
    const bool bad = IsOurFault(status.error_code());
    if (!bad && !log_.options_.every_call) return;
    const std::string code(GrpcCodeName(static_cast<absl::StatusCode>(status.error_code())));
    const double millis = absl::ToDoubleMilliseconds(absl::Now() - started_);
    const auto line = bad ? &log::Error : &log::Info;
    grpc::ServerContextBase& context = *info_.server_context();
    line(bad ? "rpc_failed" : "rpc", {{"method", info_.method()},
                                      {"code", code},
                                      {"ms", absl::StrFormat("%.3f", millis)},
                                      {"request_id", request_id_},
                                      {"trace_id", trace_.trace_id},
                                      {"caller", CallerName(context)},
                                      {"peer", context.peer()},
                                      {"error", status.error_message()}});
  }

  CallLog& log_;
  ServerRpcInfo& info_;
  const absl::Time started_;
  TraceContext trace_;
  std::string request_id_;
  std::string caller_;
};

class CallLog::CallFactory final : public ServerInterceptorFactoryInterface {
 public:
  explicit CallFactory(CallLog& log) : log_(log) {}
  Interceptor* CreateServerInterceptor(ServerRpcInfo* info) override {
    // Probes come often and mean nothing.
    if (absl::StartsWith(info->method(), "/grpc.")) return nullptr;
    return new Call(log_, *info);  // gRPC deletes it
  }

 private:
  CallLog& log_;
};

std::unique_ptr<ServerInterceptorFactoryInterface> CallLog::Factory() {
  return std::make_unique<CallFactory>(*this);
}

}  // namespace pyramid
