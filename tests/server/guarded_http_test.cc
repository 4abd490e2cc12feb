// The HTTP port with keys, TLS, ids and public texts: server/http.h over server/security/.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>

#include <atomic>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "proto/base/key.h"
#include "server/http.h"
#include "tests/testing/certificates.h"
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
  void Start(bool keys, bool tls = false, bool client_ca = false) {
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
    guard_ = std::make_unique<HttpGuard>(HttpGuard::Options{}, text_, *access_);
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
