// A real pyramid-server on free loopback ports with a folder of its own, and stubs to talk to it.
#ifndef PYRAMID_TESTS_INTEGRATION_CLUSTER_H_
#define PYRAMID_TESTS_INTEGRATION_CLUSTER_H_

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "proto/base/channel.h"
#include "proto/classification.grpc.pb.h"
#include "proto/training.grpc.pb.h"
#include "tests/testing/process.h"
#include "tests/testing/temp_folder.h"

namespace pyramid::testing {

class Cluster {
 public:
  Cluster();
  ~Cluster();

  // Starts the server and waits until it answers. Fails the test otherwise. May be called again
  // after Kill or Stop.
  void Start();
  // Set before Start: flags of the server beside those of its ports (by default it drains without
  // delay), what stubs and command lines show to it, and their environment.
  std::vector<std::string>& flags() { return flags_; }
  ChannelSecurity& security() { return security_; }
  std::map<std::string, std::string>& environment() { return environment_; }

  // SIGKILL.
  void Kill();
  void Signal(int signal);
  RunResult Wait(absl::Duration limit);
  // SIGTERM, then waits; the result is checked by the caller.
  RunResult Stop(absl::Duration limit = absl::Seconds(60));

  std::filesystem::path data() const { return folder_ / "data"; }
  std::filesystem::path folder() const { return folder_.path(); }
  const std::string& grpc_address() const { return grpc_address_; }
  const std::string& http_address() const { return http_address_; }
  const std::string& metrics_address() const { return metrics_address_; }
  std::string ServerLog() const;
  // Another channel to the server, with what `security` shows. Not shared with others.
  std::shared_ptr<grpc::Channel> Channel(const ChannelSecurity& security);
  std::vector<std::string> ServerCommand() const;

  v1::TrainingService::Stub& training() { return *training_; }
  v1::ClassificationService::Stub& classification() { return *classification_; }

  // The recipe of a small job on made-up data (written on first use): 32x32, b0, 10 classes.
  std::string SmallRecipe(const std::string& extra = "");
  std::filesystem::path SmallData();

  // Submits and returns the job's id; empty and a failed expectation otherwise.
  std::string Submit(const std::string& recipe, const std::vector<std::string>& overrides = {});
  v1::Job Get(const std::string& id);
  // Polls until `condition` holds; the last seen job. Fails the test when `limit` passes.
  v1::Job WaitFor(const std::string& id, const std::function<bool(const v1::Job&)>& condition,
                  absl::Duration limit);
  v1::Job WaitForEnd(const std::string& id, absl::Duration limit = absl::Seconds(120));
  // Progress reported, and at least `step`.
  v1::Job WaitForStep(const std::string& id, int64_t step,
                      absl::Duration limit = absl::Seconds(60));

  // Runs `pyramid ARGUMENTS…` against this server.
  RunResult Cli(std::vector<std::string> arguments, absl::Duration limit = absl::Seconds(60));

  // PIDs of live workers of the job, from their command lines.
  static std::vector<int> WorkerPids(const std::string& marker);

 private:
  TempFolder folder_;
  std::unique_ptr<Process> server_;
  std::vector<std::string> flags_ = {"--drain-delay", "0s"};
  ChannelSecurity security_;
  std::map<std::string, std::string> environment_;
  int starts_ = 0;
  int channels_ = 0;
  int runs_ = 0;
  std::string grpc_address_;
  std::string http_address_;
  std::string metrics_address_;
  std::unique_ptr<v1::TrainingService::Stub> training_;
  std::unique_ptr<v1::ClassificationService::Stub> classification_;
};

std::string Program(const std::string& name);  // path of one of our programs

// GET over HTTP/1.1 on loopback; the body, empty on failure. `status` receives the code.
std::string HttpGet(const std::string& address, const std::string& path, int* status = nullptr);

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_INTEGRATION_CLUSTER_H_
