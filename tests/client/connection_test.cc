#include "client/connection.h"

#include <gmock/gmock.h>

#include "absl/strings/str_cat.h"
#include "client/exit_code.h"
#include "tests/client/client_fixture.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::StatusIs;

class ConnectionTest : public testing::ClientFixture {
 protected:
  ConnectionTest() {
    environment_.folder = folder_.path();
    std::filesystem::create_directory(folder_ / "data");
  }

  std::string Target() {
    const absl::StatusOr<ServerAddress> address = ResolveServer(environment_);
    return address.ok() ? address->target : address.status().ToString();
  }
};

TEST_F(ConnectionTest, FlagWinsOverVariableOverFileOverDefault) {
  EXPECT_EQ(Target(), "127.0.0.1:8001");
  Write("data/server.json", R"({"grpc": "127.0.0.1:4001", "http": "127.0.0.1:4000", "pid": 7})");
  EXPECT_EQ(Target(), "127.0.0.1:4001");
  environment_.server_variable = "127.0.0.1:4002";
  EXPECT_EQ(Target(), "127.0.0.1:4002");
  environment_.server_flag = "gpu-box:4003";
  EXPECT_EQ(Target(), "gpu-box:4003");
}

TEST_F(ConnectionTest, FlagAndVariableMayNameAServerJson) {
  Write("other.json", R"({"grpc": "[::1]:5001"})");
  environment_.server_variable = (folder_ / "other.json").string();
  EXPECT_EQ(Target(), "[::1]:5001");
  environment_.server_variable.clear();
  environment_.server_flag = "other.json";
  EXPECT_EQ(Target(), "[::1]:5001");
}

TEST_F(ConnectionTest, WhatIsNoAddressIsWrongUsage) {
  for (const std::string bad :
       {"localhost", ":8001", "host:", "host:0", "host:65536", "host:http", "a b:1", "::1:8001"}) {
    environment_.server_flag = bad;
    const absl::Status status = ResolveServer(environment_).status();
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("HOST:PORT")))
        << bad;
    EXPECT_EQ(ExitCodeOf(status), kWrongUsage);
  }
}

TEST_F(ConnectionTest, NamedFileThatIsMissingMeansNoServer) {
  environment_.server_flag = "nowhere/server.json";
  EXPECT_THAT(ResolveServer(environment_),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("nowhere/server.json")));
}

TEST_F(ConnectionTest, BrokenServerJsonIsAnErrorNotTheDefault) {
  for (const std::string text :
       {"", "{", "[]", "{\"grpc\": 8001}", "{\"http\": \"a:1\"}", "{\"grpc\": \"nowhere\"}"}) {
    Write("data/server.json", text);
    EXPECT_THAT(ResolveServer(environment_),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("data/server.json")))
        << text;
  }
}

TEST_F(ConnectionTest, RefreshFollowsAServerThatMoved) {
  Write("data/server.json", R"({"grpc": "127.0.0.1:1"})");
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Connection> connection,
                       Connection::Open(environment_));
  EXPECT_FALSE(connection->Refresh());
  Write("data/server.json", absl::StrCat("{\"grpc\": \"", server_.address(), "\"}"));
  EXPECT_TRUE(connection->Refresh());
  EXPECT_EQ(connection->address().target, server_.address());
  std::filesystem::remove(folder_ / "data/server.json");
  EXPECT_FALSE(connection->Refresh());
  EXPECT_EQ(connection->address().target, server_.address());
}

TEST_F(ConnectionTest, UnreachableServerIsExplained) {
  environment_.server_flag = "127.0.0.1:1";
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Connection> connection,
                       Connection::Open(environment_));
  grpc::ClientContext context;
  v1::Job job;
  const absl::Status status =
      connection->ToStatus(connection->training()->GetJob(&context, v1::GetJobRequest(), &job));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable,
                               AllOf(HasSubstr("no server at 127.0.0.1:1"), HasSubstr("--server"),
                                     HasSubstr("PYRAMID_SERVER"))));
}

TEST_F(ConnectionTest, ServerThatRefusesForNowIsNotCalledMissing) {
  environment_.server_flag = server_.address();
  server_.get = [](const v1::GetJobRequest&, v1::Job&) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  };
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Connection> connection,
                       Connection::Open(environment_));
  grpc::ClientContext context;
  v1::Job job;
  const absl::Status status =
      connection->ToStatus(connection->training()->GetJob(&context, v1::GetJobRequest(), &job));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable,
                               HasSubstr("takes no requests now: draining")));
}

class KeyTest : public ConnectionTest {
 protected:
  // What `pyramid models` sends as its key.
  std::string KeyShown(const std::vector<std::string>& flags) {
    std::string shown = "none";
    server_.classify = [&](grpc::ServerContext& context, const v1::ClassifyRequest&,
                           v1::ClassifyResponse&) {
      const auto found = context.client_metadata().find("authorization");
      if (found != context.client_metadata().end()) {
        shown = std::string(found->second.data(), found->second.size());
      }
      return grpc::Status(grpc::StatusCode::UNAUTHENTICATED, "the key isn't known here");
    };
    Write("picture.jpg", "text");
    std::vector<std::string> arguments = {"classify", "--model", "m", "picture.jpg"};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    result_ = Pyramid(arguments);
    environment_.flags = {};
    return shown;
  }
  testing::CommandResult result_;
};

TEST_F(KeyTest, FlagWinsOverVariable) {
  EXPECT_EQ(KeyShown({}), "none");
  environment_.variables.key = "of-the-variable";
  EXPECT_EQ(KeyShown({}), "Bearer of-the-variable");
  EXPECT_EQ(KeyShown({"--key", "of-the-flag"}), "Bearer of-the-flag");
  Write("key", "of-the-file\n");
  EXPECT_EQ(KeyShown({"--key", "@key"}), "Bearer of-the-file");
}

TEST_F(KeyTest, ARefusedKeySaysHowToGiveAnother) {
  KeyShown({"--key", "wrong"});
  EXPECT_EQ(result_.code, kRefused);
  EXPECT_THAT(result_.err, AllOf(HasSubstr("the key isn't known here"), HasSubstr("--key"),
                                 HasSubstr("PYRAMID_KEY")));
}

TEST_F(KeyTest, WhatCantBeReadIsNamed) {
  KeyShown({"--key", "@nowhere"});
  EXPECT_EQ(result_.code, kNotFound);
  EXPECT_THAT(result_.err, HasSubstr("nowhere"));
  KeyShown({"--tls-ca", "ca.pem"});
  EXPECT_EQ(result_.code, kNotFound);
  EXPECT_THAT(result_.err, HasSubstr("ca.pem"));
  Write("cert.pem", "text");
  KeyShown({"--tls-cert", "cert.pem"});
  EXPECT_EQ(result_.code, kFailed);
  EXPECT_THAT(result_.err, HasSubstr("belong together"));
}

TEST_F(KeyTest, FlagsMayStandBeforeTheCommand) {
  EXPECT_EQ(Pyramid({"--key", "k", "--tls_ca", "x", "modles"}).code, kWrongUsage);
  EXPECT_THAT(Pyramid({"--key", "k", "--tls_ca", "x", "modles"}).err,
              HasSubstr("no command \"modles\""));
}

TEST(ExitCodeTest, FollowsTheStatusCode) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::InternalError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::DeadlineExceededError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::DataLossError("")), 1);
  EXPECT_EQ(ExitCodeOf(UsageError("")), 2);
  EXPECT_EQ(ExitCodeOf(absl::NotFoundError("")), 3);
  EXPECT_EQ(ExitCodeOf(absl::FailedPreconditionError("")), 4);
  EXPECT_EQ(ExitCodeOf(absl::ResourceExhaustedError("")), 4);
  EXPECT_EQ(ExitCodeOf(absl::AlreadyExistsError("")), 4);
  EXPECT_EQ(ExitCodeOf(absl::UnauthenticatedError("")), 4);
  EXPECT_EQ(ExitCodeOf(absl::PermissionDeniedError("")), 4);
  EXPECT_EQ(ExitCodeOf(absl::UnavailableError("")), 5);
}

TEST(OneLineTest, KeepsTerminalsSafe) {
  EXPECT_EQ(OneLine("a\nb\r\n  c\033[31m\x7f\n"), "a b   c?[31m?");
  EXPECT_EQ(OneLine("ünï"), "ünï");
}

}  // namespace
}  // namespace pyramid
