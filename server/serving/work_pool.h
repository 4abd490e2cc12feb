// A few named threads and a bounded queue of tasks in front of them, in their Order.
//
// Large tasks never have all threads: while one is left to the others, a slow one delays nobody but
// its own kind.
#ifndef PYRAMID_SERVER_SERVING_WORK_POOL_H_
#define PYRAMID_SERVER_SERVING_WORK_POOL_H_

#include <array>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "server/serving/order.h"

namespace pyramid {

// Thread-safe. Post never blocks.
class WorkPool {
 public:
  using Task = absl::AnyInvocable<void() &&>;
  enum class Size { kUsual, kLarge };

  // `name`: of the threads, at most 15 characters, and in messages. `max_queue`: tasks waiting,
  // those that run not counted. `nice`: how many steps the threads stand back behind the others of
  // this process, 0..19.
  WorkPool(std::string name, int threads, int max_queue, int nice = 0);
  ~WorkPool();  // carries out what waits
  WorkPool(const WorkPool&) = delete;
  WorkPool& operator=(const WorkPool&) = delete;

  // All tasks or none; order.arrival is given here. ResourceExhausted: the queue is full;
  // PushbackMillis says when to come back.
  [[nodiscard]] absl::Status Post(std::vector<Task> tasks, Order order = {},
                                  Size size = Size::kUsual);

  // Tasks of this size that would go before one posted now.
  int Ahead(const Order& order, Size size) const;

  // That tasks of this size may have at a time.
  int threads(Size size) const { return size == Size::kLarge ? most_large_ : all_; }

 private:
  using Tasks = std::map<Order, Task>;

  void Run();
  Tasks* Next() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);  // null: nothing that may run

  const std::string name_;
  const int max_queue_;
  const int nice_;
  const int all_;         // threads
  const int most_large_;  // running at a time
  mutable absl::Mutex mutex_;
  std::array<Tasks, 2> tasks_ ABSL_GUARDED_BY(mutex_);  // by Size
  int large_running_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t arrivals_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_WORK_POOL_H_
