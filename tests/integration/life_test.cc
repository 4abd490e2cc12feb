// The two lives end to end, with the real programs: a job from submit to a served answer.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "proto/base/file.h"
#include "tests/integration/cluster.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using testing::Cluster;
using ::testing::HasSubstr;
using testing::HttpGet;
using testing::Program;
using testing::RunResult;

TEST(LifeTest, AJobGoesFromSubmitToAServedAnswer) {
  Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  ASSERT_OK(WriteFileAtomically(cluster.folder() / "recipe.yaml",
                                cluster.SmallRecipe("epoch_size: 8\nmin_lr: 1e-5\n")));

  // Submit and follow to the end, as a person does.
  const RunResult submit =
      cluster.Cli({"submit", "recipe.yaml", "--watch", "--name", "first", "--request-id", "r1"},
                  absl::Seconds(120));
  ASSERT_EQ(submit.exit_code, 0) << submit.err;
  const RunResult jobs = cluster.Cli({"jobs", "--json"});
  ASSERT_EQ(jobs.exit_code, 0) << jobs.err;
  EXPECT_THAT(jobs.out, HasSubstr("SUCCEEDED"));
  // The same request again is the same job.
  const RunResult again =
      cluster.Cli({"submit", "recipe.yaml", "--name", "first", "--request-id", "r1", "--json"});
  EXPECT_EQ(again.exit_code, 0) << again.err;
  grpc::ClientContext list_context;
  v1::ListJobsResponse list;
  ASSERT_TRUE(cluster.training().ListJobs(&list_context, {}, &list).ok());
  ASSERT_EQ(list.jobs_size(), 1);
  const v1::Job& job = list.jobs(0);
  EXPECT_EQ(job.state(), v1::SUCCEEDED);
  EXPECT_EQ(job.attempts_size(), 1);
  EXPECT_GE(job.checkpoints_size(), 1);
  EXPECT_EQ(job.progress().step(), job.progress().steps());
  EXPECT_GT(job.progress().val_top1(), 0.8) << "the made-up data is easy";

  // Promote, twice: the second is the same version.
  const RunResult promote = cluster.Cli({"promote", job.id(), "--as", "bars"});
  ASSERT_EQ(promote.exit_code, 0) << promote.err;
  EXPECT_EQ(cluster.Cli({"promote", job.id(), "--as", "bars"}).exit_code, 0);
  const RunResult models = cluster.Cli({"models", "--json"});
  EXPECT_THAT(models.out, HasSubstr("bars"));

  // Classify pictures; offline gives the same logits as the endpoint.
  const RunResult exported = cluster.Cli(
      {"data", "export", "recipe.yaml", "--split", "val", "--count", "4", "--out", "pictures"});
  ASSERT_EQ(exported.exit_code, 0) << exported.err;
  std::vector<std::string> pictures;
  for (const auto& entry : std::filesystem::directory_iterator(cluster.folder() / "pictures")) {
    pictures.push_back(entry.path().string());
  }
  ASSERT_EQ(pictures.size(), 4u);
  std::vector<std::string> classify = {"classify", "--model", "bars", "--logits", "--json"};
  classify.insert(classify.end(), pictures.begin(), pictures.end());
  const RunResult served = cluster.Cli(classify);
  ASSERT_EQ(served.exit_code, 0) << served.err;
  std::vector<std::string> offline_command = {"classify", "--ckpt_path",
                                              job.checkpoints(job.checkpoints_size() - 1).path(),
                                              "--logits", "--json"};
  offline_command.insert(offline_command.end(), pictures.begin(), pictures.end());
  const RunResult offline = cluster.Cli(offline_command);
  ASSERT_EQ(offline.exit_code, 0) << offline.err;
  const auto served_logits = nlohmann::json::parse(served.out).at("logits");
  const auto offline_logits = nlohmann::json::parse(offline.out).at("logits");
  ASSERT_EQ(served_logits.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    ASSERT_EQ(served_logits[i].size(), 10u);
    for (size_t c = 0; c < 10; ++c) {
      EXPECT_NEAR(served_logits[i][c].get<double>(), offline_logits[i][c].get<double>(), 1e-4);
    }
  }

  // Validation through the endpoint gives the trainer's number exactly.
  const RunResult validate = cluster.Cli({"validate", "--model", "bars", "recipe.yaml", "--json"});
  ASSERT_EQ(validate.exit_code, 0) << validate.err;
  EXPECT_NEAR(nlohmann::json::parse(validate.out).at("top1").get<double>(),
              job.progress().val_top1(), 1e-9);

  // What Prometheus sees.
  const std::string metrics = HttpGet(cluster.metrics_address(), "/metrics");
  EXPECT_THAT(metrics, HasSubstr("pyramid_serving_requests_total{"));
  EXPECT_THAT(metrics, HasSubstr("pyramid_jobs{state=\"succeeded\"} 1"));
  int code = 0;
  EXPECT_EQ(HttpGet(cluster.http_address(), "/readyz", &code), "ready\n");
  EXPECT_EQ(code, 200);

  const RunResult stopped = cluster.Stop();
  EXPECT_EQ(stopped.exit_code, 0);

  // A restart serves the promoted model by itself.
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  EXPECT_EQ(cluster.Cli(classify).out, served.out);
  EXPECT_EQ(cluster.Cli({"validate", "--model", "nobody", "recipe.yaml"}).exit_code, 3);
}

TEST(LifeTest, TrainsAt96WhereAttentionHasNineKeys) {
  Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const std::string id = cluster.Submit(cluster.SmallRecipe("epoch_size: 2\nnum_samples: 128\n"),
                                        {"image_resize=96", "image_pad=96"});
  const v1::Job job = cluster.WaitForEnd(id, absl::Seconds(150));
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.reason();
  EXPECT_EQ(job.progress().step(), 8);
  EXPECT_TRUE(job.progress().validated());
}

TEST(LifeTest, CancelSavesAndEndsAsCanceled) {
  Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  const std::string id = cluster.Submit(
      cluster.SmallRecipe("epoch_size: 500\nckpt_save_interval: 500\nval_interval: 500\n"));
  cluster.WaitForStep(id, 5);
  // A checkpoint on request, the only one for 500 epochs; training goes on.
  const int64_t before = cluster.Get(id).progress().step();
  EXPECT_EQ(cluster.Get(id).checkpoints_size(), 0);
  EXPECT_EQ(cluster.Cli({"save", id}).exit_code, 0);
  const v1::Job saved = cluster.WaitFor(
      id, [](const v1::Job& job) { return job.checkpoints_size() > 0; }, absl::Seconds(10));
  EXPECT_EQ(saved.state(), v1::RUNNING);
  cluster.WaitForStep(id, before + 10);
  // A second job waits and says why, with numbers.
  const std::string waiting = cluster.Submit(cluster.SmallRecipe("epoch_size: 501\n"));
  const v1::Job queued = cluster.WaitFor(
      waiting, [](const v1::Job& job) { return !job.reason().empty(); }, absl::Seconds(10));
  EXPECT_EQ(queued.state(), v1::QUEUED);
  EXPECT_THAT(queued.reason(), HasSubstr("2"));
  EXPECT_EQ(cluster.Cli({"cancel", waiting}).exit_code, 0);
  EXPECT_EQ(cluster.WaitForEnd(waiting, absl::Seconds(10)).state(), v1::CANCELED);
  EXPECT_EQ(cluster.Cli({"cancel", id}).exit_code, 0);
  const v1::Job job = cluster.WaitForEnd(id, absl::Seconds(60));
  EXPECT_EQ(job.state(), v1::CANCELED);
  EXPECT_GE(job.checkpoints_size(), 1) << "it saves before it stops";
  EXPECT_EQ(cluster.Cli({"cancel", id}).exit_code, 4);
}

}  // namespace
}  // namespace pyramid
