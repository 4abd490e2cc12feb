#include "tests/integration/reload_under_load.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "proto/lifecycle.grpc.pb.h"

namespace pyramid::testing {
namespace {

constexpr int kSide = 32;

v1::ClassifyRequest Request(int number) {
  v1::ClassifyRequest request;
  request.set_model("bars");
  request.set_request_id(absl::StrCat("r", number));
  v1::ImageTensor& tensor = *request.add_pictures()->mutable_tensor();
  tensor.set_channels(1);
  tensor.set_height(kSide);
  tensor.set_width(kSide);
  for (int i = 0; i < kSide * kSide; ++i) {
    tensor.add_values(static_cast<float>((i * 37 + number) % 64) / 32.0f - 1.0f);
  }
  return request;
}

// Clients that ask one request after the other until they go.
class Clients {
 public:
  Clients(const std::string& address, int count) {
    for (int c = 0; c < count; ++c) {
      threads_.emplace_back([this, address, c] {
        auto stub = v1::ClassificationService::NewStub(
            grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
        for (int i = 0; !stop_; ++i) {
          const v1::ClassifyRequest request = Request(1000 * c + i % 1000);
          grpc::ClientContext context;
          context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
          v1::ClassifyResponse response;
          const absl::Time started = absl::Now();
          const grpc::Status status = stub->Classify(&context, request, &response);
          const double ms = absl::ToDoubleMilliseconds(absl::Now() - started);
          const std::lock_guard<std::mutex> lock(mutex_);
          if (!status.ok() || response.results_size() != 1 || response.results(0).code() != 0 ||
              response.digest().empty()) {
            errors_.push_back(absl::StrCat("classify: ", status.error_message()));
          }
          ++by_version_[response.version()];
          milliseconds_.push_back(ms);
        }
      });
    }
  }
  ~Clients() { Stop(); }
  void Stop() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  // Of the requests since the last call.
  double TakeP99() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (milliseconds_.empty()) return 0;
    const auto p99 =
        milliseconds_.begin() + static_cast<std::ptrdiff_t>(milliseconds_.size() * 99 / 100);
    std::nth_element(milliseconds_.begin(), p99, milliseconds_.end());
    const double value = *p99;
    milliseconds_.clear();
    return value;
  }
  void Report(ReloadReport& report) {
    const std::lock_guard<std::mutex> lock(mutex_);
    report.by_version = by_version_;
    for (const auto& [version, answers] : by_version_) report.answers += answers;
    report.errors.insert(report.errors.end(), errors_.begin(), errors_.end());
  }

 private:
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::vector<std::string> errors_;
  std::map<int64_t, int64_t> by_version_;
  std::vector<double> milliseconds_;
  std::vector<std::thread> threads_;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[values.size() / 2];
}

double MemoryMb(int pid) {
  std::ifstream status(absl::StrCat("/proc/", pid, "/status"));
  for (std::string word; status >> word;) {
    double kb = 0;
    if (word == "VmRSS:" && status >> kb) return kb / 1024;
  }
  return 0;
}

// Waits until so many versions' series are left: the others have been freed.
void AwaitVersions(const Cluster& cluster, int wanted) {
  for (int i = 0; i < 2000; ++i) {
    const std::string metrics = HttpGet(cluster.metrics_address(), "/metrics");
    int versions = 0;
    for (size_t at = metrics.find("pyramid_serving_batches_total{"); at != std::string::npos;
         at = metrics.find("pyramid_serving_batches_total{", at + 1)) {
      ++versions;
    }
    if (versions == wanted) return;
    absl::SleepFor(absl::Milliseconds(5));
  }
  ADD_FAILURE() << "an old version's series are still there";
}

int PidOf(const Cluster& cluster) {
  return nlohmann::json::parse(*ReadFile(cluster.data() / "server.json")).at("pid");
}

grpc::Status Promote(Cluster& cluster, const v1::Job& job, int checkpoint) {
  v1::PromoteCheckpointRequest request;
  request.set_job_id(job.id());
  request.set_checkpoint_id(job.checkpoints(checkpoint).id());
  request.set_model("bars");
  grpc::ClientContext context;
  v1::PromoteCheckpointResponse response;
  return cluster.training().PromoteCheckpoint(&context, request, &response);
}

}  // namespace

double Growth(const std::vector<double>& memory_mb) {
  constexpr size_t kSettling = 5;
  if (memory_mb.size() < 2 * kSettling) return 0;
  std::vector<double> slopes, begins;
  for (size_t i = kSettling; i < memory_mb.size(); ++i) {
    for (size_t j = i + 1; j < memory_mb.size(); ++j) {
      slopes.push_back((memory_mb[j] - memory_mb[i]) / static_cast<double>(j - i));
    }
  }
  const double slope = Median(std::move(slopes));
  for (size_t i = kSettling; i < memory_mb.size(); ++i) {
    begins.push_back(memory_mb[i] - slope * static_cast<double>(i - kSettling));
  }
  return slope * static_cast<double>(memory_mb.size() - 1 - kSettling) / Median(std::move(begins));
}

std::string TrainTwoCheckpoints(Cluster& cluster) {
  const std::string recipe = cluster.SmallRecipe(
      "epoch_size: 2\nckpt_save_interval: 1\nkeep_checkpoint_max: 5\nnum_samples: 96\n");
  EXPECT_TRUE(WriteFileAtomically(cluster.folder() / "recipe.yaml", recipe).ok());
  const std::string id = cluster.Submit(recipe);
  const v1::Job job = cluster.WaitForEnd(id);
  EXPECT_EQ(job.state(), v1::SUCCEEDED) << job.reason();
  EXPECT_GE(job.checkpoints_size(), 2);
  return id;
}

ReloadReport ReloadUnderLoad(Cluster& cluster, const v1::Job& job, int reloads) {
  ReloadReport report;
  auto channel = grpc::CreateChannel(cluster.grpc_address(), grpc::InsecureChannelCredentials());
  auto models = v1::ModelService::NewStub(channel);
  const auto promote = [&](int checkpoint) { return Promote(cluster, job, checkpoint); };
  const auto load = [&] {
    v1::LoadModelRequest request;
    request.set_model("bars");
    grpc::ClientContext context;
    v1::ModelState response;
    return models->LoadModel(&context, request, &response);
  };
  EXPECT_TRUE(promote(0).ok());
  const int pid = PidOf(cluster);

  Clients clients(cluster.grpc_address(), 2);
  absl::SleepFor(absl::Seconds(1));
  clients.TakeP99();
  absl::SleepFor(absl::Seconds(3));
  report.steady_p99_ms = clients.TakeP99();
  double seconds = 0;
  for (int i = 0; i < reloads; ++i) {
    const absl::Time started = absl::Now();
    const grpc::Status status = i % 3 == 2 ? load() : promote((i % 3 + 1) % 2);
    seconds += absl::ToDoubleSeconds(absl::Now() - started);
    if (!status.ok()) report.errors.push_back(absl::StrCat("reload: ", status.error_message()));
    AwaitVersions(cluster, 1);
    report.memory_mb.push_back(MemoryMb(pid));
  }
  report.reload_p99_ms = clients.TakeP99();
  report.seconds_per_reload = seconds / std::max(1, reloads);
  clients.Stop();
  clients.Report(report);
  report.growth = Growth(report.memory_mb);
  return report;
}

ReloadReport UnloadAndLoad(Cluster& cluster, const v1::Job& job, int rounds) {
  ReloadReport report;
  auto channel = grpc::CreateChannel(cluster.grpc_address(), grpc::InsecureChannelCredentials());
  auto models = v1::ModelService::NewStub(channel);
  auto classification = v1::ClassificationService::NewStub(channel);
  EXPECT_TRUE(Promote(cluster, job, 0).ok());
  const int pid = PidOf(cluster);
  const auto note = [&report](const char* what, const grpc::Status& status) {
    if (!status.ok()) report.errors.push_back(absl::StrCat(what, ": ", status.error_message()));
  };
  const absl::Time started = absl::Now();
  for (int i = 0; i < rounds; ++i) {
    v1::ModelState state;
    v1::UnloadModelRequest unload;
    unload.set_model("bars");
    grpc::ClientContext unloading;
    note("unload", models->UnloadModel(&unloading, unload, &state));
    AwaitVersions(cluster, 0);
    v1::LoadModelRequest load;
    load.set_model("bars");
    grpc::ClientContext loading;
    note("load", models->LoadModel(&loading, load, &state));
    for (int r = 0; r < 20; ++r) {
      grpc::ClientContext context;
      v1::ClassifyResponse response;
      note("classify", classification->Classify(&context, Request(r), &response));
      ++report.answers;
    }
    report.memory_mb.push_back(MemoryMb(pid));
  }
  report.seconds_per_reload = absl::ToDoubleSeconds(absl::Now() - started) / std::max(1, rounds);
  report.growth = Growth(report.memory_mb);
  return report;
}

}  // namespace pyramid::testing
