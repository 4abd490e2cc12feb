#include "tests/integration/cluster.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <signal.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "tests/testing/idx_data.h"

namespace pyramid::testing {

std::string Program(const std::string& name) {
  return std::string(PYRAMID_BINARY_DIR) + "/bin/" + name;
}

std::string HttpGet(const std::string& address, const std::string& path, int* status) {
  httplib::Client client("http://" + address);
  client.set_read_timeout(10);
  auto result = client.Get(path.c_str());
  if (status != nullptr) *status = result ? result->status : 0;
  return result ? result->body : "";
}

Cluster::Cluster() = default;

Cluster::~Cluster() {
  if (server_ != nullptr && server_->Running()) {
    server_->Signal(SIGTERM);
    server_->Wait(absl::Seconds(45));
  }
  // Workers outlive a killed server by design; none may outlive the test.
  for (const int pid : WorkerPids(data().string())) kill(pid, SIGKILL);
  if (::testing::Test::HasFailure())
    std::fprintf(stderr, "--- server log ---\n%s\n", ServerLog().c_str());
}

std::vector<std::string> Cluster::ServerCommand() const {
  std::vector<std::string> command = {
      Program("pyramid-server"), "--data", data().string(), "--grpc-port", "0", "--http-port", "0",
      "--metrics-port",          "0"};
  command.insert(command.end(), flags_.begin(), flags_.end());
  return command;
}

std::shared_ptr<grpc::Channel> Cluster::Channel(const ChannelSecurity& security) {
  grpc::ChannelArguments arguments;
  arguments.SetInt("test.channel", ++channels_);  // or gRPC would share a connection
  arguments.SetMaxReceiveMessageSize(64 << 20);
  auto channel = OpenChannel(grpc_address_, security, arguments);
  EXPECT_TRUE(channel.ok()) << channel.status();
  return *channel;
}

void Cluster::Signal(int signal) { server_->Signal(signal); }

RunResult Cluster::Wait(absl::Duration limit) { return server_->Wait(limit); }

void Cluster::Start() {
  std::error_code ignored;
  std::filesystem::remove(data() / "server.json", ignored);
  const std::filesystem::path log = folder_ / absl::StrCat("server", ++starts_);
  std::vector<std::string> command = ServerCommand();
  if (std::filesystem::exists(folder_ / "server.yaml")) {
    command.push_back("--config");
    command.push_back((folder_ / "server.yaml").string());
  }
  server_ = std::make_unique<Process>(command, log);
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  while (absl::Now() < deadline && server_->Running()) {
    if (absl::StatusOr<std::string> text = ReadFile(data() / "server.json"); text.ok()) {
      const nlohmann::json json = nlohmann::json::parse(*text, nullptr, false);
      ASSERT_FALSE(json.is_discarded()) << *text;
      grpc_address_ = json.at("grpc");
      http_address_ = json.at("http");
      metrics_address_ = json.at("metrics");
      const auto channel = Channel(security_);
      training_ = v1::TrainingService::NewStub(channel);
      classification_ = v1::ClassificationService::NewStub(channel);
      ASSERT_TRUE(
          channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(10)));
      return;
    }
    absl::SleepFor(absl::Milliseconds(20));
  }
  FAIL() << "the server didn't start: " << ServerLog();
}

void Cluster::Kill() {
  server_->Signal(SIGKILL);
  server_->Wait(absl::Seconds(10));
}

RunResult Cluster::Stop(absl::Duration limit) {
  server_->Signal(SIGTERM);
  return server_->Wait(limit);
}

std::string Cluster::ServerLog() const {
  std::string all;
  for (int i = 1; i <= starts_; ++i) {
    if (auto text = ReadFile(folder_.path() / absl::StrCat("server", i, ".err")); text.ok())
      all += *text;
  }
  return all;
}

std::filesystem::path Cluster::SmallData() {
  const std::filesystem::path folder = folder_ / "idx";
  if (!std::filesystem::exists(folder)) WriteIdxFolder(folder, 640, 100);
  return folder;
}

std::string Cluster::SmallRecipe(const std::string& extra) {
  return absl::StrCat(
      "model: pvt_v2_b0\ndataset: fashion_mnist\ndata_dir: ", SmallData().string(),
      "\nin_channels: 1\nnum_classes: 10\nimage_resize: 32\nimage_pad: 32\ncolor_jitter: 0\n"
      "interpolation: bicubic\nhflip: 0\nworkers: 2\ndistribute: true\nbatch_size: 16\n"
      "opt: adamw\nlr: 0.001\nweight_decay: 0.05\nwarmup_epochs: 1\nlog_interval: 5\n",
      extra);
}

std::string Cluster::Submit(const std::string& recipe, const std::vector<std::string>& overrides) {
  grpc::ClientContext context;
  v1::SubmitJobRequest request;
  v1::SubmitJobResponse response;
  request.set_recipe(recipe);
  for (const std::string& override_text : overrides) request.add_overrides(override_text);
  const grpc::Status status = training_->SubmitJob(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.job().id();
}

v1::Job Cluster::Get(const std::string& id) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  v1::GetJobRequest request;
  v1::Job job;
  request.set_job_id(id);
  const grpc::Status status = training_->GetJob(&context, request, &job);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return job;
}

v1::Job Cluster::WaitFor(const std::string& id,
                         const std::function<bool(const v1::Job&)>& condition,
                         absl::Duration limit) {
  const absl::Time deadline = absl::Now() + limit;
  v1::Job job = Get(id);
  while (!condition(job)) {
    if (job.id().empty()) return job;  // Get has said why
    if (absl::Now() > deadline) {
      ADD_FAILURE() << "waited " << limit << " in vain; the job is\n" << job.DebugString();
      return job;
    }
    absl::SleepFor(absl::Milliseconds(50));
    job = Get(id);
  }
  return job;
}

v1::Job Cluster::WaitForEnd(const std::string& id, absl::Duration limit) {
  return WaitFor(
      id, [](const v1::Job& job) { return job.state() >= v1::SUCCEEDED; }, limit);
}

v1::Job Cluster::WaitForStep(const std::string& id, int64_t step, absl::Duration limit) {
  return WaitFor(
      id,
      [step](const v1::Job& job) {
        return job.progress().step() >= step || job.state() >= v1::SUCCEEDED;
      },
      limit);
}

RunResult Cluster::Cli(std::vector<std::string> arguments, absl::Duration limit) {
  Process::Options options;
  options.environment = environment_;
  options.environment.try_emplace("PYRAMID_SERVER", grpc_address_);
  options.folder = folder_.path();
  arguments.insert(arguments.begin(), Program("pyramid"));
  return Process(std::move(arguments), folder_ / absl::StrCat("cli", ++runs_), options).Wait(limit);
}

std::vector<int> Cluster::WorkerPids(const std::string& marker) {
  std::vector<int> pids;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    int pid = 0;
    std::stringstream(entry.path().filename().string()) >> pid;
    if (pid == 0) continue;
    std::ifstream in(entry.path() / "cmdline", std::ios::binary);
    std::stringstream text;
    text << in.rdbuf();
    if (absl::StrContains(text.str(), "pyramid-worker") && absl::StrContains(text.str(), marker))
      pids.push_back(pid);
  }
  return pids;
}

}  // namespace pyramid::testing
