#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "model/recipe.h"
#include "tests/client/client_fixture.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using testing::CommandResult;
using ::testing::HasSubstr;
using ::testing::Not;

class SubmitCommandTest : public testing::ClientFixture {
 protected:
  SubmitCommandTest() {
    Write("recipe.yaml",
          "dataset: fashion_mnist\ndata_dir: ./pictures\nmodel: pvt_v2_b0\n"
          "epoch_size: 5\ndecay_epochs: 2\nin_channels: 1\nckpt_save_dir: ./ckpt\n");
    server_.submit = [this](const v1::SubmitJobRequest& request, v1::SubmitJobResponse& response) {
      request_ = request;
      *response.mutable_job() = testing::MakeJob("j-1", v1::QUEUED);
      response.mutable_job()->set_reason("waits for 2 cpu devices, 1 of 2 is free");
      response.add_warnings("a word from the server");
      return grpc::Status::OK;
    };
  }

  v1::SubmitJobRequest request_;
};

TEST_F(SubmitCommandTest, SendsTheResolvedRecipeWithPathsOfThisFolder) {
  const CommandResult result =
      Pyramid({"submit", "recipe.yaml", "--name", "first", "--request-id", "r1"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.out, "job j-1 QUEUED: waits for 2 cpu devices, 1 of 2 is free\n");
  EXPECT_THAT(result.err, AllOf(HasSubstr("warning: a word from the server\n"),
                                HasSubstr("pyramid watch j-1")));
  EXPECT_EQ(request_.name(), "first");
  EXPECT_EQ(request_.request_id(), "r1");
  EXPECT_FALSE(request_.validate_only());
  const absl::StatusOr<ParsedRecipe> sent = ParseRecipe(request_.recipe());
  ASSERT_OK(sent);
  EXPECT_EQ(sent->recipe.data_dir, (folder_ / "pictures").string());
  EXPECT_EQ(sent->recipe.ckpt_path, "");
  EXPECT_EQ(sent->recipe.ckpt_save_dir, "./ckpt");
  EXPECT_EQ(sent->recipe.epoch_size, 5);
}

TEST_F(SubmitCommandTest, AbsolutePathsStay) {
  ASSERT_EQ(
      Pyramid({"submit", "recipe.yaml", "--set", "data_dir=/srv/data", "ckpt_path=best"}).code, 0);
  const absl::StatusOr<ParsedRecipe> sent = ParseRecipe(request_.recipe());
  ASSERT_OK(sent);
  EXPECT_EQ(sent->recipe.data_dir, "/srv/data");
  EXPECT_EQ(sent->recipe.ckpt_path, (folder_ / "best").string());
}

TEST_F(SubmitCommandTest, SetWinsOverTheRecipeWhereverItStands) {
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"submit", "recipe.yaml", "--set", "epoch_size=7", "lr=0.5"},
        {"submit", "--set", "epoch_size=7", "lr=0.5", "recipe.yaml"},
        {"submit", "--set=epoch_size=7", "recipe.yaml", "--set", "lr=0.5"}}) {
    const CommandResult result = Pyramid(words);
    ASSERT_EQ(result.code, 0) << result.err;
    const absl::StatusOr<ParsedRecipe> sent = ParseRecipe(request_.recipe());
    ASSERT_OK(sent);
    EXPECT_EQ(sent->recipe.epoch_size, 7);
    EXPECT_EQ(sent->recipe.lr, 0.5);
  }
}

TEST_F(SubmitCommandTest, SetWithoutAValueIsWrongUsage) {
  const CommandResult result = Pyramid({"submit", "recipe.yaml", "--set", "epoch_size"});
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("epoch_size is not key=value"));
  EXPECT_EQ(Pyramid({"submit"}).code, 2);
}

TEST_F(SubmitCommandTest, BadRecipeFailsHereWithTheNearestKey) {
  Write("bad.yaml", "bach_size: 3\n");
  const CommandResult result = Pyramid({"submit", "bad.yaml"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("pyramid: bad.yaml: recipe.bach_size"),
                                HasSubstr("did you mean batch_size?")));
  EXPECT_EQ(request_.recipe(), "");
}

TEST_F(SubmitCommandTest, MissingRecipeIsNotFound) {
  EXPECT_EQ(Pyramid({"submit", "nowhere.yaml"}).code, 3);
}

TEST_F(SubmitCommandTest, DryRunPrintsTheRecipeAndSendsNothing) {
  const CommandResult result = Pyramid({"submit", "recipe.yaml", "--dry_run", "--set", "lr=0.25"});
  EXPECT_EQ(result.code, 0);
  const absl::StatusOr<ParsedRecipe> printed = ParseRecipe(result.out);
  ASSERT_OK(printed);
  EXPECT_EQ(printed->recipe.lr, 0.25);
  EXPECT_EQ(request_.recipe(), "");
  const CommandResult json = Pyramid({"submit", "recipe.yaml", "--dry-run", "--json"});
  EXPECT_TRUE(nlohmann::json::parse(json.out).at("recipe").is_string());
}

TEST_F(SubmitCommandTest, ValidateOnlyAsksTheServerAndQueuesNothing) {
  const CommandResult result = Pyramid({"submit", "recipe.yaml", "--validate-only"});
  EXPECT_EQ(result.code, 0);
  EXPECT_TRUE(request_.validate_only());
  EXPECT_THAT(result.out, HasSubstr("the recipe is fine: pvt_v2_b0 on fashion_mnist, 5 epochs"));
}

TEST_F(SubmitCommandTest, JsonIsTheServersAnswer) {
  const CommandResult result = Pyramid({"submit", "recipe.yaml", "--json"});
  EXPECT_EQ(result.code, 0);
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json.at("job").at("id"), "j-1");
  EXPECT_EQ(json.at("job").at("state"), "QUEUED");
  EXPECT_EQ(json.at("existed"), false);
}

TEST_F(SubmitCommandTest, RefusalsHaveTheirExitCodes) {
  const auto refuse = [this](grpc::StatusCode code) {
    server_.submit = [code](const v1::SubmitJobRequest&, v1::SubmitJobResponse&) {
      return grpc::Status(code, "recipe.data_dir: no such folder");
    };
    return Pyramid({"submit", "recipe.yaml"});
  };
  EXPECT_EQ(refuse(grpc::StatusCode::INVALID_ARGUMENT).code, 1);
  EXPECT_EQ(refuse(grpc::StatusCode::ALREADY_EXISTS).code, 4);
  EXPECT_EQ(refuse(grpc::StatusCode::INVALID_ARGUMENT).err,
            "pyramid: recipe.data_dir: no such folder\n");
}

TEST_F(SubmitCommandTest, WatchFollowsTheJobToItsEnd) {
  server_.watch = [](const v1::WatchJobRequest& request, grpc::ServerWriter<v1::JobEvent>& writer) {
    EXPECT_EQ(request.job_id(), "j-1");
    writer.Write(testing::JobEventOf(1, testing::MakeJob("j-1", v1::SUCCEEDED)));
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"submit", "recipe.yaml", "--watch"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, HasSubstr("job j-1 SUCCEEDED, top-1 0.8912"));
  EXPECT_THAT(result.err, Not(HasSubstr("follow it with")));
}

TEST_F(SubmitCommandTest, UnreachableServerIsExitCode5) {
  server_.Stop();
  const CommandResult result = Pyramid({"submit", "recipe.yaml"});
  EXPECT_EQ(result.code, 5);
  EXPECT_THAT(result.err, HasSubstr("no server at " + server_.address()));
}

}  // namespace
}  // namespace pyramid
