// The pictures that wait for one loaded model version: who is admitted, who goes first, which ones
// make a batch. Policy alone: time is an argument, nothing waits. Not thread-safe; batcher.h is
// the shell.
//
// Order: priority, then the earliest deadline, then arrival. A request is admitted if there is room
// for its pictures and if, by the batch times measured so far, it can be answered in time without
// making one of its own priority late that has been admitted. A batch is what waits when the
// network is free. It is cut at `max_batch` pictures, where the next one has another size, at as
// many pixels as `max_batch` pictures of 224x224 have (a single picture may have more), and where
// it would take longer than one of its pictures has. No picture is put into a batch that takes more
// than half of the time it came with: who arrives while such a batch runs can still be in the next.
// Pictures that have so little time left that the network would do less than half of its work are
// given up: serving them keeps those behind them waiting until they have as little (Nexus, SOSP
// 2019).
#ifndef PYRAMID_SERVER_SERVING_BATCH_QUEUE_H_
#define PYRAMID_SERVER_SERVING_BATCH_QUEUE_H_

#include <atomic>
#include <climits>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/base/pieces.h"
#include "server/serving/batch_times.h"
#include "server/serving/device_turns.h"
#include "server/serving/order.h"

namespace pyramid {

// Set once the caller no longer wants the answer; null: it always does.
using CancelFlag = std::shared_ptr<const std::atomic<bool>>;

class BatchQueue {
  struct Line;

 public:
  struct Options {
    int max_batch = 32;                               // pictures
    absl::Duration max_delay = absl::ZeroDuration();  // of the oldest one while the network is idle
    int max_queue = 256;                              // pictures admitted, not yet in a batch
    int threads = 1;                                  // of a pass that is alone; others share them
    bool decoded_here = false;  // pictures are decoded by the cores that compute
  };
  struct Answer {
    std::vector<float> logits;
    absl::Duration queue;    // from Submit to the start of the forward pass
    absl::Duration forward;  // of the whole batch
  };
  struct Picture {
    std::vector<float> pixels;  // [channels, height, width], normalised
    // In place of `pixels`: the floats where they came in, perhaps unaligned. Live until `done`.
    Pieces values;
    bool refuse_non_finite = false;
    int height = 0;
    int width = 0;
    CancelFlag cancelled;
    absl::AnyInvocable<void(absl::StatusOr<Answer>) &&> done;
  };
  struct Request {
    int pictures = 1;
    int height = 224;  // of the largest picture
    int width = 224;
    int priority = kDefaultPriority;
    absl::Time deadline = absl::InfiniteFuture();
    absl::Duration until_ready = absl::ZeroDuration();  // until they are submitted, as expected
  };
  struct Waiting {
    Picture picture;
    absl::Time arrival;
  };
  // What has left the queue.
  struct Cut {
    std::vector<Waiting> batch;
    std::vector<Waiting> expired;  // the deadline has passed
    std::vector<Waiting> late;     // it would pass before the answer
    std::vector<Waiting> cancelled;
    bool alone = false;                              // the batch: see Next
    bool wants_device = false;                       // a batch waits for it
    absl::Time look_again = absl::InfiniteFuture();  // if nothing comes before
    int pictures() const {
      return static_cast<int>(batch.size() + expired.size() + late.size() + cancelled.size());
    }
  };
  using Ticket = std::map<Order, Line>::iterator;  // of an admitted request

  explicit BatchQueue(const Options& options) : options_(options) {}

  //   ResourceExhausted  the queue is full, or IsPredictedLate; PushbackMillis says when to come
  //                      back
  absl::StatusOr<Ticket> Admit(const Request& request, const DeviceOutlook& device, absl::Time now);
  // Whether Admit would.
  absl::Status Check(const Request& request, const DeviceOutlook& device, absl::Time now) const;
  // Of the admitted pictures. A ticket is used up with the last one.
  void Submit(Ticket ticket, std::vector<Picture> pictures, absl::Time now);
  void GiveBack(Ticket ticket, int pictures);
  // Whether an admitted picture that isn't submitted yet can't be answered in time any more.
  bool TooLate(Ticket ticket, absl::Time now) const;

  // Takes out what no longer needs the network and, `with_device`, the next batch. `draining`:
  // don't wait for company. `alone`: no other pass runs; if nothing is left to wait either, the
  // batch is alone too.
  Cut Next(absl::Time now, bool draining, bool with_device, bool alone = false);

  // Of passes that have all threads to themselves, and of the others: that's what a load makes.
  BatchTimes& times(bool alone = false) { return alone ? alone_times_ : times_; }
  // How long a picture without deadline that came now would wait.
  absl::Duration PredictedWait(const DeviceOutlook& device) const;
  int waiting() const { return waiting_; }  // pictures

 private:
  struct Line {  // of one request
    int64_t pixels = 0;
    int most = INT_MAX;  // pictures in a batch
    bool trial = false;  // runs though the batch times are against it
    int reserved = 0;    // admitted, not submitted: being decoded
    std::vector<Waiting> ready;
    int waiting() const { return reserved + static_cast<int>(ready.size()); }
  };

  // Whether the pass of a request that came now would be alone.
  bool AloneNow(const DeviceOutlook& device) const { return device.alone && waiting_ == 0; }
  absl::StatusOr<Line> Judge(const Request& request, const DeviceOutlook& device,
                             absl::Time now) const;
  // Whether the request may run against `time`, in which its pictures run together.
  bool MayTry(const Request& request, const DeviceOutlook& device, const BatchTime& time,
              int together, absl::Time now) const;
  absl::Status CheckInTime(const Request& request, const Order& order, const Line& line,
                           const BatchTime& time, const DeviceOutlook& device,
                           absl::Time now) const;
  void EraseIfEmpty(Ticket ticket);
  // While nothing of this kind is known: what the other one says, at worst.
  BatchTime TimeFor(int64_t pixels, bool alone) const;

  const Options options_;
  BatchTimes times_;
  BatchTimes alone_times_;
  std::map<Order, Line> lines_;
  int waiting_ = 0;
  int64_t arrivals_ = 0;
};

// The most pictures of height x width in one batch, at least 1.
int MaxBatchOf(int max_batch, int height, int width);

// The cut of a batch, as a pure function of what is ready, in its order.
struct WaitingPicture {
  int height = 0;
  int width = 0;
  absl::Time arrival;
  absl::Time deadline = absl::InfiniteFuture();
  int priority = kDefaultPriority;
  int most = INT_MAX;  // pictures in its batch
  bool trial = false;  // runs though the batch times are against it
  bool cancelled = false;
};
enum class Verdict { kWait, kRun, kExpired, kCancelled, kLate };
struct BatchCut {
  std::vector<Verdict> verdicts;  // one a picture
  // When nothing runs: the moment at which something will.
  absl::Time look_again = absl::InfiniteFuture();
};
using TimeOf = absl::FunctionRef<BatchTime(int64_t pixels)>;
BatchCut CutBatch(std::span<const WaitingPicture> queue, absl::Time now,
                  const BatchQueue::Options& options, TimeOf times, bool draining,
                  bool company = false);  // others are being decoded

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_BATCH_QUEUE_H_
