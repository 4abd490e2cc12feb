#include "client/retry.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/numbers.h"

namespace pyramid {

std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, absl::StatusCode code,
                                         int tries, absl::Duration elapsed,
                                         std::optional<int64_t> pushback_ms, double jitter) {
  if (code != absl::StatusCode::kResourceExhausted && code != absl::StatusCode::kUnavailable) {
    return std::nullopt;
  }
  absl::Duration delay;
  if (pushback_ms.has_value()) {
    if (*pushback_ms < 0) return std::nullopt;
    delay = absl::Milliseconds(*pushback_ms);
  } else {
    // Half of the wait is random, so that callers refused together don't return together.
    const absl::Duration full =
        std::min(policy.longest, policy.first * std::pow(2.0, std::min(tries - 1, 20)));
    delay = full * (0.5 + 0.5 * std::clamp(jitter, 0.0, 1.0));
  }
  if (elapsed + delay > policy.patience) return std::nullopt;
  return delay;
}

int64_t ParsePushback(absl::string_view value) {
  int64_t milliseconds = 0;
  return absl::SimpleAtoi(value, &milliseconds) ? milliseconds : -1;
}

}  // namespace pyramid
