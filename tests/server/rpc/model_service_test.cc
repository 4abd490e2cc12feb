#include "server/rpc/model_service.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/base/grpc_status.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::Sample;
using testing::StatusIs;

// A real server on a free port; versions 1 and 2 of "fashion", 2 is stable.
class ModelServiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ModelRegistry::Options options;
    options.folder = folder_ / "models";
    registry_ = std::make_unique<ModelRegistry>(options, testing::FakeLoader(network_),
                                                testing::PassingSelfTest, metrics_);
    ASSERT_OK(registry_->Start());
    for (int bias = 1; bias <= 2; ++bias) {
      const auto folder = folder_ / absl::StrCat("checkpoint", bias);
      ASSERT_OK(testing::WriteFakeCheckpoint(folder, bias));
      ASSERT_OK(registry_->Promote(folder, "fashion", ""));
    }
    service_ = std::make_unique<ModelService>(*registry_, metrics_);
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(service_.get());
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    stub_ = v1::ModelService::NewStub(
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials()));
  }
  void TearDown() override {
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  }

  template <typename Response = v1::ModelState, typename Request, typename Method>
  absl::StatusOr<Response> Call(Method method, Request request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    request.set_model("fashion");
    Response response;
    const grpc::Status status = ((*stub_).*method)(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
    return response;
  }
  int64_t Stable() { return registry_->StateOf("fashion")->aliases().at("stable"); }

  testing::TempFolder folder_;
  testing::FakeNetwork network_;
  Metrics metrics_;
  std::unique_ptr<ModelRegistry> registry_;
  std::unique_ptr<ModelService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::ModelService::Stub> stub_;
};

TEST_F(ModelServiceTest, EveryCallReachesTheRegistryWithItsActor) {
  v1::SetAliasRequest alias;
  alias.set_alias("canary");
  alias.set_version(1);
  alias.set_actor("ann");
  ASSERT_OK_AND_ASSIGN(v1::ModelState state, Call(&v1::ModelService::Stub::SetAlias, alias));
  EXPECT_EQ(state.aliases().at("canary"), 1);
  EXPECT_EQ(state.aliases().at("stable"), 2);

  v1::SetTrafficRequest traffic;
  traffic.set_percent(12.5);
  ASSERT_OK_AND_ASSIGN(state, Call(&v1::ModelService::Stub::SetTraffic, traffic));
  EXPECT_EQ(state.traffic_alias(), "canary");
  EXPECT_DOUBLE_EQ(state.traffic_percent(), 12.5);

  v1::RemoveAliasRequest remove;
  remove.set_alias("canary");
  ASSERT_OK_AND_ASSIGN(state, Call(&v1::ModelService::Stub::RemoveAlias, remove));
  EXPECT_EQ(state.aliases().count("canary"), 0u);

  v1::RollbackRequest rollback;
  rollback.set_actor("bob");
  ASSERT_OK(Call(&v1::ModelService::Stub::Rollback, rollback));
  EXPECT_EQ(Stable(), 1);
  ASSERT_OK_AND_ASSIGN(state, Call(&v1::ModelService::Stub::UnloadModel, v1::UnloadModelRequest()));
  EXPECT_TRUE(state.unloaded());
  ASSERT_OK_AND_ASSIGN(state, Call(&v1::ModelService::Stub::LoadModel, v1::LoadModelRequest()));
  EXPECT_FALSE(state.unloaded());

  v1::ListModelEventsRequest list;
  list.set_limit(6);
  ASSERT_OK_AND_ASSIGN(
      const v1::ListModelEventsResponse events,
      Call<v1::ListModelEventsResponse>(&v1::ModelService::Stub::ListModelEvents, list));
  ASSERT_EQ(events.events_size(), 6);
  EXPECT_EQ(events.events(0).actor(), "ann");
  EXPECT_EQ(events.events(3).actor(), "bob");
  EXPECT_EQ(events.events(3).action(), "rollback");
  EXPECT_EQ(events.events(5).action(), "load");
  EXPECT_EQ(
      Sample(
          metrics_,
          R"(grpc_server_handled_total{grpc_code="OK",grpc_method="Rollback",grpc_service="pyramid.v1.ModelService",grpc_type="unary"})"),
      1);
}

TEST_F(ModelServiceTest, ErrorsKeepTheirCodesAndTexts) {
  v1::SetAliasRequest alias;
  alias.set_version(9);
  EXPECT_THAT(Call(&v1::ModelService::Stub::SetAlias, alias),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no version 9")));
  ASSERT_OK(Call(&v1::ModelService::Stub::Rollback, v1::RollbackRequest()));
  EXPECT_THAT(Call(&v1::ModelService::Stub::Rollback, v1::RollbackRequest()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no earlier stable")));
  v1::ListModelEventsRequest list;
  list.set_limit(-1);
  EXPECT_THAT(Call<v1::ListModelEventsResponse>(&v1::ModelService::Stub::ListModelEvents, list),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("limit is -1")));
}

TEST(PromotionTest, WhatTheRequestLeavesOpenStaysOpen) {
  const ModelRegistry::Promotion open = PromotionOf(v1::PromoteCheckpointRequest());
  EXPECT_FALSE(open.limits.min_top1.has_value());
  EXPECT_FALSE(open.limits.max_latency.has_value());
  EXPECT_FALSE(open.limits.latency_batch.has_value());
  EXPECT_FALSE(open.limits.min_agreement.has_value());
  EXPECT_FALSE(open.limits.require_self_test.has_value());
  EXPECT_FALSE(open.traffic_percent.has_value());

  v1::PromoteCheckpointRequest request;
  request.set_dtype("bf16");
  request.set_alias("canary");
  request.set_actor("ann");
  request.set_min_top1(0);
  request.mutable_max_latency()->set_nanos(25'000'000);
  request.set_latency_batch(8);
  request.set_min_agreement(0.9);
  request.set_require_self_test(false);
  request.set_traffic_percent(0);
  const ModelRegistry::Promotion promotion = PromotionOf(request);
  EXPECT_EQ(promotion.dtype, "bf16");
  EXPECT_EQ(promotion.alias, "canary");
  EXPECT_EQ(promotion.actor, "ann");
  EXPECT_EQ(promotion.limits.min_top1, 0.0);
  EXPECT_EQ(promotion.limits.max_latency, absl::Milliseconds(25));
  EXPECT_EQ(promotion.limits.latency_batch, 8);
  EXPECT_EQ(promotion.limits.min_agreement, 0.9);
  EXPECT_EQ(promotion.limits.require_self_test, false);
  EXPECT_EQ(promotion.traffic_percent, 0.0);
}

TEST(PromotionTest, TheResponseHasGatesAsTextAndNumbers) {
  ModelRegistry::Promoted promoted{.version = 3, .digest = "sha256:a", .previous = 2};
  v1::GateResult& gate = promoted.gates.emplace_back();
  gate.set_name("top-1");
  gate.set_value(0.91);
  gate.set_text("top-1: 0.9100");
  v1::PromoteCheckpointRequest request;
  request.set_model("fashion");
  const v1::PromoteCheckpointResponse response = ResponseOf(request, promoted);
  EXPECT_EQ(response.model(), "fashion");
  EXPECT_EQ(response.version(), 3);
  EXPECT_EQ(response.previous_version(), 2);
  EXPECT_EQ(response.alias(), "stable");
  EXPECT_EQ(response.gates(0), "top-1: 0.9100");
  EXPECT_DOUBLE_EQ(response.results(0).value(), 0.91);
}

}  // namespace
}  // namespace pyramid
