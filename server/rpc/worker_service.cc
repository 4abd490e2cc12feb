#include "server/rpc/worker_service.h"

#include "proto/base/status.h"
#include "server/rpc/handle.h"
#include "server/security/grpc_credentials.h"

namespace pyramid {
namespace {

constexpr absl::string_view kService = "pyramid.v1.WorkerService";

}  // namespace

absl::Status WorkerService::CheckToken(const grpc::ServerContext& context,
                                       const v1::WorkerId& worker) const {
  if (access_ == nullptr) return absl::OkStatus();
  return access_->CheckWorker(CredentialsOf(context), worker.job_id(), worker.epoch());
}

grpc::Status WorkerService::Register(grpc::ServerContext* context,
                                     const v1::RegisterRequest* request,
                                     v1::RegisterResponse* response) {
  return Handle(metrics_, kService, "Register", [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckToken(*context, request->worker()));
    ASSIGN_OR_RETURN(*response, jobs_.Register(*request));
    return absl::OkStatus();
  });
}

grpc::Status WorkerService::Report(grpc::ServerContext* context, const v1::ReportRequest* request,
                                   v1::ReportResponse* response) {
  return Handle(metrics_, kService, "Report", [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckToken(*context, request->worker()));
    ASSIGN_OR_RETURN(*response, jobs_.Report(*request));
    return absl::OkStatus();
  });
}

grpc::Status WorkerService::Finish(grpc::ServerContext* context, const v1::FinishRequest* request,
                                   v1::FinishResponse* response) {
  return Handle(metrics_, kService, "Finish", [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckToken(*context, request->worker()));
    ASSIGN_OR_RETURN(*response, jobs_.Finish(*request));
    return absl::OkStatus();
  });
}

}  // namespace pyramid
