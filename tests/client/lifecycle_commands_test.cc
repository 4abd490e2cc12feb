// promote's gates, alias, traffic, rollback, load, unload, models --history.
#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "tests/client/client_fixture.h"

namespace pyramid {
namespace {

using testing::CommandResult;
using ::testing::HasSubstr;

class LifecycleCommandsTest : public testing::ClientFixture {
 protected:
  void SetUp() override { environment_.user = "ann@desk"; }
  v1::ModelState State() {
    v1::ModelState state;
    state.set_name("fashion");
    (*state.mutable_aliases())["stable"] = 3;
    (*state.mutable_aliases())["canary"] = 4;
    state.set_traffic_alias("canary");
    state.set_traffic_percent(12.5);
    return state;
  }
};

TEST_F(LifecycleCommandsTest, PromoteSendsOnlyTheGatesThatAreGiven) {
  v1::PromoteCheckpointRequest seen;
  server_.promote = [&](const v1::PromoteCheckpointRequest& request,
                        v1::PromoteCheckpointResponse& response) {
    seen = request;
    response.set_model(request.model());
    response.set_version(4);
    response.set_alias(request.alias());
    response.set_digest("sha256:abc");
    return grpc::Status::OK;
  };
  EXPECT_EQ(Pyramid({"promote", "j-1", "--as", "fashion"}).code, 0);
  EXPECT_FALSE(seen.has_min_top1() || seen.has_max_latency() || seen.has_min_agreement() ||
               seen.has_require_self_test() || seen.has_traffic_percent());
  EXPECT_EQ(seen.latency_batch(), 0);
  EXPECT_EQ(seen.alias(), "");
  EXPECT_EQ(seen.actor(), "ann@desk");

  const CommandResult result =
      Pyramid({"promote", "j-1", "--as", "fashion", "--alias", "canary", "--traffic", "10",
               "--min-top1", "0.9", "--max_latency", "25ms", "--latency-batch", "8",
               "--min-agreement", "0.95", "--require-self-test"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.out, "model fashion version 4 is canary, sha256:abc\n");
  EXPECT_EQ(seen.alias(), "canary");
  EXPECT_DOUBLE_EQ(seen.traffic_percent(), 10);
  EXPECT_DOUBLE_EQ(seen.min_top1(), 0.9);
  EXPECT_EQ(seen.max_latency().nanos(), 25'000'000);
  EXPECT_EQ(seen.latency_batch(), 8);
  EXPECT_DOUBLE_EQ(seen.min_agreement(), 0.95);
  EXPECT_TRUE(seen.require_self_test());
  // 0 turns the server's gate off.
  EXPECT_EQ(Pyramid({"promote", "j-1", "--as", "fashion", "--min-top1", "0", "--max-latency", "0",
                     "--require-self-test=false"})
                .code,
            0);
  EXPECT_TRUE(seen.has_min_top1() && seen.has_max_latency() && seen.has_require_self_test());
  EXPECT_FALSE(seen.require_self_test());
}

TEST_F(LifecycleCommandsTest, SenselessGatesAreWrongUsage) {
  for (const std::vector<std::string>& flags :
       std::vector<std::vector<std::string>>{{"--min-top1", "90"},
                                             {"--min-top1", "x"},
                                             {"--max-latency", "25"},
                                             {"--max-latency", "-1s"},
                                             {"--latency-batch", "0"},
                                             {"--min-agreement", "1.1"},
                                             {"--require-self-test=maybe"},
                                             {"--traffic", "101"}}) {
    std::vector<std::string> arguments{"promote", "j-1", "--as", "x"};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    EXPECT_EQ(Pyramid(arguments).code, 2) << flags[0];
  }
}

TEST_F(LifecycleCommandsTest, AnAliasIsSetAndRemoved) {
  v1::SetAliasRequest set;
  v1::RemoveAliasRequest removed;
  server_.set_alias = [&](const v1::SetAliasRequest& request, v1::ModelState& state) {
    set = request;
    state = State();
    return grpc::Status::OK;
  };
  server_.remove_alias = [&](const v1::RemoveAliasRequest& request, v1::ModelState& state) {
    removed = request;
    state.set_name("fashion");
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"alias", "fashion", "canary", "4"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.out, "fashion: canary 4 (12.5 % of the traffic), stable 3\n");
  EXPECT_EQ(set.model(), "fashion");
  EXPECT_EQ(set.alias(), "canary");
  EXPECT_EQ(set.version(), 4);
  EXPECT_EQ(set.actor(), "ann@desk");
  EXPECT_EQ(Pyramid({"alias", "fashion", "canary", "--remove"}).out, "fashion: no alias\n");
  EXPECT_EQ(removed.alias(), "canary");
  EXPECT_EQ(Pyramid({"alias", "fashion", "canary"}).code, 2);
  EXPECT_EQ(Pyramid({"alias", "fashion", "canary", "4", "--remove"}).code, 2);
  EXPECT_EQ(Pyramid({"alias", "fashion", "canary", "0"}).code, 2);
  EXPECT_EQ(Pyramid({"alias", "fashion"}).code, 2);
}

TEST_F(LifecycleCommandsTest, TrafficRollbackLoadAndUnload) {
  v1::SetTrafficRequest traffic;
  std::string called;
  server_.set_traffic = [&](const v1::SetTrafficRequest& request, v1::ModelState& state) {
    traffic = request;
    state = State();
    return grpc::Status::OK;
  };
  const auto note = [&](const char* name) {
    return [&called, name, this](const auto& request, v1::ModelState& state) {
      called += std::string(name) + " " + request.model() + " " + request.actor() + "; ";
      state = State();
      state.set_unloaded(std::string(name) == "unload");
      return grpc::Status::OK;
    };
  };
  server_.rollback = note("rollback");
  server_.load = note("load");
  server_.unload = note("unload");
  EXPECT_EQ(Pyramid({"traffic", "fashion", "12.5", "--alias", "canary"}).code, 0);
  EXPECT_DOUBLE_EQ(traffic.percent(), 12.5);
  EXPECT_EQ(traffic.alias(), "canary");
  EXPECT_EQ(Pyramid({"traffic", "fashion", "0"}).code, 0);
  EXPECT_EQ(traffic.alias(), "");
  EXPECT_EQ(Pyramid({"traffic", "fashion", "-1"}).code, 2);
  EXPECT_EQ(Pyramid({"rollback", "fashion"}).code, 0);
  EXPECT_EQ(Pyramid({"load", "fashion"}).code, 0);
  EXPECT_THAT(Pyramid({"unload", "fashion"}).out, HasSubstr("stable 3; unloaded\n"));
  EXPECT_EQ(called, "rollback fashion ann@desk; load fashion ann@desk; unload fashion ann@desk; ");
  const nlohmann::json json = nlohmann::json::parse(Pyramid({"rollback", "fashion", "--json"}).out);
  EXPECT_EQ(json.at("aliases").at("stable"), "3");
}

TEST_F(LifecycleCommandsTest, RefusalsKeepTheirMeaning) {
  server_.rollback = [](const v1::RollbackRequest&, v1::ModelState&) {
    return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "no earlier stable version");
  };
  server_.load = [](const v1::LoadModelRequest&, v1::ModelState&) {
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no model");
  };
  const CommandResult result = Pyramid({"rollback", "fashion"});
  EXPECT_EQ(result.code, 4);
  EXPECT_EQ(result.err, "pyramid: no earlier stable version\n");
  EXPECT_EQ(Pyramid({"load", "fashion"}).code, 3);
}

TEST_F(LifecycleCommandsTest, TheHistoryIsATableOfNumbersAndRefusals) {
  v1::ListModelEventsRequest seen;
  server_.events = [&](const v1::ListModelEventsRequest& request,
                       v1::ListModelEventsResponse& response) {
    seen = request;
    v1::ModelEvent& promoted = *response.add_events();
    promoted.mutable_time()->set_seconds(1'700'000'000);
    promoted.set_actor("ann");
    promoted.set_action("promote");
    promoted.set_alias("canary");
    promoted.set_version(4);
    promoted.set_previous_version(3);
    promoted.set_traffic_percent(10);
    promoted.set_job_id("j-000007");
    promoted.set_step(940);
    promoted.add_gates()->set_text("top-1: 0.9123, wanted ≥ 0.9");
    promoted.add_gates()->set_text("self-test: max error 1e-06, wanted ≤ 0.0001");
    v1::ModelEvent& refused = *response.add_events();
    refused.set_action("rollback");
    refused.set_code(9);
    refused.set_error("no earlier\nstable");
    response.add_events()->set_action("load");
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"models", "--history", "fashion", "--limit", "20"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(seen.model(), "fashion");
  EXPECT_EQ(seen.limit(), 20);
  EXPECT_THAT(result.out, HasSubstr("ann    promote canary 10 %  3 → 4"));
  EXPECT_THAT(result.out, HasSubstr("j-000007 step 940  top-1: 0.9123, wanted ≥ 0.9; self-test"));
  EXPECT_THAT(result.out, HasSubstr("refused: no earlier"));
  EXPECT_THAT(result.out, HasSubstr("done\n"));
  EXPECT_EQ(nlohmann::json::parse(Pyramid({"models", "--history", "fashion", "--json"}).out)
                .at("events")
                .size(),
            3u);
  EXPECT_EQ(Pyramid({"models", "--limit", "20"}).code, 2);
}

TEST_F(LifecycleCommandsTest, ModelsShowAliasesSharesAndUnloadedOnes) {
  server_.models = [](v1::ListModelsResponse& response) {
    v1::ModelVersion stable = testing::MakeModel("fashion", 1, 10);
    stable.add_aliases("stable");
    stable.set_traffic_percent(90);
    v1::ModelVersion canary = testing::MakeModel("fashion", 2, 10, false);
    canary.add_aliases("canary");
    canary.set_traffic_percent(10);
    v1::ModelVersion gone = testing::MakeModel("old", 1, 10, false);
    gone.add_aliases("stable");
    gone.set_unloaded(true);
    for (const v1::ModelVersion& model : {stable, canary, gone}) *response.add_models() = model;
    return grpc::Status::OK;
  };
  const std::string out = Pyramid({"models"}).out;
  EXPECT_THAT(out, HasSubstr("fashion        1  stable 90 %      pvt_v2_b0"));
  EXPECT_THAT(out, HasSubstr("fashion        2  canary 10 %      pvt_v2_b0"));
  EXPECT_THAT(out, HasSubstr("old            1  stable unloaded  pvt_v2_b0"));
}

TEST_F(LifecycleCommandsTest, ClassifyAndValidateTakeAnAlias) {
  std::vector<std::string> asked;
  server_.classify = [&](grpc::ServerContext&, const v1::ClassifyRequest& request,
                         v1::ClassifyResponse& response) {
    asked.push_back(request.model() + " " + std::to_string(request.version()));
    response.set_model("fashion");
    response.set_version(4);
    for (int i = 0; i < request.pictures_size(); ++i) response.add_results()->add_predictions();
    return grpc::Status::OK;
  };
  Write("a.png", "bytes");
  const CommandResult result = Pyramid({"classify", "--model", "fashion@canary", "a.png"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("model fashion version 4"));
  EXPECT_EQ(asked, std::vector<std::string>{"fashion@canary 0"});
  for (const char* wrong : {"fashion@", "@canary", "fashion:", "fashion:0", "fashion:1@canary"}) {
    EXPECT_EQ(Pyramid({"classify", "--model", wrong, "a.png"}).code, 2) << wrong;
  }
}

}  // namespace
}  // namespace pyramid
