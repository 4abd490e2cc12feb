// Bad input of every kind through the real programs: the right code, and a message that names
// field, value and limit.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sqlite3.h>

#include <fstream>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "tests/integration/cluster.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using testing::Cluster;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Process;
using testing::Program;
using testing::RunResult;

class RefusalTest : public ::testing::Test {
 protected:
  void SetUp() override { cluster_.Start(); }

  // Submits a recipe that must be refused.
  void ExpectRefused(const std::string& extra, grpc::StatusCode code, const std::string& text) {
    grpc::ClientContext context;
    v1::SubmitJobRequest request;
    v1::SubmitJobResponse response;
    request.set_recipe(cluster_.SmallRecipe());
    request.add_overrides(extra);
    const grpc::Status status = cluster_.training().SubmitJob(&context, request, &response);
    EXPECT_EQ(status.error_code(), code) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(text));
  }

  Cluster cluster_;
};

TEST_F(RefusalTest, Recipes) {
  ExpectRefused("model=pvt_v2_b9", grpc::INVALID_ARGUMENT, "pvt_v2_b9");
  ExpectRefused("bach_size=3", grpc::INVALID_ARGUMENT, "did you mean batch_size?");
  ExpectRefused("batch_size=0", grpc::INVALID_ARGUMENT, "recipe.batch_size is 0; use 1..4096");
  ExpectRefused("data_dir=/nowhere/at/all", grpc::INVALID_ARGUMENT, "/nowhere/at/all");
  ExpectRefused("workers=64", grpc::INVALID_ARGUMENT, "64");
  ExpectRefused("device=cuda", grpc::INVALID_ARGUMENT, "cuda");
  ExpectRefused("mixup=0.8", grpc::INVALID_ARGUMENT, "not supported yet: mixup");
}

TEST_F(RefusalTest, ARequestIdWithAnotherRecipe) {
  v1::SubmitJobRequest request;
  v1::SubmitJobResponse response;
  request.set_request_id("same");
  request.set_recipe(cluster_.SmallRecipe("epoch_size: 50\n"));
  grpc::ClientContext first;
  ASSERT_TRUE(cluster_.training().SubmitJob(&first, request, &response).ok());
  request.set_recipe(cluster_.SmallRecipe("epoch_size: 51\n"));
  grpc::ClientContext second;
  EXPECT_EQ(cluster_.training().SubmitJob(&second, request, &response).error_code(),
            grpc::ALREADY_EXISTS);
  EXPECT_EQ(cluster_.Cli({"promote", response.job().id(), "--as", "early"}).exit_code, 4);
}

TEST_F(RefusalTest, UnknownNames) {
  EXPECT_EQ(cluster_.Cli({"job", "j-999999"}).exit_code, 3);
  EXPECT_EQ(cluster_.Cli({"cancel", "j-999999"}).exit_code, 3);
  EXPECT_EQ(cluster_.Cli({"promote", "j-999999", "--as", "x"}).exit_code, 3);
  const RunResult classify = cluster_.Cli(
      {"classify", "--model", "nobody", PYRAMID_SOURCE_DIR "/tests/golden/images/tiny.png"});
  EXPECT_EQ(classify.exit_code, 3);
  EXPECT_THAT(classify.err, HasSubstr("nobody"));
  EXPECT_EQ(cluster_.Cli({"no-such-command"}).exit_code, 2);
}

TEST_F(RefusalTest, BrokenDataEndsTheJobWithTheReason) {
  // Truncated pictures: the header promises more than the file holds.
  const std::filesystem::path images = cluster_.SmallData() / "train-images-idx3-ubyte";
  std::filesystem::resize_file(images, std::filesystem::file_size(images) / 2);
  const std::string id = cluster_.Submit(cluster_.SmallRecipe("epoch_size: 2\n"));
  const v1::Job job = cluster_.WaitForEnd(id, absl::Seconds(60));
  EXPECT_EQ(job.state(), v1::FAILED);
  EXPECT_EQ(job.attempts_size(), 1) << "damaged data isn't retried";
  EXPECT_THAT(job.reason(), HasSubstr("train-images-idx3-ubyte"));
}

TEST_F(RefusalTest, ASecondServerOnThePortOrTheFolder) {
  const std::string port = cluster_.grpc_address().substr(cluster_.grpc_address().rfind(':') + 1);
  const RunResult same_port =
      testing::Run({Program("pyramid-server"), "--data", (cluster_.folder() / "other").string(),
                    "--grpc-port", port, "--http-port", "0", "--metrics-port", "0"},
                   cluster_.folder() / "second");
  EXPECT_EQ(same_port.exit_code, 1);
  EXPECT_THAT(same_port.err, AllOf(HasSubstr(port), HasSubstr("in use")));
  const RunResult same_folder = testing::Run(cluster_.ServerCommand(), cluster_.folder() / "third");
  EXPECT_EQ(same_folder.exit_code, 1);
  EXPECT_THAT(same_folder.err, HasSubstr("another"));
}

TEST(RefusalAtStartTest, ADataFolderOfANewerVersion) {
  Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  ASSERT_EQ(cluster.Stop().exit_code, 0);
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open((cluster.data() / "jobs.sqlite").c_str(), &db), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(db, "PRAGMA user_version = 99", nullptr, nullptr, nullptr), SQLITE_OK);
  sqlite3_close(db);
  const RunResult run =
      testing::Run(cluster.ServerCommand(), cluster.folder() / "newer", absl::Seconds(20));
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_THAT(run.err, HasSubstr("99"));
}

TEST(RefusalAtStartTest, AnUnknownKeyInServerYaml) {
  testing::TempFolder folder;
  std::ofstream(folder / "server.yaml") << "serving: {max_bach: 4}\n";
  const RunResult run = testing::Run(
      {Program("pyramid-server"), "--config", (folder / "server.yaml").string()}, folder / "run");
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_THAT(run.err, HasSubstr("did you mean max_batch?"));
  EXPECT_THAT(run.err, Not(HasSubstr("terminate")));
}

TEST(RefusalAtStartTest, AnUnreachableServer) {
  testing::TempFolder folder;
  const RunResult run =
      testing::Run({Program("pyramid"), "jobs", "--server", "127.0.0.1:1"}, folder / "run");
  EXPECT_EQ(run.exit_code, 5);
  EXPECT_THAT(run.err, HasSubstr("127.0.0.1:1"));
}

}  // namespace
}  // namespace pyramid
