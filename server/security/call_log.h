// What happens to every gRPC call on its way in and out, whoever handles it: a request id and a
// trace, both sent back in the trailing metadata and written to the log, and an error text that
// tells nothing of this machine.
#ifndef PYRAMID_SERVER_SECURITY_CALL_LOG_H_
#define PYRAMID_SERVER_SECURITY_CALL_LOG_H_

#include <grpcpp/support/server_interceptor.h>

#include <atomic>
#include <cstdint>
#include <memory>

#include "server/security/access.h"
#include "server/security/public_text.h"

namespace pyramid {

// Calls of our own services (not health, not reflection). Thread-safe.
class CallLog {
 public:
  struct Options {
    bool every_call = false;  // a line for every call, not only for those that failed in us
  };
  // `access` must outlive the server.
  CallLog(const Options& options, const PublicText& text, const Access& access)
      : options_(options), text_(text), access_(access) {}

  // For ServerBuilder::experimental().SetInterceptorCreators. This object must outlive the server.
  std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> Factory();

  int64_t begun() const { return begun_; }
  int64_t ended() const { return ended_; }  // their status was sent, or their client has gone

 private:
  class Call;
  class CallFactory;

  const Options options_;
  const PublicText& text_;
  const Access& access_;
  std::atomic<int64_t> begun_{0};
  std::atomic<int64_t> ended_{0};
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_CALL_LOG_H_
