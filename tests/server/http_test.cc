#include "server/http.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;
using testing::StatusIs;

// Answers with the request's method, path, body's size and one header.
RestReply Echo(RestRequest& request) {
  return {.status = 200,
          .content_type = "text/plain",
          .headers = {{"X-Echo", request.header("x-test")}},
          .body = absl::StrCat(request.method, " ", request.path, " ", request.body.size())};
}

class HttpServerTest : public ::testing::Test {
 protected:
  void Start(HttpServer::Options options = {}) {
    if (!static_cast<bool>(options.answer)) options.answer = Echo;
    auto server = HttpServer::Start(std::move(options));
    ASSERT_OK(server.status());
    server_ = *std::move(server);
  }
  httplib::Client Client() {
    httplib::Client client("127.0.0.1", server_->port());
    client.set_read_timeout(20);
    client.set_keep_alive(true);
    client.set_tcp_nodelay(true);
    return client;
  }
  // A connection of our own, to write what no client library would.
  int Connect() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(server_->port()));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    const timeval limit{.tv_sec = 20, .tv_usec = 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    return fd;
  }
  static std::string ReadAll(int fd) {
    std::string all;
    char buffer[4096];
    for (ssize_t n = 0; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;) {
      all.append(buffer, static_cast<size_t>(n));
    }
    close(fd);
    return all;
  }
  // Sends it and reads what comes until the server closes.
  std::string Talk(const std::string& text) {
    const int fd = Connect();
    EXPECT_EQ(send(fd, text.data(), text.size(), MSG_NOSIGNAL), static_cast<ssize_t>(text.size()));
    return ReadAll(fd);
  }

  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, HealthFollowsReadiness) {
  std::atomic<bool> ready{true};
  Start({.ready = [&] { return ready.load(); }});
  httplib::Client client = Client();
  EXPECT_EQ(client.Get("/healthz")->status, 200);
  EXPECT_EQ(client.Get("/readyz")->status, 200);
  ready = false;
  EXPECT_EQ(client.Get("/readyz")->status, 503);
  EXPECT_EQ(client.Get("/readyz")->body, "draining\n");
  EXPECT_EQ(client.Get("/healthz")->body, "ok\n");
}

TEST_F(HttpServerTest, OtherPathsGoToTheHandler) {
  Start();
  httplib::Client client = Client();
  auto answer = client.Get("/v2/models/a%20b?x=1", {{"X-Test", "42"}});
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->body, "GET /v2/models/a b 0") << "decoded, without the query";
  EXPECT_EQ(answer->get_header_value("X-Echo"), "42");
  EXPECT_EQ(client.Post("/p", "12345", "application/x-www-form-urlencoded")->body, "POST /p 5");
  EXPECT_EQ(
      client.Post("/p", std::string(1'000'000, '='), "application/x-www-form-urlencoded")->body,
      "POST /p 1000000")
      << "curl sends pictures as forms unless told otherwise";
}

TEST_F(HttpServerTest, RequestsOfOneConnectionDoNotWaitForAcknowledgements) {
  Start();
  httplib::Client client = Client();
  ASSERT_TRUE(client.Post("/p", "x", "image/png"));
  const absl::Time started = absl::Now();
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(client.Post("/p", std::string(100, 'x'), "image/png"));
  EXPECT_LT(absl::Now() - started, absl::Seconds(3)) << "40 ms each with Nagle's algorithm";
}

TEST_F(HttpServerTest, ABodyOverTheLimitIs413AndTheServerGoesOn) {
  Start({.max_body_bytes = 1000});
  httplib::Client client = Client();
  const auto refused = client.Post("/p", std::string(1001, 'x'), "image/png");
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->status, 413);
  EXPECT_THAT(refused->body, HasSubstr("error"));
  EXPECT_EQ(client.Post("/p", std::string(1000, 'x'), "image/png")->body, "POST /p 1000");
}

TEST_F(HttpServerTest, AChunkedBodyIsBoundedToo) {
  Start({.max_body_bytes = 1000});
  const std::string head = "POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  const std::string chunk = absl::StrCat("190\r\n", std::string(400, 'x'), "\r\n");
  EXPECT_THAT(Talk(absl::StrCat(head, chunk, chunk, chunk, chunk)), HasSubstr("413"));
  const std::string good = Talk(absl::StrCat(
      "POST /p HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n",
      chunk, chunk, "0\r\n\r\n"));
  EXPECT_THAT(good, HasSubstr("POST /p 800"));
}

// What is left of a body that wasn't read mustn't become the next request.
TEST_F(HttpServerTest, TheRestOfARefusedBodyIsNoRequest) {
  std::atomic<int> answered{0};
  Start({.max_body_bytes = 1000, .answer = [&](RestRequest& request) {
           ++answered;
           return Echo(request);
         }});
  const std::string chunk = absl::StrCat("3e8\r\n", std::string(1000, 'x'), "\r\n");
  const std::string all =
      Talk(absl::StrCat("POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", chunk,
                        "40\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"));
  EXPECT_THAT(all, HasSubstr("413"));
  EXPECT_FALSE(absl::StrContains(all, "smuggled"));
  EXPECT_EQ(answered, 0);
}

TEST_F(HttpServerTest, BodiesAreBoundedTogether) {
  absl::Notification first_is_there;
  absl::Notification go_on;
  Start({.max_body_bytes = 1000, .max_all_bodies_bytes = 1500, .answer = [&](RestRequest& request) {
           if (request.path == "/wait") {
             first_is_there.Notify();
             go_on.WaitForNotification();
           }
           return Echo(request);
         }});
  std::thread waiting(
      [&] { EXPECT_EQ(Client().Post("/wait", std::string(1000, 'x'), "image/png")->status, 200); });
  first_is_there.WaitForNotification();
  EXPECT_EQ(Client().Post("/p", std::string(1000, 'x'), "image/png")->status, 429);
  EXPECT_EQ(Client().Post("/p", std::string(400, 'x'), "image/png")->status, 200);
  go_on.Notify();
  waiting.join();
  EXPECT_EQ(Client().Post("/p", std::string(1000, 'x'), "image/png")->status, 200)
      << "it is given back";
}

TEST_F(HttpServerTest, WhoIsNotAdmittedIsNotRead) {
  Start({.admit = [](const RestRequest& request) {
    return request.header("x-key") == "good" ? absl::OkStatus()
                                             : absl::UnauthenticatedError("no key");
  }});
  // It promises a body and never sends it: the answer comes all the same.
  const std::string refused = Talk("POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n");
  EXPECT_THAT(refused, HasSubstr("401"));
  EXPECT_THAT(refused, HasSubstr("{\"error\":\"no key\"}"));
  EXPECT_EQ(Client().Get("/p")->status, 401);
  EXPECT_EQ(Client().Get("/p", {{"X-Key", "good"}})->status, 200);
  EXPECT_EQ(Client().Get("/healthz")->status, 200);
}

// A client that sends all of a large body before it reads sees why it was refused.
TEST_F(HttpServerTest, ARefusalReachesAClientThatIsStillSending) {
  Start({.admit = [](const RestRequest&) { return absl::UnauthenticatedError("no key"); }});
  for (int i = 0; i < 20; ++i) {
    const auto refused = Client().Post("/p", std::string(20'000'000, 'x'), "image/png");
    ASSERT_TRUE(refused) << "attempt " << i;
    EXPECT_EQ(refused->status, 401);
  }
}

TEST_F(HttpServerTest, APostWithoutABodyNeedsNoLength) {
  Start();
  EXPECT_THAT(Talk("POST /p HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
              HasSubstr("POST /p 0"));
}

TEST_F(HttpServerTest, CompressedBodiesAreReadAndBounded) {
  Start({.max_body_bytes = 100'000});
  httplib::Client client = Client();
  client.set_compress(true);
  EXPECT_EQ(client.Post("/p", std::string(50'000, 'x'), "text/plain")->body, "POST /p 50000");
  EXPECT_EQ(client.Post("/p", std::string(5'000'000, 'x'), "text/plain")->status, 413)
      << "a few kilobytes that unpack to five megabytes";
}

// tritonclient offers to take gzip and then doesn't unpack it.
TEST_F(HttpServerTest, AnswersAreNotCompressed) {
  Start({.answer = [](RestRequest&) { return RestReply{.body = std::string(10'000, '1')}; }});
  httplib::Client client = Client();
  client.set_decompress(false);
  const auto answer = client.Get("/p", {{"Accept-Encoding", "gzip, deflate, br"}});
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->body.size(), 10'000u);
  EXPECT_FALSE(answer->has_header("Content-Encoding"));
  EXPECT_EQ(answer->get_header_value("Content-Type"), "application/json");
  EXPECT_EQ(answer->get_header_value_count("Content-Type"), 1u);
}

TEST_F(HttpServerTest, OddRequestsAreRefused) {
  Start();
  httplib::Client client = Client();
  EXPECT_EQ(client.Delete("/p")->status, 405);
  EXPECT_EQ(client.Get(absl::StrCat("/", std::string(2000, 'a')))->status, 414);
  const httplib::MultipartFormDataItems form = {{"file", "x", "cat.jpg", "image/jpeg"}};
  EXPECT_EQ(client.Post("/p", form)->status, 415);
  const int fd = Connect();
  const std::string nonsense = "nonsense\r\n\r\n";
  EXPECT_GT(send(fd, nonsense.data(), nonsense.size(), MSG_NOSIGNAL), 0);
  char head[16] = {};
  EXPECT_GT(recv(fd, head, sizeof(head) - 1, MSG_WAITALL), 0);
  EXPECT_STREQ(head, "HTTP/1.1 400 Ba");
  close(fd);
  EXPECT_EQ(Client().Get("/p")->status, 200) << "and the server goes on";
}

TEST_F(HttpServerTest, AnExceptionInTheHandlerIs500) {
  Start({.answer = [](RestRequest&) -> RestReply { throw std::runtime_error("/secret/path"); }});
  const auto answer = Client().Get("/p");
  EXPECT_EQ(answer->status, 500);
  EXPECT_THAT(answer->body, HasSubstr("see the server's log"));
}

TEST_F(HttpServerTest, ConnectionsThatAskNothingShutNobodyOut) {
  Start({.max_connections = 8});
  std::vector<int> idle;
  for (int i = 0; i < 100; ++i) idle.push_back(Connect());
  const absl::Time started = absl::Now();
  EXPECT_EQ(Client().Get("/healthz")->status, 200);
  EXPECT_EQ(Client().Get("/p")->status, 200);
  EXPECT_LT(absl::Now() - started, absl::Seconds(2));
  for (const int fd : idle) close(fd);
}

// A place that is kept between requests goes to somebody who has one.
TEST_F(HttpServerTest, TheLongestIdleConnectionGivesWay) {
  Start({.max_connections = 2});
  httplib::Client first = Client();
  httplib::Client second = Client();
  httplib::Client third = Client();
  ASSERT_EQ(first.Get("/p")->status, 200);
  ASSERT_EQ(second.Get("/p")->status, 200);
  const absl::Time started = absl::Now();
  EXPECT_EQ(third.Get("/p")->status, 200);
  EXPECT_EQ(first.Get("/p")->status, 200) << "it connects anew";
  EXPECT_LT(absl::Now() - started, absl::Seconds(2)) << "an idle one may stay for ten";
}

TEST_F(HttpServerTest, HealthIsAnsweredWhileAllPlacesAreTaken) {
  absl::Notification go;
  std::atomic<int> answering{0};
  Start({.max_connections = 3, .answer = [&](RestRequest& request) {
           ++answering;
           go.WaitForNotification();
           return Echo(request);
         }});
  std::vector<std::thread> clients;
  for (int i = 0; i < 3; ++i) {
    clients.emplace_back([this] { EXPECT_EQ(Client().Post("/p", "x", "image/png")->status, 200); });
  }
  while (answering < 3) absl::SleepFor(absl::Milliseconds(1));
  const absl::Time started = absl::Now();
  for (const char* path : {"/healthz", "/readyz"}) EXPECT_EQ(Client().Get(path)->status, 200);
  const auto refused = Client().Post("/p", "x", "image/png");
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->status, 503);
  EXPECT_EQ(refused->get_header_value("Retry-After"), "1");
  EXPECT_THAT(refused->body, HasSubstr("3 connections"));
  EXPECT_LT(absl::Now() - started, absl::Seconds(2));
  go.Notify();
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(Client().Get("/p")->status, 200) << "there is place again";
}

// Half a request, and a byte from time to time, so that no read takes too long.
TEST_F(HttpServerTest, WhoNeverFinishesARequestIsHungUpOnOnceThereAreMany) {
  Start({.longest_silence = absl::Seconds(1), .max_connections = 1});
  std::vector<int> slow;
  const std::string head = "GET /p HTTP/1.1\r\nX-Slow: ";
  for (int i = 0; i < 150; ++i) {
    slow.push_back(Connect());
    ASSERT_GT(send(slow.back(), head.data(), head.size(), MSG_NOSIGNAL), 0);
  }
  const absl::Time started = absl::Now();
  constexpr size_t kBeyond = 30;  // what counts as many
  size_t closed = 0;
  while (closed < kBeyond && absl::Now() - started < absl::Seconds(20)) {
    absl::SleepFor(absl::Milliseconds(200));
    EXPECT_EQ(Client().Get("/healthz")->status, 200);
    closed = 0;
    for (const int fd : slow) {
      char byte = 'x';
      const bool sent = send(fd, &byte, 1, MSG_NOSIGNAL) == 1;
      if (!sent || recv(fd, &byte, 1, MSG_DONTWAIT) == 0) ++closed;
    }
  }
  EXPECT_GE(closed, kBeyond);
  for (const int fd : slow) close(fd);
}

TEST_F(HttpServerTest, ABodyThatTricklesIsGivenUp) {
  Start({.body_time = absl::Milliseconds(300)});
  const int fd = Connect();
  const std::string head = "POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n";
  ASSERT_GT(send(fd, head.data(), head.size(), MSG_NOSIGNAL), 0);
  std::string answer;
  for (int i = 0; i < 100 && answer.empty(); ++i) {
    char byte = 'x';
    if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1) break;
    absl::SleepFor(absl::Milliseconds(50));
    char buffer[256];
    const ssize_t n = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT);
    if (n > 0) answer.assign(buffer, static_cast<size_t>(n));
  }
  close(fd);
  EXPECT_THAT(answer, HasSubstr("408"));
}

TEST_F(HttpServerTest, AClientThatHangsUpIsNoticed) {
  absl::Notification asked;
  std::atomic<bool> stayed{false};
  std::atomic<bool> left{false};
  Start({.answer = [&](RestRequest& request) {
    stayed = !request.gone();
    asked.Notify();
    for (int i = 0; i < 500 && !left; ++i) {
      absl::SleepFor(absl::Milliseconds(10));
      left = request.gone();
    }
    return Echo(request);
  }});
  const int fd = Connect();
  const std::string head = "POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx";
  ASSERT_GT(send(fd, head.data(), head.size(), MSG_NOSIGNAL), 0);
  asked.WaitForNotification();
  EXPECT_TRUE(stayed);
  close(fd);
  server_ = nullptr;  // waits for the answer
  EXPECT_TRUE(left);
}

TEST_F(HttpServerTest, ShutdownCutsOffWhatTakesTooLong) {
  absl::Notification asked;
  Start({.answer = [&](RestRequest& request) {
    asked.Notify();
    while (!request.gone()) absl::SleepFor(absl::Milliseconds(10));
    return Echo(request);
  }});
  const int waits = Connect();
  const int trickles = Connect();
  const std::string whole = "POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx";
  const std::string begun = "POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\nx";
  ASSERT_GT(send(waits, whole.data(), whole.size(), MSG_NOSIGNAL), 0);
  ASSERT_GT(send(trickles, begun.data(), begun.size(), MSG_NOSIGNAL), 0);
  asked.WaitForNotification();
  const absl::Time started = absl::Now();
  server_->Shutdown(started + absl::Milliseconds(300));
  const absl::Duration took = absl::Now() - started;
  EXPECT_GE(took, absl::Milliseconds(300)) << "until then they might have been answered";
  EXPECT_LT(took, absl::Seconds(3));
  server_ = nullptr;
  close(waits);
  close(trickles);
}

TEST_F(HttpServerTest, EveryRequestIsCountedByKindAndStatus) {
  absl::Mutex mutex;
  std::vector<std::pair<HttpKind, int>> seen;
  Start({.ended = [&](HttpKind kind, int status) {
    absl::MutexLock lock(&mutex);
    seen.emplace_back(kind, status);
  }});
  httplib::Client client = Client();
  client.Get("/healthz");
  client.Get("/v2/health/live");
  client.Post("/v2/models/m/infer", "x", "image/png");
  client.Get("/v2/models/m/versions/1/config");
  client.Post("/v2/repository/index", "", "application/json");
  client.Put("/elsewhere", "x", "text/plain");
  server_ = nullptr;
  EXPECT_THAT(seen, ElementsAre(Pair(HttpKind::kHealth, 200), Pair(HttpKind::kHealth, 200),
                                Pair(HttpKind::kInfer, 200), Pair(HttpKind::kModel, 200),
                                Pair(HttpKind::kRepository, 200), Pair(HttpKind::kOther, 405)));
}

TEST_F(HttpServerTest, StoppingDoesNotWaitForIdleConnections) {
  Start();
  const int idle = Connect();
  httplib::Client client = Client();
  ASSERT_EQ(client.Get("/healthz")->status, 200);
  const absl::Time started = absl::Now();
  server_ = nullptr;
  EXPECT_LT(absl::Now() - started, absl::Seconds(3)) << "the library waits ten seconds for them";
  close(idle);
}

TEST_F(HttpServerTest, AnAnswerInProgressIsSentBeforeTheServerStops) {
  absl::Notification asked;
  Start({.answer = [&](RestRequest& request) {
    asked.Notify();
    absl::SleepFor(absl::Milliseconds(300));
    return Echo(request);
  }});
  std::thread client([this] {
    const auto answer = Client().Post("/p", "x", "image/png");
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->body, "POST /p 1");
  });
  asked.WaitForNotification();
  server_ = nullptr;
  client.join();
}

TEST_F(HttpServerTest, APortInUseIsUnavailable) {
  Start();
  EXPECT_THAT(HttpServer::Start({.port = server_->port(), .answer = Echo}).status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("--http-port")));
}

}  // namespace
}  // namespace pyramid
