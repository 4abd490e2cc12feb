#include <gmock/gmock.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/notification.h"
#include "tests/client/client_fixture.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using testing::CommandResult;
using testing::FakeServer;
using ::testing::HasSubstr;
using testing::JobEventOf;
using testing::MakeJob;
using ::testing::Not;
using testing::ProgressEventOf;
using Writer = grpc::ServerWriter<v1::JobEvent>;

class WatchCommandTest : public testing::ClientFixture {};

TEST_F(WatchCommandTest, ShowsProgressAsPlainLinesAndEndsWithTheJob) {
  server_.watch = [](const v1::WatchJobRequest& request, Writer& writer) {
    EXPECT_EQ(request.job_id(), "j-1");
    EXPECT_EQ(request.after_event(), 0);
    EXPECT_TRUE(request.no_logs());
    writer.Write(JobEventOf(1, MakeJob("j-1", v1::RUNNING)));
    writer.Write(ProgressEventOf(1, 100, 1000));
    writer.Write(ProgressEventOf(1, 110, 1000));  // 1 % more: not worth a line
    writer.Write(ProgressEventOf(1, 200, 1000));
    v1::JobEvent saved;
    saved.set_number(2);
    saved.mutable_checkpoint()->set_id("step-00000200");
    saved.mutable_checkpoint()->set_bytes(2'000'000);
    writer.Write(saved);
    v1::Job job = MakeJob("j-1", v1::SUCCEEDED);
    job.mutable_started()->set_seconds(1000);
    job.mutable_ended()->set_seconds(1200);
    writer.Write(JobEventOf(3, job));
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"watch", "j-1"});
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(result.out, "job j-1 SUCCEEDED, top-1 0.8912, 1,234 images/s, 3m20s\n");
  EXPECT_EQ(result.err,
            "RUNNING\n"
            "train epoch 0.50/5 step 100/1000 loss 0.5000\n"
            "train epoch 1.00/5 step 200/1000 loss 0.5000\n"
            "checkpoint step-00000200, 2.0 MB\n"
            "SUCCEEDED\n");
}

TEST_F(WatchCommandTest, RewritesOneLineOnATerminal) {
  server_.watch = [](const v1::WatchJobRequest&, Writer& writer) {
    writer.Write(ProgressEventOf(1, 500, 1000));
    writer.Write(JobEventOf(2, MakeJob("j-1", v1::SUCCEEDED)));
    return grpc::Status::OK;
  };
  environment_.err_is_terminal = true;
  environment_.columns = 100;
  const CommandResult result = Pyramid({"watch", "j-1"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.err, HasSubstr("\r\033[Kepoch 2.5/5 [================="));
}

TEST_F(WatchCommandTest, FailedAndCanceledJobsAreExitCode1) {
  for (const v1::JobState state : {v1::FAILED, v1::CANCELED}) {
    server_.watch = [state](const v1::WatchJobRequest&, Writer& writer) {
      v1::Job job = MakeJob("j-1", state);
      job.set_reason("rank 1 ran out of memory");
      writer.Write(JobEventOf(1, job));
      return grpc::Status::OK;
    };
    const CommandResult result = Pyramid({"watch", "j-1"});
    EXPECT_EQ(result.code, 1);
    EXPECT_THAT(result.out, HasSubstr("rank 1 ran out of memory"));
  }
}

TEST_F(WatchCommandTest, JsonIsOneEventALine) {
  server_.watch = [](const v1::WatchJobRequest&, Writer& writer) {
    writer.Write(ProgressEventOf(1, 500, 1000));
    writer.Write(JobEventOf(2, MakeJob("j-1", v1::SUCCEEDED)));
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"watch", "j-1", "--json"});
  EXPECT_EQ(result.code, 0);
  const std::vector<std::string> lines = absl::StrSplit(result.out, '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(nlohmann::json::parse(lines[0]).at("progress").at("step"), "500");
  EXPECT_EQ(nlohmann::json::parse(lines[1]).at("job").at("state"), "SUCCEEDED");
}

TEST_F(WatchCommandTest, UnknownJobIsExitCode3) {
  server_.watch = [](const v1::WatchJobRequest&, Writer&) {
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no job");
  };
  EXPECT_EQ(Pyramid({"watch", "j-9"}).code, 3);
  EXPECT_EQ(Pyramid({"logs", "j-9"}).code, 3);
}

TEST_F(WatchCommandTest, ServerThatWasNeverThereIsExitCode5AtOnce) {
  server_.Stop();
  EXPECT_EQ(Pyramid({"watch", "j-1"}).code, 5);
}

TEST_F(WatchCommandTest, FollowsAServerThatRestartsOnAnotherPort) {
  use_fake_ = false;  // data/server.json says where
  std::filesystem::create_directory(folder_ / "data");
  const auto write_address = [this](const std::string& address) {
    Write("data/server.json.tmp", absl::StrCat("{\"grpc\": \"", address, "\"}"));
    std::filesystem::rename(folder_ / "data/server.json.tmp", folder_ / "data/server.json");
  };
  write_address(server_.address());
  absl::Notification watched;
  server_.watch = [&](const v1::WatchJobRequest& request, Writer& writer) {
    // The second call comes when the client has read all of the first one's events.
    if (request.after_event() != 0) {
      if (!watched.HasBeenNotified()) watched.Notify();
    } else {
      writer.Write(JobEventOf(1, MakeJob("j-1", v1::RUNNING)));
      writer.Write(ProgressEventOf(4, 100, 1000));
    }
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "shutting down");
  };
  FakeServer second;
  second.watch = [](const v1::WatchJobRequest& request, Writer& writer) {
    EXPECT_EQ(request.after_event(), 4);
    v1::Job job = MakeJob("j-1", v1::SUCCEEDED);
    job.set_restarts(1);
    writer.Write(JobEventOf(5, job));
    return grpc::Status::OK;
  };
  std::thread restart([&] {
    watched.WaitForNotification();
    server_.Stop();
    write_address(second.address());
  });
  const CommandResult result = Pyramid({"watch", "j-1"});
  restart.join();
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("SUCCEEDED"));
  EXPECT_THAT(result.out, HasSubstr("1 restarts"));
  EXPECT_THAT(result.err, AllOf(HasSubstr("lost the server; the job goes on"),
                                HasSubstr("the server is back at " + second.address())));
}

TEST_F(WatchCommandTest, StreamThatEndsBeforeTheJobIsTakenUpAgain) {
  int calls = 0;
  server_.watch = [&](const v1::WatchJobRequest& request, Writer& writer) {
    EXPECT_EQ(request.after_event(), calls);
    ++calls;
    writer.Write(JobEventOf(calls, MakeJob("j-1", calls < 3 ? v1::RUNNING : v1::SUCCEEDED)));
    return grpc::Status::OK;
  };
  EXPECT_EQ(Pyramid({"watch", "j-1"}).code, 0);
  EXPECT_EQ(calls, 3);
}

TEST_F(WatchCommandTest, GivesUpWhenPatienceEnds) {
  server_.watch = [](const v1::WatchJobRequest& request, Writer& writer) {
    if (request.after_event() == 0) writer.Write(JobEventOf(1, MakeJob("j-1", v1::RUNNING)));
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  };
  const CommandResult result = Pyramid({"watch", "j-1", "--patience", "0.3"});
  EXPECT_EQ(result.code, 5);
  EXPECT_THAT(result.err, HasSubstr("draining"));
}

TEST_F(WatchCommandTest, LogsPrintsLinesWithTheirRank) {
  server_.watch = [](const v1::WatchJobRequest& request, Writer& writer) {
    EXPECT_FALSE(request.no_logs());
    EXPECT_TRUE(request.history_only());
    writer.Write(JobEventOf(1, MakeJob("j-1", v1::RUNNING)));
    for (int i = 0; i < 2; ++i) {
      v1::JobEvent event;
      event.set_number(2 + i);
      event.mutable_log()->set_rank(i);
      event.mutable_log()->set_attempt_epoch(7);
      event.mutable_log()->set_text("line\033]0;title");
      writer.Write(event);
    }
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"logs", "j-1"});
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(result.out, "[0] line?]0;title\n[1] line?]0;title\n");
  EXPECT_EQ(result.err, "--- attempt 7\n");
}

TEST_F(WatchCommandTest, LogsFollowsToTheJobsEnd) {
  server_.watch = [](const v1::WatchJobRequest& request, Writer& writer) {
    EXPECT_FALSE(request.history_only());
    v1::JobEvent event;
    event.set_number(1);
    event.mutable_log()->set_text("hello");
    writer.Write(event);
    writer.Write(JobEventOf(2, MakeJob("j-1", v1::FAILED)));
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"logs", "j-1", "--follow"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, AllOf(HasSubstr("[0] hello\n"), Not(HasSubstr("FAILED"))));
}

}  // namespace
}  // namespace pyramid
