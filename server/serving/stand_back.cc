#include "server/serving/stand_back.h"

#include <linux/sched/types.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace pyramid {
namespace {

constexpr uint64_t kSlice = 10'000'000;  // ns; an ordinary thread has 1 to 3 ms

}  // namespace

void StandBack(int nice) {
  const auto thread = static_cast<id_t>(syscall(SYS_gettid));  // Linux has a nice value a thread
  errno = 0;
  const int before = getpriority(PRIO_PROCESS, thread);
  if (nice > 0 && errno == 0) setpriority(PRIO_PROCESS, thread, before + nice);
  sched_attr attributes{};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
  attributes.sched_runtime = kSlice;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

}  // namespace pyramid
