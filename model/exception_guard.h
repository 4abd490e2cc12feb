// The one place that catches what LibTorch, OpenCV and the standard library throw.
#ifndef PYRAMID_MODEL_EXCEPTION_GUARD_H_
#define PYRAMID_MODEL_EXCEPTION_GUARD_H_

#include <type_traits>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pyramid {

// Call within a catch block: what is being handled, as a Status. Out of memory is
// ResourceExhausted, anything else has `code` and the library's message without its backtrace.
// "what: message".
absl::Status StatusOfCurrentException(absl::string_view what, absl::StatusCode code);

// Runs `function`, which returns absl::Status or absl::StatusOr<T>.
template <typename Function>
auto Guard(absl::string_view what, absl::StatusCode code, Function&& function)
    -> std::invoke_result_t<Function> {
  try {
    return function();
  } catch (...) {
    return StatusOfCurrentException(what, code);
  }
}

}  // namespace pyramid

#endif  // PYRAMID_MODEL_EXCEPTION_GUARD_H_
