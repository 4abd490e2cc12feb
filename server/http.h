// The HTTP port: /healthz (the process answers), /readyz (it takes work), and what a handler
// answers to all other paths.
//
// A connection holds a thread while it is open (http_connections.h says who may stay). Health is
// answered whatever the others do. Heads are bounded (http_stream.h), bodies one by one, together
// and in time. GET and POST only; ranges aren't served.
#ifndef PYRAMID_SERVER_HTTP_H_
#define PYRAMID_SERVER_HTTP_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/metrics.h"
#include "server/rpc/rest_v2.h"
#include "server/security/http_guard.h"
#include "server/security/tls_files.h"

namespace pyramid {

class HttpServer {
 public:
  struct Options {
    std::string host = "127.0.0.1";
    int port = 0;                              // 0: a free one
    int64_t max_body_bytes = 64 << 20;         // of a request
    int64_t max_all_bodies_bytes = 512 << 20;  // of all requests at the moment
    // A body may take so long, and what it takes at 2 kB/s beside that; 408 then.
    absl::Duration body_time = absl::Seconds(30);
    absl::Duration longest_silence = absl::Seconds(15);  // without a request, once there are many
    int max_connections = 256;  // with requests; who comes beyond gets 503 unless one is idle
    absl::AnyInvocable<bool() const> ready = [] { return true; };  // asked on each /readyz
    // Asked before the body is read (which request.body isn't yet); an error is the answer.
    absl::AnyInvocable<absl::Status(const RestRequest& request) const> admit =
        [](const RestRequest&) { return absl::OkStatus(); };
    // Request ids, traces, texts for clients, the log; null: none of them. It and `tls` must
    // outlive the server.
    const HttpGuard* guard = nullptr;
    TlsFiles* tls = nullptr;  // null: plain HTTP
    // Told of each request that has been answered.
    absl::AnyInvocable<void(HttpKind kind, int status) const> ended = [](HttpKind, int) {};
    // Answers everything but health.
    absl::AnyInvocable<RestReply(RestRequest& request) const> answer;
  };

  // Listens with its own threads; what the options call may be called from any of them.
  // Unavailable: the address is in use or isn't ours.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(Options options);
  ~HttpServer();  // Shutdown, however long it takes
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // Takes no more connections and waits for the answers in progress. Those that aren't there by
  // `until` are cut off: bodies end, RestRequest::gone becomes true. Once.
  void Shutdown(absl::Time until);

  int port() const;

 private:
  struct State;
  explicit HttpServer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_HTTP_H_
