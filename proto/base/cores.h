// The machine's cores that this process may use (taskset, cpusets).
#ifndef PYRAMID_PROTO_BASE_CORES_H_
#define PYRAMID_PROTO_BASE_CORES_H_

#include <sched.h>

#include <algorithm>
#include <thread>

namespace pyramid {

inline int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_CORES_H_
