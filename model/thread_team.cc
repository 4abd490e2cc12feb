#include "model/thread_team.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "model/thread_limit.h"

namespace pyramid {
namespace {

// About 50 µs (a pause takes 140 cycles): longer than the wait between two layers, shorter than a
// scheduler's slice.
constexpr int kSpins = 1200;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits until `value` isn't `old` any more.
void WaitWhile(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// Where each thread of a pass runs: on cores of their own, the caller where it is. The kernel
// prefers to wake a thread on the core of the one that wakes it and separates the two only at its
// next look, which is after most passes are over.
class Cores {
 public:
  // The cores that the calling thread may use, from the one that it runs on. Empty, which leaves
  // everything to the kernel: fewer than `wanted`.
  explicit Cores(int wanted) {
    cpu_set_t set;
    CPU_ZERO(&set);
    const int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof set, &set) != 0 || CPU_COUNT(&set) < wanted) return;
    for (int i = 0; i < CPU_SETSIZE && static_cast<int>(cores_.size()) < wanted; ++i) {
      const int core = (here + i) % CPU_SETSIZE;
      if (CPU_ISSET(static_cast<size_t>(core), &set)) cores_.push_back(core);
    }
  }

  // Moves the calling thread, of this rank, to its core. It stays there until it is moved again.
  void Take(int rank) const {
    if (cores_.empty() || sched_getcpu() == cores_[static_cast<size_t>(rank)]) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(static_cast<size_t>(cores_[static_cast<size_t>(rank)]), &set);
    sched_setaffinity(0, sizeof set, &set);  // without it the pass is only slower
  }

 private:
  absl::InlinedVector<int, 32> cores_;
};

class Team {
 public:
  ~Team() {
    stopping_.store(true);
    for (auto& helper : helpers_) {
      helper->work.fetch_add(1, std::memory_order_release);
      helper->work.notify_one();
    }
    for (auto& helper : helpers_) helper->thread.join();
  }

  void Run(int wanted, absl::FunctionRef<void(int, int)> fn) {
    std::unique_lock<std::mutex> lock;
    if (wanted > 1) lock = std::unique_lock<std::mutex>(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      fn(0, 1);
      return;
    }
    while (static_cast<int>(helpers_.size()) < wanted - 1) AddHelper();
    fn_.emplace(fn);
    size_ = wanted;
    cores_.emplace(wanted);
    pending_.store(static_cast<uint32_t>(wanted - 1), std::memory_order_relaxed);
    for (int i = 0; i < wanted - 1; ++i) {
      helpers_[static_cast<size_t>(i)]->work.fetch_add(1, std::memory_order_release);
      helpers_[static_cast<size_t>(i)]->work.notify_one();
    }
    fn(0, wanted);
    for (uint32_t left = pending_.load(std::memory_order_acquire); left != 0;
         left = pending_.load(std::memory_order_acquire)) {
      WaitWhile(pending_, left);
    }
  }

 private:
  struct Helper {
    std::atomic<uint32_t> work{0};
    std::thread thread;
  };

  void AddHelper() {
    const int rank = static_cast<int>(helpers_.size()) + 1;
    helpers_.push_back(std::make_unique<Helper>());
    Helper& helper = *helpers_.back();
    helper.thread = std::thread([this, &helper, rank] {
      pthread_setname_np(pthread_self(), "forward");
      for (uint32_t seen = 0;;) {
        WaitWhile(helper.work, seen);
        ++seen;
        if (stopping_.load()) return;
        cores_->Take(rank);
        (*fn_)(rank, size_);
        if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
      }
    });
  }

  std::mutex mutex_;  // held by the pass that has the team
  std::vector<std::unique_ptr<Helper>> helpers_;
  std::optional<absl::FunctionRef<void(int, int)>> fn_;
  std::optional<Cores> cores_;
  int size_ = 1;
  std::atomic<uint32_t> pending_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace

void TeamBarrier::Wait() {
  const uint32_t round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    round_.notify_all();
    return;
  }
  WaitWhile(round_, round);
}

Share ShareOf(int64_t n, int64_t grain, int rank, int size) {
  const int64_t pieces = (n + grain - 1) / grain;
  return {std::min(n, pieces * rank / size * grain),
          std::min(n, pieces * (rank + 1) / size * grain)};
}

void RunOnTeam(int wanted, absl::FunctionRef<void(int rank, int size)> fn) {
  static Team team;
  team.Run(ThreadLimit::Of(wanted), fn);
}

}  // namespace pyramid
