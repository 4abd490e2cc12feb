#include "tests/worker/fake_coordinator.h"

#include <algorithm>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"

namespace pyramid::testing {

FakeCoordinator::FakeCoordinator(std::filesystem::path server_file)
    : server_file_(std::move(server_file)) {
  Return();
}

FakeCoordinator::~FakeCoordinator() { Vanish(); }

void FakeCoordinator::Vanish() {
  if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  server_ = nullptr;
}

void FakeCoordinator::Return() {
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  if (server_ == nullptr ||
      !WriteFileAtomically(server_file_, absl::StrCat("{\"grpc\": \"127.0.0.1:", port, "\"}")).ok())
    std::abort();
}

void FakeCoordinator::set_directive(v1::Directive directive) {
  absl::MutexLock lock(&mutex_);
  directive_ = directive;
}
void FakeCoordinator::set_epoch(int64_t epoch) {
  absl::MutexLock lock(&mutex_);
  epoch_ = epoch;
}
std::string FakeCoordinator::authorization() const {
  absl::MutexLock lock(&mutex_);
  return authorization_;
}
std::vector<v1::RegisterRequest> FakeCoordinator::registers() const {
  absl::MutexLock lock(&mutex_);
  return registers_;
}
std::vector<v1::ReportRequest> FakeCoordinator::reports() const {
  absl::MutexLock lock(&mutex_);
  return reports_;
}
std::vector<v1::FinishRequest> FakeCoordinator::finishes() const {
  absl::MutexLock lock(&mutex_);
  return finishes_;
}

bool FakeCoordinator::AwaitReport(const std::function<bool(const v1::ReportRequest&)>& condition,
                                  absl::Duration limit) const {
  const absl::Time deadline = absl::Now() + limit;
  while (absl::Now() < deadline) {
    const std::vector<v1::ReportRequest> all = reports();
    if (std::any_of(all.begin(), all.end(), condition)) return true;
    absl::SleepFor(absl::Milliseconds(10));
  }
  return false;
}

grpc::Status FakeCoordinator::Check(const v1::WorkerId& worker) const {
  if (worker.epoch() >= epoch_) return grpc::Status::OK;
  return {grpc::StatusCode::FAILED_PRECONDITION,
          absl::StrCat("epoch ", worker.epoch(), " is over, now ", epoch_)};
}

grpc::Status FakeCoordinator::Register(grpc::ServerContext* context,
                                       const v1::RegisterRequest* request,
                                       v1::RegisterResponse* response) {
  absl::MutexLock lock(&mutex_);
  const auto shown = context->client_metadata().find("authorization");
  authorization_ = shown == context->client_metadata().end()
                       ? ""
                       : std::string(shown->second.data(), shown->second.size());
  registers_.push_back(*request);
  response->set_directive(v1::GO_ON);
  return Check(request->worker());
}

grpc::Status FakeCoordinator::Report(grpc::ServerContext*, const v1::ReportRequest* request,
                                     v1::ReportResponse* response) {
  absl::MutexLock lock(&mutex_);
  reports_.push_back(*request);
  response->set_directive(directive_);
  return Check(request->worker());
}

grpc::Status FakeCoordinator::Finish(grpc::ServerContext*, const v1::FinishRequest* request,
                                     v1::FinishResponse*) {
  absl::MutexLock lock(&mutex_);
  finishes_.push_back(*request);
  return Check(request->worker());
}

}  // namespace pyramid::testing
