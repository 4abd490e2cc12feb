#include "server/serving/gates.h"

#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr absl::string_view kNotAvailable = "not available";

// 0: not asked for.
double LimitOf(const std::optional<double>& limit) { return limit.value_or(0); }

absl::Status CheckShare(absl::string_view name, const std::optional<double>& share) {
  if (!share.has_value() || (*share >= 0 && *share <= 1)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is ", *share, "; use 0..1, 0 asks for nothing"));
}

// Fills in what follows from the rest. `measured` and `wanted` are texts, `at_least` says on which
// side of the limit the value must be.
void Judge(v1::GateResult& gate, absl::string_view measured, absl::string_view wanted,
           bool at_least) {
  const bool within =
      at_least ? gate.value() >= gate.limit() : gate.value() <= gate.limit();  // NaN: no
  gate.set_passed(!gate.asked() || (gate.available() && within));
  gate.set_text(absl::StrCat(gate.name(), ": ", measured));
  if (gate.asked()) absl::StrAppend(gate.mutable_text(), ", wanted ", wanted);
}

std::string Milliseconds(double seconds) { return absl::StrFormat("%.3g ms", seconds * 1e3); }

}  // namespace

GateLimits MergeLimits(const GateLimits& wanted, const GateLimits& defaults) {
  GateLimits merged = wanted;
  if (!merged.min_top1.has_value()) merged.min_top1 = defaults.min_top1;
  if (!merged.max_latency.has_value()) merged.max_latency = defaults.max_latency;
  if (!merged.latency_batch.has_value()) merged.latency_batch = defaults.latency_batch;
  if (!merged.min_agreement.has_value()) {
    merged.min_agreement = defaults.min_agreement;
    merged.agreement_from_the_second = true;
  }
  if (!merged.require_self_test.has_value()) merged.require_self_test = defaults.require_self_test;
  return merged;
}

absl::Status CheckLimits(const GateLimits& limits, int max_batch) {
  RETURN_IF_ERROR(CheckShare("min_top1", limits.min_top1));
  RETURN_IF_ERROR(CheckShare("min_agreement", limits.min_agreement));
  const absl::Duration latency = limits.max_latency.value_or(absl::ZeroDuration());
  if (latency < absl::ZeroDuration()) {
    return absl::InvalidArgumentError(absl::StrCat("max_latency is ", absl::FormatDuration(latency),
                                                   "; use more than 0, 0 asks for nothing"));
  }
  const int batch = limits.latency_batch.value_or(1);
  if (batch < 1 || batch > max_batch) {
    return absl::InvalidArgumentError(absl::StrCat("latency_batch is ", batch, "; use 1..",
                                                   max_batch,
                                                   ", the largest batch this server forms"));
  }
  return absl::OkStatus();
}

v1::GateResult Top1Gate(const v1::Manifest& manifest, const GateLimits& limits) {
  v1::GateResult gate;
  gate.set_name("top-1");
  gate.set_available(manifest.training().validated());
  gate.set_value(gate.available() ? manifest.training().val_top1() : 0);
  gate.set_limit(LimitOf(limits.min_top1));
  gate.set_asked(gate.limit() > 0);
  Judge(gate,
        gate.available() ? absl::StrFormat("%.4f", gate.value())
                         : absl::StrCat(kNotAvailable, " (the checkpoint isn't validated)"),
        absl::StrFormat("≥ %.4g", gate.limit()), /*at_least=*/true);
  return gate;
}

v1::GateResult SelfTestGate(const SelfTestResult& result, const GateLimits& limits) {
  v1::GateResult gate;
  gate.set_name("self-test");
  gate.set_available(result.available);
  gate.set_value(result.max_error);
  gate.set_limit(result.tolerance);
  // What can be tested must pass, asked for or not.
  gate.set_asked(result.available || limits.require_self_test.value_or(false));
  if (!result.available) {
    Judge(gate, absl::StrCat(kNotAvailable, " (the checkpoint has none)"), "one",
          /*at_least=*/false);
    return gate;
  }
  Judge(gate, absl::StrFormat("max error %.3g", gate.value()),
        absl::StrFormat("≤ %.3g", gate.limit()), /*at_least=*/false);
  return gate;
}

v1::GateResult LatencyGate(absl::Duration median, int batch, const GateLimits& limits) {
  v1::GateResult gate;
  gate.set_name("latency");
  gate.set_available(true);
  gate.set_value(absl::ToDoubleSeconds(median));
  gate.set_limit(absl::ToDoubleSeconds(limits.max_latency.value_or(absl::ZeroDuration())));
  gate.set_asked(gate.limit() > 0);
  Judge(gate, absl::StrCat(Milliseconds(gate.value()), " at batch ", batch),
        absl::StrCat("≤ ", Milliseconds(gate.limit())), /*at_least=*/false);
  return gate;
}

v1::GateResult AgreementGate(const Agreement& agreement, const GateLimits& limits) {
  v1::GateResult gate;
  gate.set_name("agreement");
  gate.set_available(agreement.available);
  gate.set_value(agreement.share);
  const bool holds = !(agreement.first && limits.agreement_from_the_second);
  gate.set_limit(holds ? LimitOf(limits.min_agreement) : 0);
  gate.set_asked(gate.limit() > 0);
  Judge(gate,
        agreement.available ? absl::StrFormat("%.4f of %d pictures with %s", agreement.share,
                                              agreement.pictures, agreement.with)
                            : absl::StrCat(kNotAvailable, " (", agreement.with, ")"),
        absl::StrFormat("≥ %.4g", gate.limit()), /*at_least=*/true);
  return gate;
}

double ShareOfSameAnswers(std::span<const float> logits, std::span<const float> others,
                          int classes) {
  const auto each = static_cast<size_t>(classes);
  if (each == 0 || logits.empty() || logits.size() != others.size()) return 0;
  const size_t pictures = logits.size() / each;
  const auto first = [each](std::span<const float> all, size_t picture) {
    const std::span<const float> one = all.subspan(picture * each, each);
    return std::max_element(one.begin(), one.end()) - one.begin();
  };
  size_t same = 0;
  for (size_t i = 0; i < pictures; ++i) same += first(logits, i) == first(others, i) ? 1 : 0;
  return static_cast<double>(same) / static_cast<double>(pictures);
}

std::string WhyNotComparable(const v1::Manifest& manifest, const v1::Manifest& other) {
  if (manifest.network().num_classes() != other.network().num_classes() ||
      !std::equal(manifest.labels().begin(), manifest.labels().end(), other.labels().begin(),
                  other.labels().end())) {
    return "the stable version has other classes";
  }
  if (!google::protobuf::util::MessageDifferencer::Equals(manifest.preprocessing(),
                                                          other.preprocessing())) {
    return "the stable version's preprocessing differs";
  }
  return "";
}

absl::Status CheckGate(const v1::GateResult& gate) {
  if (gate.passed()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("gate ", gate.text()));
}

}  // namespace pyramid
