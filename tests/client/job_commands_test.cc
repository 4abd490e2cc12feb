// jobs, job, cancel, promote, models: one call each.
#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "tests/client/client_fixture.h"

namespace pyramid {
namespace {

using testing::CommandResult;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class JobCommandsTest : public testing::ClientFixture {};

const grpc::Status kNoJob(grpc::StatusCode::NOT_FOUND, "no job \"j-9\"");

TEST_F(JobCommandsTest, JobsAreATable) {
  server_.list = [](const v1::ListJobsRequest&, v1::ListJobsResponse& response) {
    *response.add_jobs() = testing::MakeJob("j-2", v1::RUNNING);
    v1::Job& queued = *response.add_jobs();
    queued.set_id("j-1");
    queued.set_state(v1::QUEUED);
    queued.set_reason("waits for 2 cpu devices");
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"jobs"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, HasSubstr("JOB  NAME   STATE    EPOCH    LOSS   TOP-1  IMAGES/S"));
  EXPECT_THAT(result.out, HasSubstr("j-2  first  RUNNING  2.5/5  0.4321  0.8912     1,234  20"));
  EXPECT_THAT(result.out, HasSubstr("waits for 2 cpu devices\n"));
}

TEST_F(JobCommandsTest, JobsCanBeChosenByState) {
  v1::ListJobsRequest seen;
  server_.list = [&](const v1::ListJobsRequest& request, v1::ListJobsResponse&) {
    seen = request;
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"jobs", "--state", "running", "QUEUED", "--json"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(seen.states(), ElementsAre(v1::RUNNING, v1::QUEUED));
  EXPECT_TRUE(nlohmann::json::parse(result.out).at("jobs").empty());
  EXPECT_EQ(Pyramid({"jobs"}).err, "no jobs\n");
  const CommandResult wrong = Pyramid({"jobs", "--state", "runing"});
  EXPECT_EQ(wrong.code, 2);
  EXPECT_THAT(wrong.err, HasSubstr("did you mean RUNNING?"));
}

TEST_F(JobCommandsTest, JobShowsAttemptsAndCheckpoints) {
  server_.get = [](const v1::GetJobRequest& request, v1::Job& job) {
    EXPECT_EQ(request.job_id(), "j-1");
    job = testing::MakeJob("j-1", v1::RUNNING);
    job.set_restarts(1);
    v1::Attempt& attempt = *job.add_attempts();
    attempt.set_epoch(7);
    attempt.mutable_started()->set_seconds(1'700'000'000);
    attempt.mutable_ended()->set_seconds(1'700'000'100);
    attempt.set_failure(v1::WORKER_LOST);
    attempt.set_cause("rank 1 was killed");
    v1::WorkerExit& worker = *attempt.add_workers();
    worker.set_rank(1);
    worker.set_exited(true);
    worker.set_signal(9);
    worker.add_last_lines("last words\033[2J");
    v1::Checkpoint& checkpoint = *job.add_checkpoints();
    checkpoint.set_id("step-00000940");
    checkpoint.set_epochs_done(2);
    checkpoint.set_bytes(14'300'000);
    checkpoint.set_validated(true);
    checkpoint.set_val_top1(0.8912);
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"job", "j-1"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, HasSubstr("state      RUNNING\n"));
  EXPECT_THAT(result.out, HasSubstr("restarts   1 of at most 3\n"));
  EXPECT_THAT(result.out, HasSubstr("WORKER_LOST: rank 1 was killed\n"));
  EXPECT_THAT(result.out, HasSubstr("rank 1 ended by signal 9\n"));
  EXPECT_THAT(result.out, HasSubstr("| last words?[2J\n"));
  EXPECT_THAT(result.out, HasSubstr("step-00000940       2  0.8912  14.3 MB"));
  const nlohmann::json json = nlohmann::json::parse(Pyramid({"job", "j-1", "--json"}).out);
  EXPECT_EQ(json.at("state"), "RUNNING");
  EXPECT_EQ(json.at("attempts").at(0).at("failure"), "WORKER_LOST");
  EXPECT_EQ(json.at("progress").at("images_per_second"), 1234);
}

TEST_F(JobCommandsTest, UnknownJobIsExitCode3) {
  server_.get = [](const v1::GetJobRequest&, v1::Job&) { return kNoJob; };
  server_.cancel = [](const v1::CancelJobRequest&, v1::Job&) { return kNoJob; };
  EXPECT_EQ(Pyramid({"job", "j-9"}).code, 3);
  EXPECT_EQ(Pyramid({"cancel", "j-9"}).code, 3);
  EXPECT_EQ(Pyramid({"job", "j-9"}).err, "pyramid: no job \"j-9\"\n");
}

TEST_F(JobCommandsTest, CancelSendsTheReason) {
  v1::CancelJobRequest seen;
  server_.cancel = [&](const v1::CancelJobRequest& request, v1::Job& job) {
    seen = request;
    job = testing::MakeJob("j-1", v1::STOPPING);
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"cancel", "j-1", "--reason", "wrong data"});
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(result.out, "job j-1 STOPPING\n");
  EXPECT_EQ(seen.reason(), "wrong data");
}

TEST_F(JobCommandsTest, SaveSaysWhereTheJobWas) {
  server_.save = [](const v1::SaveCheckpointRequest& request, v1::Job& job) {
    job = testing::MakeJob(request.job_id(), v1::RUNNING);
    job.mutable_progress()->set_step(17);
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"save", "j-1"});
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(result.out, "job j-1 saves at its next step; it was at step 17\n");
  server_.save = [](const v1::SaveCheckpointRequest&, v1::Job&) {
    return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "j-1 is QUEUED");
  };
  EXPECT_EQ(Pyramid({"save", "j-1"}).code, 4);
}

TEST_F(JobCommandsTest, CancelOfAnEndedJobIsRefused) {
  server_.cancel = [](const v1::CancelJobRequest&, v1::Job&) {
    return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "job j-1 has ended");
  };
  EXPECT_EQ(Pyramid({"cancel", "j-1"}).code, 4);
}

TEST_F(JobCommandsTest, PromoteNamesJobCheckpointModelAndDtype) {
  v1::PromoteCheckpointRequest seen;
  server_.promote = [&](const v1::PromoteCheckpointRequest& request,
                        v1::PromoteCheckpointResponse& response) {
    seen = request;
    response.set_model(request.model());
    response.set_version(2);
    response.set_digest("sha256:abc");
    response.add_gates("self-test: max error 1e-6, wanted 1e-4");
    return grpc::Status::OK;
  };
  const CommandResult result =
      Pyramid({"promote", "j-1:step-00000940", "--as", "fashion", "--dtype", "bf16"});
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(result.out,
            "model fashion version 2 in service, sha256:abc\n"
            "  self-test: max error 1e-6, wanted 1e-4\n");
  EXPECT_EQ(seen.job_id(), "j-1");
  EXPECT_EQ(seen.checkpoint_id(), "step-00000940");
  EXPECT_EQ(seen.dtype(), "bf16");
  EXPECT_EQ(Pyramid({"promote", "j-1", "--as", "fashion"}).code, 0);
  EXPECT_EQ(seen.checkpoint_id(), "");
  EXPECT_EQ(seen.dtype(), "");
}

TEST_F(JobCommandsTest, PromoteChecksItsWords) {
  EXPECT_EQ(Pyramid({"promote", "j-1"}).code, 2);
  EXPECT_EQ(Pyramid({"promote", "j-1:", "--as", "x"}).code, 2);
  EXPECT_EQ(Pyramid({"promote", ":step-1", "--as", "x"}).code, 2);
  EXPECT_EQ(Pyramid({"promote", "j-1", "--as", "x", "--dtype", "int8"}).code, 2);
}

TEST_F(JobCommandsTest, PromoteFailuresKeepTheirMeaning) {
  const auto refuse = [this](grpc::StatusCode code) {
    server_.promote = [code](const v1::PromoteCheckpointRequest&, v1::PromoteCheckpointResponse&) {
      return grpc::Status(code, "no");
    };
    return Pyramid({"promote", "j-1", "--as", "x"}).code;
  };
  EXPECT_EQ(refuse(grpc::StatusCode::FAILED_PRECONDITION), 4);
  EXPECT_EQ(refuse(grpc::StatusCode::NOT_FOUND), 3);
  EXPECT_EQ(refuse(grpc::StatusCode::DATA_LOSS), 1);
}

TEST_F(JobCommandsTest, ModelsAreATable) {
  server_.models = [](v1::ListModelsResponse& response) {
    *response.add_models() = testing::MakeModel("fashion", 1, 10, false);
    *response.add_models() = testing::MakeModel("fashion", 2, 10);
    response.set_max_pictures(256);
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"models"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, HasSubstr("fashion        2  stable   pvt_v2_b0       10  1x32x32"));
  EXPECT_THAT(result.out, HasSubstr("sha256:0123456789ab\n"));
  const nlohmann::json json = nlohmann::json::parse(Pyramid({"models", "--json"}).out);
  EXPECT_EQ(json.at("models").size(), 2u);
  EXPECT_EQ(json.at("max_pictures"), 256);
}

TEST_F(JobCommandsTest, NoModelsSaysHowToGetOne) {
  server_.models = [](v1::ListModelsResponse&) { return grpc::Status::OK; };
  EXPECT_THAT(Pyramid({"models"}).err, HasSubstr("pyramid promote"));
}

TEST_F(JobCommandsTest, OtherServersAreRecognised) {
  const CommandResult result = Pyramid({"models"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("doesn't know this call"));
}

}  // namespace
}  // namespace pyramid
