// Keys, TLS and what they refuse, with the real programs.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "proto/lifecycle.grpc.pb.h"
#include "proto/worker.grpc.pb.h"
#include "tests/integration/cluster.h"
#include "tests/integration/served_model.h"
#include "tests/testing/certificates.h"
#include "tests/testing/raw_call.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using testing::CertificateAuthority;
using testing::CertificateFiles;
using testing::Cluster;
using ::testing::HasSubstr;
using testing::RunResult;

// A keys file with one key a scope, made as an operator makes it.
class SecurityTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string file;
    for (const std::string scope : {"infer", "submit", "admin"}) {
      const RunResult made =
          cluster_.Cli({"key", "new", absl::StrCat("of-", scope), "--scopes", scope, "--json"});
      ASSERT_EQ(made.exit_code, 0) << made.err;
      const auto json = nlohmann::json::parse(made.out);
      keys_[scope] = json.at("key").get<std::string>();
      absl::StrAppend(&file, json.at("entry").get<std::string>(), "\n");
    }
    ASSERT_OK(WriteFileAtomically(cluster_.folder() / "keys.yaml", file));
    cluster_.flags().insert(cluster_.flags().end(),
                            {"--keys", (cluster_.folder() / "keys.yaml").string()});
  }
  void UseTls(bool client_certificates) {
    const CertificateFiles server = authority_.Issue("server", "server", "DNS:pyramid.test");
    auto& flags = cluster_.flags();
    flags.insert(flags.end(), {"--tls-cert", server.certificate.string(), "--tls-key",
                               server.private_key.string()});
    cluster_.security().ca = authority_.certificate();
    cluster_.security().name = "pyramid.test";
    if (!client_certificates) return;
    const CertificateFiles client = authority_.Issue("client", "ada", "DNS:ada");
    flags.insert(flags.end(), {"--tls-client-ca", authority_.certificate().string()});
    cluster_.security().cert = client.certificate;
    cluster_.security().private_key = client.private_key;
    cluster_.environment()["PYRAMID_TLS_CERT"] = client.certificate.string();
    cluster_.environment()["PYRAMID_TLS_KEY"] = client.private_key.string();
  }
  RunResult As(const std::string& scope, const std::vector<std::string>& arguments) {
    cluster_.environment()["PYRAMID_KEY"] = keys_[scope];
    return cluster_.Cli(arguments);
  }
  // A variable of a process's environment.
  static std::string VariableOf(int pid, const std::string& name) {
    std::ifstream in(absl::StrCat("/proc/", pid, "/environ"), std::ios::binary);
    for (std::string entry; std::getline(in, entry, '\0');) {
      if (absl::StartsWith(entry, name + "=")) return entry.substr(name.size() + 1);
    }
    return "";
  }

  Cluster cluster_;
  const CertificateAuthority authority_{cluster_.folder(), "ca"};
  std::map<std::string, std::string> keys_;
};

TEST_F(SecurityTest, AJobRunsAndIsServedOverMutualTlsWithKeys) {
  UseTls(/*client_certificates=*/true);
  cluster_.security().key = keys_["submit"];
  cluster_.Start();
  ASSERT_FALSE(HasFailure());
  // The command line finds the authority and the name in server.json.
  cluster_.environment()["PYRAMID_SERVER"] = (cluster_.data() / "server.json").string();

  const std::string id = cluster_.Submit(
      cluster_.SmallRecipe("epoch_size: 400\nckpt_save_interval: 400\nval_interval: 400\n"));
  const v1::Job running = cluster_.WaitForStep(id, 3);
  ASSERT_EQ(running.attempts_size(), 1) << "its workers' tokens are taken";
  const int64_t epoch = running.attempts(0).epoch();

  // A token is good for its attempt and for nothing else.
  const std::vector<int> pids = Cluster::WorkerPids(cluster_.data().string());
  ASSERT_FALSE(pids.empty());
  ChannelSecurity worker = cluster_.security();
  worker.key = VariableOf(pids[0], "PYRAMID_WORKER_TOKEN");
  EXPECT_TRUE(absl::StartsWith(worker.key, "pyw.")) << worker.key;
  EXPECT_EQ(VariableOf(pids[0], "PYRAMID_KEY"), "");
  const auto channel = cluster_.Channel(worker);
  const auto report = [&](int64_t attempt, int64_t sequence) {
    grpc::ClientContext context;
    v1::ReportRequest request;
    v1::ReportResponse response;
    request.mutable_worker()->set_job_id(id);
    request.mutable_worker()->set_epoch(attempt);
    request.mutable_worker()->set_rank(1);
    request.set_sequence(sequence);
    return v1::WorkerService::NewStub(channel)->Report(&context, request, &response);
  };
  EXPECT_TRUE(report(epoch, 1).ok());
  EXPECT_EQ(report(epoch + 1, 2).error_code(), grpc::StatusCode::PERMISSION_DENIED);
  {
    grpc::ClientContext context;
    v1::Job job;
    v1::GetJobRequest request;
    request.set_job_id(id);
    EXPECT_EQ(v1::TrainingService::NewStub(channel)->GetJob(&context, request, &job).error_code(),
              grpc::StatusCode::PERMISSION_DENIED);
  }

  // Scopes, as a person meets them.
  EXPECT_EQ(As("submit", {"save", id}).exit_code, 0);
  cluster_.WaitFor(
      id, [](const v1::Job& job) { return job.checkpoints_size() > 0; }, absl::Seconds(30));
  const RunResult refused = As("submit", {"promote", id, "--as", "bars"});
  EXPECT_EQ(refused.exit_code, 4);
  EXPECT_THAT(refused.err, HasSubstr("needs admin"));
  const RunResult promoted = As("admin", {"promote", id, "--as", "bars"});
  EXPECT_EQ(promoted.exit_code, 0) << promoted.err;
  EXPECT_EQ(As("submit", {"cancel", id}).exit_code, 0);
  EXPECT_EQ(As("infer", {"jobs"}).exit_code, 4);
  EXPECT_EQ(As("infer", {"models"}).exit_code, 0);
  cluster_.environment().erase("PYRAMID_KEY");
  const RunResult keyless = cluster_.Cli({"models"});
  EXPECT_EQ(keyless.exit_code, 4);
  EXPECT_THAT(keyless.err, AllOf(HasSubstr("a key is needed"), HasSubstr("PYRAMID_KEY")));
  // Without a certificate there isn't even a connection.
  cluster_.environment().erase("PYRAMID_TLS_CERT");
  cluster_.environment().erase("PYRAMID_TLS_KEY");
  EXPECT_EQ(As("admin", {"models"}).exit_code, 5);

  cluster_.WaitForEnd(id);
  EXPECT_EQ(report(epoch, 3).error_code(), grpc::StatusCode::FAILED_PRECONDITION)
      << "an attempt that has ended";
  // Who promoted it is on record.
  grpc::ClientContext context;
  v1::ListModelEventsRequest request;
  v1::ListModelEventsResponse events;
  request.set_model("bars");
  ChannelSecurity admin = cluster_.security();
  admin.key = keys_["admin"];
  ASSERT_TRUE(v1::ModelService::NewStub(cluster_.Channel(admin))
                  ->ListModelEvents(&context, request, &events)
                  .ok());
  ASSERT_GT(events.events_size(), 0);
  EXPECT_THAT(events.events(0).actor(), ::testing::StartsWith("of-admin"));
}

TEST_F(SecurityTest, WorkersTokensOutliveTheServer) {
  cluster_.security().key = keys_["submit"];
  cluster_.Start();
  ASSERT_FALSE(HasFailure());
  const std::string id = cluster_.Submit(
      cluster_.SmallRecipe("epoch_size: 12\nckpt_save_interval: 12\nval_interval: 12\n"));
  cluster_.WaitForStep(id, 3);
  cluster_.Kill();
  cluster_.Start();
  ASSERT_FALSE(HasFailure());
  const v1::Job job = cluster_.WaitForEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.reason();
  EXPECT_EQ(job.attempts_size(), 1) << "the same workers went on";
}

TEST_F(SecurityTest, HttpHasTheSameKeysAndTls) {
  testing::InstallFormulaModel(cluster_);
  UseTls(/*client_certificates=*/false);
  cluster_.security().key = keys_["infer"];
  cluster_.Start();
  ASSERT_FALSE(HasFailure());
  const std::string url = absl::StrCat("https://", cluster_.http_address());
  const auto curl = [&](std::vector<std::string> arguments) {
    const size_t colon = cluster_.http_address().rfind(':');
    std::vector<std::string> command = {
        "curl",
        "-sS",
        "--max-time",
        "20",
        "-o",
        (cluster_.folder() / "body").string(),
        "-w",
        "%{http_code}",
        "--cacert",
        authority_.certificate().string(),
        "--connect-to",
        absl::StrCat("pyramid.test:443:127.0.0.1:", cluster_.http_address().substr(colon + 1))};
    command.insert(command.end(), arguments.begin(), arguments.end());
    const RunResult result = testing::Run(command, cluster_.folder() / "curl");
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result.out;
  };
  EXPECT_EQ(curl({"https://pyramid.test/healthz"}), "200");
  EXPECT_EQ(curl({"https://pyramid.test/v2"}), "401");
  EXPECT_EQ(curl({"https://pyramid.test/v2", "-H", "Authorization: Bearer " + keys_["infer"]}),
            "200");
  const std::string picture =
      absl::StrCat("@", PYRAMID_SOURCE_DIR, "/tests/golden/images/baseline_444.jpg");
  std::vector<std::string> infer = {"https://pyramid.test/v2/models/formula/infer", "-H",
                                    "X-API-Key: " + keys_["submit"], "--data-binary", picture};
  EXPECT_EQ(curl(infer), "403");
  infer[2] = "X-API-Key: " + keys_["infer"];
  EXPECT_EQ(curl(infer), "200");
}

TEST_F(SecurityTest, AKeyTakenBackIsRefusedWithinSeconds) {
  cluster_.security().key = keys_["infer"];
  cluster_.Start();
  ASSERT_FALSE(HasFailure());
  const auto list = [&] {
    grpc::ClientContext context;
    v1::ListModelsResponse response;
    return cluster_.classification().ListModels(&context, {}, &response).error_code();
  };
  EXPECT_EQ(list(), grpc::StatusCode::OK);
  ASSERT_OK(WriteFileAtomically(cluster_.folder() / "keys.yaml", "[]"));
  const absl::Time deadline = absl::Now() + absl::Seconds(5);
  while (list() == grpc::StatusCode::OK && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(50));
  }
  EXPECT_EQ(list(), grpc::StatusCode::UNAUTHENTICATED);
}

TEST_F(SecurityTest, ACertificateIsRenewedWhileCallsGoOn) {
  UseTls(/*client_certificates=*/false);
  cluster_.security().key = keys_["infer"];
  cluster_.Start();
  ASSERT_FALSE(HasFailure());
  const auto list = [](v1::ClassificationService::Stub& stub) {
    grpc::ClientContext context;
    v1::ListModelsResponse response;
    return stub.ListModels(&context, {}, &response).ok();
  };
  EXPECT_TRUE(list(cluster_.classification()));
  // A new authority signs the new certificate: who trusts only the old one can't come in any more.
  const CertificateAuthority next(cluster_.folder(), "next");
  next.Issue("server", "server", "DNS:pyramid.test");
  ChannelSecurity renewed = cluster_.security();
  renewed.ca = next.certificate();
  EXPECT_TRUE(list(*v1::ClassificationService::NewStub(cluster_.Channel(renewed))));
  EXPECT_FALSE(list(*v1::ClassificationService::NewStub(cluster_.Channel(cluster_.security()))));
  EXPECT_TRUE(list(cluster_.classification())) << "its connection stays";
}

// What keeps the server from starting: exit code 1 and one line.
class RefusedStartTest : public ::testing::Test {
 protected:
  std::string Refused(const std::vector<std::string>& flags) {
    std::vector<std::string> command = {testing::Program("pyramid-server"),
                                        "--data",
                                        (folder_ / "data").string(),
                                        "--grpc-port",
                                        "0",
                                        "--http-port",
                                        "0",
                                        "--metrics-port",
                                        "0"};
    command.insert(command.end(), flags.begin(), flags.end());
    const RunResult result = testing::Run(command, folder_ / "server", absl::Seconds(20));
    EXPECT_EQ(result.exit_code, 1) << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
    return result.err;
  }
  testing::TempFolder folder_;
};

TEST_F(RefusedStartTest, AnOpenAddressWithoutProtection) {
  EXPECT_THAT(Refused({"--host", "0.0.0.0"}),
              AllOf(HasSubstr("other machines can reach host 0.0.0.0"), HasSubstr("--insecure")));
}

TEST_F(RefusedStartTest, FilesThatCantBeUsed) {
  const CertificateAuthority authority(folder_.path(), "ca");
  const CertificateFiles one = authority.Issue("one", "one", "DNS:a");
  const CertificateFiles other = authority.Issue("other", "other", "DNS:a");
  const std::string none = (folder_ / "none").string();
  EXPECT_THAT(Refused({"--keys", none}), HasSubstr("none"));
  ASSERT_OK(WriteFileAtomically(folder_ / "keys", "- {name: x, scope: 1}"));
  EXPECT_THAT(Refused({"--keys", (folder_ / "keys").string()}), HasSubstr("did you mean scopes?"));
  EXPECT_THAT(Refused({"--tls-cert", one.certificate}), HasSubstr("belong together"));
  EXPECT_THAT(Refused({"--tls-cert", one.certificate, "--tls-key", none}), HasSubstr("none"));
  EXPECT_THAT(Refused({"--tls-cert", one.certificate, "--tls-key", other.private_key}),
              HasSubstr("isn't the private key of the certificate"));
  EXPECT_THAT(Refused({"--tls-cert", one.certificate, "--tls-key", one.private_key,
                       "--tls-client-ca", none}),
              HasSubstr("none"));
  EXPECT_THAT(Refused({"--tls-client-ca", one.certificate}), HasSubstr("needs TLS"));
}

TEST(InsecureTest, AFlagLetsItListenEverywhere) {
  Cluster cluster;
  cluster.flags().insert(cluster.flags().end(), {"--host", "0.0.0.0", "--insecure"});
  cluster.Start();
  ASSERT_FALSE(::testing::Test::HasFailure());
  EXPECT_THAT(cluster.ServerLog(), HasSubstr("exposed host=0.0.0.0"));
  EXPECT_TRUE(absl::StartsWith(cluster.metrics_address(), "127.0.0.1:"))
      << "metrics stay on loopback";
}

}  // namespace
}  // namespace pyramid
