#include "tests/client/fake_server.h"

#include <chrono>

#include "absl/strings/str_cat.h"

namespace pyramid::testing {

FakeServer::FakeServer() {
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(static_cast<v1::TrainingService::Service*>(this));
  builder.RegisterService(static_cast<v1::ClassificationService::Service*>(this));
  builder.RegisterService(static_cast<v1::ModelService::Service*>(this));
  server_ = builder.BuildAndStart();
  address_ = absl::StrCat("127.0.0.1:", port);
}

FakeServer::~FakeServer() { Stop(); }

void FakeServer::Stop() {
  if (server_ == nullptr) return;
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
  server_.reset();
}

v1::Job MakeJob(const std::string& id, v1::JobState state) {
  v1::Job job;
  job.set_id(id);
  job.set_name("first");
  job.set_state(state);
  job.set_workers(2);
  job.set_device("cpu");
  job.set_max_restarts(3);
  job.mutable_submitted()->set_seconds(1'700'000'000);
  v1::Progress& progress = *job.mutable_progress();
  progress.set_phase("train");
  progress.set_step(940);
  progress.set_steps(1880);
  progress.set_epoch(2.5);
  progress.set_epochs(5);
  progress.set_loss(0.4321);
  progress.set_images_per_second(1234);
  progress.set_validated(true);
  progress.set_val_top1(0.8912);
  return job;
}

v1::JobEvent JobEventOf(int64_t number, const v1::Job& job) {
  v1::JobEvent event;
  event.set_number(number);
  *event.mutable_job() = job;
  return event;
}

v1::JobEvent ProgressEventOf(int64_t number, int64_t step, int64_t steps) {
  v1::JobEvent event;
  event.set_number(number);
  v1::Progress& progress = *event.mutable_progress();
  progress.set_phase("train");
  progress.set_step(step);
  progress.set_steps(steps);
  progress.set_epochs(5);
  progress.set_epoch(5.0 * static_cast<double>(step) / static_cast<double>(steps));
  progress.set_loss(0.5);
  return event;
}

v1::ModelVersion MakeModel(const std::string& name, int64_t version, int classes, bool serving) {
  v1::ModelVersion model;
  model.set_name(name);
  model.set_version(version);
  model.set_serving(serving);
  model.set_digest("sha256:0123456789abcdef0123456789abcdef");
  model.mutable_network()->set_variant("pvt_v2_b0");
  model.mutable_network()->set_num_classes(classes);
  model.mutable_network()->set_in_channels(1);
  model.mutable_preprocessing()->set_crop(32);
  model.mutable_created()->set_seconds(1'700'000'000);
  return model;
}

}  // namespace pyramid::testing
