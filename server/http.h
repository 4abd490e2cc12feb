// The HTTP port: /healthz (the process answers) and /readyz (it takes work), status code and one
// line of text.
#ifndef PYRAMID_SERVER_HTTP_H_
#define PYRAMID_SERVER_HTTP_H_

#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"

namespace pyramid {

class HttpServer {
 public:
  // Listens on `host`:`port` (0: a free one) with its own threads. `ready` is asked on each
  // /readyz, from any thread. Unavailable: the address is in use or isn't ours.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& host, int port,
                                                           absl::AnyInvocable<bool() const> ready);
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
