#include "worker/coordinator_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"
#include "tests/worker/fake_coordinator.h"

namespace pyramid {
namespace {

using testing::FakeCoordinator;
using ::testing::HasSubstr;
using testing::StatusIs;

class CoordinatorClientTest : public ::testing::Test {
 protected:
  CoordinatorClient::Options Options() {
    CoordinatorClient::Options options;
    options.worker.set_job_id("job-1");
    options.worker.set_epoch(5);
    options.server_file = folder_ / "server.json";
    options.device = "cpu";
    options.interval = absl::Milliseconds(20);
    options.call_timeout = absl::Seconds(2);
    options.finish_patience = absl::Seconds(5);
    options.on_stale = [this](const std::string&) { ++stale_; };
    return options;
  }
  v1::Progress At(int64_t step) {
    v1::Progress progress;
    progress.set_step(step);
    return progress;
  }

  testing::TempFolder folder_;
  FakeCoordinator coordinator_{folder_ / "server.json"};
  std::atomic<int> stale_{0};
};

TEST_F(CoordinatorClientTest, RegistersThenReportsTheNewestProgressAndEveryLine) {
  const auto client = CoordinatorClient::Start(Options());
  client->SetProgress(At(1));
  client->SetProgress(At(7));
  client->AddLine("a");
  client->AddLine("b");
  ASSERT_TRUE(coordinator_.AwaitReport([](const auto& r) { return r.progress().step() == 7; },
                                       absl::Seconds(5)));
  ASSERT_TRUE(coordinator_.AwaitReport([](const auto& r) { return r.log_lines_size() > 0; },
                                       absl::Seconds(5)));
  const auto registers = coordinator_.registers();
  ASSERT_EQ(registers.size(), 1u);
  EXPECT_EQ(registers[0].worker().job_id(), "job-1");
  EXPECT_EQ(registers[0].device(), "cpu");
  EXPECT_GT(registers[0].pid(), 0);
  int64_t last = 0;
  for (const auto& report : coordinator_.reports()) {
    EXPECT_GT(report.sequence(), last);
    last = report.sequence();
    EXPECT_EQ(report.worker().epoch(), 5);
  }
}

TEST_F(CoordinatorClientTest, ShowsTheTokenItWasGiven) {
  setenv("PYRAMID_KEY", "a-key", 1);
  setenv("PYRAMID_WORKER_TOKEN", "a-token", 1);
  CoordinatorClient::Options options = Options();
  CoordinatorClient::FromEnvironment(options);
  unsetenv("PYRAMID_WORKER_TOKEN");
  CoordinatorClient::Options of_a_person = Options();
  CoordinatorClient::FromEnvironment(of_a_person);
  unsetenv("PYRAMID_KEY");
  EXPECT_EQ(of_a_person.key, "a-key");
  const auto client = CoordinatorClient::Start(options);
  ASSERT_TRUE(coordinator_.AwaitReport([](const auto&) { return true; }, absl::Seconds(5)));
  EXPECT_EQ(coordinator_.authorization(), "Bearer a-token");
}

TEST_F(CoordinatorClientTest, AFileOfTlsThatCantBeReadIsTriedAgainLater) {
  CoordinatorClient::Options options = Options();
  options.tls_ca = folder_ / "ca.pem";
  options.finish_patience = absl::ZeroDuration();
  const auto client = CoordinatorClient::Start(options);
  EXPECT_THAT(client->Finish({}), StatusIs(absl::StatusCode::kNotFound, HasSubstr("ca.pem")));
  EXPECT_TRUE(coordinator_.registers().empty());
}

TEST_F(CoordinatorClientTest, StopStaysAndSaveIsCarriedOutOnce) {
  const auto client = CoordinatorClient::Start(Options());
  EXPECT_FALSE(client->SaveAsked());
  coordinator_.set_directive(v1::SAVE);
  const absl::Time deadline = absl::Now() + absl::Seconds(5);
  while (!client->SaveAsked() && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(5));
  ASSERT_TRUE(client->SaveAsked());
  client->SaveDone();
  coordinator_.set_directive(v1::GO_ON);
  ASSERT_TRUE(coordinator_.AwaitReport([](const auto& r) { return r.saves_done() == 1; },
                                       absl::Seconds(5)));
  coordinator_.set_directive(v1::STOP);
  while (!client->StopAsked() && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_TRUE(client->StopAsked());
}

TEST_F(CoordinatorClientTest, ALostCoordinatorIsFoundAgainAndLosesNothing) {
  const auto client = CoordinatorClient::Start(Options());
  ASSERT_TRUE(coordinator_.AwaitReport([](const auto&) { return true; }, absl::Seconds(5)));
  coordinator_.Vanish();
  v1::Checkpoint checkpoint;
  for (int i = 0; i < 3; ++i) {
    checkpoint.set_id(absl::StrCat("step-", i));
    client->AddCheckpoint(checkpoint);
    client->AddLine(absl::StrCat("line ", i));
    client->SetProgress(At(100 + i));
    absl::SleepFor(absl::Milliseconds(40));
  }
  coordinator_.Return();
  ASSERT_TRUE(coordinator_.AwaitReport([](const auto& r) { return r.progress().step() == 102; },
                                       absl::Seconds(10)));
  std::set<std::string> checkpoints, lines;
  for (const auto& report : coordinator_.reports()) {
    for (const auto& c : report.new_checkpoints()) checkpoints.insert(c.id());
    for (const auto& line : report.log_lines()) lines.insert(line);
  }
  EXPECT_EQ(checkpoints.size(), 3u);
  EXPECT_EQ(lines.size(), 3u);
}

TEST_F(CoordinatorClientTest, AStaleEpochIsToldOnce) {
  coordinator_.set_epoch(6);
  const auto client = CoordinatorClient::Start(Options());
  const absl::Time deadline = absl::Now() + absl::Seconds(5);
  while (stale_ == 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(5));
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_EQ(stale_, 1);
  EXPECT_THAT(client->Finish({}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("epoch 5 is over")));
}

TEST_F(CoordinatorClientTest, FinishIsRepeatedUntilItIsAnswered) {
  const auto client = CoordinatorClient::Start(Options());
  ASSERT_TRUE(coordinator_.AwaitReport([](const auto&) { return true; }, absl::Seconds(5)));
  coordinator_.Vanish();
  std::thread later([&] {
    absl::SleepFor(absl::Milliseconds(300));
    coordinator_.Return();
  });
  client->SetProgress(At(9));
  v1::FinishRequest request;
  request.set_succeeded(true);
  EXPECT_OK(client->Finish(request));
  later.join();
  const auto finishes = coordinator_.finishes();
  ASSERT_FALSE(finishes.empty());
  EXPECT_TRUE(finishes.back().succeeded());
  EXPECT_EQ(finishes.back().worker().job_id(), "job-1");
}

TEST_F(CoordinatorClientTest, FinishGivesUpWhenPatienceEnds) {
  auto options = Options();
  options.finish_patience = absl::Milliseconds(200);
  const auto client = CoordinatorClient::Start(options);
  coordinator_.Vanish();
  const absl::Time begin = absl::Now();
  EXPECT_THAT(client->Finish({}), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("")));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
}

TEST(ServerAddressTest, ComesFromServerJson) {
  testing::TempFolder folder;
  EXPECT_THAT(ServerAddressFrom(folder / "server.json"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("server.json")));
  ASSERT_OK(WriteFileAtomically(folder / "server.json", "{\"grpc\": 8001}"));
  EXPECT_THAT(ServerAddressFrom(folder / "server.json"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("grpc")));
  ASSERT_OK(WriteFileAtomically(folder / "server.json", "{\"grpc\": \"127.0.0.1:1\"}"));
  EXPECT_EQ(*ServerAddressFrom(folder / "server.json"), "127.0.0.1:1");
}

}  // namespace
}  // namespace pyramid
