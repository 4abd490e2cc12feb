// The built program as a user runs it: every command once, against the fake server, with the exit
// code a shell sees.
#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "model/formats/safetensors.h"
#include "tests/client/client_fixture.h"
#include "tests/testing/process.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::MakeJob;
using testing::RunResult;

class BinaryTest : public testing::ClientFixture {
 protected:
  BinaryTest() {
    // A copy with a worker of the test's beside it.
    std::filesystem::create_directory(folder_ / "bin");
    std::filesystem::copy_file(PYRAMID_BINARY_DIR "/bin/pyramid", folder_ / "bin/pyramid");
    WriteScript("bin/pyramid-worker",
                "#!/bin/sh\n[ \"$1 $2\" = \"data export\" ] && exec cat export.bin\n"
                "echo \"worker: $@\"\nexit 7\n");
    Write("recipe.yaml", "dataset: fashion_mnist\ndata_dir: ./pictures\nin_channels: 1\n");
    server_.submit = [](const v1::SubmitJobRequest&, v1::SubmitJobResponse& response) {
      *response.mutable_job() = MakeJob("j-1", v1::QUEUED);
      return grpc::Status::OK;
    };
    server_.list = [](const v1::ListJobsRequest&, v1::ListJobsResponse& response) {
      *response.add_jobs() = MakeJob("j-1", v1::RUNNING);
      return grpc::Status::OK;
    };
    server_.get = [](const v1::GetJobRequest& request, v1::Job& job) {
      if (request.job_id() != "j-1") return grpc::Status(grpc::StatusCode::NOT_FOUND, "no job");
      job = MakeJob("j-1", v1::RUNNING);
      return grpc::Status::OK;
    };
    server_.watch = [](const v1::WatchJobRequest&, grpc::ServerWriter<v1::JobEvent>& writer) {
      v1::JobEvent event;
      event.set_number(1);
      event.mutable_log()->set_text("hello");
      writer.Write(event);
      writer.Write(testing::JobEventOf(2, MakeJob("j-1", v1::SUCCEEDED)));
      return grpc::Status::OK;
    };
    server_.cancel = [](const v1::CancelJobRequest&, v1::Job&) {
      return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "job j-1 has ended");
    };
    server_.promote = [](const v1::PromoteCheckpointRequest& request,
                         v1::PromoteCheckpointResponse& response) {
      response.set_model(request.model());
      response.set_version(1);
      return grpc::Status::OK;
    };
    server_.models = [](v1::ListModelsResponse& response) {
      *response.add_models() = testing::MakeModel("fashion", 1, 2);
      return grpc::Status::OK;
    };
    server_.classify = [](grpc::ServerContext&, const v1::ClassifyRequest& request,
                          v1::ClassifyResponse& response) {
      response.set_model("fashion");
      response.set_version(1);
      for (int i = 0; i < request.pictures_size(); ++i) {
        v1::Prediction& prediction = *response.add_results()->add_predictions();
        prediction.set_label("c0");
        prediction.set_probability(1);
      }
      return grpc::Status::OK;
    };
  }

  RunResult Shell(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), (folder_ / "bin/pyramid").string());
    return testing::Process(
               std::move(arguments), folder_ / "log",
               {.folder = folder_.path(), .environment = {{"PYRAMID_SERVER", server_.address()}}})
        .Wait(absl::Seconds(30));
  }
};

TEST_F(BinaryTest, HelpAndVersion) {
  EXPECT_EQ(Shell({"--help"}).exit_code, 0);
  EXPECT_THAT(Shell({"--version"}).out, HasSubstr("pyramid "));
  EXPECT_EQ(Shell({}).exit_code, 2);
  EXPECT_EQ(Shell({"no-such-command"}).exit_code, 2);
}

TEST_F(BinaryTest, JobsLife) {
  EXPECT_EQ(Shell({"submit", "recipe.yaml", "--set", "epoch_size=2", "--watch"}).exit_code, 0);
  EXPECT_EQ(Shell({"submit", "recipe.yaml", "--validate_only"}).exit_code, 0);
  EXPECT_THAT(Shell({"submit", "recipe.yaml", "--dry-run"}).out,
              HasSubstr("data_dir: \"" + std::filesystem::canonical(folder_.path()).string()));
  EXPECT_THAT(Shell({"jobs"}).out, HasSubstr("RUNNING"));
  EXPECT_EQ(nlohmann::json::parse(Shell({"job", "j-1", "--json"}).out).at("id"), "j-1");
  EXPECT_EQ(Shell({"job", "j-2"}).exit_code, 3);
  EXPECT_EQ(Shell({"watch", "j-1"}).exit_code, 0);
  EXPECT_EQ(Shell({"logs", "j-1"}).out, "[0] hello\n");
  EXPECT_EQ(Shell({"logs", "j-1", "--follow"}).exit_code, 0);
  EXPECT_EQ(Shell({"cancel", "j-1"}).exit_code, 4);
}

TEST_F(BinaryTest, ModelsLife) {
  EXPECT_THAT(Shell({"promote", "j-1", "--as", "fashion"}).out,
              HasSubstr("model fashion version 1"));
  EXPECT_THAT(Shell({"models"}).out, HasSubstr("fashion"));
  Write("one.png", "picture");
  const RunResult classify = Shell({"classify", "--model", "fashion", "one.png"});
  EXPECT_EQ(classify.exit_code, 0);
  EXPECT_EQ(classify.out, "one.png  c0  100.00 %\n");
  EXPECT_EQ(Shell({"classify", "--model", "fashion", "one.png", "missing.png"}).exit_code, 1);
  Write("export.bin", absl::StrCat("{\"count\":1,\"classes\":[\"c0\",\"c1\"]}\n",
                                   std::string("\0\0\0\0\x01\0\0\0", 8), "p"));
  const RunResult validate = Shell({"validate", "--model", "fashion", "data"});
  EXPECT_EQ(validate.exit_code, 0) << validate.err;
  EXPECT_THAT(validate.out, HasSubstr("top-1 1.0000\n"));
}

TEST_F(BinaryTest, WorkerCommandsRunTheProgramBesideIt) {
  const RunResult train = Shell({"train", "-c", "recipe.yaml", "--batch_size", "8"});
  EXPECT_EQ(train.exit_code, 7);
  EXPECT_EQ(train.out, "worker: train -c recipe.yaml --batch_size 8\n");
  EXPECT_EQ(Shell({"bench", "model", "--json"}).out, "worker: bench model --json\n");
  EXPECT_EQ(Shell({"data", "verify", "d"}).out, "worker: data verify d\n");
  EXPECT_EQ(Shell({"validate", "-c", "recipe.yaml", "--ckpt_path", "f"}).out,
            "worker: validate -c recipe.yaml --ckpt_path f\n");
}

TEST_F(BinaryTest, InspectAndOfflineClassify) {
  const std::string machine = Shell({"inspect", "--machine"}).out;
  EXPECT_THAT(machine, HasSubstr("cores"));
  EXPECT_THAT(machine, HasSubstr("fp32 computed by"));
  const std::string data(4, '\0');
  ASSERT_OK_AND_ASSIGN(const std::string weights, SerializeSafetensors({{"w", "F32", {1}, data}}));
  Write("w.safetensors", weights);
  EXPECT_THAT(Shell({"inspect", "w.safetensors"}).out, HasSubstr("parameters  1\n"));
  EXPECT_EQ(Shell({"classify", "--ckpt", "nowhere", "one.png"}).exit_code,
            nlohmann::json::parse(Shell({"inspect", "--machine", "--json"}).out)
                        .at("versions")
                        .at("libtorch") == "none"
                ? 4
                : 3);
}

TEST_F(BinaryTest, ServerJsonOfTheFolderIsUsed) {
  std::filesystem::create_directory(folder_ / "data");
  Write("data/server.json", absl::StrCat("{\"grpc\": \"", server_.address(), "\"}"));
  const RunResult result =
      testing::Process({(folder_ / "bin/pyramid").string(), "models"}, folder_ / "log",
                       {.folder = folder_.path(), .environment = {{"PYRAMID_SERVER", ""}}})
          .Wait(absl::Seconds(30));
  EXPECT_EQ(result.exit_code, 0) << result.err;
}

TEST_F(BinaryTest, UnreachableServerIsOneLineAndExitCode5) {
  const RunResult result = Shell({"jobs", "--server", "127.0.0.1:1"});
  EXPECT_EQ(result.exit_code, 5);
  EXPECT_EQ(result.err,
            "pyramid: no server at 127.0.0.1:1 (from --server): Connection refused; start "
            "pyramid-server, or name another with --server HOST:PORT or PYRAMID_SERVER\n");
}

}  // namespace
}  // namespace pyramid
