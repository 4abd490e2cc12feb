// "Full; come back in so many milliseconds": a hint that travels with a status. rpc/ sends it as
// grpc-retry-pushback-ms.
#ifndef PYRAMID_SERVER_SERVING_PUSHBACK_H_
#define PYRAMID_SERVER_SERVING_PUSHBACK_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace pyramid {

inline constexpr absl::string_view kPushbackPayload = "pyramid/retry-pushback-ms";
inline constexpr absl::string_view kPredictedLatePayload = "pyramid/predicted-late";

inline absl::Status WithPushback(absl::Status status, absl::Duration pushback) {
  status.SetPayload(kPushbackPayload,
                    absl::Cord(absl::StrCat(absl::ToInt64Milliseconds(pushback))));
  return status;
}

// Milliseconds; -1: the status has no hint.
inline int64_t PushbackMillis(const absl::Status& status) {
  const auto payload = status.GetPayload(kPushbackPayload);
  int64_t millis = -1;
  if (!payload.has_value() || !absl::SimpleAtoi(std::string(*payload), &millis)) return -1;
  return millis;
}

// Marks a refusal that has another reason than a full queue: the answer would come too late.
inline absl::Status PredictedLate(absl::Status status) {
  status.SetPayload(kPredictedLatePayload, absl::Cord());
  return status;
}

inline bool IsPredictedLate(const absl::Status& status) {
  return status.GetPayload(kPredictedLatePayload).has_value();
}

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_PUSHBACK_H_
