// Who goes first wherever requests wait: the higher priority, then the earlier deadline, then who
// came first.
#ifndef PYRAMID_SERVER_SERVING_ORDER_H_
#define PYRAMID_SERVER_SERVING_ORDER_H_

#include <cstdint>
#include <tuple>

#include "absl/time/time.h"

namespace pyramid {

inline constexpr int kLowestPriority = 10;  // 1 is the highest
inline constexpr int kDefaultPriority = 5;  // of requests that ask for 0

struct Order {
  int priority = kDefaultPriority;
  absl::Time deadline = absl::InfiniteFuture();
  int64_t arrival = 0;  // counts up; given by the queue

  friend bool operator<(const Order& a, const Order& b) {
    return std::tie(a.priority, a.deadline, a.arrival) <
           std::tie(b.priority, b.deadline, b.arrival);
  }
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_ORDER_H_
