#include "server/http.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/testing/connect.h"
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
    const int fd = testing::ConnectTo(server_->port());
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
  // Sends it, what comes later in a packet of its own, and reads what comes until the server
  // closes.
  std::string Talk(const std::string& text, const std::string& later = "") {
    const int fd = Connect();
    EXPECT_EQ(send(fd, text.data(), text.size(), MSG_NOSIGNAL), static_cast<ssize_t>(text.size()));
    if (!later.empty()) {
      absl::SleepFor(absl::Milliseconds(300));
      send(fd, later.data(), later.size(), MSG_NOSIGNAL);
    }
    return ReadAll(fd);
  }
  static int AnswersIn(absl::string_view all) {
    int count = 0;
    for (size_t at = 0; (at = all.find("HTTP/1.1 ", at)) != all.npos; ++at) ++count;
    return count;
  }
  // The status and the body of the one answer, which is as long as it says.
  std::pair<int, std::string> TalkOnce(const std::string& text, const std::string& later = "") {
    const std::string all = Talk(text, later);
    EXPECT_EQ(AnswersIn(all), 1) << all;
    const size_t end = all.find("\r\n\r\n");
    if (end == all.npos || all.size() < 12) return {0, all};
    const std::string body = all.substr(end + 4);
    EXPECT_THAT(all.substr(0, end + 2),
                HasSubstr(absl::StrCat("\r\nContent-Length: ", body.size(), "\r\n")));
    return {std::stoi(all.substr(9, 3)), body};
  }
  // Bytes that this process has in memory.
  static int64_t Resident() {
    int64_t all = 0;
    int64_t resident = 0;
    std::ifstream("/proc/self/statm") >> all >> resident;
    return resident * sysconf(_SC_PAGESIZE);
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
  const std::string head = "POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  const std::string chunk = absl::StrCat("3e8\r\n", std::string(1000, 'x'), "\r\n");
  const std::string smuggled = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
  EXPECT_EQ(TalkOnce(absl::StrCat(head, chunk, "40\r\n", smuggled)).first, 413);
  EXPECT_EQ(TalkOnce(absl::StrCat(head, chunk, "1\r\nx"), smuggled).first, 413);
  EXPECT_EQ(TalkOnce("POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n", smuggled).first,
            413);
  EXPECT_EQ(TalkOnce(absl::StrCat(head, "1\r\nxBROKEN\r\n"), smuggled).first, 400)
      << "the library takes that for the end";
  EXPECT_EQ(TalkOnce("PUT /p HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n", smuggled).first,
            405);
  EXPECT_EQ(answered, 0);
}

// The library reads no body of these.
TEST_F(HttpServerTest, TheBodyOfAGetIsNoRequest) {
  std::atomic<int> answered{0};
  Start({.answer = [&](RestRequest& request) {
    ++answered;
    return Echo(request);
  }});
  const std::string smuggled = "GET /readyz HTTP/1.1\r\nHost: x\r\nX-Filler: 12345\r\n\r\n";
  const std::string length = absl::StrCat("Content-Length: ", smuggled.size(), "\r\n\r\n");
  for (const char* path : {"/p", "/healthz"}) {
    const std::string head = absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: x\r\n");
    EXPECT_EQ(TalkOnce(head + length, smuggled),
              std::pair(400, std::string(R"({"error":"GET takes no body; send it by POST"})")));
    EXPECT_EQ(TalkOnce(head + "Transfer-Encoding: chunked\r\n\r\n", smuggled).first, 400);
  }
  for (const std::string& rest : {length, std::string("\r\n")}) {
    const std::string all = Talk(absl::StrCat("HEAD /p HTTP/1.1\r\nHost: x\r\n", rest), smuggled);
    EXPECT_EQ(AnswersIn(all), 1) << all;
    EXPECT_THAT(all, HasSubstr("405"));
    EXPECT_THAT(all, HasSubstr("Connection: close\r\n"));
    EXPECT_FALSE(absl::StrContains(all, "Keep-Alive"));
  }
  EXPECT_EQ(answered, 0);
  const std::string both = Talk("GET /p HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
                                "GET /q HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  EXPECT_EQ(AnswersIn(both), 2) << both;
}

// What passes them on may take another end of the body than we do.
TEST_F(HttpServerTest, BodiesOfUncertainLengthAreRefused) {
  Start();
  for (const char* lines :
       {"Content-Length: 5\r\nTransfer-Encoding: chunked", "Content-Length: 5\r\nContent-Length: 6",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "Transfer-Encoding: xchunked",
        "Transfer-Encoding: gzip, chunked", "Content-Length: +5", "Content-Length: -5",
        "Content-Length: 5x", "Content-Length: 99999999999999999999", "Content-Length : 5"}) {
    EXPECT_EQ(TalkOnce(absl::StrCat("POST /p HTTP/1.1\r\nHost: x\r\n", lines, "\r\n\r\n"),
                       "5\r\nhello\r\n0\r\n\r\n")
                  .first,
              400)
        << lines;
  }
}

TEST_F(HttpServerTest, RequestsMayComeTogether) {
  Start();
  const std::string all = Talk(
      "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
      "GET /b HTTP/1.1\r\nHost: x\r\n\r\n"
      "POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nde\r\n0\r\n\r\n"
      "GET /d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  EXPECT_EQ(AnswersIn(all), 4) << all;
  for (const char* body : {"POST /a 3", "GET /b 0", "POST /c 2", "GET /d 0"}) {
    EXPECT_THAT(all, HasSubstr(body));
  }
}

// The library hands a client's offset and length on as they are, and makes a part of each range.
TEST_F(HttpServerTest, RangesChangeNothing) {
  Start({.max_body_bytes = 1000,
         .ready = [] { return false; },
         .admit =
             [](const RestRequest& request) {
               return request.path == "/secret" ? absl::UnauthenticatedError("no key")
                                                : absl::OkStatus();
             }});
  const std::string refused = R"({"error":"no key"})";
  const std::string use = R"({"error":"use GET or POST, and paths of at most 1024 bytes"})";
  const struct {
    std::string request;  // up to its headers
    std::string body;
    int status;
    std::string answer;
  } cases[] = {
      {"GET /p", "", 200, "GET /p 0"},
      {"POST /p", "abc", 200, "POST /p 3"},
      {"GET /readyz", "", 503, "draining\n"},
      {"GET /secret", "", 401, refused},
      {"POST /secret", "abc", 401, refused},
      {"PUT /", "", 405, use},
      {"DELETE /p", "abc", 405, use},
      {absl::StrCat("GET /", std::string(1024, 'a')), "", 414, use},
      {"POST /p", std::string(1001, 'x'), 413, R"({"error":"the body has more than 1000 bytes"})"},
  };
  std::vector<std::string> ranges = {"bytes=0-3000000",    "bytes=64-60000",
                                     "bytes=1-2",          "bytes=-1",
                                     "bytes=9000000-",     "bytes=0-9223372036854775807",
                                     "bytes=0-1,3-3000000"};
  const std::string many =
      absl::StrCat("bytes=", absl::StrJoin(std::vector<std::string>(4000, "-"), ","));
  ranges.push_back(many);
  // The library refuses these after it has looked at some of them, or dies of their length where
  // threads have less than 8 MB of stack.
  for (const char* bad : {"bytes=5-2", "bytes=0-3000000,5-2", "bytes"}) ranges.push_back(bad);
  ranges.push_back(absl::StrCat("bytes=", std::string(8000, '9'), "-"));
  ranges.push_back(many + ",5-2");
  for (const std::string& range : ranges) {
    for (const auto& one : cases) {
      const std::string text = absl::StrCat(
          one.request, " HTTP/1.1\r\nHost: x\r\nConnection: close\r\nRange: ", range, "\r\n",
          one.body.empty() ? "" : absl::StrCat("Content-Length: ", one.body.size(), "\r\n"), "\r\n",
          one.body);
      EXPECT_EQ(TalkOnce(text), std::pair(one.status, one.answer))
          << one.request << " " << range.substr(0, 40);
    }
    EXPECT_EQ(TalkOnce(absl::StrCat("POST /p HTTP/1.1\r\nHost: x\r\nRange: ", range,
                                    "\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                                    "Content-Length: 1\r\n\r\nx")),
              std::pair(415, std::string(R"({"error":"send the body as it is, not as a form"})")));
  }
  EXPECT_EQ(TalkOnce("GET /p HTTP/1.1\r\nrAnGe: bytes=0-1\r\nConnection: close\r\n\r\n"),
            std::pair(200, std::string("GET /p 0")));
  EXPECT_THAT(Talk("GET /p HTTP/1.1\r\nRanges: bytes=0-1\r\nX-Test: range: 1\r\n"
                   "Connection: close\r\n\r\n"),
              HasSubstr("X-Echo: range: 1\r\n"))
      << "other headers stay";
  // What the library refuses by itself.
  EXPECT_EQ(
      TalkOnce(absl::StrCat("GET /", std::string(9000, 'a'),
                            " HTTP/1.1\r\nRange: bytes=0-3000000\r\n\r\n")),
      std::pair(414,
                std::string(R"({"error":"the request's first line has more than 8192 bytes"})")));
  EXPECT_EQ(TalkOnce("nonsense\r\nRange: bytes=0-3000000\r\n\r\n"),
            std::pair(400, std::string(R"({"error":"the request's head can't be read"})")));
}

// Nothing of it is known yet, and no key has been seen.
TEST_F(HttpServerTest, AHeadIsBounded) {
  Start();
  const std::string get = "GET /p HTTP/1.1\r\nHost: x\r\n";
  const std::string too_long =
      R"({"error":"the request's head has more than 65536 bytes or 200 lines"})";
  std::string lines;
  for (int i = 0; i < 250; ++i) lines += "a: b\r\n";
  EXPECT_EQ(TalkOnce(absl::StrCat(get, lines, "\r\n")), std::pair(431, too_long));
  EXPECT_EQ(TalkOnce(absl::StrCat(get, "X: ", std::string(70'000, 'x'))), std::pair(431, too_long));
  EXPECT_EQ(TalkOnce(absl::StrCat(get, "X: ", std::string(9000, 'x'), "\r\n\r\n")).first, 400)
      << "a line that the library refuses";
  EXPECT_EQ(TalkOnce(std::string(70'000, 'x')).first, 414);
  std::string large = absl::StrCat(get, "Connection: close\r\n");
  for (int i = 0; i < 8; ++i) absl::StrAppend(&large, "X: ", std::string(8000, 'x'), "\r\n");
  EXPECT_EQ(TalkOnce(large + "\r\n"), std::pair(200, std::string("GET /p 0")));
}

// A line between a body's chunks isn't of the body, and trailers aren't either.
TEST_F(HttpServerTest, LinesOfAChunkedBodyAreBounded) {
  Start();
  const std::string post = "POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  for (const char* before : {"", "1;", "1\r\nx\r\n", "1\r\nx\r\n0;", "0\r\n", "0\r\nX: "}) {
    EXPECT_EQ(TalkOnce(absl::StrCat(post, before, std::string(100'000, 'x'))).first, 400) << before;
  }
  std::string bytes;  // one by one
  for (int i = 0; i < 10'000; ++i) bytes += "1\r\nx\r\n";
  EXPECT_EQ(TalkOnce(absl::StrCat("POST /p HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                                  "Transfer-Encoding: chunked\r\n\r\n",
                                  bytes, "0\r\n\r\n")),
            std::pair(200, std::string("POST /p 10000")));
}

TEST_F(HttpServerTest, WhatHasNoEndTakesNoMemory) {
  Start();
  for (const char* begin :
       {"", "GET /p HTTP/1.1\r\nX: ",
        "POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;"}) {
    const int fd = Connect();
    ASSERT_GE(send(fd, begin, strlen(begin), MSG_NOSIGNAL), 0);
    const std::string some(1 << 20, 'x');
    const int64_t before = Resident();
    for (int i = 0; i < 80; ++i) {
      if (send(fd, some.data(), some.size(), MSG_NOSIGNAL) <= 0) break;
    }
    EXPECT_LT(Resident() - before, 16 << 20) << begin;
    close(fd);
  }
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
  EXPECT_THAT(Talk("POST /p%0Aq HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"),
              HasSubstr("401"))
      << "nor with a line break in its path";
  EXPECT_EQ(Client().Get("/p")->status, 401);
  EXPECT_EQ(Client().Get("/p%0D%0A%00q", {{"X-Key", "good"}})->status, 200);
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
  const auto refused = Client().Post("/p", {{"Range", "bytes=0-3000000"}}, "x", "image/png");
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->status, 503);
  EXPECT_EQ(refused->body.back(), '}');
  EXPECT_LT(refused->body.size(), 200u) << "and nothing of this process's memory";
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
  // In the second no byte of the body comes, but one and one of the first chunk's line.
  for (const char* length : {"Content-Length: 100000", "Transfer-Encoding: chunked"}) {
    const int fd = Connect();
    const std::string head = absl::StrCat("POST /p HTTP/1.1\r\nHost: x\r\n", length, "\r\n\r\n");
    ASSERT_GT(send(fd, head.data(), head.size(), MSG_NOSIGNAL), 0);
    std::string answer;
    for (int i = 0; i < 100 && answer.empty(); ++i) {
      char byte = '0';
      if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1) break;
      absl::SleepFor(absl::Milliseconds(50));
      char buffer[256];
      const ssize_t n = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT);
      if (n > 0) answer.assign(buffer, static_cast<size_t>(n));
    }
    close(fd);
    EXPECT_THAT(answer, HasSubstr("408")) << length;
  }
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
