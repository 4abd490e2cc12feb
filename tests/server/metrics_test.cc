#include "server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "server/process_metrics.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using testing::HasSeries;
using ::testing::HasSubstr;
using testing::MetricsText;
using testing::Sample;

v1::Progress SomeProgress() {
  v1::Progress progress;
  progress.set_step(30);
  progress.set_epoch(1.5);
  progress.set_epochs(6);
  progress.set_loss(0.75);
  progress.set_learning_rate(0.001);
  progress.set_images_per_second(1234);
  progress.set_images(3000);
  progress.set_step_seconds(0.2);
  progress.set_grad_norm(2.5);
  progress.set_data_wait_seconds(0.01);
  return progress;
}

v1::Manifest ManifestOf(const std::string& digest) {
  v1::Manifest manifest;
  manifest.set_digest(digest);
  manifest.mutable_training()->set_job_id("job-1");
  manifest.mutable_network()->set_variant("pvt_v2_b0");
  return manifest;
}

// Everything there is, each at least once.
void CountEverything(Metrics& metrics) {
  ModelMetrics& model = metrics.ForModel("fashion");
  model.StartVersion(3, 3'700'000);
  model.SetDrift(3, ModelMetrics::Drift::kConfidence, 0.125);
  model.CountRequest(3, absl::StatusCode::kOk);
  model.CountRejection(ModelMetrics::Rejection::kExpired, 4);
  model.ObserveRequest(absl::Milliseconds(20));
  model.ObserveStage(ModelMetrics::Stage::kForward, absl::Milliseconds(15));
  model.ObserveBatch(3, 7);
  model.CountRejection(ModelMetrics::Rejection::kPredictedLate, 2);
  model.AddQueue(5, 256);
  model.ObserveAnswer(2, 10, 0.75);
  model.SetPredictedWait(3, absl::Milliseconds(120));
  metrics.AddInflight(1);
  metrics.SetModelInfo("fashion", 3, ManifestOf("sha256:ab"), "bf16");
  metrics.SetModelReady("fashion", true);
  metrics.CountHttp(HttpKind::kInfer, 429);
  metrics.ObserveModelLoad("fashion", absl::Seconds(1), false);
  const Metrics::Rpc& rpc = metrics.StartRpc("pyramid.v1.TrainingService", "WatchJob");
  metrics.CountReceived(rpc);
  metrics.CountSent(rpc);
  metrics.CountSent(rpc);
  metrics.EndRpc(rpc, absl::StatusCode::kNotFound, absl::Milliseconds(2));
  metrics.SetJobs({{v1::RUNNING, 2}});
  metrics.CountAttemptEnd(v1::WORKER_LOST);
  metrics.CountRestart();
  metrics.ObserveQueueWait(absl::Seconds(3));
  metrics.ObserveProgress("job-1", SomeProgress(), 2000);
  metrics.ObserveCheckpoint(absl::Seconds(2), 14'000'000);
  metrics.CountCheckpointFailure(v1::DISK_FULL);
}

TEST(MetricsTest, PromtoolFindsNothingToComplainAbout) {
  Metrics metrics;
  CountEverything(metrics);
  testing::TempFolder folder;
  ASSERT_TRUE(WriteFileAtomically(folder / "metrics.txt", MetricsText(metrics)).ok());
  if (std::system("command -v promtool >/dev/null") != 0)
    GTEST_SKIP() << "promtool isn't installed";
  const std::string command =
      absl::StrCat("promtool check metrics <", (folder / "metrics.txt").string(), " >",
                   (folder / "output").string(), " 2>&1");
  const int status = std::system(command.c_str());
  EXPECT_EQ(WEXITSTATUS(status), 0) << ReadFile(folder / "output").value();
  EXPECT_EQ(ReadFile(folder / "output").value(), "");
}

TEST(MetricsTest, PromtoolIsContentBeforeAnythingIsCounted) {
  Metrics metrics;
  testing::TempFolder folder;
  ASSERT_TRUE(WriteFileAtomically(folder / "metrics.txt", MetricsText(metrics)).ok());
  if (std::system("command -v promtool >/dev/null") != 0)
    GTEST_SKIP() << "promtool isn't installed";
  const std::string command =
      absl::StrCat("promtool check metrics <", (folder / "metrics.txt").string(), " 2>&1");
  EXPECT_EQ(WEXITSTATUS(std::system(command.c_str())), 0);
}

TEST(MetricsTest, KnownLabelCombinationsStartAtZero) {
  Metrics metrics;
  metrics.ForModel("fashion").StartVersion(1, 100);
  metrics.ForModel("fashion").StartClasses(100);
  for (
      const char* series : {
          R"(pyramid_serving_requests_total{code="OK",model="fashion",version="1"})",
          R"(pyramid_serving_requests_total{code="DeadlineExceeded",model="fashion",version="1"})",
          R"(pyramid_serving_requests_total{code="NotFound",model="fashion",version="0"})",
          R"(pyramid_serving_rejected_images_total{model="fashion",reason="queue_full"})",
          R"(pyramid_serving_rejected_images_total{model="fashion",reason="decode"})",
          R"(pyramid_serving_rejected_images_total{model="fashion",reason="predicted_late"})",
          R"(pyramid_serving_predicted_wait_seconds{model="fashion"})",
          R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage="queue"})",
          R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage="receive"})",
          R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage="preprocess"})",
          R"(pyramid_serving_request_duration_seconds_count{model="fashion"})",
          R"(pyramid_serving_batch_size_images_count{model="fashion"})",
          R"(pyramid_serving_images_total{model="fashion",version="1"})",
          R"(pyramid_serving_queue_images{model="fashion"})",
          R"(pyramid_serving_model_load_failures_total{model="fashion"})",
          R"(pyramid_serving_model_ready{model="fashion"})",
          R"(pyramid_serving_confidence_ratio_count{model="fashion"})",
          R"(pyramid_serving_predictions_total{class="0",model="fashion"})",
          R"(pyramid_serving_predictions_total{class="99",model="fashion"})",
          R"(pyramid_http_requests_total{kind="health",status="200"})",
          R"(grpc_server_started_total{grpc_method="Classify",grpc_service="pyramid.v1.ClassificationService",grpc_type="unary"})",
          R"(grpc_server_msg_received_total{grpc_method="Classify",grpc_service="pyramid.v1.ClassificationService",grpc_type="unary"})",
          R"(grpc_server_msg_sent_total{grpc_method="Classify",grpc_service="pyramid.v1.ClassificationService",grpc_type="unary"})",
          R"(pyramid_jobs{state="queued"})",
          R"(pyramid_jobs{state="failed"})",
          R"(pyramid_attempts_total{class="none"})",
          R"(pyramid_attempts_total{class="worker_lost"})",
          R"(pyramid_checkpoint_failures_total{cause="disk_full"})",
          "pyramid_job_restarts_total",
          "pyramid_serving_inflight_requests",
          R"(grpc_server_handled_total{grpc_code="Internal",grpc_method="Classify",grpc_service="pyramid.v1.ClassificationService",grpc_type="unary"})",
          R"(grpc_server_handled_total{grpc_code="OK",grpc_method="Report",grpc_service="pyramid.v1.WorkerService",grpc_type="unary"})",
      }) {
    EXPECT_EQ(Sample(metrics, series), 0) << series;
  }
  EXPECT_THAT(MetricsText(metrics), HasSubstr("pyramid_build_info{version=\""));
}

TEST(MetricsTest, ThePredictedWaitIsTheLongestOfTheLoadedVersions) {
  Metrics metrics;
  ModelMetrics& model = metrics.ForModel("fashion");
  const auto shown = [&] {
    return Sample(metrics, R"(pyramid_serving_predicted_wait_seconds{model="fashion"})");
  };
  model.StartVersion(3, 100);
  model.StartVersion(4, 100);
  model.SetPredictedWait(3, absl::Milliseconds(120));
  model.SetPredictedWait(4, absl::Milliseconds(20));
  EXPECT_NEAR(shown(), 0.12, 1e-9);
  model.SetPredictedWait(3, absl::ZeroDuration());
  EXPECT_NEAR(shown(), 0.02, 1e-9);
  model.DropVersion(4, 100);
  EXPECT_EQ(shown(), 0);
}

TEST(MetricsTest, EachCallCountsWhereItsNameSays) {
  Metrics metrics;
  CountEverything(metrics);
  const std::pair<const char*, double> expected[] = {
      {R"(pyramid_serving_requests_total{code="OK",model="fashion",version="3"})", 1},
      {R"(pyramid_serving_rejected_images_total{model="fashion",reason="expired"})", 4},
      {R"(pyramid_serving_rejected_images_total{model="fashion",reason="predicted_late"})", 2},
      {R"(pyramid_serving_predicted_wait_seconds{model="fashion"})", 0.12},
      {R"(pyramid_serving_request_duration_seconds_sum{model="fashion"})", 0.02},
      {R"(pyramid_serving_stage_duration_seconds_sum{model="fashion",stage="forward"})", 0.015},
      {R"(pyramid_serving_batch_size_images_bucket{model="fashion",le="4"})", 0},
      {R"(pyramid_serving_batch_size_images_bucket{model="fashion",le="8"})", 1},
      {R"(pyramid_serving_images_total{model="fashion",version="3"})", 7},
      {R"(pyramid_serving_batches_total{model="fashion",version="3"})", 1},
      {R"(pyramid_serving_queue_images{model="fashion"})", 5},
      {R"(pyramid_serving_queue_capacity_images{model="fashion"})", 256},
      {"pyramid_serving_inflight_requests", 1},
      {R"(pyramid_serving_model_info{digest="sha256:ab",dtype="bf16",job="job-1",model="fashion",variant="pvt_v2_b0",version="3"})",
       1},
      {R"(pyramid_serving_model_memory_bytes{model="fashion",version="3"})", 3'700'000},
      {R"(pyramid_serving_drift_index{kind="confidence",model="fashion",version="3"})", 0.125},
      {R"(grpc_server_msg_received_total{grpc_method="WatchJob",grpc_service="pyramid.v1.TrainingService",grpc_type="server_stream"})",
       1},
      {R"(grpc_server_msg_sent_total{grpc_method="WatchJob",grpc_service="pyramid.v1.TrainingService",grpc_type="server_stream"})",
       2},
      {R"(pyramid_serving_model_load_duration_seconds_sum{model="fashion"})", 1},
      {R"(pyramid_serving_model_load_failures_total{model="fashion"})", 1},
      {R"(grpc_server_handled_total{grpc_code="NotFound",grpc_method="WatchJob",grpc_service="pyramid.v1.TrainingService",grpc_type="server_stream"})",
       1},
      {R"(grpc_server_started_total{grpc_method="WatchJob",grpc_service="pyramid.v1.TrainingService",grpc_type="server_stream"})",
       1},
      {R"(pyramid_serving_predictions_total{class="2",model="fashion"})", 1},
      {R"(pyramid_serving_predictions_total{class="9",model="fashion"})", 0},
      {R"(pyramid_serving_confidence_ratio_sum{model="fashion"})", 0.75},
      {R"(pyramid_serving_model_ready{model="fashion"})", 1},
      {R"(pyramid_http_requests_total{kind="infer",status="429"})", 1},
      {R"(pyramid_jobs{state="running"})", 2},
      {R"(pyramid_attempts_total{class="worker_lost"})", 1},
      {"pyramid_job_restarts_total", 1},
      {"pyramid_queue_wait_seconds_sum", 3},
      {R"(pyramid_job_step{job="job-1"})", 30},
      {R"(pyramid_job_epoch_ratio{job="job-1"})", 0.25},
      {R"(pyramid_train_loss{job="job-1"})", 0.75},
      {R"(pyramid_learning_rate{job="job-1"})", 0.001},
      {R"(pyramid_train_images_per_second{job="job-1"})", 1234},
      {R"(pyramid_grad_norm{job="job-1"})", 2.5},
      {R"(pyramid_data_wait_seconds{job="job-1"})", 0.01},
      {R"(pyramid_train_images_total{job="job-1"})", 1000},
      {"pyramid_step_duration_seconds_sum", 0.2},
      {"pyramid_checkpoint_duration_seconds_sum", 2},
      {"pyramid_checkpoint_bytes", 14'000'000},
      {R"(pyramid_checkpoint_failures_total{cause="disk_full"})", 1},
  };
  for (const auto& [series, value] : expected) {
    EXPECT_NEAR(Sample(metrics, series), value, 1e-9) << series;
  }
}

TEST(MetricsTest, ManyClassesHaveNoSeriesEach) {
  Metrics metrics;
  metrics.ForModel("imagenet").StartClasses(1000);
  metrics.ForModel("imagenet").ObserveAnswer(7, 1000, 0.5);
  EXPECT_FALSE(absl::StrContains(MetricsText(metrics), R"(class="7")"));
  EXPECT_EQ(Sample(metrics, R"(pyramid_serving_confidence_ratio_count{model="imagenet"})"), 1);
}

TEST(ProcessMetricsTest, TellsOfThisProcess) {
  std::map<std::string, double> values;
  for (const prometheus::MetricFamily& family : ProcessMetrics().Collect()) {
    const prometheus::ClientMetric& metric = family.metric.at(0);
    values[family.name] =
        family.type == prometheus::MetricType::Counter ? metric.counter.value : metric.gauge.value;
  }
  const absl::Time now = absl::Now();
  EXPECT_EQ(values.size(), 7U);
  EXPECT_GT(values["process_cpu_seconds_total"], -1e-9);
  EXPECT_LT(values["process_cpu_seconds_total"], 600);
  EXPECT_GT(values["process_resident_memory_bytes"], 1e6);
  EXPECT_GT(values["process_virtual_memory_bytes"], values["process_resident_memory_bytes"]);
  EXPECT_GE(values["process_threads"], 1);
  EXPECT_NEAR(values["process_start_time_seconds"], absl::ToDoubleSeconds(now - absl::UnixEpoch()),
              600);
  EXPECT_GE(values["process_max_fds"], values["process_open_fds"]);
  std::vector<std::ifstream> more(5);
  for (std::ifstream& file : more) file.open("/proc/self/stat");
  for (const prometheus::MetricFamily& family : ProcessMetrics().Collect()) {
    if (family.name == "process_open_fds") {
      EXPECT_EQ(family.metric.at(0).gauge.value, values["process_open_fds"] + 5);
    }
  }
}

TEST(MetricsTest, ValidationAppearsOnceMeasured) {
  Metrics metrics;
  v1::Progress progress = SomeProgress();
  metrics.ObserveProgress("job-1", progress, 0);
  EXPECT_FALSE(HasSeries(metrics, R"(pyramid_val_top1_ratio{job="job-1"})"));
  progress.set_validated(true);
  progress.set_val_top1(0.91);
  metrics.ObserveProgress("job-1", progress, 3000);
  EXPECT_DOUBLE_EQ(Sample(metrics, R"(pyramid_val_top1_ratio{job="job-1"})"), 0.91);
}

TEST(MetricsTest, ImagesNeverCountBackwardsAfterARestart) {
  Metrics metrics;
  v1::Progress progress = SomeProgress();
  metrics.ObserveProgress("job-1", progress, 0);
  progress.set_images(1000);
  metrics.ObserveProgress("job-1", progress, 3000);
  EXPECT_EQ(Sample(metrics, R"(pyramid_train_images_total{job="job-1"})"), 3000);
  progress.set_images(1200);
  metrics.ObserveProgress("job-1", progress, 1000);
  EXPECT_EQ(Sample(metrics, R"(pyramid_train_images_total{job="job-1"})"), 3200);
}

TEST(MetricsTest, AnEndedJobLeavesNoSeries) {
  Metrics metrics;
  metrics.ObserveProgress("job-1", SomeProgress(), 0);
  metrics.ObserveProgress("job-2", SomeProgress(), 0);
  metrics.DropJob("job-1");
  EXPECT_FALSE(absl::StrContains(MetricsText(metrics), "job-1"));
  EXPECT_EQ(Sample(metrics, R"(pyramid_job_step{job="job-2"})"), 30);
}

TEST(MetricsTest, AnUnloadedVersionLeavesNoSeries) {
  Metrics metrics;
  ModelMetrics& model = metrics.ForModel("fashion");
  model.StartVersion(1, 100);
  model.StartVersion(2, 100);
  model.SetDrift(1, ModelMetrics::Drift::kClasses, 0);
  model.DropVersion(1, 100);
  model.SetDrift(1, ModelMetrics::Drift::kClasses, 1);  // of a batch that ends late
  EXPECT_FALSE(absl::StrContains(MetricsText(metrics), R"(version="1")"));
  EXPECT_TRUE(absl::StrContains(MetricsText(metrics), R"(version="2")"));
}

TEST(MetricsTest, AVersionLoadedTwiceKeepsItsSeriesUntilBothAreGone) {
  Metrics metrics;
  ModelMetrics& model = metrics.ForModel("fashion");
  model.StartVersion(1, 100);
  model.StartVersion(1, 100);
  model.ObserveBatch(1, 2);
  EXPECT_EQ(Sample(metrics, R"(pyramid_serving_model_memory_bytes{model="fashion",version="1"})"),
            200);
  model.DropVersion(1, 100);
  EXPECT_EQ(Sample(metrics, R"(pyramid_serving_model_memory_bytes{model="fashion",version="1"})"),
            100);
  EXPECT_EQ(Sample(metrics, R"(pyramid_serving_images_total{model="fashion",version="1"})"), 2);
  model.DropVersion(1, 100);
  EXPECT_FALSE(HasSeries(metrics, R"(pyramid_serving_images_total{model="fashion",version="1"})"));
}

TEST(MetricsTest, ModelInfoNamesOnlyTheVersionInService) {
  Metrics metrics;
  metrics.SetModelInfo("fashion", 1, ManifestOf("sha256:one"), "fp32");
  metrics.SetModelInfo("fashion", 2, ManifestOf("sha256:two"), "fp32");
  EXPECT_FALSE(absl::StrContains(MetricsText(metrics), "sha256:one"));
  EXPECT_EQ(
      Sample(
          metrics,
          R"(pyramid_serving_model_info{digest="sha256:two",dtype="fp32",job="job-1",model="fashion",variant="pvt_v2_b0",version="2"})"),
      1);
}

TEST(MetricsTest, AnObjectiveIsABoundOfRequestDurations) {
  Metrics metrics(absl::Milliseconds(50));
  ModelMetrics& model = metrics.ForModel("fashion");
  model.ObserveRequest(absl::Milliseconds(45));
  model.ObserveRequest(absl::Milliseconds(50));
  model.ObserveRequest(absl::Milliseconds(51));
  const auto within = [&](const char* bound) {
    return Sample(
        metrics,
        absl::StrCat(R"(pyramid_serving_request_duration_seconds_bucket{model="fashion",le=")",
                     bound, R"("})"));
  };
  EXPECT_EQ(within("0.04"), 0);
  EXPECT_EQ(within("0.05"), 2);
  EXPECT_EQ(within("0.064"), 3);
}

TEST(MetricsTest, AnObjectiveThatIsABoundAlreadyOrBeyondAllAddsWhatItMust) {
  const auto bounds = [](absl::Duration objective) {
    Metrics metrics(objective);
    metrics.ForModel("fashion");
    const std::string text = MetricsText(metrics);
    int count = 0;
    for (absl::string_view line : absl::StrSplit(text, '\n')) {
      count += absl::StartsWith(line, "pyramid_serving_request_duration_seconds_bucket");
    }
    return count;
  };
  EXPECT_EQ(bounds(absl::ZeroDuration()), 27);  // with +Inf
  EXPECT_EQ(bounds(absl::Milliseconds(40)), 27);
  EXPECT_EQ(bounds(absl::Seconds(20)), 28);
}

}  // namespace
}  // namespace pyramid
