// A coordinator for tests: answers a worker's calls, remembers them, gives directives, can vanish
// and come back on another port.
#ifndef PYRAMID_TESTS_WORKER_FAKE_COORDINATOR_H_
#define PYRAMID_TESTS_WORKER_FAKE_COORDINATOR_H_

#include <grpcpp/grpcpp.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/worker.grpc.pb.h"

namespace pyramid::testing {

class FakeCoordinator final : public v1::WorkerService::Service {
 public:
  // Listens on a free loopback port and writes `server_file`.
  explicit FakeCoordinator(std::filesystem::path server_file);
  ~FakeCoordinator() override;

  void Vanish();  // as if killed
  void Return();  // on another port; server.json is rewritten
  void set_directive(v1::Directive directive);
  void set_epoch(int64_t epoch);  // calls with an older one are stale; default 0

  std::string authorization() const;  // of the newest Register call
  std::vector<v1::RegisterRequest> registers() const;
  std::vector<v1::ReportRequest> reports() const;
  std::vector<v1::FinishRequest> finishes() const;

  // Waits until `condition` holds, asked with the reports so far; false after `limit`.
  bool AwaitReport(const std::function<bool(const v1::ReportRequest&)>& condition,
                   absl::Duration limit) const;

 private:
  grpc::Status Register(grpc::ServerContext* context, const v1::RegisterRequest* request,
                        v1::RegisterResponse* response) override;
  grpc::Status Report(grpc::ServerContext*, const v1::ReportRequest* request,
                      v1::ReportResponse* response) override;
  grpc::Status Finish(grpc::ServerContext*, const v1::FinishRequest* request,
                      v1::FinishResponse* response) override;
  grpc::Status Check(const v1::WorkerId& worker) const;

  const std::filesystem::path server_file_;
  std::unique_ptr<grpc::Server> server_;
  mutable absl::Mutex mutex_;
  v1::Directive directive_ = v1::GO_ON;
  int64_t epoch_ = 0;
  std::string authorization_;
  std::vector<v1::RegisterRequest> registers_;
  std::vector<v1::ReportRequest> reports_;
  std::vector<v1::FinishRequest> finishes_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_WORKER_FAKE_COORDINATOR_H_
