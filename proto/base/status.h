// Passing absl::Status on: RETURN_IF_ERROR, ASSIGN_OR_RETURN, and Annotate for one word of context
// per layer.
#ifndef PYRAMID_PROTO_BASE_STATUS_H_
#define PYRAMID_PROTO_BASE_STATUS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pyramid {

// The same code, the message preceded by "context: ". OK stays OK. Payloads are kept.
inline absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  if (status.ok()) return status;
  absl::Status annotated(status.code(), absl::StrCat(context, ": ", status.message()));
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    annotated.SetPayload(url, payload);
  });
  return annotated;
}

}  // namespace pyramid

#define RETURN_IF_ERROR(expression)                                         \
  do {                                                                      \
    if (absl::Status _status = (expression); !_status.ok()) return _status; \
  } while (false)

#define PYRAMID_CONCAT_INNER(a, b) a##b
#define PYRAMID_CONCAT(a, b) PYRAMID_CONCAT_INNER(a, b)

// ASSIGN_OR_RETURN(auto value, Function()): declares or assigns the value, or returns the error.
#define ASSIGN_OR_RETURN(target, expression) \
  PYRAMID_ASSIGN_OR_RETURN(PYRAMID_CONCAT(_status_or_, __LINE__), target, expression)
#define PYRAMID_ASSIGN_OR_RETURN(temporary, target, expression) \
  auto temporary = (expression);                                \
  if (!temporary.ok()) return temporary.status();               \
  target = *std::move(temporary)

#endif  // PYRAMID_PROTO_BASE_STATUS_H_
