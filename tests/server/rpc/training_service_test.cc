#include "server/rpc/training_service.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/grpc_status.h"
#include "tests/server/rpc/training_server.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TrainingServer;
using ::testing::HasSubstr;

class TrainingServiceTest : public ::testing::Test {
 protected:
  template <typename Request, typename Response, typename Method>
  absl::Status Call(Method method, const Request& request, Response* response) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    return FromGrpc(((*stub_).*method)(&context, request, response));
  }
  v1::Job Submit() {
    v1::SubmitJobRequest request;
    request.set_recipe(server_.Recipe());
    v1::SubmitJobResponse response;
    EXPECT_OK(Call(&v1::TrainingService::Stub::SubmitJob, request, &response));
    return response.job();
  }
  TrainingServer server_;
  std::unique_ptr<v1::TrainingService::Stub> stub_ =
      v1::TrainingService::NewStub(server_.channel());
};

TEST_F(TrainingServiceTest, SubmitsGetsAndLists) {
  const v1::Job job = Submit();
  EXPECT_EQ(job.state(), v1::QUEUED);
  v1::GetJobRequest get;
  get.set_job_id(job.id());
  v1::Job got;
  EXPECT_OK(Call(&v1::TrainingService::Stub::GetJob, get, &got));
  EXPECT_EQ(got.id(), job.id());
  v1::ListJobsResponse list;
  EXPECT_OK(Call(&v1::TrainingService::Stub::ListJobs, v1::ListJobsRequest(), &list));
  EXPECT_EQ(list.jobs_size(), 1);
}

TEST_F(TrainingServiceTest, ErrorsKeepTheirCodesAndTexts) {
  v1::SubmitJobRequest submit;
  submit.set_recipe("epoch_sise: 3");
  v1::SubmitJobResponse submitted;
  EXPECT_THAT(Call(&v1::TrainingService::Stub::SubmitJob, submit, &submitted),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean epoch_size")));
  submit.set_recipe(server_.Recipe());
  submit.set_request_id("r");
  EXPECT_OK(Call(&v1::TrainingService::Stub::SubmitJob, submit, &submitted));
  submit.set_name("other");
  EXPECT_THAT(Call(&v1::TrainingService::Stub::SubmitJob, submit, &submitted),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("\"r\"")));
  v1::Job job;
  v1::GetJobRequest get;
  get.set_job_id("j-000077");
  EXPECT_THAT(Call(&v1::TrainingService::Stub::GetJob, get, &job),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("j-000077")));
}

TEST_F(TrainingServiceTest, CancelsOnce) {
  v1::CancelJobRequest cancel;
  cancel.set_job_id(Submit().id());
  v1::Job job;
  EXPECT_OK(Call(&v1::TrainingService::Stub::CancelJob, cancel, &job));
  EXPECT_EQ(job.state(), v1::CANCELED);
  EXPECT_THAT(Call(&v1::TrainingService::Stub::CancelJob, cancel, &job),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("has ended")));
}

TEST_F(TrainingServiceTest, AWatchEndsWithTheJob) {
  const v1::Job job = Submit();
  v1::WatchJobRequest request;
  request.set_job_id(job.id());
  grpc::ClientContext context;
  const auto reader = stub_->WatchJob(&context, request);
  v1::JobEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.job().state(), v1::QUEUED);
  v1::CancelJobRequest cancel;
  cancel.set_job_id(job.id());
  v1::Job canceled;
  ASSERT_OK(Call(&v1::TrainingService::Stub::CancelJob, cancel, &canceled));
  v1::JobState last = v1::QUEUED;
  int events = 1;
  for (; reader->Read(&event); ++events) last = event.job().state();
  EXPECT_OK(FromGrpc(reader->Finish()));
  EXPECT_EQ(last, v1::CANCELED);
  EXPECT_EQ(server_.Sent("WatchJob"), events);
}

TEST_F(TrainingServiceTest, AWatchOfAnUnknownJobIsNotFound) {
  v1::WatchJobRequest request;
  request.set_job_id("j-000077");
  grpc::ClientContext context;
  const auto reader = stub_->WatchJob(&context, request);
  v1::JobEvent event;
  EXPECT_FALSE(reader->Read(&event));
  EXPECT_THAT(FromGrpc(reader->Finish()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("j-000077")));
}

TEST_F(TrainingServiceTest, AWatchEndsSoonAfterItsClientHasGone) {
  v1::WatchJobRequest request;
  request.set_job_id(Submit().id());
  grpc::ClientContext context;
  const auto reader = stub_->WatchJob(&context, request);
  v1::JobEvent event;
  ASSERT_TRUE(reader->Read(&event));
  context.TryCancel();
  EXPECT_THAT(FromGrpc(reader->Finish()), StatusIs(absl::StatusCode::kCancelled, HasSubstr("")));
  // The handler's end is counted, so it has ended.
  for (int i = 0; i < 500 && server_.Handled("WatchJob", "Canceled") == 0; ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_EQ(server_.Handled("WatchJob", "Canceled"), 1);
}

TEST_F(TrainingServiceTest, DrainingEndsWatchesWithUnavailable) {
  v1::WatchJobRequest request;
  request.set_job_id(Submit().id());
  grpc::ClientContext context;
  const auto reader = stub_->WatchJob(&context, request);
  v1::JobEvent event;
  ASSERT_TRUE(reader->Read(&event));
  server_.manager().Drain(absl::Milliseconds(50));
  while (reader->Read(&event)) {
  }
  EXPECT_THAT(FromGrpc(reader->Finish()),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("stopping")));
}

TEST_F(TrainingServiceTest, PromotesTheCheckpointsFolder) {
  const std::string id = server_.JobWithCheckpoint("step-00000010");
  v1::PromoteCheckpointRequest request;
  request.set_job_id(id);
  request.set_model("clothes");
  v1::PromoteCheckpointResponse response;
  ASSERT_OK(Call(&v1::TrainingService::Stub::PromoteCheckpoint, request, &response));
  EXPECT_EQ(response.model(), "clothes");
  EXPECT_EQ(server_.promoted().filename(), "step-00000010");
  request.set_checkpoint_id("step-00000011");
  EXPECT_THAT(Call(&v1::TrainingService::Stub::PromoteCheckpoint, request, &response),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("step-00000011")));
  request.set_job_id("j-000077");
  EXPECT_THAT(Call(&v1::TrainingService::Stub::PromoteCheckpoint, request, &response),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("j-000077")));
}

TEST_F(TrainingServiceTest, PromotionOfAJobWithoutCheckpointIsRefusedAndServingsErrorsComeThrough) {
  v1::PromoteCheckpointRequest request;
  request.set_job_id(Submit().id());
  request.set_model("clothes");
  v1::PromoteCheckpointResponse response;
  EXPECT_THAT(Call(&v1::TrainingService::Stub::PromoteCheckpoint, request, &response),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no checkpoint yet")));
  request.set_job_id(server_.JobWithCheckpoint("step-00000010"));
  server_.set_promote_error(absl::DataLossError("weights.safetensors is damaged"));
  EXPECT_THAT(Call(&v1::TrainingService::Stub::PromoteCheckpoint, request, &response),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("damaged")));
}

TEST_F(TrainingServiceTest, CallsAreCountedByCode) {
  Submit();
  v1::GetJobRequest get;
  get.set_job_id("nope");
  v1::Job job;
  EXPECT_FALSE(Call(&v1::TrainingService::Stub::GetJob, get, &job).ok());
  EXPECT_EQ(server_.Handled("SubmitJob", "OK"), 1);
  EXPECT_EQ(server_.Handled("GetJob", "NotFound"), 1);
}

}  // namespace
}  // namespace pyramid
