// The rate limits of keys, where pictures come in.
#ifndef PYRAMID_SERVER_RPC_RATE_GATE_H_
#define PYRAMID_SERVER_RPC_RATE_GATE_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/rpc/infer_request.h"
#include "server/security/access.h"
#include "server/serving/model_registry.h"

namespace pyramid {

// Thread-safe.
class RateGate {
 public:
  // Both must outlive it.
  RateGate(const Access& access, ModelRegistry& registry) : access_(access), registry_(registry) {}

  // Lets `images` for `model` pass and counts them, or counts them as refused.
  //   ResourceExhausted  over the rate of the caller's key; PushbackMillis says when to come back
  //   Unauthenticated    the key is no longer good
  absl::Status Pass(const Credentials& credentials, absl::string_view model, int images) const {
    absl::Status status = access_.Charge(credentials, images);
    if (status.ok()) return status;
    if (ModelMetrics* metrics = registry_.MetricsOf(ViewOf(model).model); metrics != nullptr) {
      metrics->CountRequest(0, status.code());
      if (absl::IsResourceExhausted(status)) {
        metrics->CountRejection(ModelMetrics::Rejection::kRate, images);
      }
    }
    return status;
  }

 private:
  const Access& access_;
  ModelRegistry& registry_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_RATE_GATE_H_
