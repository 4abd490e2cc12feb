// Collects pictures from many requests into batches for one loaded model version and runs them.
//
// A batch is what gathered while the last one ran: an idle network starts at once, unless
// `max_delay` tells it to wait for company. batch_queue.h says who is admitted, who goes first and
// where a batch is cut. A picture that has no time left or whose caller is gone is answered without
// reaching the network. Models take turns on the device.
//
// Room is taken first (Admit), so that nothing is decoded that the queue then refuses. Thread-safe;
// nothing but Drain blocks.
#ifndef PYRAMID_SERVER_SERVING_BATCHER_H_
#define PYRAMID_SERVER_SERVING_BATCHER_H_

#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "model/classifier.h"
#include "proto/base/clock.h"
#include "server/metrics.h"
#include "server/serving/batch_queue.h"
#include "server/serving/device_turns.h"

namespace pyramid {

class Batcher {
 public:
  struct Options {
    int max_batch = 32;  // pictures
    absl::Duration max_delay =
        absl::ZeroDuration();             // of the oldest picture while the network is idle
    int max_queue = 256;                  // pictures admitted, not yet in a batch
    int threads = 1;                      // of a pass while no other runs or waits
    bool decoded_here = false;            // pictures are decoded by the cores that compute
    std::shared_ptr<DeviceTurns> device;  // shared by models; null: its own, a pass at a time
  };
  using Answer = BatchQueue::Answer;
  using Request = BatchQueue::Request;
  // `done` is called exactly once, on a batch thread, without a lock; must be short.
  //   DeadlineExceeded   the deadline passed before the batch started
  //   ResourceExhausted  IsPredictedLate: it would have passed before the answer
  //   Cancelled          `cancelled` was set before the batch started
  //   InvalidArgument    a value isn't finite; its batch mates don't notice
  //   else               the network's error, for every picture of the batch
  using Picture = BatchQueue::Picture;

  // Room for a request's pictures in the queue, given back when this goes. Must not outlive the
  // batcher. Not thread-safe.
  class Room {
   public:
    Room() = default;
    Room(Room&& other) noexcept;
    Room& operator=(Room&& other) noexcept;
    ~Room();
    int pictures() const { return pictures_; }

   private:
    friend class Batcher;
    Room(Batcher* batcher, BatchQueue::Ticket ticket, int pictures)
        : batcher_(batcher), ticket_(ticket), pictures_(pictures) {}
    Batcher* batcher_ = nullptr;
    BatchQueue::Ticket ticket_;  // valid while there are pictures_
    int pictures_ = 0;
  };

  // `classifier`, `metrics` and `clock` must outlive the batcher.
  Batcher(Classifier& classifier, const Options& options, ModelMetrics& metrics, int64_t version,
          Clock& clock = Clock::Real());
  ~Batcher();  // Drain
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;

  // Room for all of a request's pictures or for none.
  //   ResourceExhausted  the queue is full, or IsPredictedLate: the answer would come after the
  //                      deadline; PushbackMillis says when to come back
  //   InvalidArgument    more than max_queue at once
  //   Unavailable        draining
  [[nodiscard]] absl::StatusOr<Room> Admit(const Request& request);

  // Whether Admit would. ResourceExhausted as Admit; OK also when something else is wrong.
  [[nodiscard]] absl::Status Check(const Request& request);

  // Queues the pictures beside each other. `room` has at least as many; what is left of it can be
  // used later.
  void Submit(Room& room, std::vector<Picture> pictures);

  // ResourceExhausted, IsPredictedLate, once a picture of `room` can't be answered in time any
  // more, even alone. `room` isn't empty.
  [[nodiscard]] absl::Status CheckInTime(const Room& room);

  // Admits no more, waits until what was admitted has been answered or given back, and ends the
  // batch threads.
  void Drain();

  const Options& options() const { return options_; }

 private:
  struct Cut : BatchQueue::Cut {
    int threads = 1;  // for the batch
  };
  using Turn = DeviceTurns::Turn;

  void Run();
  // What the batch thread does next; a turn is held if there is a batch in it. False: drained.
  bool Next(Cut& cut, Turn& turn);
  void Refuse(std::vector<BatchQueue::Waiting>& pictures, const absl::Status& status,
              ModelMetrics::Rejection reason);
  void RunBatch(Cut& cut, Turn& turn, std::vector<float>& memory);
  DeviceOutlook Look(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void GiveBack(BatchQueue::Ticket ticket, int pictures);

  Classifier& classifier_;
  const Options options_;
  ModelMetrics& metrics_;
  const int64_t version_;
  Clock& clock_;
  const std::shared_ptr<DeviceTurns> device_;
  const int user_;  // of the device

  absl::Mutex mutex_;
  BatchQueue queue_ ABSL_GUARDED_BY(mutex_);
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t news_ ABSL_GUARDED_BY(mutex_) = 0;       // counts what the batch threads should look at
  bool fetching_ ABSL_GUARDED_BY(mutex_) = false;  // a batch thread waits for its turn
  absl::Time crowded_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();  // last
  std::vector<std::thread> threads_;  // as many as passes may run at a time
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_BATCHER_H_
