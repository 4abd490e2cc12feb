#include "server/http.h"

#include <httplib.h>
#include <pthread.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/base/log.h"
#include "server/http_connections.h"
#include "server/http_stream.h"
#include "server/rpc/rest_json.h"
#include "server/serving/pushback.h"

namespace pyramid {
namespace {

constexpr char kEveryPath[] = R"([\s\S]*)";         // a '.' stands for no line break
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

// What this thread serves.
struct Serving {
  HttpStream* stream = nullptr;
  HttpGuard::Call call;
  bool begun = false;  // the call; not before the library has read a request's head
  bool close = false;  // the connection ends with this answer
};
thread_local Serving t_serving;

// The library's server for HTTP or HTTPS, over connections of ours.
template <typename Base>
class Listener final : public Base {
 public:
  template <typename... Arguments>
  Listener(HttpConnections& connections, absl::Duration body_time, Arguments&&... arguments)
      : Base(std::forward<Arguments>(arguments)...),
        connections_(connections),
        body_time_(body_time) {}

  void Deepen() { ::listen(this->svr_sock_, kBacklog); }

 private:
  bool process_and_close_socket(socket_t socket) override {
    SSL_CTX* tls = nullptr;
    if constexpr (std::is_same_v<Base, httplib::SSLServer>) tls = this->ssl_context();
    try {
      HttpStream stream(socket, tls);
      return stream.Open() && Serve(stream);
    } catch (const std::exception& exception) {  // of the library, outside the handlers
      log::Error("http_failed", {{"error", exception.what()}});
      return false;
    }
  }

  bool Serve(HttpStream& stream) {
    bool going_on = true;
    for (size_t left = this->keep_alive_max_count_; going_on && left > 0; --left) {
      if (this->svr_sock_ == INVALID_SOCKET) break;
      if (!stream.AwaitRequest(absl::Seconds(this->keep_alive_timeout_sec_))) break;
      t_serving = {.stream = &stream};
      stream.BeginHead();
      bool close = false;
      const auto head_is_there = [&](httplib::Request&) {
        stream.BeginBody(body_time_, kSlowestBody);
      };
      going_on = this->process_request(stream, left == 1, close, head_is_there) && !close;
      if (!t_serving.close) continue;
      stream.EndWriting();
      connections_.Linger(stream.socket());
      return true;
    }
    return going_on;
  }

  HttpConnections& connections_;
  const absl::Duration body_time_;
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

// Where the request wasn't read to its end the connection can't be used any more: what is left of
// it would be the next request.
void SendAndClose(RestReply reply, httplib::Response& response) {
  t_serving.close = true;
  Send(std::move(reply), response);
}

void SetConnection(httplib::Response& response) {
  if (!t_serving.close) return;
  response.headers.erase("Keep-Alive");
  response.headers.erase("Connection");
  response.set_header("Connection", "close");
}

// What is wrong with what a request says of its body: whoever passes it on to us mustn't take
// another end of it than we do. Empty: nothing.
std::string BodyProblem(const httplib::Request& request) {
  const size_t lengths = request.get_header_value_count("Content-Length");
  const size_t codings = request.get_header_value_count("Transfer-Encoding");
  for (const auto& [name, value] : request.headers) {
    if (std::any_of(name.begin(), name.end(), absl::ascii_isspace)) {
      return "a header's name has a space in it";
    }
  }
  if (lengths + codings > 1) return "send one Content-Length or one Transfer-Encoding, not more";
  if (codings == 1 &&
      !absl::EqualsIgnoreCase(request.get_header_value("Transfer-Encoding"), "chunked")) {
    return "the only Transfer-Encoding is chunked";
  }
  uint64_t length = 0;
  if (lengths == 1) {
    const std::string text = request.get_header_value("Content-Length");
    if (!std::all_of(text.begin(), text.end(), absl::ascii_isdigit) ||
        !absl::SimpleAtoi(text, &length)) {
      return "Content-Length isn't a number of bytes";
    }
  }
  if (request.method == "GET" && (codings > 0 || length > 0)) {
    return "GET takes no body; send it by POST";
  }
  return "";
}

// What the library refuses by itself.
std::string WhyRefused(int status, const HttpStream& stream) {
  switch (status) {
    case 414:
      return "the request's first line has more than 8192 bytes";
    case 431:
      return absl::StrCat("the request's head has more than ", stream.kMaxHead, " bytes or ",
                          stream.kMaxHeadLines, " lines");
    default:
      return "the request's head can't be read";
  }
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
  void Refuse(const httplib::Request& http, httplib::Response& response) const;
  RestReply ForClient(RestReply reply) const;
  void Log(const httplib::Request& http, const httplib::Response& response) const;
  void Answer(const httplib::Request& http, httplib::Response& response,
              const httplib::ContentReader* reader);
  RestReply ReadBody(const httplib::ContentReader& reader, bool chunked, BodyRoom& room,
                     std::string& body, bool& whole) const;
  RestReply TooLong() const;
};

void HttpServer::State::MakeServer() {
  if (options.tls == nullptr) {
    auto plain = std::make_unique<Listener<httplib::Server>>(connections, options.body_time);
    deepen = [raw = plain.get()] { raw->Deepen(); };
    server = std::move(plain);
    return;
  }
  auto tls = std::make_unique<Listener<httplib::SSLServer>>(
      connections, options.body_time, [this](SSL_CTX& context) {
        ServeCertificates(context, *options.tls);
        return true;
      });
  deepen = [raw = tls.get()] { raw->Deepen(); };
  server = std::move(tls);
}

void HttpServer::State::Begin(const httplib::Request& http, httplib::Response& response) const {
  t_serving.begun = true;
  if (options.guard == nullptr) return;
  HttpGuard::Call& call = t_serving.call;
  call =
      options.guard->Begin(http.get_header_value(kRequestId), http.get_header_value(kTraceparent));
  response.set_header(kRequestId, call.request_id);
  response.set_header(kTraceparent, call.trace.Header());
}

// A request that the library refuses by itself, of which it may have read a part.
void HttpServer::State::Refuse(const httplib::Request& http, httplib::Response& response) const {
  Begin(http, response);
  const bool too_long = response.status == 400 && t_serving.stream->head_too_long();
  const int status = too_long ? 431 : response.status;
  SendAndClose({.status = status, .body = ErrorJson(WhyRefused(status, *t_serving.stream))},
               response);
}

RestReply HttpServer::State::ForClient(RestReply reply) const {
  if (options.guard == nullptr || reply.status < 400) return reply;
  if (reply.status >= 500) t_serving.call.error = reply.body;
  reply.body = options.guard->Public(reply.body);
  return reply;
}

void HttpServer::State::Log(const httplib::Request& http, const httplib::Response& response) const {
  if (options.guard == nullptr) return;
  const std::string authorization = http.get_header_value("authorization");
  const std::string api_key = http.get_header_value("x-api-key");
  options.guard->Log(t_serving.call,
                     {.method = http.method,
                      .path = http.path,
                      .status = response.status,
                      .peer = t_serving.stream->peer(),
                      .credentials = {.authorization = authorization, .api_key = api_key}});
}

// An error if the body isn't there as a whole; status 200 otherwise.
RestReply HttpServer::State::ReadBody(const httplib::ContentReader& reader, bool chunked,
                                      BodyRoom& room, std::string& body, bool& whole) const {
  bool too_long = false;
  absl::Status refused;
  whole = reader([&](const char* data, size_t size) {
    if (static_cast<int64_t>(body.size() + size) > options.max_body_bytes) {
      too_long = true;
      return false;
    }
    if (!room.Take(static_cast<int64_t>(size))) {
      refused = absl::ResourceExhaustedError("too many bytes of requests at once; try again");
      return false;
    }
    body.append(data, size);
    return true;
  });
  if (too_long) return TooLong();
  if (!refused.ok()) return ErrorReply(refused);
  if (t_serving.stream->body_too_slow()) {
    return {.status = 408, .body = ErrorJson("the body comes too slowly")};
  }
  whole = whole && (!chunked || t_serving.stream->EndsChunks());
  if (!whole) return ErrorReply(absl::InvalidArgumentError("the body can't be read"));
  return {};
}

RestReply HttpServer::State::TooLong() const {
  return {
      .status = 413,
      .body = ErrorJson(absl::StrCat("the body has more than ", options.max_body_bytes, " bytes"))};
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
    if (!admitted.ok()) return SendAndClose(ForClient(ErrorReply(admitted)), response);
    if (http.is_multipart_form_data()) {
      return SendAndClose(
          {.status = 415, .body = ErrorJson("send the body as it is, not as a form")}, response);
    }
    // The library would read all of it, however long that takes.
    if (http.get_header_value<uint64_t>("Content-Length") >
        static_cast<uint64_t>(options.max_body_bytes)) {
      return SendAndClose(TooLong(), response);
    }
    BodyRoom room(body_bytes, options.max_all_bodies_bytes);
    bool whole = false;
    const absl::Time started = absl::Now();
    RestReply unread = ReadBody(*reader, http.has_header("Transfer-Encoding"), room, body, whole);
    request.received = absl::Now() - started;
    if (!whole) return SendAndClose(std::move(unread), response);
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
        // Its body may not have been read.
        SendAndClose({.status = 500, .body = ErrorJson("internal error; see the server's log")},
                     response);
      });
  server.set_error_handler(
      httplib::Server::Handler([raw](const httplib::Request& request, httplib::Response& response) {
        if (!t_serving.begun) raw->Refuse(request, response);
      }));
  server.set_post_routing_handler([](const httplib::Request&, httplib::Response& response) {
    SetType(response);
    SetConnection(response);
  });
  server.set_logger([raw](const httplib::Request& request, const httplib::Response& response) {
    raw->connections.EndRequest();  // the answer has been sent
    raw->options.ended(KindOf(request.path), response.status);
    raw->Log(request, response);
  });
  server.set_pre_routing_handler([raw](const httplib::Request& request,
                                       httplib::Response& response) {
    const bool placed = raw->connections.BeginRequest(t_serving.stream->peer());
    raw->Begin(request, response);
    if (!placed && KindOf(request.path) != HttpKind::kHealth) {
      SendAndClose(ErrorReply(WithPushback(
                       absl::UnavailableError(absl::StrCat(
                           raw->options.max_connections,
                           " connections have requests already, as many as may; come back later")),
                       kComeBack)),
                   response);
      return httplib::Server::HandlerResponse::Handled;
    }
    const std::string problem = BodyProblem(request);
    if (!problem.empty()) {
      SendAndClose({.status = 400, .body = ErrorJson(problem)}, response);
      return httplib::Server::HandlerResponse::Handled;
    }
    if (request.path.size() <= kMaxPath && (request.method == "GET" || request.method == "POST")) {
      return httplib::Server::HandlerResponse::Unhandled;
    }
    SendAndClose({.status = request.path.size() > kMaxPath ? 414 : 405,
                  .body = ErrorJson(
                      absl::StrCat("use GET or POST, and paths of at most ", kMaxPath, " bytes"))},
                 response);
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
  server.Get(kEveryPath, [raw](const httplib::Request& request, httplib::Response& response) {
    raw->Answer(request, response, nullptr);
  });
  server.Post(kEveryPath, [raw](const httplib::Request& request, httplib::Response& response,
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
