// The HTTP port with keys, TLS, ids and public texts: server/http.h over server/security/.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <netinet/in.h>
#include <openssl/ssl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/base/file.h"
#include "proto/base/key.h"
#include "server/http.h"
#include "tests/testing/certificates.h"
#include "tests/testing/connect.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using testing::CertificateFiles;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using testing::Sample;

class GuardedHttpTest : public ::testing::Test {
 protected:
  void Start(bool keys, bool tls = false, bool client_ca = false, bool every_call = false) {
    ASSERT_OK(WriteFileAtomically(
        folder_ / "keys.yaml",
        absl::StrCat("- {name: phones, sha256: ", KeyHash("key-phones"), ", scopes: [infer]}\n")));
    Access::Options access;
    if (keys) {
      access = {.keys = folder_ / "keys.yaml", .worker_secret = folder_ / "worker.secret"};
    }
    ASSERT_OK_AND_ASSIGN(access_, Access::Create(access, metrics_));
    if (tls) {
      Install(first_);
      TlsFiles::Paths paths{.certificate = live_.certificate, .private_key = live_.private_key};
      if (client_ca) paths.client_ca = authority_.certificate();
      ASSERT_OK_AND_ASSIGN(files_, TlsFiles::Open(paths));
    }
    guard_ =
        std::make_unique<HttpGuard>(HttpGuard::Options{.every_call = every_call}, text_, *access_);
    HttpServer::Options options;
    options.guard = guard_.get();
    options.tls = files_.get();
    options.admit = [this](const RestRequest& request) {
      const std::string authorization = request.header("authorization");
      const std::string api_key = request.header("x-api-key");
      return guard_->Admit(request.method, request.path,
                           {.authorization = authorization, .api_key = api_key});
    };
    options.answer = [this](RestRequest& request) -> RestReply {
      ++answers_;
      if (request.path == "/v2/models/who") {
        const std::string api_key = request.header("x-api-key");
        return {.status = 200, .body = guard_->CallerName({.api_key = api_key})};
      }
      if (request.body == "fail") {
        return {.status = 500, .body = R"({"error":"/usr/src/a.cc:3 at 10.0.0.1:7"})"};
      }
      if (request.path == "/v2/large") return {.status = 200, .body = std::string(5'000'000, 'x')};
      if (request.method == "GET") return {.status = 404, .body = "{}"};
      return {.status = 200, .body = absl::StrCat("got ", request.body.size())};
    };
    ASSERT_OK_AND_ASSIGN(server_, HttpServer::Start(std::move(options)));
  }
  httplib::Client Client() {
    httplib::Client client("127.0.0.1", server_->port());
    client.set_keep_alive(true);
    client.set_read_timeout(20);
    return client;
  }
  // Sends it, over TLS or not, and reads what comes until the server closes.
  std::string Talk(const std::string& text, bool tls) {
    const int fd = testing::ConnectTo(server_->port());
    SSL_CTX* const context = SSL_CTX_new(TLS_client_method());
    SSL* const ssl = SSL_new(context);
    SSL_set_fd(ssl, fd);
    if (tls) {
      EXPECT_EQ(SSL_connect(ssl), 1);
    }
    const int size = static_cast<int>(text.size());
    if (tls) {
      EXPECT_EQ(SSL_write(ssl, text.data(), size), size);
    } else {
      EXPECT_EQ(send(fd, text.data(), text.size(), MSG_NOSIGNAL), size);
    }
    std::string all;
    char buffer[4096];
    const auto read = [&] {
      return tls ? SSL_read(ssl, buffer, sizeof(buffer))
                 : static_cast<int>(recv(fd, buffer, sizeof(buffer), 0));
    };
    for (int n = 0; (n = read()) > 0;) all.append(buffer, static_cast<size_t>(n));
    SSL_free(ssl);
    SSL_CTX_free(context);
    close(fd);
    return all;
  }
  void Install(const CertificateFiles& pair) {
    ASSERT_OK(WriteFileAtomically(live_.private_key, *ReadFile(pair.private_key)));
    ASSERT_OK(WriteFileAtomically(live_.certificate, *ReadFile(pair.certificate)));
  }
  // Whether a client with this certificate (null: none) gets an answer over TLS from a server that
  // shows one which `authority_` signed for 127.0.0.1.
  bool Answers(const CertificateFiles* own = nullptr) {
    httplib::SSLClient client("127.0.0.1", server_->port(),
                              own == nullptr ? "" : own->certificate.string(),
                              own == nullptr ? "" : own->private_key.string());
    client.set_ca_cert_path(authority_.certificate().c_str());
    client.enable_server_certificate_verification(true);
    client.set_read_timeout(20);
    const auto result = client.Get("/healthz");
    return result && result->body == "ok\n";
  }

  testing::TempFolder folder_;
  const testing::CertificateAuthority authority_{folder_.path(), "ca"};
  const CertificateFiles first_ = authority_.Issue("first", "server", "IP:127.0.0.1");
  const CertificateFiles second_ = authority_.Issue("second", "server", "DNS:elsewhere.test");
  const CertificateFiles client_ = authority_.Issue("client", "ada", "");
  const CertificateFiles live_{.certificate = folder_ / "live.pem",
                               .private_key = folder_ / "live.key"};
  const PublicText text_{"/srv/data"};
  Metrics metrics_;
  std::unique_ptr<Access> access_;
  std::unique_ptr<TlsFiles> files_;
  std::unique_ptr<HttpGuard> guard_;
  std::atomic<int> answers_{0};
  std::unique_ptr<HttpServer> server_;
};

TEST_F(GuardedHttpTest, TheKeyDecides) {
  Start(/*keys=*/true);
  httplib::Client client = Client();
  EXPECT_EQ(client.Get("/healthz")->status, 200);
  const auto refused = client.Get("/v2");
  EXPECT_EQ(refused->status, 401);
  EXPECT_THAT(nlohmann::json::parse(refused->body).at("error").get<std::string>(),
              HasSubstr("a key is needed"));
  EXPECT_EQ(client.Get("/v2", {{"Authorization", "Bearer wrong"}})->status, 401);
  EXPECT_EQ(answers_, 0);
  EXPECT_EQ(client.Get("/v2", {{"Authorization", "Bearer key-phones"}})->status, 404)
      << "let in; nothing is there";
  EXPECT_EQ(client.Get("/v2", {{"X-API-Key", "key-phones"}})->status, 404);
  const auto load = client.Post("/v2/repository/models/bars/load",
                                {{"Authorization", "Bearer key-phones"}}, "{}", "application/json");
  EXPECT_EQ(load->status, 403);
  EXPECT_THAT(load->body, HasSubstr("needs admin"));
  EXPECT_EQ(Sample(metrics_, R"(pyramid_refused_calls_total{reason="auth"})"), 2);
  EXPECT_EQ(Sample(metrics_, R"(pyramid_refused_calls_total{reason="scope"})"), 1);
}

TEST_F(GuardedHttpTest, TheBodyOfARefusedRequestIsNotTheNextRequest) {
  Start(/*keys=*/true);
  httplib::Client client = Client();
  const std::string smuggled =
      "POST /v2/models/bars/infer HTTP/1.1\r\nHost: x\r\nX-API-Key: key-phones\r\n"
      "Content-Length: 3\r\n\r\nabc";
  for (int i = 0; i < 3; ++i) {
    const auto refused = client.Post("/v2/models/bars/infer", smuggled, "application/json");
    ASSERT_TRUE(refused);
    EXPECT_EQ(refused->status, 401);
    const auto next = client.Post("/v2/models/bars/infer", {{"X-API-Key", "key-phones"}}, "1234",
                                  "application/json");
    ASSERT_TRUE(next);
    EXPECT_EQ(next->body, "got 4");
  }
  EXPECT_EQ(answers_, 3);
}

TEST_F(GuardedHttpTest, EveryAnswerBearsARequestIdAndATrace) {
  Start(/*keys=*/true);
  httplib::Client client = Client();
  const auto made = client.Get("/healthz");
  EXPECT_THAT(made->get_header_value("x-request-id"), MatchesRegex("[0-9a-f]{32}"));
  EXPECT_THAT(made->get_header_value("traceparent"), MatchesRegex("00-[0-9a-f]{32}-.*-00"));
  const auto given = client.Get(
      "/healthz", {{"X-Request-Id", "mine"},
                   {"Traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}});
  EXPECT_EQ(given->get_header_value("x-request-id"), "mine");
  EXPECT_THAT(given->get_header_value("traceparent"),
              MatchesRegex("00-4bf92f3577b34da6a3ce929d0e0e4736-[0-9a-f]{16}-01"));
  EXPECT_EQ(client.Get("/v2", {{"X-Request-Id", "mine"}})->get_header_value("x-request-id"),
            "mine");
}

// The library refuses them before anybody has seen them; the thread has served others before.
TEST_F(GuardedHttpTest, RequestsThatCannotBeReadHaveIdsOfTheirOwn) {
  Start(/*keys=*/true, /*tls=*/false, /*client_ca=*/false, /*every_call=*/true);
  ::testing::internal::CaptureStderr();
  for (const std::string& text :
       {std::string("nonsense\r\n\r\n"),
        absl::StrCat("GET /", std::string(9000, 'a'), " HTTP/1.1\r\n\r\n")}) {
    EXPECT_EQ(Client().Get("/healthz", {{"X-Request-Id", "stranger"}})->status, 200);
    const std::string answer = Talk(text, /*tls=*/false);
    EXPECT_THAT(answer, ::testing::ContainsRegex("x-request-id: [0-9a-f]{32}\r\n"));
    EXPECT_THAT(answer, ::testing::ContainsRegex("traceparent: 00-[0-9a-f]{32}-"));
  }
  const std::string given =
      Talk(absl::StrCat("GET /p HTTP/1.1\r\nX-Request-Id: mine\r\nX: ", std::string(9000, 'x'),
                        "\r\n\r\n"),
           /*tls=*/false);
  EXPECT_THAT(given, HasSubstr("x-request-id: mine\r\n"));
  server_ = nullptr;
  const std::string log = ::testing::internal::GetCapturedStderr();
  int refused = 0;
  for (const absl::string_view line : absl::StrSplit(log, '\n')) {
    if (!absl::StrContains(line, "code=400") && !absl::StrContains(line, "code=414")) continue;
    ++refused;
    EXPECT_FALSE(absl::StrContains(line, "stranger")) << line;
    EXPECT_THAT(std::string(line), ::testing::ContainsRegex("ms=[0-9]\\.[0-9]+ ")) << "its own";
    EXPECT_THAT(std::string(line), HasSubstr("peer=127.0.0.1:"));
  }
  EXPECT_EQ(refused, 3) << log;
}

// One a second, however many are tried.
TEST_F(GuardedHttpTest, GuessingKeysLeavesALine) {
  Start(/*keys=*/true);
  ::testing::internal::CaptureStderr();
  httplib::Client client = Client();
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(client.Get("/v2", {{"X-API-Key", absl::StrCat("guess", i)}})->status, 401);
  }
  absl::SleepFor(absl::Milliseconds(1100));
  EXPECT_EQ(client
                .Post("/v2/repository/models/bars/load", {{"X-API-Key", "key-phones"}}, "{}",
                      "application/json")
                ->status,
            403);
  server_ = nullptr;
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_THAT(log, ::testing::ContainsRegex(
                       R"(call_refused method="GET /v2" code=Unauthenticated why=.* calls=1)"));
  EXPECT_THAT(
      log, ::testing::ContainsRegex(R"(call_refused method="POST /v2/repository/models/bars/load" )"
                                    R"(code=PermissionDenied why=.* calls=5)"))
      << "four before it";
  EXPECT_FALSE(absl::StrContains(log, "guess"));
}

TEST_F(GuardedHttpTest, ErrorsTellNothingOfThisMachineAndTheLogAll) {
  Start(/*keys=*/false);
  ::testing::internal::CaptureStderr();
  httplib::Client client = Client();
  const auto failed =
      client.Post("/v2/models/bars/infer", {{"X-Request-Id", "mine"}}, "fail", "application/json");
  ASSERT_TRUE(failed);
  EXPECT_EQ(failed->status, 500);
  EXPECT_EQ(failed->body, R"({"error":".../a.cc:3 at <address>"})");
  EXPECT_EQ(failed->get_header_value("Content-Length"), absl::StrCat(failed->body.size()));
  server_ = nullptr;  // the line is written by then
  const std::string line = ::testing::internal::GetCapturedStderr();
  EXPECT_THAT(line, HasSubstr("http_failed method=POST path=/v2/models/bars/infer code=500"));
  EXPECT_THAT(line, HasSubstr("request_id=mine"));
  EXPECT_THAT(line, HasSubstr("/usr/src/a.cc:3 at 10.0.0.1:7"));
}

TEST_F(GuardedHttpTest, HttpsFollowsItsFiles) {
  Start(/*keys=*/false, /*tls=*/true);
  EXPECT_TRUE(Answers());
  Install(second_);
  EXPECT_FALSE(Answers()) << "the new certificate is for another name";
  Install(first_);
  EXPECT_TRUE(Answers());
  ASSERT_OK(WriteFileAtomically(live_.certificate, "garbage"));
  EXPECT_TRUE(Answers()) << "a botched renewal changes nothing";
  httplib::Client plain("127.0.0.1", server_->port());
  plain.set_read_timeout(2);
  EXPECT_FALSE(plain.Get("/healthz"));
  EXPECT_TRUE(Answers());
}

TEST_F(GuardedHttpTest, HeadsAreBoundedOverTlsToo) {
  Start(/*keys=*/true, /*tls=*/true);
  const std::string get = "GET /healthz HTTP/1.1\r\nHost: x\r\n";
  EXPECT_THAT(Talk(absl::StrCat(get, "X: ", std::string(1 << 20, 'x')), /*tls=*/true),
              HasSubstr("HTTP/1.1 431 "));
  EXPECT_THAT(Talk(absl::StrCat(get, "X: ", std::string(8000, 'x'), "\r\n\r\n", get,
                                "Connection: close\r\n\r\n"),
                   /*tls=*/true),
              MatchesRegex("HTTP/1.1 200 .*ok\nHTTP/1.1 200 .*ok\n"));
  EXPECT_THAT(Talk("PUT / HTTP/1.1\r\nHost: x\r\nRange: bytes=0-3000000\r\n\r\n", /*tls=*/true),
              ::testing::EndsWith("use GET or POST, and paths of at most 1024 bytes\"}"));
}

TEST_F(GuardedHttpTest, LargeBodiesAndAnswersPassOverTls) {
  Start(/*keys=*/true, /*tls=*/true);
  httplib::SSLClient client("127.0.0.1", server_->port());
  client.enable_server_certificate_verification(false);
  client.set_keep_alive(true);
  client.set_read_timeout(20);
  const std::string body(20'000'000, 'x');
  for (int i = 0; i < 3; ++i) {
    const auto refused = client.Post("/v2/models/bars/infer", body, "image/png");
    ASSERT_TRUE(refused) << "attempt " << i;
    EXPECT_EQ(refused->status, 401);
    const auto taken =
        client.Post("/v2/models/bars/infer", {{"X-API-Key", "key-phones"}}, body, "image/png");
    ASSERT_TRUE(taken) << "attempt " << i;
    EXPECT_EQ(taken->body, "got 20000000");
    const auto large = client.Get("/v2/large", {{"X-API-Key", "key-phones"}});
    ASSERT_TRUE(large) << "attempt " << i;
    EXPECT_EQ(large->body.size(), 5'000'000u);
  }
}

TEST_F(GuardedHttpTest, ACertificatesNameIsTheCallersUnlessAKeyHasOne) {
  Start(/*keys=*/true, /*tls=*/true, /*client_ca=*/true);
  const auto who = [&](const CertificateFiles& own, const httplib::Headers& headers) {
    httplib::SSLClient client("127.0.0.1", server_->port(), own.certificate.string(),
                              own.private_key.string());
    client.set_ca_cert_path(authority_.certificate().c_str());
    client.set_read_timeout(20);
    const auto answer = client.Get("/v2/models/who", headers);
    return answer ? answer->body : "no answer";
  };
  EXPECT_EQ(who(client_, {{"X-API-Key", "key-phones"}}), "phones");
  server_ = nullptr;
  Start(/*keys=*/false, /*tls=*/true, /*client_ca=*/true);
  EXPECT_EQ(who(client_, {}), "ada");
  const CertificateFiles named = authority_.Issue("named", "common", "DNS:ada.example.test");
  EXPECT_EQ(who(named, {}), "ada.example.test");
}

TEST_F(GuardedHttpTest, MutualTlsTakesCertificatesOfItsAuthorityOnly) {
  Start(/*keys=*/false, /*tls=*/true, /*client_ca=*/true);
  EXPECT_FALSE(Answers());
  EXPECT_TRUE(Answers(&client_));
  const testing::CertificateAuthority stranger(folder_.path(), "stranger");
  const CertificateFiles other = stranger.Issue("other", "eve", "");
  EXPECT_FALSE(Answers(&other));
}

}  // namespace
}  // namespace pyramid
