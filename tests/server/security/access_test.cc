#include "server/security/access.h"

#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "proto/base/key.h"
#include "proto/classification.pb.h"
#include "proto/lifecycle.pb.h"
#include "proto/open_inference.pb.h"
#include "proto/training.pb.h"
#include "proto/worker.pb.h"
#include "server/serving/pushback.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::Sample;
using testing::StatusIs;

TEST(AccessTableTest, EveryMethodOfOurServicesIsInIt) {
  for (const google::protobuf::FileDescriptor* file :
       {v1::ClassifyRequest::descriptor()->file(), v1::SubmitJobRequest::descriptor()->file(),
        v1::ReportRequest::descriptor()->file(), v1::ModelState::descriptor()->file(),
        inference::ModelInferRequest::descriptor()->file()}) {
    for (int s = 0; s < file->service_count(); ++s) {
      for (int m = 0; m < file->service(s)->method_count(); ++m) {
        const std::string path = absl::StrCat("/", file->service(s)->full_name(), "/",
                                              file->service(s)->method(m)->name());
        EXPECT_TRUE(IsInRpcTable(path)) << path << " has no scope in server/security/access.cc";
      }
    }
  }
}

TEST(AccessTableTest, ScopesAreAsDocumented) {
  EXPECT_EQ(NeededForRpc("/pyramid.v1.ClassificationService/Classify").Text(), "infer");
  EXPECT_EQ(NeededForRpc("/pyramid.v1.TrainingService/SubmitJob").Text(), "submit");
  EXPECT_EQ(NeededForRpc("/pyramid.v1.TrainingService/PromoteCheckpoint").Text(), "admin");
  EXPECT_EQ(NeededForRpc("/pyramid.v1.ModelService/Rollback").Text(), "admin");
  EXPECT_EQ(NeededForRpc("/pyramid.v1.WorkerService/Report").Text(), "worker");
  EXPECT_EQ(NeededForRpc("/inference.GRPCInferenceService/ModelInfer").Text(), "infer");
  EXPECT_EQ(NeededForRpc("/inference.GRPCInferenceService/RepositoryModelUnload").Text(), "admin");
  EXPECT_TRUE(NeededForRpc("/grpc.health.v1.Health/Check").empty());
  EXPECT_TRUE(NeededForRpc("/grpc.health.v1.Health/Watch").empty());
  EXPECT_TRUE(
      NeededForRpc("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo").empty());
  EXPECT_TRUE(NeededForRpc("/inference.GRPCInferenceService/ServerLive").empty());
}

TEST(AccessTableTest, WhatIsntInItNeedsAdmin) {
  EXPECT_EQ(NeededForRpc("/pyramid.v1.TrainingService/EraseEverything").Text(), "admin");
  EXPECT_EQ(NeededForRpc("/pyramid.v1.ClassificationService/ClassifyX").Text(), "admin");
  EXPECT_EQ(NeededForRpc("").Text(), "admin");
  EXPECT_EQ(NeededForHttp("POST", "/v2/other").Text(), "admin");
  EXPECT_EQ(NeededForHttp("GET", "/").Text(), "admin");
  EXPECT_EQ(NeededForHttp("DELETE", "/v2/models/bars").Text(), "admin");
}

TEST(AccessTableTest, HttpPaths) {
  EXPECT_TRUE(NeededForHttp("GET", "/healthz").empty());
  EXPECT_TRUE(NeededForHttp("GET", "/readyz").empty());
  EXPECT_TRUE(NeededForHttp("GET", "/v2/health/ready").empty());
  EXPECT_TRUE(NeededForHttp("GET", "/v2/models/bars/ready").empty());
  EXPECT_TRUE(NeededForHttp("GET", "/v2/models/bars/versions/3/ready").empty());
  EXPECT_TRUE(NeededForHttp("GET", "/v2/models/ready/ready").empty());
  EXPECT_TRUE(NeededForHttp("GET", "/v2/models/ready/versions/ready/ready").empty());
  // Metadata of a model or an alias of that name, and what isn't a path.
  for (const char* path :
       {"/v2/models/ready", "/v2/models/bars/versions/ready", "/v2/models//ready",
        "/v2/models/bars/versions//ready", "/v2/models/bars/other/3/ready",
        "/v2/models/bars/3/ready", "/v2/models/bars/versions/3/config/ready", "/v2/ready"}) {
    EXPECT_EQ(NeededForHttp("GET", path).Text(), "infer") << path;
  }
  // Their bodies would be read.
  for (const char* path : {"/healthz", "/v2/health/live", "/v2/models/bars/ready"}) {
    EXPECT_EQ(NeededForHttp("POST", path).Text(), "admin") << path;
  }
  EXPECT_EQ(NeededForHttp("GET", "/v2").Text(), "infer");
  EXPECT_EQ(NeededForHttp("GET", "/v2/models/bars/versions/3").Text(), "infer");
  EXPECT_EQ(NeededForHttp("POST", "/v2/models/bars/infer").Text(), "infer");
  EXPECT_EQ(NeededForHttp("POST", "/v2/repository/index").Text(), "infer");
  EXPECT_EQ(NeededForHttp("POST", "/v2/repository/models/bars/load").Text(), "admin");
  EXPECT_EQ(NeededForHttp("POST", "/v2/repository/models/x/ready").Text(), "admin");
}

class AccessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string yaml;
    const auto add = [&](const std::string& name, const std::string& rest) {
      absl::StrAppend(&yaml, "- {name: ", name, ", sha256: ", KeyHash("key-" + name), ", ", rest,
                      "}\n");
    };
    add("phones", "scopes: [infer], images_per_second: 10");
    add("lab", "scopes: [submit]");
    add("cluster", "scopes: [worker]");
    add("root", "scopes: [admin]");
    add("old", "scopes: [admin], expires: 2023-01-01");
    ASSERT_OK(WriteFileAtomically(folder_ / "keys.yaml", yaml));
    ASSERT_OK_AND_ASSIGN(access_, Open());
  }
  absl::StatusOr<std::unique_ptr<Access>> Open() {
    return Access::Create(
        {.keys = folder_ / "keys.yaml", .worker_secret = folder_ / "worker.secret"}, metrics_,
        clock_);
  }
  absl::Status Admit(const std::string& authorization, Scopes needed) {
    return access_->Admit({.authorization = authorization}, needed, "This");
  }

  testing::TempFolder folder_;
  testing::FakeClock clock_;
  Metrics metrics_;
  std::unique_ptr<Access> access_;
};

TEST_F(AccessTest, TheScopeDecides) {
  EXPECT_OK(Admit("Bearer key-phones", {Scope::kInfer}));
  EXPECT_OK(Admit("bearer key-phones", {Scope::kInfer, Scope::kSubmit}));
  EXPECT_THAT(
      Admit("Bearer key-phones", {Scope::kSubmit}),
      StatusIs(absl::StatusCode::kPermissionDenied, "the key phones may infer; This needs submit"));
  EXPECT_THAT(Admit("Bearer key-lab", {Scope::kAdmin}),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("needs admin")));
  for (const Scope scope : {Scope::kInfer, Scope::kSubmit, Scope::kWorker, Scope::kAdmin}) {
    EXPECT_OK(Admit("Bearer key-root", {scope}));
  }
  EXPECT_EQ(Sample(metrics_, R"(pyramid_refused_calls_total{reason="scope"})"), 2);
  EXPECT_EQ(Sample(metrics_, R"(pyramid_refused_calls_total{reason="auth"})"), 0);
}

TEST_F(AccessTest, WithoutAGoodKeyNobodyIsKnown) {
  EXPECT_THAT(Admit("", {Scope::kInfer}),
              StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("a key is needed")));
  for (const char* text : {"Bearer", "Bearer ", "Bearer key-phones2", "Basic key-phones", "x",
                           "Bearer key-phones key-root"}) {
    EXPECT_THAT(Admit(text, {Scope::kInfer}),
                StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("isn't known")))
        << text;
  }
  EXPECT_THAT(Admit("Bearer key-old", {Scope::kInfer}),
              StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("old has expired")));
  EXPECT_EQ(Sample(metrics_, R"(pyramid_refused_calls_total{reason="auth"})"), 8);
}

TEST_F(AccessTest, AnApiKeyHeaderServesToo) {
  EXPECT_OK(access_->Admit({.api_key = "key-phones"}, {Scope::kInfer}, "This"));
  EXPECT_THAT(access_->Admit({.authorization = "Bearer wrong", .api_key = "key-phones"},
                             {Scope::kInfer}, "This"),
              StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("isn't known")));
}

TEST_F(AccessTest, HealthNeedsNoKey) { EXPECT_OK(Admit("", Scopes())); }

TEST_F(AccessTest, WithoutAKeysFileEverybodyMay) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Access> open, Access::Create({}, metrics_, clock_));
  EXPECT_FALSE(open->has_keys());
  EXPECT_OK(open->Admit({}, {Scope::kAdmin}, "This"));
  EXPECT_OK(open->Charge({}, 1000));
  EXPECT_EQ(open->WorkerToken("j", 1), "");
  EXPECT_OK(open->CheckWorker({}, "j", 1));
}

TEST_F(AccessTest, PicturesOverTheRateAreRefusedWithTheTimeToComeBack) {
  const Credentials phones{.authorization = "Bearer key-phones"};
  EXPECT_OK(access_->Charge(phones, 8));
  const absl::Status refused = access_->Charge(phones, 5);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted,
                                "the key phones may send 10 images per second; come back in "
                                "300ms"));
  EXPECT_EQ(PushbackMillis(refused), 300);
  clock_.Advance(absl::Milliseconds(300));
  EXPECT_OK(access_->Charge(phones, 5));
  EXPECT_OK(access_->Charge({.authorization = "Bearer key-root"}, 100'000)) << "no limit";
}

TEST_F(AccessTest, ATokenIsGoodForItsAttemptOnly) {
  const std::string token = access_->WorkerToken("job-7", 12);
  const std::string header = "Bearer " + token;
  EXPECT_OK(Admit(header, {Scope::kWorker}));
  EXPECT_THAT(Admit(header, {Scope::kSubmit}),
              StatusIs(absl::StatusCode::kPermissionDenied,
                       "the key worker of job-7 may worker; This needs submit"));
  EXPECT_OK(access_->CheckWorker({.authorization = header}, "job-7", 12));
  for (const auto& [job, epoch] : {std::pair{"job-7", 13}, {"job-8", 12}, {"job-71", 2}}) {
    EXPECT_THAT(access_->CheckWorker({.authorization = header}, job, epoch),
                StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("another attempt's")));
  }
  // Whatever let the call in, what is no worker's key is none here either.
  EXPECT_THAT(access_->CheckWorker({.authorization = "Bearer key-phones"}, "job-7", 12),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("needs worker")));
  for (const std::string nobody : {"", "Bearer nobody", "nobody"}) {
    EXPECT_THAT(access_->CheckWorker({.authorization = nobody}, "job-7", 12),
                StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("key")));
  }
  // A key with scope worker is good for every attempt: an operator's own workers.
  EXPECT_OK(access_->CheckWorker({.authorization = "Bearer key-cluster"}, "job-8", 12));
}

TEST_F(AccessTest, AForgedTokenIsUnknown) {
  const std::string token = access_->WorkerToken("job-7", 12);
  std::string other = token;
  other.back() = other.back() == '0' ? '1' : '0';
  std::string later = token;
  later.replace(later.find(".12."), 4, ".13.");
  for (const std::string& forged : {other, later, std::string("pyw."), std::string("pyw.1.2"),
                                    std::string("pyw.x.y.z"), token + "0", token + ".0"}) {
    EXPECT_THAT(Admit("Bearer " + forged, {Scope::kWorker}),
                StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("isn't known")))
        << forged;
  }
}

TEST_F(AccessTest, TokensOutliveTheServerAndTheSecretIsOurs) {
  const std::string token = access_->WorkerToken("job-7", 12);
  ASSERT_OK_AND_ASSIGN(access_, Open());
  EXPECT_EQ(access_->WorkerToken("job-7", 12), token);
  struct stat found {};
  ASSERT_EQ(stat((folder_ / "worker.secret").c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777, 0600u);
  // Another secret, other tokens.
  std::filesystem::remove(folder_ / "worker.secret");
  ASSERT_OK_AND_ASSIGN(access_, Open());
  EXPECT_THAT(Admit("Bearer " + token, {Scope::kWorker}),
              StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("isn't known")));
}

}  // namespace
}  // namespace pyramid
