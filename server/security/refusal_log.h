// Calls that are refused for their key come in floods when one has expired: one line a second at
// most, with their number. Thread-safe.
#ifndef PYRAMID_SERVER_SECURITY_REFUSAL_LOG_H_
#define PYRAMID_SERVER_SECURITY_REFUSAL_LOG_H_

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace pyramid {

class RefusalLog {
 public:
  // Writes `call_refused`, or counts it for the next line. `method` as it is called over its port.
  void Add(absl::string_view method, const absl::Status& status);

 private:
  absl::Mutex mutex_;
  absl::Time next_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  int64_t count_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_REFUSAL_LOG_H_
