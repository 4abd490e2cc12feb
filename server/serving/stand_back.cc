#include "server/serving/stand_back.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <thread>

namespace pyramid {
namespace {

// As sched_setattr(2) has it; <linux/sched/types.h> and <sched.h> can't be included together.
struct SchedulingAttributes {
  uint32_t size = sizeof(SchedulingAttributes);
  uint32_t policy = 0;
  uint64_t flags = 0;
  int32_t nice = 0;
  uint32_t priority = 0;
  uint64_t runtime = 0;  // ns; of an ordinary thread: its slice
  uint64_t deadline = 0;
  uint64_t period = 0;
};

bool Get(int thread, SchedulingAttributes& attributes) {
  return syscall(SYS_sched_getattr, thread, &attributes, sizeof attributes, 0) == 0;
}

bool IsOrdinary(const SchedulingAttributes& attributes) {
  return attributes.policy == SCHED_OTHER || attributes.policy == SCHED_BATCH;
}

bool SetPolicy(int thread, SchedulingAttributes attributes, uint32_t policy) {
  attributes.policy = policy;
  return syscall(SYS_sched_setattr, thread, &attributes, 0) == 0;
}

// Of an ordinary thread; zero: the kernel's slice, 1 to 3 ms.
void Set(uint32_t policy, absl::Duration slice) {
  SchedulingAttributes attributes;
  if (!Get(0, attributes) || !IsOrdinary(attributes)) return;  // somebody's choice
  attributes.runtime = static_cast<uint64_t>(absl::ToInt64Nanoseconds(slice));
  SetPolicy(0, attributes, policy);
}

}  // namespace

void StandBack(int nice, absl::Duration slice) {
  const auto thread = static_cast<id_t>(syscall(SYS_gettid));  // Linux has a nice value a thread
  errno = 0;
  const int before = getpriority(PRIO_PROCESS, thread);
  if (nice > 0 && errno == 0) setpriority(PRIO_PROCESS, thread, before + nice);
  Set(SCHED_OTHER, slice);
}

// Whether there is a way back is tried while nothing depends on it.
bool StandAside() {
  SchedulingAttributes before;
  if (!Get(0, before) || !IsOrdinary(before)) return false;
  bool back = false;
  std::thread([&] {
    back = SetPolicy(0, before, SCHED_IDLE) && SetPolicy(0, before, before.policy);
  }).join();
  return back && SetPolicy(0, before, SCHED_IDLE);
}

void EndStandingAside(int thread) {
  SchedulingAttributes now;
  if (Get(thread, now)) SetPolicy(thread, now, SCHED_OTHER);
}

TurnTaking::TurnTaking() { Set(SCHED_BATCH, absl::Microseconds(500)); }

TurnTaking::~TurnTaking() { Set(SCHED_OTHER, absl::ZeroDuration()); }

}  // namespace pyramid
