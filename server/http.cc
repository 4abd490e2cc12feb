#include "server/http.h"

#include <httplib.h>
#include <pthread.h>
#include <sys/socket.h>

#include <atomic>
#include <deque>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/base/log.h"
#include "server/http_connections.h"
#include "server/rpc/rest_json.h"
#include "server/serving/pushback.h"

namespace pyramid {
namespace {

constexpr char kLaterType[] = "x-type-of-content";  // never sent
constexpr int kBacklog = 512;             // the library's 5 makes a burst of connections wait
constexpr size_t kMaxPath = 1024;         // bytes
constexpr time_t kKeepAliveSeconds = 10;  // between requests
constexpr size_t kRequestsOfConnection = 1'000'000;
constexpr int kThreadsBeside = 256;  // for connections without a place: health, refusals
constexpr absl::Duration kComeBack = absl::Seconds(1);  // without a place
constexpr double kSlowestBody = 2000;                   // bytes per second

// A thread for each connection, made when it is needed and kept. The library's own pool is of a
// fixed size: so many idle connections would shut out everybody else.
class ConnectionThreads final : public httplib::TaskQueue {
 public:
  ConnectionThreads(HttpConnections& connections, int max_threads, absl::Duration longest_silence)
      : connections_(connections),
        max_threads_(static_cast<size_t>(max_threads)),
        longest_silence_(longest_silence) {}

  void enqueue(std::function<void()> connection) override {
    bool many = false;
    {
      absl::MutexLock lock(&mutex_);
      waiting_.push_back(std::move(connection));
      if (waiting_.size() > idle_ && threads_.size() < max_threads_) {
        threads_.emplace_back([this] { Run(); });
      }
      many = threads_.size() - idle_ + kThreadsBeside / 2 > max_threads_;
    }
    if (many) connections_.CloseSilent(longest_silence_);
  }

  void shutdown() override {
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
    }
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void Run() {
    pthread_setname_np(pthread_self(), "http");
    while (true) {
      std::function<void()> connection;
      {
        absl::MutexLock lock(&mutex_);
        const auto ready = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
          return stopping_ || !waiting_.empty();
        };
        ++idle_;
        mutex_.Await(absl::Condition(&ready));
        --idle_;
        if (waiting_.empty()) return;
        connection = std::move(waiting_.front());
        waiting_.pop_front();
      }
      connections_.Open();
      connection();
      connections_.Close();
    }
  }

  HttpConnections& connections_;
  const size_t max_threads_;
  const absl::Duration longest_silence_;
  absl::Mutex mutex_;
  std::deque<std::function<void()>> waiting_ ABSL_GUARDED_BY(mutex_);
  size_t idle_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;  // by the library's listening thread alone
};

// The library's server for HTTP or HTTPS.
template <typename Base>
class Listener final : public Base {
 public:
  using Base::Base;
  void Deepen() { ::listen(this->svr_sock_, kBacklog); }
};

// Room for a body in what all bodies may take together; given back when it goes.
class BodyRoom {
 public:
  BodyRoom(std::atomic<int64_t>& taken, int64_t limit) : taken_(taken), limit_(limit) {}
  ~BodyRoom() { taken_ -= mine_; }
  BodyRoom(const BodyRoom&) = delete;
  BodyRoom& operator=(const BodyRoom&) = delete;

  bool Take(int64_t bytes) {
    mine_ += bytes;
    return (taken_ += bytes) <= limit_;
  }

 private:
  std::atomic<int64_t>& taken_;
  const int64_t limit_;
  int64_t mine_ = 0;
};

HttpKind KindOf(absl::string_view path) {
  if (path == "/healthz" || path == "/readyz" || absl::StartsWith(path, "/v2/health/")) {
    return HttpKind::kHealth;
  }
  if (absl::StartsWith(path, "/v2/repository/")) return HttpKind::kRepository;
  if (!absl::StartsWith(path, "/v2/models/")) return HttpKind::kOther;
  return absl::EndsWith(path, "/infer") ? HttpKind::kInfer : HttpKind::kModel;
}

// Without either header there is no body, and the library would wait for the connection's end.
bool HasBody(const httplib::Request& request) {
  return request.has_header("Content-Length") || request.has_header("Transfer-Encoding");
}

void Send(RestReply reply, httplib::Response& response) {
  response.status = reply.status;
  for (auto& [name, value] : reply.headers) response.set_header(name.c_str(), value);
  response.body = std::move(reply.body);
  response.set_header(kLaterType, reply.content_type);
}

// The library compresses what it knows by its type, and clients that offer to take that may not:
// tritonclient's asyncio client doesn't. So the type comes after it has decided.
void SetType(httplib::Response& response) {
  if (!response.has_header(kLaterType)) return;
  const std::string type = response.get_header_value(kLaterType);
  response.headers.erase(kLaterType);
  response.headers.erase("Content-Type");
  response.set_header("Content-Type", type);
}

// Where the request's body wasn't read to its end the connection can't be used any more. The
// library closes it if a provider of content gives up, here after everything has been written.
void SendAndClose(RestReply reply, httplib::Response& response, HttpConnections& connections,
                  bool unread_body = true) {
  const std::string body = std::move(reply.body);
  reply.body.clear();
  const std::string type = reply.content_type;
  Send(std::move(reply), response);
  response.headers.erase(kLaterType);
  response.set_header("Connection", "close");
  response.set_content_provider(
      body.size(), type,
      [body, unread_body, &connections](size_t offset, size_t length, httplib::DataSink& sink) {
        sink.write(body.data() + offset, length);
        if (unread_body) connections.Linger();
        return false;
      });
}

}  // namespace

struct HttpServer::State {
  explicit State(Options server_options) : options(std::move(server_options)) {}

  const Options options;
  std::unique_ptr<httplib::Server> server;
  std::function<void()> deepen;  // its Listener's
  std::atomic<int64_t> body_bytes{0};
  HttpConnections connections{options.max_connections};
  int port = 0;
  std::thread thread;

  void MakeServer();
  // What the guard does at the beginning and the end of a request, and to the text of an error.
  void Begin(const httplib::Request& http, httplib::Response& response) const;
  RestReply ForClient(RestReply reply) const;
  void Log(const httplib::Request& http, const httplib::Response& response) const;
  void Answer(const httplib::Request& http, httplib::Response& response,
              const httplib::ContentReader* reader);
  RestReply ReadBody(const httplib::ContentReader& reader, BodyRoom& room, std::string& body,
                     bool& whole) const;
};

// Of the request that this thread serves.
thread_local HttpGuard::Call t_call;

void HttpServer::State::MakeServer() {
  if (options.tls == nullptr) {
    auto plain = std::make_unique<Listener<httplib::Server>>();
    deepen = [raw = plain.get()] { raw->Deepen(); };
    server = std::move(plain);
    return;
  }
  auto tls = std::make_unique<Listener<httplib::SSLServer>>([this](SSL_CTX& context) {
    ServeCertificates(context, *options.tls);
    return true;
  });
  deepen = [raw = tls.get()] { raw->Deepen(); };
  server = std::move(tls);
}

void HttpServer::State::Begin(const httplib::Request& http, httplib::Response& response) const {
  if (options.guard == nullptr) return;
  t_call =
      options.guard->Begin(http.get_header_value(kRequestId), http.get_header_value(kTraceparent));
  response.set_header(kRequestId, t_call.request_id);
  response.set_header(kTraceparent, t_call.trace.Header());
}

RestReply HttpServer::State::ForClient(RestReply reply) const {
  if (options.guard == nullptr || reply.status < 400) return reply;
  if (reply.status >= 500) t_call.error = reply.body;
  reply.body = options.guard->Public(reply.body);
  return reply;
}

void HttpServer::State::Log(const httplib::Request& http, const httplib::Response& response) const {
  if (options.guard == nullptr) return;
  const std::string authorization = http.get_header_value("authorization");
  const std::string api_key = http.get_header_value("x-api-key");
  options.guard->Log(t_call, {.method = http.method,
                              .path = http.path,
                              .status = response.status,
                              .peer = absl::StrCat(http.remote_addr, ":", http.remote_port),
                              .credentials = {.authorization = authorization, .api_key = api_key}});
}

// An error if the body isn't there as a whole; status 200 otherwise.
RestReply HttpServer::State::ReadBody(const httplib::ContentReader& reader, BodyRoom& room,
                                      std::string& body, bool& whole) const {
  const absl::Time started = absl::Now();
  absl::Status refused;
  whole = reader([&](const char* data, size_t size) {
    if (static_cast<int64_t>(body.size() + size) > options.max_body_bytes) {
      refused = absl::InvalidArgumentError(
          absl::StrCat("the body has more than ", options.max_body_bytes, " bytes"));
      return false;
    }
    if (absl::Now() - started >
        options.body_time + absl::Seconds(static_cast<double>(body.size()) / kSlowestBody)) {
      refused = absl::DeadlineExceededError("the body comes too slowly");
      return false;
    }
    if (!room.Take(static_cast<int64_t>(size))) {
      refused = absl::ResourceExhaustedError("too many bytes of requests at once; try again");
      return false;
    }
    body.append(data, size);
    return true;
  });
  if (absl::IsInvalidArgument(refused)) {
    return {.status = 413, .body = ErrorJson(refused.message())};
  }
  if (absl::IsDeadlineExceeded(refused)) {
    return {.status = 408, .body = ErrorJson(refused.message())};
  }
  if (!refused.ok()) return ErrorReply(refused);
  if (!whole) return ErrorReply(absl::InvalidArgumentError("the body can't be read"));
  return {};
}

void HttpServer::State::Answer(const httplib::Request& http, httplib::Response& response,
                               const httplib::ContentReader* reader) {
  const auto header = [&](absl::string_view name) {
    return http.get_header_value(std::string(name).c_str());
  };
  std::string body;
  RestRequest request{.method = http.method, .path = http.path, .header = header, .gone = [this] {
                        return connections.HungUp();
                      }};
  const absl::Status admitted = options.admit(request);
  if (reader != nullptr && HasBody(http)) {
    if (!admitted.ok()) return SendAndClose(ForClient(ErrorReply(admitted)), response, connections);
    if (http.is_multipart_form_data()) {
      return SendAndClose(
          {.status = 415, .body = ErrorJson("send the body as it is, not as a form")}, response,
          connections);
    }
    BodyRoom room(body_bytes, options.max_all_bodies_bytes);
    bool whole = false;
    const absl::Time started = absl::Now();
    RestReply unread = ReadBody(*reader, room, body, whole);
    request.received = absl::Now() - started;
    // The library has skipped the rest of a body whose length was told to be over the limit.
    if (!whole) {
      if (response.status == 413)
        unread = {.status = 413, .body = ErrorJson("the body is too long")};
      return SendAndClose(std::move(unread), response, connections);
    }
    request.body = body;
    return Send(ForClient(options.answer(request)), response);
  }
  Send(ForClient(admitted.ok() ? options.answer(request) : ErrorReply(admitted)), response);
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(Options options) {
  auto state = std::make_unique<State>(std::move(options));
  State* const raw = state.get();
  raw->MakeServer();
  httplib::Server& server = *raw->server;
  if (!server.is_valid()) return absl::InternalError("OpenSSL can't serve HTTPS");
  server.new_task_queue = [raw] {
    return new ConnectionThreads(raw->connections, raw->options.max_connections + kThreadsBeside,
                                 raw->options.longest_silence);
  };
  // The library's default also sets SO_REUSEPORT, which would let two servers share a port
  // unnoticed.
  server.set_socket_options([](socket_t socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  // Head and body of an answer are written one after the other: with Nagle's algorithm the body
  // would wait 40 ms for the client's acknowledgement.
  server.set_tcp_nodelay(true);
  server.set_keep_alive_max_count(kRequestsOfConnection);
  server.set_keep_alive_timeout(kKeepAliveSeconds);
  server.set_payload_max_length(static_cast<size_t>(raw->options.max_body_bytes));
  server.set_exception_handler(
      [](const httplib::Request&, httplib::Response& response, std::exception_ptr error) {
        try {
          std::rethrow_exception(std::move(error));
        } catch (const std::exception& exception) {
          log::Error("http_failed", {{"error", exception.what()}});
        } catch (...) {
          log::Error("http_failed", {{"error", "not an exception"}});
        }
        Send({.status = 500, .body = ErrorJson("internal error; see the server's log")}, response);
      });
  server.set_error_handler(httplib::Server::Handler([](const httplib::Request&,
                                                       httplib::Response& response) {
    // What the library refuses by itself has no body.
    if (!response.body.empty() || response.content_length_ > 0) return;
    Send({.status = response.status, .body = ErrorJson("the request can't be answered")}, response);
  }));
  server.set_post_routing_handler(
      [](const httplib::Request&, httplib::Response& response) { SetType(response); });
  server.set_logger([raw](const httplib::Request& request, const httplib::Response& response) {
    raw->connections.EndRequest();  // the answer has been sent
    raw->options.ended(KindOf(request.path), response.status);
    raw->Log(request, response);
  });
  server.set_pre_routing_handler([raw](const httplib::Request& request,
                                       httplib::Response& response) {
    const bool placed =
        raw->connections.BeginRequest(absl::StrCat(request.remote_addr, ":", request.remote_port));
    raw->Begin(request, response);
    if (!placed && KindOf(request.path) != HttpKind::kHealth) {
      SendAndClose(ErrorReply(WithPushback(
                       absl::UnavailableError(absl::StrCat(
                           raw->options.max_connections,
                           " connections have requests already, as many as may; come back later")),
                       kComeBack)),
                   response, raw->connections, HasBody(request));
      return httplib::Server::HandlerResponse::Handled;
    }
    if (request.path.size() <= kMaxPath && (request.method == "GET" || request.method == "POST")) {
      return httplib::Server::HandlerResponse::Unhandled;
    }
    SendAndClose({.status = request.path.size() > kMaxPath ? 414 : 405,
                  .body = ErrorJson(
                      absl::StrCat("use GET or POST, and paths of at most ", kMaxPath, " bytes"))},
                 response, raw->connections, HasBody(request));
    return httplib::Server::HandlerResponse::Handled;
  });
  server.Get("/healthz", [](const httplib::Request&, httplib::Response& response) {
    response.set_content("ok\n", "text/plain");
  });
  server.Get("/readyz", [raw](const httplib::Request&, httplib::Response& response) {
    const bool is_ready = raw->options.ready();
    response.status = is_ready ? 200 : 503;
    response.set_content(is_ready ? "ready\n" : "draining\n", "text/plain");
  });
  server.Get(".*", [raw](const httplib::Request& request, httplib::Response& response) {
    raw->Answer(request, response, nullptr);
  });
  server.Post(".*", [raw](const httplib::Request& request, httplib::Response& response,
                          const httplib::ContentReader& reader) {
    raw->Answer(request, response, &reader);
  });

  const std::string& host = raw->options.host;
  if (raw->options.port == 0) {
    raw->port = server.bind_to_any_port(host);
  } else {
    raw->port = server.bind_to_port(host, raw->options.port) ? raw->options.port : -1;
  }
  if (raw->port <= 0) {
    return absl::UnavailableError(
        absl::StrCat("can't listen on ", host, ":", raw->options.port,
                     " for HTTP: the port is in use or the address isn't this machine's; "
                     "choose another with --http-port"));
  }
  raw->connections.Listen(raw->port);
  raw->deepen();
  raw->thread = std::thread([raw] { raw->server->listen_after_bind(); });
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(state)));
}

HttpServer::HttpServer(std::unique_ptr<State> state) : state_(std::move(state)) {}

HttpServer::~HttpServer() { Shutdown(absl::InfiniteFuture()); }

void HttpServer::Shutdown(absl::Time until) {
  if (!state_->thread.joinable()) return;
  // stop() before the loop has begun would be lost.
  while (!state_->server->is_running()) std::this_thread::yield();
  state_->server->stop();
  HttpConnections& connections = state_->connections;
  if (!connections.AwaitAnswered(until)) {
    log::Warning("drain_timeout", {{"what", "HTTP requests"}});
    connections.CutOff();
    connections.AwaitAnswered(absl::InfiniteFuture());
  }
  connections.EndReading();  // the library leaves those that are idle to their time limit
  state_->thread.join();
}

int HttpServer::port() const { return state_->port; }

}  // namespace pyramid
