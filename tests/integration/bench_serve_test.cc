// `pyramid bench serve` against the real server and the real network.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "tests/integration/cluster.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/weight_file.h"

namespace pyramid {
namespace {

using testing::Cluster;
using testing::RunResult;

class BenchServeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(testing::WriteFormulaFile(cluster_.folder() / "weights.safetensors"));
    const auto model = cluster_.data() / "models" / "formula";
    std::filesystem::create_directories(model);
    const RunResult converted =
        testing::Process(
            {testing::Program("pyramid"), "convert",
             (cluster_.folder() / "weights.safetensors").string(), (model / "1").string()},
            cluster_.folder() / "convert")
            .Wait(absl::Seconds(60));
    ASSERT_EQ(converted.exit_code, 0) << converted.err;
    ASSERT_OK(WriteFileAtomically(
        model / "state.json",
        R"({"format_version": 1, "name": "formula", "aliases": {"stable": "1"}})"));
    ASSERT_OK(WriteFileAtomically(cluster_.folder() / "server.yaml",
                                  "serving: {max_queue: 4, max_pictures: 4, max_batch: 2}\n"));
    cluster_.Start();
  }

  nlohmann::json Bench(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"bench", "serve", "--json", "--warm-up", "0"});
    const RunResult run = cluster_.Cli(arguments, absl::Seconds(40));
    EXPECT_EQ(run.exit_code, 0) << run.err;
    return nlohmann::json::parse(run.out, nullptr, false);
  }

  Cluster cluster_;
};

TEST_F(BenchServeTest, BothProtocolsAreAnswered) {
  const std::string picture =
      absl::StrCat(PYRAMID_SOURCE_DIR, "/tests/golden/images/baseline_444.jpg");
  for (const char* protocol : {"native", "v2"}) {
    const nlohmann::json tensors = Bench({"--closed", "1", "--seconds", "1", "--size", "64",
                                          "--model", "formula", "--protocol", protocol});
    EXPECT_GT(tensors.at("answered").get<int>(), 0) << protocol;
    EXPECT_EQ(tensors.at("failed"), 0) << tensors;
    const nlohmann::json files =
        Bench({"--closed", "1", "--seconds", "1", "--per-request", "2", "--pictures", picture,
               "--model", "formula", "--protocol", protocol});
    EXPECT_GT(files.at("answered").get<int>(), 0) << protocol;
    EXPECT_EQ(files.at("failed"), 0) << files;
    EXPECT_EQ(files.at("bad_pictures"), 0);
  }
}

TEST_F(BenchServeTest, TheServersPartsAddUpToLessThanTheClientsTime) {
  const nlohmann::json json = Bench({"--closed", "1", "--seconds", "1", "--size", "64"});
  const nlohmann::json& server = json.at("server_ms");
  EXPECT_GT(server.at("forward").at("p50").get<double>(), 0);
  EXPECT_GT(server.at("overhead").at("p50").get<double>(), 0);
  EXPECT_LT(server.at("total").at("p50").get<double>(), json.at("latency_ms").at("p50"));
}

TEST_F(BenchServeTest, TooMuchLoadIsRefusedAndTheRestIsAnswered) {
  const nlohmann::json json =
      Bench({"--rate", "3000", "--seconds", "2", "--size", "64", "--deadline", "2000"});
  EXPECT_GT(json.at("answered").get<int>(), 0);
  EXPECT_GT(json.at("errors").value("RESOURCE_EXHAUSTED", 0), 0) << json;
  EXPECT_EQ(
      json.at("due").get<int>(),
      json.at("answered").get<int>() + json.at("failed").get<int>() + json.at("unsent").get<int>());
}

}  // namespace
}  // namespace pyramid
