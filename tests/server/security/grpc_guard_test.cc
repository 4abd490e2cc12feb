// Keys, TLS and the call log on a real gRPC server.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/channel.h"
#include "proto/base/file.h"
#include "proto/base/key.h"
#include "proto/classification.grpc.pb.h"
#include "proto/training.grpc.pb.h"
#include "server/security/call_log.h"
#include "server/security/grpc_credentials.h"
#include "tests/testing/certificates.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/raw_call.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using testing::CertificateFiles;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using testing::Sample;
using testing::StatusIs;

// Answers ListModels; Classify fails with the model's name as its error text.
class Classification final : public v1::ClassificationService::CallbackService {
 public:
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest*,
                                       v1::ListModelsResponse* response) override {
    response->set_max_pictures(7);
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
  grpc::ServerUnaryReactor* Classify(grpc::CallbackServerContext* context,
                                     const v1::ClassifyRequest* request,
                                     v1::ClassifyResponse*) override {
    ++calls;
    if (!request->request_id().empty()) {
      context->AddTrailingMetadata("x-request-id", request->request_id());
    }
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish({grpc::StatusCode::INTERNAL, request->model()});
    return reactor;
  }
  std::atomic<int> calls{0};
};

// The synchronous kind of service.
class Training final : public v1::TrainingService::Service {
 public:
  grpc::Status GetJob(grpc::ServerContext* context, const v1::GetJobRequest* request,
                      v1::Job*) override {
    caller = CallerName(*context);
    return {grpc::StatusCode::NOT_FOUND, request->job_id()};
  }
  std::string caller;
};

class GrpcGuardTest : public ::testing::Test {
 protected:
  void StartServer(bool keys, bool tls = false, bool client_ca = false) {
    std::string yaml;
    for (const auto& [name, scope] :
         {std::pair{"phones", "infer"}, {"lab", "submit"}, {"root", "admin"}}) {
      absl::StrAppend(&yaml, "- {name: ", name, ", sha256: ", KeyHash(absl::StrCat("key-", name)),
                      ", scopes: [", scope, "]}\n");
    }
    ASSERT_OK(WriteFileAtomically(folder_ / "keys.yaml", yaml));
    Access::Options options;
    if (keys) {
      options = {.keys = folder_ / "keys.yaml", .worker_secret = folder_ / "worker.secret"};
    }
    ASSERT_OK_AND_ASSIGN(access_, Access::Create(options, metrics_));
    if (tls) {
      TlsFiles::Paths paths{.certificate = live_.certificate, .private_key = live_.private_key};
      if (client_ca) paths.client_ca = authority_.certificate();
      Install(first_);
      ASSERT_OK_AND_ASSIGN(files_, TlsFiles::Open(paths));
    }
    log_ = std::make_unique<CallLog>(CallLog::Options{}, text_, *access_);
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", MakeServerCredentials(*access_, files_), &port_);
    builder.RegisterService(&service_);
    builder.RegisterService(&training_);
    std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> creators;
    creators.push_back(log_->Factory());
    builder.experimental().SetInterceptorCreators(std::move(creators));
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
  }
  void TearDown() override {
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  }

  void Install(const CertificateFiles& pair) {
    ASSERT_OK(WriteFileAtomically(live_.private_key, *ReadFile(pair.private_key)));
    ASSERT_OK(WriteFileAtomically(live_.certificate, *ReadFile(pair.certificate)));
  }

  std::shared_ptr<grpc::Channel> Channel(const ChannelSecurity& security) {
    grpc::ChannelArguments arguments;
    arguments.SetInt("test.channel", ++channels_);  // or gRPC would reuse a connection
    auto channel = OpenChannel(absl::StrCat("127.0.0.1:", port_), security, arguments);
    EXPECT_OK(channel);
    return *channel;
  }

  struct Reply {
    grpc::Status status;
    std::multimap<std::string, std::string> trailers;
    std::string certificate;  // that the server showed
    std::string Trailer(const std::string& key) const {
      EXPECT_EQ(trailers.count(key), 1u) << key;
      const auto found = trailers.find(key);
      return found == trailers.end() ? "" : found->second;
    }
  };
  using Metadata = std::multimap<std::string, std::string>;
  template <typename Function>
  Reply Call(const Metadata& metadata, Function&& function) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    for (const auto& [key, value] : metadata) context.AddMetadata(key, value);
    Reply reply;
    reply.status = function(context);
    for (const auto& [key, value] : context.GetServerTrailingMetadata()) {
      reply.trailers.emplace(std::string(key.data(), key.size()),
                             std::string(value.data(), value.size()));
    }
    const auto auth = context.auth_context();
    if (reply.status.ok() && auth != nullptr) {
      for (const grpc::string_ref& pem : auth->FindPropertyValues("x509_pem_cert")) {
        reply.certificate = std::string(pem.data(), pem.size());
      }
    }
    return reply;
  }
  Reply ListModels(const ChannelSecurity& security, const Metadata& metadata = {}) {
    const auto stub = v1::ClassificationService::NewStub(Channel(security));
    return Call(metadata, [&](grpc::ClientContext& context) {
      v1::ListModelsResponse response;
      return stub->ListModels(&context, {}, &response);
    });
  }
  Reply Classify(const v1::ClassifyRequest& request, const Metadata& metadata = {}) {
    const auto stub = v1::ClassificationService::NewStub(Channel({}));
    return Call(metadata, [&](grpc::ClientContext& context) {
      v1::ClassifyResponse response;
      return stub->Classify(&context, request, &response);
    });
  }
  Reply GetJob(const std::string& id, const ChannelSecurity& security) {
    const auto stub = v1::TrainingService::NewStub(Channel(security));
    return Call({}, [&](grpc::ClientContext& context) {
      v1::GetJobRequest request;
      v1::Job job;
      request.set_job_id(id);
      return stub->GetJob(&context, request, &job);
    });
  }

  testing::TempFolder folder_;
  const testing::CertificateAuthority authority_{folder_.path(), "ca"};
  const CertificateFiles first_ = authority_.Issue("first", "server", "DNS:pyramid.test");
  const CertificateFiles second_ = authority_.Issue("second", "server", "DNS:pyramid.test");
  const CertificateFiles client_ = authority_.Issue("client", "ada", "");
  const CertificateFiles live_{.certificate = folder_ / "live.pem",
                               .private_key = folder_ / "live.key"};
  const PublicText text_{"/srv/data"};
  Metrics metrics_;
  std::unique_ptr<Access> access_;
  std::shared_ptr<TlsFiles> files_;
  std::unique_ptr<CallLog> log_;
  Classification service_;
  Training training_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
  int channels_ = 0;
};

TEST_F(GrpcGuardTest, TwoKeysAreNone) {
  StartServer(/*keys=*/true);
  EXPECT_TRUE(ListModels({}, {{"authorization", "Bearer key-phones"}}).status.ok());
  for (const std::string name : {"authorization", "x-api-key"}) {
    for (const auto& [first, second] :
         {std::pair{"key-phones", "nobody"}, {"nobody", "key-phones"}, {"key-root", "key-root"}}) {
      const std::string bearer = name == "authorization" ? "Bearer " : "";
      const Reply refused = ListModels({}, {{name, bearer + first}, {name, bearer + second}});
      EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
      EXPECT_THAT(refused.status.error_message(), HasSubstr("a key is needed"));
    }
  }
}

TEST_F(GrpcGuardTest, TheKeyDecides) {
  StartServer(/*keys=*/true);
  EXPECT_EQ(ListModels({}).status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(ListModels({.key = "wrong"}).status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(ListModels({.key = "key-phones"}).status.ok());
  EXPECT_TRUE(ListModels({}, {{"x-api-key", "key-phones"}}).status.ok());
  const Reply refused = GetJob("j", {.key = "key-phones"});
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(refused.status.error_message(), "the key phones may infer; GetJob needs submit");
  EXPECT_EQ(GetJob("j", {.key = "key-lab"}).status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(training_.caller, "lab");
  EXPECT_EQ(GetJob("j", {.key = "key-root"}).status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(training_.caller, "root");
  EXPECT_EQ(Sample(metrics_, R"(pyramid_refused_calls_total{reason="auth"})"), 2);
  EXPECT_EQ(Sample(metrics_, R"(pyramid_refused_calls_total{reason="scope"})"), 1);
}

TEST_F(GrpcGuardTest, ARefusedCallsMessageIsNeverHandled) {
  StartServer(/*keys=*/true);
  v1::ClassifyRequest request;
  request.add_pictures()->set_encoded(std::string(3 << 20, 'x'));
  EXPECT_EQ(Classify(request).status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(service_.calls, 0);
  EXPECT_EQ(log_->begun(), 0);
}

TEST_F(GrpcGuardTest, HealthNeedsNoKey) {
  StartServer(/*keys=*/true);
  std::string response;
  EXPECT_TRUE(testing::RawCall(Channel({}), testing::kHealthCheck, "", &response).ok());
  EXPECT_EQ(testing::HealthStatus(response), 1);
}

TEST_F(GrpcGuardTest, AnUnknownMethodNeedsAdmin) {
  StartServer(/*keys=*/true);
  const auto call = [&](const std::string& key) {
    return testing::RawCall(Channel({.key = key}), "/pyramid.v1.TrainingService/Other", "")
        .error_code();
  };
  EXPECT_EQ(call("key-lab"), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(call("key-root"), grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(GrpcGuardTest, EveryAnswerBearsARequestIdAndATrace) {
  StartServer(/*keys=*/false);
  const Reply made = ListModels({});
  EXPECT_THAT(made.Trailer("x-request-id"), MatchesRegex("[0-9a-f]{32}"));
  EXPECT_THAT(made.Trailer("traceparent"), MatchesRegex("00-[0-9a-f]{32}-[0-9a-f]{16}-00"));
  const Reply given =
      ListModels({}, {{"x-request-id", "mine"},
                      {"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}});
  EXPECT_EQ(given.Trailer("x-request-id"), "mine");
  EXPECT_THAT(given.Trailer("traceparent"),
              MatchesRegex("00-4bf92f3577b34da6a3ce929d0e0e4736-[0-9a-f]{16}-01"));
  const Reply invalid = ListModels({}, {{"x-request-id", "a b"}, {"traceparent", "00-zz"}});
  EXPECT_THAT(invalid.Trailer("x-request-id"), MatchesRegex("[0-9a-f]{32}"));
  EXPECT_THAT(invalid.Trailer("traceparent"), MatchesRegex("00-[0-9a-f]{32}-[0-9a-f]{16}-00"));
  // An id that the request itself holds wins, and a failed call has them too.
  v1::ClassifyRequest request;
  request.set_request_id("r-7");
  EXPECT_EQ(Classify(request, {{"x-request-id", "mine"}}).Trailer("x-request-id"), "r-7");
  EXPECT_EQ(GetJob("j", {}).trailers.count("x-request-id"), 1u);
}

TEST_F(GrpcGuardTest, TheLogHasTheIdsAndTheWholeErrorTheClientHasNot) {
  StartServer(/*keys=*/false);
  v1::ClassifyRequest request;
  request.set_model("/usr/lib/x/torch.cc:7 at 0x7f0012345678, /srv/data/models/bars");
  ::testing::internal::CaptureStderr();
  const Reply reply = Classify(
      request, {{"x-request-id", "mine"},
                {"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}});
  const std::string line = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(reply.status.error_message(), ".../torch.cc:7 at <address>, <data>/models/bars");
  EXPECT_THAT(line, HasSubstr("rpc_failed method=/pyramid.v1.ClassificationService/Classify"));
  EXPECT_THAT(line, HasSubstr("code=Internal"));
  EXPECT_THAT(line, HasSubstr("request_id=mine"));
  EXPECT_THAT(line, HasSubstr("trace_id=4bf92f3577b34da6a3ce929d0e0e4736"));
  EXPECT_THAT(line, HasSubstr("/usr/lib/x/torch.cc:7 at 0x7f0012345678"));
}

TEST_F(GrpcGuardTest, PathsOfARecipeStayInTrainingsErrors) {
  StartServer(/*keys=*/false);
  EXPECT_EQ(GetJob("/mnt/pictures, /srv/data/x", {}).status.error_message(),
            "/mnt/pictures, <data>/x");
}

TEST_F(GrpcGuardTest, CountsCallsThatBeganAndEnded) {
  StartServer(/*keys=*/false);
  for (int i = 0; i < 5; ++i) ListModels({});
  EXPECT_EQ(log_->begun(), 5);
  for (int i = 0; i < 1000 && log_->ended() < 5; ++i) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(log_->ended(), 5);
}

TEST_F(GrpcGuardTest, TlsTakesItsClientsOnly) {
  StartServer(/*keys=*/true, /*tls=*/true);
  ChannelSecurity security{
      .key = "key-phones", .ca = authority_.certificate(), .name = "pyramid.test"};
  const Reply reply = ListModels(security);
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.certificate, *ReadFile(first_.certificate));
  ChannelSecurity keyless = security;
  keyless.key.clear();
  EXPECT_EQ(ListModels(keyless).status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  ChannelSecurity plain{.key = "key-phones"};
  EXPECT_EQ(ListModels(plain).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  ChannelSecurity elsewhere = security;
  elsewhere.name.clear();
  EXPECT_EQ(ListModels(elsewhere).status.error_code(), grpc::StatusCode::UNAVAILABLE)
      << "the certificate isn't for 127.0.0.1";
  const testing::CertificateAuthority stranger(folder_.path(), "stranger");
  ChannelSecurity distrusting = security;
  distrusting.ca = stranger.certificate();
  EXPECT_EQ(ListModels(distrusting).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  // The certificate itself may be what is trusted: nothing else to hand round on one machine.
  ChannelSecurity pinned = security;
  pinned.ca = first_.certificate;
  EXPECT_TRUE(ListModels(pinned).status.ok());
}

TEST_F(GrpcGuardTest, MutualTlsTakesCertificatesOfItsAuthorityOnly) {
  StartServer(/*keys=*/false, /*tls=*/true, /*client_ca=*/true);
  ChannelSecurity security{.ca = authority_.certificate(), .name = "pyramid.test"};
  EXPECT_EQ(ListModels(security).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  const testing::CertificateAuthority stranger(folder_.path(), "stranger");
  const CertificateFiles other = stranger.Issue("other", "eve", "");
  security.cert = other.certificate;
  security.private_key = other.private_key;
  EXPECT_EQ(ListModels(security).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  security.cert = client_.certificate;
  security.private_key = client_.private_key;
  EXPECT_TRUE(ListModels(security).status.ok());
  EXPECT_EQ(GetJob("j", security).status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(training_.caller, "ada");
}

TEST_F(GrpcGuardTest, ANewCertificateIsShownWithoutARestart) {
  StartServer(/*keys=*/false, /*tls=*/true);
  const ChannelSecurity security{.ca = authority_.certificate(), .name = "pyramid.test"};
  const auto held = v1::ClassificationService::NewStub(Channel(security));
  const auto call_held = [&] {
    return Call({}, [&](grpc::ClientContext& context) {
      v1::ListModelsResponse response;
      return held->ListModels(&context, {}, &response);
    });
  };
  EXPECT_EQ(call_held().certificate, *ReadFile(first_.certificate));
  Install(second_);
  EXPECT_EQ(ListModels(security).certificate, *ReadFile(second_.certificate));
  EXPECT_EQ(call_held().certificate, *ReadFile(first_.certificate)) << "connections stay";
  // A botched renewal changes nothing.
  ASSERT_OK(WriteFileAtomically(live_.private_key, *ReadFile(first_.private_key)));
  EXPECT_EQ(ListModels(security).certificate, *ReadFile(second_.certificate));
  std::filesystem::remove(live_.certificate);
  EXPECT_EQ(ListModels(security).certificate, *ReadFile(second_.certificate));
}

TEST_F(GrpcGuardTest, AChannelSaysWhatItCantRead) {
  EXPECT_THAT(OpenChannel("x:1", {.ca = folder_ / "none.pem"}, {}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none.pem")));
  EXPECT_THAT(OpenChannel("x:1", {.cert = client_.certificate}, {}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("belong together")));
  EXPECT_THAT(OpenChannel("x:1", {.key = "a\nb"}, {}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no header can carry")));
}

TEST_F(GrpcGuardTest, AServerFileTellsOfTls) {
  ChannelSecurity security;
  FillFromServerFile(R"({"grpc": "x:1"})", security);
  FillFromServerFile("garbage", security);
  EXPECT_FALSE(security.UsesTls());
  FillFromServerFile(R"({"tls": {"ca": "/a/ca.pem", "name": "n"}})", security);
  EXPECT_TRUE(security.UsesTls());
  EXPECT_EQ(security.ca, "/a/ca.pem");
  EXPECT_EQ(security.name, "n");
  ChannelSecurity own{.ca = "/own.pem"};
  FillFromServerFile(R"({"tls": {"ca": "/a/ca.pem", "name": "n"}})", own);
  EXPECT_EQ(own.ca, "/own.pem");
}

}  // namespace
}  // namespace pyramid
