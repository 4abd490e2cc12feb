#include "worker/failure.h"

#include <optional>
#include <string>

#include "absl/strings/cord.h"

namespace pyramid {
namespace {

constexpr char kUrl[] = "pyramid/failure-class";

}  // namespace

absl::Status WithFailure(absl::Status status, v1::FailureClass failure) {
  if (!status.ok()) status.SetPayload(kUrl, absl::Cord(v1::FailureClass_Name(failure)));
  return status;
}

v1::FailureClass FailureOf(const absl::Status& status) {
  if (status.ok()) return v1::FAILURE_CLASS_UNSPECIFIED;
  v1::FailureClass marked;
  if (const auto payload = status.GetPayload(kUrl);
      payload.has_value() && v1::FailureClass_Parse(std::string(*payload), &marked)) {
    return marked;
  }
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kFailedPrecondition:
      return v1::CONFIG;
    case absl::StatusCode::kDataLoss:
      return v1::DATA_CORRUPT;
    case absl::StatusCode::kResourceExhausted:
      return v1::OOM_HOST;
    case absl::StatusCode::kAborted:
      return v1::COMM;
    default:
      return v1::WORKER_LOST;
  }
}

int ExitCodeOf(const absl::Status& status) {
  if (status.ok()) return kExitDone;
  if (status.code() == absl::StatusCode::kInvalidArgument) return kExitUsage;
  if (status.code() == absl::StatusCode::kNotFound) return kExitNotFound;
  return kExitFailed;
}

}  // namespace pyramid
