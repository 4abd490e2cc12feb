// The threads that share one forward pass.
//
// A pass runs the same function on every thread of a team; each takes its share of the rows and
// waits for the others where it needs their results. One team exists per process: cores are shared,
// so two passes at once don't get two sets of threads. A pass that finds the team busy runs on its
// caller's thread alone.
#ifndef PYRAMID_MODEL_THREAD_TEAM_H_
#define PYRAMID_MODEL_THREAD_TEAM_H_

#include <atomic>
#include <cstdint>

#include "absl/functional/function_ref.h"

namespace pyramid {

// Lets `size` threads wait for each other, again and again. Spins for some microseconds, then
// sleeps.
class TeamBarrier {
 public:
  void Reset(int size) { size_ = size; }
  void Wait();

 private:
  int size_ = 1;
  std::atomic<uint32_t> arrived_{0};
  std::atomic<uint32_t> round_{0};
};

struct Share {
  int64_t begin = 0;
  int64_t end = 0;
};

// The part of [0, n) that is `rank`'s of `size`, cut at multiples of `grain`, as even as that
// allows.
Share ShareOf(int64_t n, int64_t grain, int rank, int size);

// What one thread of a team sees. `size` 1: Sync does nothing.
class TeamMember {
 public:
  TeamMember(int rank, int size, TeamBarrier* barrier)
      : rank_(rank), size_(size), barrier_(barrier) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  void Sync() const {
    if (size_ > 1) barrier_->Wait();
  }
  Share Mine(int64_t n, int64_t grain) const { return ShareOf(n, grain, rank_, size_); }

 private:
  int rank_;
  int size_;
  TeamBarrier* barrier_;
};

// Calls fn(0), …, fn(n - 1) on threads of their own at the same time, 0 on the caller's; returns
// when all are done. n is at most `wanted` and the caller's ThreadLimit, and 1 while another caller
// has the team. fn gets (rank, n). fn must not throw and must not call this.
void RunOnTeam(int wanted, absl::FunctionRef<void(int rank, int size)> fn);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_THREAD_TEAM_H_
