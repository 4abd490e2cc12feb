#include "server/http.h"

#include <httplib.h>

#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pyramid {

struct HttpServer::State {
  httplib::Server server;
  absl::AnyInvocable<bool() const> ready;
  int port = 0;
  std::thread thread;
};

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(
    const std::string& host, int port, absl::AnyInvocable<bool() const> ready) {
  auto state = std::make_unique<State>();
  state->ready = std::move(ready);
  // A few threads: the answers cost nothing.
  state->server.new_task_queue = [] { return new httplib::ThreadPool(2); };
  // The library's default also sets SO_REUSEPORT, which would let two servers share a port
  // unnoticed.
  state->server.set_socket_options([](socket_t socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  state->server.Get("/healthz", [](const httplib::Request&, httplib::Response& response) {
    response.set_content("ok\n", "text/plain");
  });
  state->server.Get("/readyz",
                    [raw = state.get()](const httplib::Request&, httplib::Response& response) {
                      const bool is_ready = raw->ready();
                      response.status = is_ready ? 200 : 503;
                      response.set_content(is_ready ? "ready\n" : "draining\n", "text/plain");
                    });
  if (port == 0) {
    state->port = state->server.bind_to_any_port(host.c_str());
  } else {
    state->port = state->server.bind_to_port(host.c_str(), port) ? port : -1;
  }
  if (state->port <= 0) {
    return absl::UnavailableError(
        absl::StrCat("can't listen on ", host, ":", port,
                     " for HTTP: the port is in use or the address isn't this machine's; "
                     "choose another with --http-port"));
  }
  state->thread = std::thread([raw = state.get()] { raw->server.listen_after_bind(); });
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(state)));
}

HttpServer::HttpServer(std::unique_ptr<State> state) : state_(std::move(state)) {}

HttpServer::~HttpServer() {
  // stop() before the loop has begun would be lost.
  while (!state_->server.is_running()) std::this_thread::yield();
  state_->server.stop();
  state_->thread.join();
}

int HttpServer::port() const { return state_->port; }

}  // namespace pyramid
