// A few named threads and a bounded queue of tasks in front of them, first come first served.
#ifndef PYRAMID_SERVER_SERVING_WORK_POOL_H_
#define PYRAMID_SERVER_SERVING_WORK_POOL_H_

#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace pyramid {

// Thread-safe. Post never blocks.
class WorkPool {
 public:
  using Task = absl::AnyInvocable<void() &&>;

  // `name`: of the threads, at most 15 characters, and in messages. `max_queue`: tasks waiting,
  // those that run not counted.
  WorkPool(std::string name, int threads, int max_queue);
  ~WorkPool();  // carries out what waits
  WorkPool(const WorkPool&) = delete;
  WorkPool& operator=(const WorkPool&) = delete;

  // All tasks or none. ResourceExhausted: the queue is full; PushbackMillis says when to come back.
  [[nodiscard]] absl::Status Post(std::vector<Task> tasks);

 private:
  void Run();

  const std::string name_;
  const int max_queue_;
  absl::Mutex mutex_;
  std::deque<Task> tasks_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_WORK_POOL_H_
