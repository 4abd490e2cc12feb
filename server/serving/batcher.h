// Collects pictures from many requests into batches for one loaded model version.
//
// A batch is what gathered while the last one ran: an idle network starts at once, unless
// `max_delay` tells it to wait for company. It is cut at `max_batch` pictures, where the next
// picture has another size, and at as many pixels as `max_batch` pictures of 224x224 have (a single
// picture may have more). Arrival order is kept. A picture whose deadline has passed or whose
// caller is gone is answered without reaching the network.
//
// Room is taken first (Admit), so that nothing is decoded that the queue then refuses. Thread-safe;
// nothing but Drain blocks.
#ifndef PYRAMID_SERVER_SERVING_BATCHER_H_
#define PYRAMID_SERVER_SERVING_BATCHER_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "model/classifier.h"
#include "proto/base/clock.h"
#include "server/metrics.h"

namespace pyramid {

// Set once the caller no longer wants the answer; null: it always does.
using CancelFlag = std::shared_ptr<const std::atomic<bool>>;

class Batcher {
 public:
  // The most pictures of height x width in one batch, at least 1.
  static int MaxBatchOf(int max_batch, int height, int width);

  struct Options {
    int max_batch = 32;  // pictures
    absl::Duration max_delay =
        absl::ZeroDuration();  // of the oldest picture while the network is idle
    int max_queue = 256;       // pictures admitted, not yet in a batch
  };
  struct Answer {
    std::vector<float> logits;
    absl::Duration queue;    // from Submit to the start of the forward pass
    absl::Duration forward;  // of the whole batch
  };
  using Done = absl::AnyInvocable<void(absl::StatusOr<Answer>) &&>;
  struct Picture {
    std::vector<float> pixels;  // [channels, height, width], normalised
    int height = 0;
    int width = 0;
    absl::Time deadline = absl::InfiniteFuture();
    CancelFlag cancelled;
    // Called exactly once, on the batch thread, without a lock; must be short.
    //   DeadlineExceeded  `deadline` passed before the batch started
    //   Cancelled         `cancelled` was set before the batch started
    //   else              the network's error, for every picture of the batch
    Done done;
  };

  // Room for pictures in the queue, given back when this goes. Must not outlive the batcher. Not
  // thread-safe.
  class Room {
   public:
    Room() = default;
    Room(Room&& other) noexcept;
    Room& operator=(Room&& other) noexcept;
    ~Room();
    int pictures() const { return pictures_; }

   private:
    friend class Batcher;
    Room(Batcher* batcher, int pictures) : batcher_(batcher), pictures_(pictures) {}
    Batcher* batcher_ = nullptr;
    int pictures_ = 0;
  };

  // `classifier`, `metrics` and `clock` must outlive the batcher.
  Batcher(Classifier& classifier, const Options& options, ModelMetrics& metrics, int64_t version,
          Clock& clock = Clock::Real());
  ~Batcher();  // Drain
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;

  // Room for all of a request's pictures or for none.
  //   ResourceExhausted  the queue is full; PushbackMillis says when to come back
  //   InvalidArgument    more than max_queue at once
  //   Unavailable        draining
  [[nodiscard]] absl::StatusOr<Room> Admit(int pictures);

  // Queues the pictures beside each other. `room` has at least as many; what is left of it can be
  // used later.
  void Submit(Room& room, std::vector<Picture> pictures);

  // Admits no more, waits until what was admitted has been answered or given back, and ends the
  // batch thread.
  void Drain();

  const Options& options() const { return options_; }

 private:
  struct Waiting {
    Picture picture;
    absl::Time arrival;
  };
  struct Work {  // what the batch thread does next
    std::vector<Waiting> batch;
    std::vector<Waiting> expired;
    std::vector<Waiting> cancelled;
  };

  void Run();
  bool Next(Work& work);  // false: drained
  void RunBatch(std::vector<Waiting> batch);
  void GiveBack(int pictures);

  Classifier& classifier_;
  const Options options_;
  ModelMetrics& metrics_;
  const int64_t version_;
  Clock& clock_;

  absl::Mutex mutex_;
  std::deque<Waiting> queue_ ABSL_GUARDED_BY(mutex_);
  int room_taken_ ABSL_GUARDED_BY(mutex_) = 0;  // admitted, not yet submitted
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool news_ ABSL_GUARDED_BY(mutex_) = false;               // the batch thread should look again
  double seconds_per_picture_ ABSL_GUARDED_BY(mutex_) = 0;  // moving average; 0: not measured yet
  std::thread thread_;
};

// The policy, as a pure function of the queue.
struct WaitingPicture {
  int height = 0;
  int width = 0;
  absl::Time arrival;
  absl::Time deadline = absl::InfiniteFuture();
  bool cancelled = false;
};
enum class Verdict { kWait, kRun, kExpired, kCancelled };
struct BatchCut {
  std::vector<Verdict> verdicts;  // one a picture
  absl::Time look_again =
      absl::InfiniteFuture();  // when nothing runs: the moment at which something will
};
// `draining`: don't wait for company.
BatchCut CutBatch(std::span<const WaitingPicture> queue, absl::Time now,
                  const Batcher::Options& options, bool draining);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_BATCHER_H_
