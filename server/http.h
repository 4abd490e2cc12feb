// The HTTP port: /healthz (the process answers), /readyz (it takes work), and what a handler
// answers to all other paths.
//
// A connection holds a thread while it is open. Bodies are bounded, one by one and together. GET
// and POST only.
#ifndef PYRAMID_SERVER_HTTP_H_
#define PYRAMID_SERVER_HTTP_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/rpc/rest_v2.h"
#include "server/security/http_guard.h"
#include "server/security/tls_files.h"

namespace pyramid {

class HttpServer {
 public:
  struct Options {
    std::string host = "127.0.0.1";
    int port = 0;                                                  // 0: a free one
    int64_t max_body_bytes = 64 << 20;                             // of a request
    int64_t max_all_bodies_bytes = 512 << 20;                      // of all requests at the moment
    int max_connections = 256;                                     // those beyond wait
    absl::AnyInvocable<bool() const> ready = [] { return true; };  // asked on each /readyz
    // Asked before the body is read (which request.body isn't yet); an error is the answer.
    absl::AnyInvocable<absl::Status(const RestRequest& request) const> admit =
        [](const RestRequest&) { return absl::OkStatus(); };
    // Request ids, traces, texts for clients, the log; null: none of them. It and `tls` must
    // outlive the server.
    const HttpGuard* guard = nullptr;
    TlsFiles* tls = nullptr;  // null: plain HTTP
    // Answers everything but health.
    absl::AnyInvocable<RestReply(RestRequest& request) const> answer;
  };

  // Listens with its own threads; what the options call may be called from any of them.
  // Unavailable: the address is in use or isn't ours.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(Options options);
  // Takes no more connections, and waits for the answers in progress.
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const;

 private:
  struct State;
  explicit HttpServer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_HTTP_H_
