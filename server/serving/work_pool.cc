#include "server/serving/work_pool.h"

#include <pthread.h>

#include <algorithm>
#include <cassert>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/serving/pushback.h"
#include "server/serving/stand_back.h"

namespace pyramid {
namespace {

constexpr absl::Duration kPushback = absl::Milliseconds(100);

}  // namespace

WorkPool::WorkPool(std::string name, int threads, int max_queue, int nice)
    : name_(std::move(name)),
      max_queue_(max_queue),
      nice_(nice),
      all_(threads),
      most_large_(std::max(1, threads - 1)) {
  assert(threads > 0);
  threads_.reserve(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) {
    threads_.emplace_back([this] {
      pthread_setname_np(pthread_self(), name_.c_str());
      StandBack(nice_);
      Run();
    });
  }
}

WorkPool::~WorkPool() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

absl::Status WorkPool::Post(std::vector<Task> tasks, Order order, Size size) {
  absl::MutexLock lock(&mutex_);
  const size_t waiting = tasks_[0].size() + tasks_[1].size();
  if (waiting + tasks.size() > static_cast<size_t>(max_queue_)) {
    return WithPushback(absl::ResourceExhaustedError(absl::StrCat(
                            "the ", name_, " queue is full: ", waiting, " of ", max_queue_,
                            " tasks wait and ", tasks.size(), " more came; try again in ",
                            absl::ToInt64Milliseconds(kPushback), " ms")),
                        kPushback);
  }
  Tasks& queue = tasks_[static_cast<size_t>(size)];
  for (Task& task : tasks) {
    order.arrival = ++arrivals_;
    queue.emplace(order, std::move(task));
  }
  return absl::OkStatus();
}

int WorkPool::Ahead(const Order& order, Size size) const {
  Order last = order;
  last.arrival = std::numeric_limits<int64_t>::max();
  absl::MutexLock lock(&mutex_);
  const Tasks& queue = tasks_[static_cast<size_t>(size)];
  return static_cast<int>(std::distance(queue.begin(), queue.lower_bound(last)));
}

WorkPool::Tasks* WorkPool::Next() {
  Tasks& usual = tasks_[static_cast<size_t>(Size::kUsual)];
  Tasks& large = tasks_[static_cast<size_t>(Size::kLarge)];
  const bool large_may = !large.empty() && large_running_ < most_large_;
  if (usual.empty()) return large_may ? &large : nullptr;
  return large_may && large.begin()->first < usual.begin()->first ? &large : &usual;
}

void WorkPool::Run() {
  while (true) {
    Task task;
    bool large = false;
    {
      absl::MutexLock lock(&mutex_);
      const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return Next() != nullptr || (stopping_ && tasks_[0].empty() && tasks_[1].empty());
      };
      mutex_.Await(absl::Condition(&ready));
      Tasks* const queue = Next();
      if (queue == nullptr) return;  // stopping
      large = queue == &tasks_[static_cast<size_t>(Size::kLarge)];
      large_running_ += large;
      task = std::move(queue->begin()->second);
      queue->erase(queue->begin());
    }
    std::move(task)();
    task = nullptr;
    if (large) {
      absl::MutexLock lock(&mutex_);
      --large_running_;
    }
  }
}

}  // namespace pyramid
