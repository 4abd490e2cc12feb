#include "client/exit_code.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

constexpr absl::string_view kUsagePayload = "pyramid.client/usage";

}  // namespace

absl::Status UsageError(absl::string_view message) {
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kUsagePayload, absl::Cord());
  return status;
}

ExitCode ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kDone;
    case absl::StatusCode::kInvalidArgument:
      return status.GetPayload(kUsagePayload).has_value() ? kWrongUsage : kFailed;
    case absl::StatusCode::kNotFound:
      return kNotFound;
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return kRefused;
    case absl::StatusCode::kUnavailable:
      return kUnreachable;
    default:
      return kFailed;
  }
}

int Fail(const Environment& environment, const absl::Status& status) {
  std::string message = OneLine(status.message());
  if (message.empty()) message = absl::StatusCodeToString(status.code());
  *environment.err << absl::StrCat("pyramid: ", message, "\n") << std::flush;
  return ExitCodeOf(status);
}

std::string OneLine(absl::string_view text) {
  std::string line;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n' || c == '\r' || c == '\t') {
      if (!line.empty() && line.back() != ' ') line += ' ';
    } else if (byte < 0x20 || byte == 0x7f) {
      line += '?';
    } else {
      line += c;
    }
  }
  while (!line.empty() && line.back() == ' ') line.pop_back();
  return line;
}

}  // namespace pyramid
