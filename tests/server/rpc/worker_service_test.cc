#include "server/rpc/worker_service.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include "proto/base/grpc_status.h"
#include "tests/server/rpc/training_server.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TrainingServer;
using ::testing::HasSubstr;

class WorkerServiceTest : public ::testing::Test {
 protected:
  template <typename Request, typename Response, typename Method>
  absl::Status Call(Method method, const Request& request, Response* response) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    return FromGrpc(((*stub_).*method)(&context, request, response));
  }
  template <typename Request>
  static Request Of(const std::string& id, int64_t epoch) {
    Request request;
    request.mutable_worker()->set_job_id(id);
    request.mutable_worker()->set_epoch(epoch);
    return request;
  }
  TrainingServer server_;
  std::unique_ptr<v1::WorkerService::Stub> stub_ = v1::WorkerService::NewStub(server_.channel());
};

TEST_F(WorkerServiceTest, AWorkerRegistersReportsAndFinishes) {
  const auto [id, epoch] = server_.LaunchedJob();
  v1::RegisterResponse registered;
  ASSERT_OK(
      Call(&v1::WorkerService::Stub::Register, Of<v1::RegisterRequest>(id, epoch), &registered));
  EXPECT_EQ(registered.directive(), v1::GO_ON);
  auto report = Of<v1::ReportRequest>(id, epoch);
  report.set_sequence(1);
  report.mutable_progress()->set_step(3);
  v1::ReportResponse reported;
  ASSERT_OK(Call(&v1::WorkerService::Stub::Report, report, &reported));
  EXPECT_EQ(reported.directive(), v1::GO_ON);
  EXPECT_EQ(server_.manager().Get(id)->progress().step(), 3);

  v1::CancelJobRequest cancel;
  cancel.set_job_id(id);
  ASSERT_OK(server_.manager().Cancel(cancel));
  report.set_sequence(2);
  ASSERT_OK(Call(&v1::WorkerService::Stub::Report, report, &reported));
  EXPECT_EQ(reported.directive(), v1::STOP);

  auto finish = Of<v1::FinishRequest>(id, epoch);
  finish.set_stopped(true);
  v1::FinishResponse finished;
  ASSERT_OK(Call(&v1::WorkerService::Stub::Finish, finish, &finished));
}

TEST_F(WorkerServiceTest, AnOlderEpochIsRefusedInEveryCall) {
  const auto [id, epoch] = server_.LaunchedJob();
  v1::RegisterResponse registered;
  v1::ReportResponse reported;
  v1::FinishResponse finished;
  EXPECT_THAT(
      Call(&v1::WorkerService::Stub::Register, Of<v1::RegisterRequest>(id, epoch - 1), &registered),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("must exit")));
  EXPECT_THAT(
      Call(&v1::WorkerService::Stub::Report, Of<v1::ReportRequest>(id, epoch - 1), &reported),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("must exit")));
  EXPECT_THAT(
      Call(&v1::WorkerService::Stub::Finish, Of<v1::FinishRequest>(id, epoch - 1), &finished),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("must exit")));
}

}  // namespace
}  // namespace pyramid
