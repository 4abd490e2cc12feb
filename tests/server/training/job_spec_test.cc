#include "server/training/job_spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "absl/strings/str_cat.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;

v1::SubmitJobRequest Request(const std::string& recipe, const std::string& name = "") {
  v1::SubmitJobRequest request;
  request.set_recipe(recipe);
  request.set_name(name);
  return request;
}

class JobSpecTest : public ::testing::Test {
 protected:
  absl::Status Check(const std::string& extra, const DeviceCounts& devices = {{"cpu", 2}}) {
    const auto spec =
        ResolveJob(Request(absl::StrCat("data_dir: ", folder_.path().string(), "\n", extra)));
    if (!spec.ok()) return spec.status();
    return CheckOnServer(*spec, devices);
  }
  TempFolder folder_;
};

TEST_F(JobSpecTest, NamesAJobByModelAndData) {
  ASSERT_OK_AND_ASSIGN(const JobSpec spec,
                       ResolveJob(Request("model: pvt_v2_b1\ndataset: fashion_mnist\n")));
  EXPECT_EQ(spec.name, "pvt_v2_b1-fashion_mnist");
  ASSERT_OK_AND_ASSIGN(const JobSpec named, ResolveJob(Request("", "night.run-2")));
  EXPECT_EQ(named.name, "night.run-2");
}

TEST_F(JobSpecTest, RefusesNamesThatAreNoFileNames) {
  for (const std::string& name :
       {std::string("a/b"), std::string(".."), std::string("with space"), std::string(65, 'a')}) {
    EXPECT_THAT(ResolveJob(Request("", name)),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1..64 letters")))
        << name;
  }
}

TEST_F(JobSpecTest, RefusesALongRequestId) {
  v1::SubmitJobRequest request = Request("");
  request.set_request_id(std::string(129, 'x'));
  EXPECT_THAT(ResolveJob(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 128")));
}

TEST_F(JobSpecTest, TheRecipesErrorsComeThrough) {
  EXPECT_THAT(ResolveJob(Request("batch_sise: 3")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean batch_size?")));
  EXPECT_THAT(ResolveJob(Request("batch_size: 0")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("recipe.batch_size is 0")));
}

TEST_F(JobSpecTest, SpellingDoesntChangeTheHashValuesDo) {
  const auto hash = [](const std::string& recipe) { return ResolveJob(Request(recipe))->hash; };
  EXPECT_EQ(hash("batch_size: 64\nlr: 1e-3\n"), hash("# a comment\nlr: 0.001\nbatch_size: 64"));
  EXPECT_NE(hash("batch_size: 64"), hash("batch_size: 65"));
  EXPECT_NE(ResolveJob(Request("", "a"))->hash, ResolveJob(Request("", "b"))->hash);
}

TEST_F(JobSpecTest, OverridesWin) {
  v1::SubmitJobRequest request = Request("lr: 0.5\n");
  request.add_overrides("lr=0.25");
  ASSERT_OK_AND_ASSIGN(const JobSpec spec, ResolveJob(request));
  EXPECT_EQ(spec.recipe.lr, 0.25);
}

TEST_F(JobSpecTest, AcceptsWhatTheServerCanRun) { EXPECT_OK(Check("workers: 2")); }

TEST_F(JobSpecTest, ADataFolderMustBeOnTheServer) {
  ASSERT_OK_AND_ASSIGN(const JobSpec gone, ResolveJob(Request("data_dir: /no/such/folder")));
  EXPECT_THAT(CheckOnServer(gone, {{"cpu", 2}}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("recipe.data_dir is /no/such/folder"),
                             HasSubstr("no such folder"))));
  std::ofstream(folder_ / "file") << "x";
  ASSERT_OK_AND_ASSIGN(
      const JobSpec file,
      ResolveJob(Request(absl::StrCat("data_dir: ", (folder_ / "file").string()))));
  EXPECT_THAT(CheckOnServer(file, {{"cpu", 2}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("isn't a folder")));
}

TEST_F(JobSpecTest, WeightsToStartFromMustBeThere) {
  EXPECT_THAT(
      Check("ckpt_path: /no/weights"),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("recipe.ckpt_path is /no/weights")));
}

TEST_F(JobSpecTest, ADeviceThatIsntThereIsRefusedWithWhatIs) {
  EXPECT_THAT(Check("device: cuda", {{"cpu", 2}, {"cuda", 0}}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("recipe.device is cuda; this server has cpu (2)")));
  EXPECT_OK(Check("device: cuda", {{"cpu", 2}, {"cuda", 1}}));
}

TEST_F(JobSpecTest, MoreWorkersThanTheServerHasAreRefusedWithNumbers) {
  EXPECT_THAT(Check("workers: 3"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("recipe.workers is 3; this server runs at most 2 cpu workers at "
                                 "once; use 1..2")));
}

TEST_F(JobSpecTest, TheJobCarriesTheResolvedRecipe) {
  v1::SubmitJobRequest request = Request("workers: 2\npriority: 7\nowner: ann\nmax_restarts: 5\n");
  request.set_request_id("r1");
  ASSERT_OK_AND_ASSIGN(const JobSpec spec, ResolveJob(request));
  const v1::Job job = MakeJob(spec, request);
  EXPECT_EQ(job.state(), v1::QUEUED);
  EXPECT_EQ(job.workers(), 2);
  EXPECT_EQ(job.priority(), 7);
  EXPECT_EQ(job.owner(), "ann");
  EXPECT_EQ(job.max_restarts(), 5);
  EXPECT_EQ(job.request_id(), "r1");
  ASSERT_OK_AND_ASSIGN(const ParsedRecipe again, ParseRecipe(job.recipe()));
  EXPECT_EQ(RecipeToYaml(again.recipe), job.recipe());
}

}  // namespace
}  // namespace pyramid
