#include "server/rpc/model_service.h"

#include <string>
#include <utility>

#include "proto/base/status.h"
#include "proto/base/time.h"
#include "server/rpc/actor.h"
#include "server/rpc/handle.h"

namespace pyramid {
namespace {

const char* Name() { return v1::ModelService::service_full_name(); }

constexpr int kUsualEvents = 100;
constexpr int kMostEvents = 10'000;

absl::Status Give(absl::StatusOr<v1::ModelState> state, v1::ModelState* response) {
  if (state.ok()) *response = *std::move(state);
  return state.status();
}

}  // namespace

grpc::Status ModelService::SetAlias(grpc::ServerContext* context,
                                    const v1::SetAliasRequest* request, v1::ModelState* response) {
  return Handle(metrics_, Name(), "SetAlias", [&] {
    return Give(registry_.SetAlias(request->model(), request->alias(), request->version(),
                                   ActorOf(*context, request->actor())),
                response);
  });
}

grpc::Status ModelService::RemoveAlias(grpc::ServerContext* context,
                                       const v1::RemoveAliasRequest* request,
                                       v1::ModelState* response) {
  return Handle(metrics_, Name(), "RemoveAlias", [&] {
    return Give(registry_.RemoveAlias(request->model(), request->alias(),
                                      ActorOf(*context, request->actor())),
                response);
  });
}

grpc::Status ModelService::SetTraffic(grpc::ServerContext* context,
                                      const v1::SetTrafficRequest* request,
                                      v1::ModelState* response) {
  return Handle(metrics_, Name(), "SetTraffic", [&] {
    return Give(registry_.SetTraffic(request->model(), request->alias(), request->percent(),
                                     ActorOf(*context, request->actor())),
                response);
  });
}

grpc::Status ModelService::Rollback(grpc::ServerContext* context,
                                    const v1::RollbackRequest* request, v1::ModelState* response) {
  return Handle(metrics_, Name(), "Rollback", [&] {
    return Give(registry_.Rollback(request->model(), ActorOf(*context, request->actor())),
                response);
  });
}

grpc::Status ModelService::LoadModel(grpc::ServerContext* context,
                                     const v1::LoadModelRequest* request,
                                     v1::ModelState* response) {
  return Handle(metrics_, Name(), "LoadModel", [&] {
    return Give(registry_.Load(request->model(), ActorOf(*context, request->actor())), response);
  });
}

grpc::Status ModelService::UnloadModel(grpc::ServerContext* context,
                                       const v1::UnloadModelRequest* request,
                                       v1::ModelState* response) {
  return Handle(metrics_, Name(), "UnloadModel", [&] {
    return Give(registry_.Unload(request->model(), ActorOf(*context, request->actor())), response);
  });
}

grpc::Status ModelService::ListModelEvents(grpc::ServerContext*,
                                           const v1::ListModelEventsRequest* request,
                                           v1::ListModelEventsResponse* response) {
  return Handle(metrics_, Name(), "ListModelEvents", [&]() -> absl::Status {
    if (request->limit() < 0 || request->limit() > kMostEvents) {
      return absl::InvalidArgumentError(absl::StrCat("limit is ", request->limit(), "; use 1..",
                                                     kMostEvents, ", or 0 for ", kUsualEvents));
    }
    const int limit = request->limit() == 0 ? kUsualEvents : request->limit();
    ASSIGN_OR_RETURN(std::vector<v1::ModelEvent> events,
                     registry_.EventsOf(request->model(), limit));
    for (v1::ModelEvent& event : events) *response->add_events() = std::move(event);
    return absl::OkStatus();
  });
}

ModelRegistry::Promotion PromotionOf(const v1::PromoteCheckpointRequest& request) {
  ModelRegistry::Promotion promotion;
  promotion.dtype = request.dtype();
  promotion.alias = request.alias();
  promotion.actor = request.actor();
  GateLimits& limits = promotion.limits;
  if (request.has_min_top1()) limits.min_top1 = request.min_top1();
  if (request.has_max_latency()) limits.max_latency = FromProto(request.max_latency());
  if (request.latency_batch() != 0) limits.latency_batch = request.latency_batch();
  if (request.has_min_agreement()) limits.min_agreement = request.min_agreement();
  if (request.has_require_self_test()) limits.require_self_test = request.require_self_test();
  if (request.has_traffic_percent()) promotion.traffic_percent = request.traffic_percent();
  return promotion;
}

v1::PromoteCheckpointResponse ResponseOf(const v1::PromoteCheckpointRequest& request,
                                         const ModelRegistry::Promoted& promoted) {
  v1::PromoteCheckpointResponse response;
  response.set_model(request.model());
  response.set_version(promoted.version);
  response.set_digest(promoted.digest);
  response.set_existed(promoted.existed);
  response.set_alias(request.alias().empty() ? std::string(kStableAlias) : request.alias());
  response.set_previous_version(promoted.previous);
  for (const v1::GateResult& gate : promoted.gates) {
    response.add_gates(gate.text());
    *response.add_results() = gate;
  }
  return response;
}

}  // namespace pyramid
