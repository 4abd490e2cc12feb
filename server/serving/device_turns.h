// Models share a device: so many forward passes at a time, and who has used the device least goes
// next.
//
// Use is counted in seconds from the moment a user last had nothing to do: a model that has been
// idle can't claim what it didn't use, and one of long batches gets fewer of them. Thread-safe.
#ifndef PYRAMID_SERVER_SERVING_DEVICE_TURNS_H_
#define PYRAMID_SERVER_SERVING_DEVICE_TURNS_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace pyramid {

// What a request that comes now finds.
struct DeviceOutlook {
  bool busy = false;                              // as many passes run as may
  absl::Duration free_in = absl::ZeroDuration();  // until the first of them is expected to end
  int rivals = 0;                                 // other users that run or wait
  int running = 0;                                // passes, whoever's
  int instances = 1;
  bool guests = false;
  bool alone = false;  // a pass that starts now has all threads to itself; its user says so
};

class DeviceTurns {
 public:
  // The right to run one forward pass; given back when this goes. Not thread-safe.
  class Turn {
   public:
    Turn() = default;
    Turn(Turn&& other) noexcept;
    Turn& operator=(Turn&& other) noexcept;
    ~Turn() { GiveBack(absl::ZeroDuration()); }
    bool held() const { return device_ != nullptr; }
    void Expect(absl::Time end);         // of the pass
    void GiveBack(absl::Duration used);  // nothing if it isn't held

   private:
    friend class DeviceTurns;
    Turn(DeviceTurns* device, int64_t number) : device_(device), number_(number) {}
    DeviceTurns* device_ = nullptr;
    int64_t number_ = 0;
  };

  // Something else computes on the device while this lives, outside all turns: loading, for
  // example.
  class Guest {
   public:
    explicit Guest(DeviceTurns& device) : device_(device) { ++device_.guests_; }
    ~Guest() { --device_.guests_; }
    Guest(const Guest&) = delete;
    Guest& operator=(const Guest&) = delete;

   private:
    DeviceTurns& device_;
  };

  explicit DeviceTurns(int instances = 1);  // passes at a time
  DeviceTurns(const DeviceTurns&) = delete;
  DeviceTurns& operator=(const DeviceTurns&) = delete;

  int instances() const { return instances_; }

  // A user, such as one model version; Leave when none of its turns is held or waited for.
  int Join();
  void Leave(int user);

  // Waits for a turn.
  Turn Take(int user);

  DeviceOutlook Look(int user, absl::Time now) const;

 private:
  struct Use {
    double seconds = 0;
    int active = 0;  // turns held or waited for
  };
  struct Running {
    int user = 0;
    absl::Time end = absl::InfinitePast();  // as expected
  };
  struct Waiter {
    int user = 0;
    int64_t turn = 0;
  };

  int64_t NextTurn() const ABSL_SHARED_LOCKS_REQUIRED(mutex_);  // of the waiters
  void End(int64_t number, absl::Duration used);

  const int instances_;
  std::atomic<int> guests_{0};
  mutable absl::Mutex mutex_;
  std::map<int, Use> users_ ABSL_GUARDED_BY(mutex_);
  std::vector<Waiter> waiters_ ABSL_GUARDED_BY(mutex_);
  std::map<int64_t, Running> running_ ABSL_GUARDED_BY(mutex_);
  double reached_ ABSL_GUARDED_BY(mutex_) = 0;  // use at which the last turn was given
  int64_t turns_ ABSL_GUARDED_BY(mutex_) = 0;
  int joined_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_DEVICE_TURNS_H_
