// What the next request will ask for, as far as the last ones tell: so one whose headers are here
// can be judged before its message is read. Nothing is known while requests differ: a priority or
// a model that others don't have is never refused for what others wait for. Thread-safe.
#ifndef PYRAMID_SERVER_SERVING_DOOR_H_
#define PYRAMID_SERVER_SERVING_DOOR_H_

#include <cstdint>
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

  // Whether one that can't get what it is expected to wish for is refused. One in 16 is read all
  // the same: that is how another wish is heard of.
  bool Refuse();

 private:
  mutable absl::Mutex mutex_;
  Wish wish_ ABSL_GUARDED_BY(mutex_);
  int alike_ ABSL_GUARDED_BY(mutex_) = 0;  // requests in a row
  absl::Time differed_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  int64_t refused_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_DOOR_H_
