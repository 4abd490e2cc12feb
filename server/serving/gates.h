// What a checkpoint must show before it goes into service. Pure: numbers in, verdicts out.
#ifndef PYRAMID_SERVER_SERVING_GATES_H_
#define PYRAMID_SERVER_SERVING_GATES_H_

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "model/classifier.h"
#include "proto/lifecycle.pb.h"
#include "proto/model.pb.h"

namespace pyramid {

// Unset: somebody else decides, in the end nothing is asked for. 0, false: not asked for.
struct GateLimits {
  std::optional<double> min_top1;  // 0..1
  std::optional<absl::Duration> max_latency;
  std::optional<int> latency_batch;     // pictures; 1 if nobody says
  std::optional<double> min_agreement;  // 0..1
  std::optional<bool> require_self_test;
  bool agreement_from_the_second = false;  // min_agreement doesn't hold where nothing is stable yet
};

// `wanted`, and where that leaves something open, `defaults`, whose min_agreement holds from a
// model's second version on.
GateLimits MergeLimits(const GateLimits& wanted, const GateLimits& defaults);

// InvalidArgument: a share outside 0..1, a negative latency, a batch outside 1..max_batch.
absl::Status CheckLimits(const GateLimits& limits, int max_batch);

v1::GateResult Top1Gate(const v1::Manifest& manifest, const GateLimits& limits);

// A self-test that failed never comes this far.
v1::GateResult SelfTestGate(const SelfTestResult& result, const GateLimits& limits);

v1::GateResult LatencyGate(absl::Duration median, int batch, const GateLimits& limits);

// Share of pictures for which both networks' first answers are the same.
struct Agreement {
  bool available = false;
  std::string with;    // "version 3", or why it isn't available
  bool first = false;  // nothing is stable yet
  int pictures = 0;
  double share = 0;
};
v1::GateResult AgreementGate(const Agreement& agreement, const GateLimits& limits);

// The first answers of the two compared; logits are [pictures, classes]. Equal ones: the lower
// class counts.
double ShareOfSameAnswers(std::span<const float> logits, std::span<const float> others,
                          int classes);

// Empty if one network's pictures mean the same to the other; else why not.
std::string WhyNotComparable(const v1::Manifest& manifest, const v1::Manifest& other);

// FailedPrecondition with name, value and limit if the gate isn't passed.
absl::Status CheckGate(const v1::GateResult& gate);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_GATES_H_
