#include "server/grpc_log.h"

#include <grpc/support/log.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/base/log.h"

namespace pyramid {
namespace {

constexpr int kLinesASecond = 10;

ABSL_CONST_INIT absl::Mutex g_mutex(absl::kConstInit);
int64_t g_second ABSL_GUARDED_BY(g_mutex) = 0;
int g_lines ABSL_GUARDED_BY(g_mutex) = 0;
int64_t g_left_out ABSL_GUARDED_BY(g_mutex) = 0;

void Write(gpr_log_func_args* args) {
  int64_t left_out = 0;
  {
    absl::MutexLock lock(&g_mutex);
    const int64_t second = absl::ToUnixSeconds(absl::Now());
    if (second != g_second) {
      g_second = second;
      g_lines = 0;
    }
    if (++g_lines > kLinesASecond) {
      ++g_left_out;
      return;
    }
    left_out = std::exchange(g_left_out, 0);
  }
  const char* slash = std::strrchr(args->file, '/');
  log::Warning("grpc", {{"message", args->message},
                        {"file", slash == nullptr ? args->file : slash + 1},
                        {"line", args->line},
                        {"left_out", left_out}});
}

}  // namespace

void LogWhatGrpcSays() { gpr_set_log_function(&Write); }

}  // namespace pyramid
