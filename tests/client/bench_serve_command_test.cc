#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <nlohmann/json.hpp>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/exit_code.h"
#include "tests/client/client_fixture.h"

namespace pyramid {
namespace {

using testing::CommandResult;
using ::testing::HasSubstr;

class BenchServeCommandTest : public testing::ClientFixture {
 protected:
  BenchServeCommandTest() {
    server_.models = [](v1::ListModelsResponse& response) {
      v1::ModelVersion model = testing::MakeModel("fashion", 2, 10);
      model.mutable_network()->set_in_channels(1);
      model.mutable_preprocessing()->set_crop(32);
      *response.add_models() = model;
      return grpc::Status::OK;
    };
    server_.classify = [this](grpc::ServerContext&, const v1::ClassifyRequest& request,
                              v1::ClassifyResponse& response) {
      {
        absl::MutexLock lock(&mutex_);
        last_ = request;
        ++calls_;
      }
      for (int i = 0; i < request.pictures_size(); ++i) response.add_results();
      response.mutable_timings()->mutable_decode()->set_nanos(1'000'000);
      response.mutable_timings()->mutable_queue()->set_nanos(2'000'000);
      response.mutable_timings()->mutable_forward()->set_nanos(3'000'000);
      response.mutable_timings()->mutable_total()->set_nanos(6'500'000);
      return grpc::Status::OK;
    };
  }

  nlohmann::json Bench(std::vector<std::string> arguments, int code = kDone) {
    arguments.insert(arguments.begin(), {"bench", "serve", "--json"});
    const CommandResult result = Pyramid(arguments);
    EXPECT_EQ(result.code, code) << result.out << result.err;
    return nlohmann::json::parse(result.out, nullptr, false);
  }
  v1::ClassifyRequest last() {
    absl::MutexLock lock(&mutex_);
    return last_;
  }

  absl::Mutex mutex_;
  v1::ClassifyRequest last_;
  int calls_ = 0;
};

TEST_F(BenchServeCommandTest, SendsTheModelsTensorsAtTheRate) {
  const nlohmann::json json =
      Bench({"--rate", "200", "--seconds", "1.5", "--warm-up", "0.2", "--within", "500"});
  const double due = json.at("due");
  EXPECT_NEAR(due, 300, 5 * std::sqrt(300.0));
  EXPECT_EQ(json.at("answered"), json.at("due"));
  EXPECT_EQ(json.at("failed"), 0);
  EXPECT_NEAR(json.at("images_per_second").get<double>(), due / 1.5, 1e-6);
  EXPECT_EQ(json.at("latency_ms").at("count"), json.at("due"));
  EXPECT_GT(json.at("goodput").at(0).at("share").get<double>(), 0.5);
  EXPECT_GT(json.at("client_cpu_seconds").get<double>(), 0);
  ASSERT_EQ(last().pictures_size(), 1);
  EXPECT_EQ(last().pictures(0).tensor().channels(), 1);
  EXPECT_EQ(last().pictures(0).tensor().values_size(), 32 * 32);
  EXPECT_EQ(last().model(), "fashion");
  EXPECT_EQ(last().version(), 0);
}

TEST_F(BenchServeCommandTest, TellsWhatTheServerDidBesideItsParts) {
  const nlohmann::json json = Bench({"--closed", "2", "--seconds", "0.3", "--warm-up", "0"});
  const nlohmann::json& server = json.at("server_ms");
  EXPECT_DOUBLE_EQ(server.at("decode").at("p50"), 1);
  EXPECT_DOUBLE_EQ(server.at("queue").at("p99"), 2);
  EXPECT_DOUBLE_EQ(server.at("forward").at("max"), 3);
  EXPECT_NEAR(server.at("overhead").at("p50").get<double>(), 0.5, 1e-9);
}

// A server that stands still for a while: an open loop goes on, and everybody who came meanwhile
// waited.
TEST_F(BenchServeCommandTest, CountsFromWhenARequestWasDue) {
  const absl::Time until = absl::Now() + absl::Seconds(1);
  server_.classify = [until](grpc::ServerContext&, const v1::ClassifyRequest&,
                             v1::ClassifyResponse& response) {
    absl::SleepFor(until - absl::Now());
    response.add_results();
    return grpc::Status::OK;
  };
  const nlohmann::json json = Bench({"--rate", "50", "--seconds", "1.5", "--warm-up", "0"});
  EXPECT_EQ(json.at("answered"), json.at("due"));
  // Two thirds came while it stood still and waited for half a second on average.
  EXPECT_GT(json.at("latency_ms").at("p50").get<double>(), 100);
  EXPECT_LT(json.at("latency_ms").at("max").get<double>(), 1500);
}

TEST_F(BenchServeCommandTest, GoesOnAfterRefusalsAndCountsThemByCode) {
  std::atomic<int> number{0};
  server_.classify = [&number](grpc::ServerContext&, const v1::ClassifyRequest&,
                               v1::ClassifyResponse& response) -> grpc::Status {
    const int turn = number++ % 4;
    if (turn == 0) return {grpc::StatusCode::RESOURCE_EXHAUSTED, "full"};
    if (turn == 1) return {grpc::StatusCode::UNAVAILABLE, "draining"};
    v1::PictureResult& result = *response.add_results();
    if (turn == 2) result.set_code(3), result.set_message("no picture");
    return grpc::Status::OK;
  };
  const nlohmann::json json = Bench({"--rate", "200", "--seconds", "1", "--warm-up", "0"});
  const int full = json.at("errors").at("RESOURCE_EXHAUSTED");
  const int draining = json.at("errors").at("UNAVAILABLE");
  EXPECT_GT(full, 0);
  EXPECT_GT(draining, 0);
  EXPECT_EQ(json.at("failed"), full + draining);
  EXPECT_EQ(json.at("due").get<int>(), full + draining + json.at("answered").get<int>());
  EXPECT_NEAR(json.at("bad_pictures").get<int>(), json.at("answered").get<int>() / 2, 2);
  EXPECT_EQ(json.at("failed_ms").at("count"), full + draining);
}

TEST_F(BenchServeCommandTest, ADeadlineCountsFromWhenTheRequestWasDue) {
  server_.classify = [](grpc::ServerContext&, const v1::ClassifyRequest&, v1::ClassifyResponse&) {
    absl::SleepFor(absl::Milliseconds(300));
    return grpc::Status::OK;
  };
  const nlohmann::json json = Bench(
      {"--rate", "20", "--seconds", "0.5", "--warm-up", "0", "--deadline", "50", "--seed", "2"},
      kFailed);
  EXPECT_EQ(json.at("answered"), 0);
  EXPECT_EQ(json.at("errors").at("DEADLINE_EXCEEDED"), json.at("due"));
  EXPECT_EQ(json.at("goodput").at(0).at("within_ms"), 50);
  EXPECT_EQ(json.at("goodput").at(0).at("per_second"), 0);
}

TEST_F(BenchServeCommandTest, AClosedLoopKeepsSoManyInFlight) {
  std::atomic<int> now{0};
  std::atomic<int> most{0};
  server_.classify = [&](grpc::ServerContext&, const v1::ClassifyRequest&,
                         v1::ClassifyResponse& response) {
    const int mine = ++now;
    int seen = most;
    while (seen < mine && !most.compare_exchange_weak(seen, mine)) {
    }
    absl::SleepFor(absl::Milliseconds(20));
    response.add_results();
    --now;
    return grpc::Status::OK;
  };
  const nlohmann::json json = Bench({"--closed", "3", "--seconds", "1", "--warm-up", "0.1"});
  EXPECT_EQ(most, 3);
  EXPECT_GT(json.at("answered").get<int>(), 3);
  EXPECT_EQ(json.at("in_flight"), 3);
}

TEST_F(BenchServeCommandTest, AClosedLoopWaitsAsLongAsTheServerAsks) {
  std::atomic<int> calls{0};
  server_.classify = [&](grpc::ServerContext& context, const v1::ClassifyRequest&,
                         v1::ClassifyResponse&) -> grpc::Status {
    ++calls;
    context.AddTrailingMetadata("grpc-retry-pushback-ms", "100");
    return {grpc::StatusCode::RESOURCE_EXHAUSTED, "full"};
  };
  Bench({"--closed", "2", "--seconds", "1", "--warm-up", "0"}, kRefused);
  EXPECT_GE(calls, 4);
  EXPECT_LE(calls, 2 * 11);
}

TEST_F(BenchServeCommandTest, SendsFilesInTurnsSeveralARequest) {
  Write("a.jpg", "first");
  Write("b.jpg", "second");
  const nlohmann::json json = Bench({"--closed", "1", "--seconds", "0.2", "--warm-up", "0",
                                     "--per-request", "3", "--pictures", "a.jpg", "b.jpg"});
  ASSERT_EQ(last().pictures_size(), 3);
  EXPECT_NE(last().pictures(0).encoded(), last().pictures(1).encoded());
  EXPECT_EQ(last().pictures(0).encoded(), last().pictures(2).encoded());
  EXPECT_NEAR(json.at("images_per_second").get<double>(),
              3 * json.at("answers_per_second").get<double>(), 1e-6);
}

TEST_F(BenchServeCommandTest, TextNamesTheFigures) {
  const CommandResult result =
      Pyramid({"bench", "serve", "--closed", "1", "--seconds", "0.2", "--within", "1000"});
  EXPECT_EQ(result.code, kDone) << result.err;
  for (const char* wanted : {"answered ", "images/s", "within 1000 ms", "p99", "server: queue"}) {
    EXPECT_THAT(result.out, HasSubstr(wanted));
  }
}

TEST_F(BenchServeCommandTest, WrongUsageIsSaidSo) {
  EXPECT_EQ(Pyramid({"bench", "serve"}).code, kWrongUsage);
  EXPECT_EQ(Pyramid({"bench", "serve", "--rate", "5", "--closed", "2"}).code, kWrongUsage);
  const CommandResult unknown = Pyramid({"bench", "serve", "--rate", "fast"});
  EXPECT_EQ(unknown.code, kWrongUsage);
  EXPECT_THAT(unknown.err, HasSubstr("see pyramid bench serve --help"));
  EXPECT_EQ(Pyramid({"bench", "serve", "--rate", "5", "--model", "other"}).code, kNotFound);
  EXPECT_EQ(Pyramid({"bench", "serve", "--rate", "5", "--pictures", "none.jpg"}).code, kNotFound);
}

TEST_F(BenchServeCommandTest, WithoutAServerIsUnreachable) {
  server_.Stop();
  EXPECT_EQ(Pyramid({"bench", "serve", "--rate", "5"}).code, kUnreachable);
}

TEST_F(BenchServeCommandTest, HelpIsItsOwn) {
  const CommandResult result = Pyramid({"bench", "serve", "--help"});
  EXPECT_EQ(result.code, kDone);
  EXPECT_THAT(result.out, HasSubstr("--rate"));
  EXPECT_THAT(result.out, HasSubstr("--closed"));
}

}  // namespace
}  // namespace pyramid
