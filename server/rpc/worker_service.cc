#include "server/rpc/worker_service.h"

#include "proto/base/status.h"
#include "server/rpc/handle.h"

namespace pyramid {
namespace {

constexpr absl::string_view kService = "pyramid.v1.WorkerService";

}  // namespace

grpc::Status WorkerService::Register(grpc::ServerContext*, const v1::RegisterRequest* request,
                                     v1::RegisterResponse* response) {
  return Handle(metrics_, kService, "Register", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, jobs_.Register(*request));
    return absl::OkStatus();
  });
}

grpc::Status WorkerService::Report(grpc::ServerContext*, const v1::ReportRequest* request,
                                   v1::ReportResponse* response) {
  return Handle(metrics_, kService, "Report", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, jobs_.Report(*request));
    return absl::OkStatus();
  });
}

grpc::Status WorkerService::Finish(grpc::ServerContext*, const v1::FinishRequest* request,
                                   v1::FinishResponse* response) {
  return Handle(metrics_, kService, "Finish", [&]() -> absl::Status {
    ASSIGN_OR_RETURN(*response, jobs_.Finish(*request));
    return absl::OkStatus();
  });
}

}  // namespace pyramid
