// What the next request will ask for, as far as the last ones tell: so one whose headers are here
// can be judged before its message is read. Nothing is known while requests differ. The first ones
// of a priority or a model that nobody had for a minute may be refused for what others wait for,
// until one of them has been read (Refuse); for a minute nobody is then. Thread-safe.
#ifndef PYRAMID_SERVER_SERVING_DOOR_H_
#define PYRAMID_SERVER_SERVING_DOOR_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/serving/batch_queue.h"
#include "server/serving/work_pool.h"

namespace pyramid {

class Door {
 public:
  struct Wish {
    std::string model;
    int64_t version = 0;                   // as named, 0: none
    BatchQueue::Request pictures;          // `deadline` and `until_ready` aren't looked at
    std::optional<WorkPool::Size> decode;  // none: tensors
    bool operator==(const Wish& other) const;
  };

  // A request has been read.
  void Read(const Wish& wish, absl::Time now);

  // What the last 32 requests, and all of the last minute, wished for.
  std::optional<Wish> Expect(absl::Time now) const;

  // Whether one that can't get what it is expected to wish for is refused. One in 16, 40 a second
  // at most, is read all the same: that is how another wish is heard of.
  bool Refuse(absl::Time now);

  // Of a call that is let in, until its message has been read and it is judged for what it is.
  // Must not outlive the door.
  class Pass {
   public:
    Pass() = default;
    Pass(Pass&& other) noexcept;
    Pass& operator=(Pass&& other) noexcept;
    ~Pass();

   private:
    friend class Door;
    Pass(Door* door, int64_t number) : door_(door), number_(number) {}
    Door* door_ = nullptr;
    int64_t number_ = 0;
  };
  Pass Enter(absl::Time now);
  // Passes of the last 25 ms: they will want room before one that comes now does. Whoever takes
  // longer to send doesn't keep a place meanwhile.
  int Reading(absl::Time now);

 private:
  void Leave(int64_t number);

  mutable absl::Mutex mutex_;
  Wish wish_ ABSL_GUARDED_BY(mutex_);
  int alike_ ABSL_GUARDED_BY(mutex_) = 0;  // requests in a row
  absl::Time differed_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  int64_t refused_ ABSL_GUARDED_BY(mutex_) = 0;  // since the last that wasn't
  absl::Time read_all_the_same_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();  // last
  int64_t entered_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<int64_t, absl::Time> reading_ ABSL_GUARDED_BY(mutex_);  // by number, so by time
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_DOOR_H_
