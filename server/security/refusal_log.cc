#include "server/security/refusal_log.h"

#include <utility>

#include "absl/time/clock.h"
#include "proto/base/grpc_status.h"
#include "proto/base/log.h"

namespace pyramid {

void RefusalLog::Add(absl::string_view method, const absl::Status& status) {
  const absl::Time now = absl::Now();
  int64_t count = 0;
  {
    absl::MutexLock lock(&mutex_);
    ++count_;
    if (now < next_) return;
    next_ = now + absl::Seconds(1);
    count = std::exchange(count_, 0);
  }
  log::Warning("call_refused", {{"method", method},
                                {"code", GrpcCodeName(status.code())},
                                {"why", status.message()},
                                {"calls", count}});
}

}  // namespace pyramid
