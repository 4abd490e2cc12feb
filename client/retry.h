// When a refused call is worth repeating. Pure.
#ifndef PYRAMID_CLIENT_RETRY_H_
#define PYRAMID_CLIENT_RETRY_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace pyramid {

struct RetryPolicy {
  absl::Duration first = absl::Milliseconds(50);
  absl::Duration longest = absl::Seconds(5);
  absl::Duration patience = absl::Seconds(60);  // from the first try; no try starts later
};

// How long to wait before the next try, or nothing: give up. RESOURCE_EXHAUSTED and UNAVAILABLE are
// repeated, nothing else. `tries` done so far (≥ 1), `elapsed` since the first began, `jitter` in
// 0..1. A `pushback` from the server replaces the backoff; a negative one forbids another try (gRPC
// retry design A6).
std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, absl::StatusCode code,
                                         int tries, absl::Duration elapsed,
                                         std::optional<int64_t> pushback_ms, double jitter);

// The value of trailing metadata grpc-retry-pushback-ms. Anything but a number counts as negative,
// as the design says.
int64_t ParsePushback(absl::string_view value);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_RETRY_H_
