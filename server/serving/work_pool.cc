#include "server/serving/work_pool.h"

#include <pthread.h>

#include <cassert>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/serving/pushback.h"

namespace pyramid {
namespace {

constexpr absl::Duration kPushback = absl::Milliseconds(100);

}  // namespace

WorkPool::WorkPool(std::string name, int threads, int max_queue)
    : name_(std::move(name)), max_queue_(max_queue) {
  assert(threads > 0);
  threads_.reserve(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) {
    threads_.emplace_back([this] {
      pthread_setname_np(pthread_self(), name_.c_str());
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

absl::Status WorkPool::Post(std::vector<Task> tasks) {
  absl::MutexLock lock(&mutex_);
  if (tasks_.size() + tasks.size() > static_cast<size_t>(max_queue_)) {
    return WithPushback(absl::ResourceExhaustedError(absl::StrCat(
                            "the ", name_, " queue is full: ", tasks_.size(), " of ", max_queue_,
                            " tasks wait and ", tasks.size(), " more came; try again in ",
                            absl::ToInt64Milliseconds(kPushback), " ms")),
                        kPushback);
  }
  for (Task& task : tasks) tasks_.push_back(std::move(task));
  return absl::OkStatus();
}

void WorkPool::Run() {
  while (true) {
    Task task;
    {
      absl::MutexLock lock(&mutex_);
      const auto ready = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
        return stopping_ || !tasks_.empty();
      };
      mutex_.Await(absl::Condition(&ready));
      if (tasks_.empty()) return;  // stopping
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    std::move(task)();
  }
}

}  // namespace pyramid
