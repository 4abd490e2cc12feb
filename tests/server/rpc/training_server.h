// A gRPC server with the two training services over a job manager whose processes are made up.
#ifndef PYRAMID_TESTS_SERVER_RPC_TRAINING_SERVER_H_
#define PYRAMID_TESTS_SERVER_RPC_TRAINING_SERVER_H_

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "server/rpc/training_service.h"
#include "server/rpc/worker_service.h"
#include "tests/server/training/fake_launcher.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid::testing {

// Jobs stay QUEUED until StartManager.
class TrainingServer {
 public:
  TrainingServer() {
    std::filesystem::create_directory(folder_ / "pictures");
    JobManager::Options options;
    options.data = folder_ / "data";
    options.devices = {{"cpu", 2}};
    options.worker_program = "/bin/worker";
    options.tick = absl::Milliseconds(2);
    manager_ = *JobManager::Create(options, launcher_, metrics_);
    training_ = std::make_unique<TrainingService>(
        *manager_,
        [this](const std::filesystem::path& checkpoint, const v1::PromoteCheckpointRequest& request)
            -> absl::StatusOr<v1::PromoteCheckpointResponse> {
          if (!promote_error_.ok()) return promote_error_;
          promoted_ = checkpoint;
          v1::PromoteCheckpointResponse response;
          response.set_model(request.model());
          return response;
        },
        metrics_);
    worker_ = std::make_unique<WorkerService>(*manager_, metrics_);
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(training_.get());
    builder.RegisterService(worker_.get());
    server_ = builder.BuildAndStart();
    channel_ =
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials());
  }
  ~TrainingServer() { server_->Shutdown(std::chrono::system_clock::now()); }

  void StartManager() {
    if (!started_) manager_->Start();
    started_ = true;
  }
  std::string Recipe() const {
    return absl::StrCat("data_dir: ", (folder_.path() / "pictures").string(), "\n");
  }
  // Submits a job, lets it run and waits for its launch: its id and epoch.
  std::pair<std::string, int64_t> LaunchedJob() {
    StartManager();
    v1::SubmitJobRequest submit;
    submit.set_recipe(Recipe());
    const std::string id = manager_->Submit(submit)->job().id();
    for (int i = 0; i < 5000; ++i) {
      const v1::Job job = *manager_->Get(id);
      if (job.attempts_size() == 1 && job.attempts(0).workers_size() == 1) {
        return {id, job.attempts(0).epoch()};
      }
      absl::SleepFor(absl::Milliseconds(1));
    }
    ADD_FAILURE() << "never launched";
    return {id, 0};
  }
  std::string JobWithCheckpoint(const std::string& checkpoint_id) {
    const auto [id, epoch] = LaunchedJob();
    v1::ReportRequest report;
    report.mutable_worker()->set_job_id(id);
    report.mutable_worker()->set_epoch(epoch);
    report.set_sequence(1);
    v1::Checkpoint& checkpoint = *report.add_new_checkpoints();
    checkpoint.set_id(checkpoint_id);
    checkpoint.set_path((folder_ / checkpoint_id).string());
    std::filesystem::create_directory(checkpoint.path());
    EXPECT_OK(manager_->Report(report));
    return id;
  }
  double Handled(const std::string& method, const std::string& code) {
    return Counter("grpc_server_handled_total", {{"grpc_method", method}, {"grpc_code", code}});
  }
  double Sent(const std::string& method) {
    return Counter("grpc_server_msg_sent_total", {{"grpc_method", method}});
  }

  JobManager& manager() { return *manager_; }
  FakeLauncher& launcher() { return launcher_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }
  const std::filesystem::path& promoted() const { return promoted_; }
  void set_promote_error(absl::Status status) { promote_error_ = std::move(status); }

 private:
  // Of the first series with these labels, among others.
  double Counter(absl::string_view name, const std::map<std::string, std::string>& labels) {
    for (const prometheus::MetricFamily& family : metrics_.registry()->Collect()) {
      if (family.name != name) continue;
      for (const prometheus::ClientMetric& metric : family.metric) {
        size_t found = 0;
        for (const auto& label : metric.label) {
          const auto wanted = labels.find(label.name);
          found += wanted != labels.end() && wanted->second == label.value ? 1 : 0;
        }
        if (found == labels.size()) return metric.counter.value;
      }
    }
    return 0;
  }

  TempFolder folder_;
  FakeLauncher launcher_;
  Metrics metrics_;
  absl::Status promote_error_;
  std::filesystem::path promoted_;
  bool started_ = false;
  std::unique_ptr<JobManager> manager_;
  std::unique_ptr<TrainingService> training_;
  std::unique_ptr<WorkerService> worker_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_SERVER_RPC_TRAINING_SERVER_H_
