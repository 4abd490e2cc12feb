// Who a call is, in logs and trailing metadata: W3C trace context and a request id.
#ifndef PYRAMID_SERVER_SECURITY_TRACE_H_
#define PYRAMID_SERVER_SECURITY_TRACE_H_

#include <string>

#include "absl/strings/string_view.h"

namespace pyramid {

// Names of the headers, which are also the keys of the metadata.
inline constexpr char kTraceparent[] = "traceparent";
inline constexpr char kRequestId[] = "x-request-id";

struct TraceContext {
  std::string trace_id;   // 32 lower-case hex digits: the caller's, or new
  std::string parent_id;  // 16: of the server's part of the trace
  std::string flags;      // 2: the caller's; "00", not sampled, in a new trace

  std::string Header() const;  // "00-<trace_id>-<parent_id>-<flags>"
};

// Goes on with the trace of a `traceparent` header. One that is missing or against the
// specification (https://www.w3.org/TR/trace-context/) begins a new trace; it is never an error.
TraceContext ContinueTrace(absl::string_view traceparent);

// The caller's id if it is 1 to 128 printable ASCII characters without blanks, quotes and
// backslashes; else a new one of 32 hex digits. Never text that could play tricks on a log.
std::string RequestIdFrom(absl::string_view given);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_TRACE_H_
