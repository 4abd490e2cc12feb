#include "server/serving/batcher.h"

#include <pthread.h>

#include <algorithm>
#include <cassert>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/serving/pushback.h"

namespace pyramid {
namespace {

// How much a new batch counts in the moving average of seconds per picture.
constexpr double kNewBatchWeight = 0.2;
constexpr absl::Duration kUnknownPushback = absl::Milliseconds(100);  // before the first batch
constexpr absl::Duration kLeastPushback = absl::Milliseconds(10);
constexpr absl::Duration kMostPushback = absl::Seconds(10);

constexpr int64_t kUsualPixels = int64_t{224} * 224;  // of a picture: what max_batch is meant for

absl::Status QueueFull(int waiting, int capacity, int more, absl::Duration pushback) {
  return WithPushback(
      absl::ResourceExhaustedError(absl::StrCat(
          "the queue is full: ", waiting, " of ", capacity, " pictures wait and ", more,
          " more came; try again in ", absl::ToInt64Milliseconds(pushback), " ms")),
      pushback);
}

}  // namespace

int Batcher::MaxBatchOf(int max_batch, int height, int width) {
  const int64_t fit = max_batch * kUsualPixels / (int64_t{height} * width);
  return static_cast<int>(std::clamp<int64_t>(fit, 1, max_batch));
}

BatchCut CutBatch(std::span<const WaitingPicture> queue, absl::Time now,
                  const Batcher::Options& options, bool draining) {
  BatchCut cut;
  cut.verdicts.assign(queue.size(), Verdict::kWait);
  std::vector<size_t> batch;
  int room = 0;
  bool closed = false;  // a picture waits that can't join the batch, so nor can those behind it
  for (size_t i = 0; i < queue.size(); ++i) {
    const WaitingPicture& picture = queue[i];
    if (picture.deadline <= now) {
      cut.verdicts[i] = Verdict::kExpired;
    } else if (picture.cancelled) {
      cut.verdicts[i] = Verdict::kCancelled;
    } else if (!closed) {
      if (batch.empty()) {
        batch.push_back(i);
        room = Batcher::MaxBatchOf(options.max_batch, picture.height, picture.width);
      } else if (static_cast<int>(batch.size()) < room &&
                 picture.height == queue[batch.front()].height &&
                 picture.width == queue[batch.front()].width) {
        batch.push_back(i);
      } else {
        closed = true;
      }
    }
  }
  if (batch.empty()) return cut;

  const absl::Time due = queue[batch.front()].arrival + options.max_delay;
  const bool full = closed || static_cast<int>(batch.size()) >= room;
  // Nobody waits for company beyond his deadline.
  const bool pressed =
      std::any_of(batch.begin(), batch.end(), [&](size_t i) { return queue[i].deadline <= due; });
  if (full || draining || pressed || due <= now) {
    for (const size_t i : batch) cut.verdicts[i] = Verdict::kRun;
  } else {
    cut.look_again = due;
  }
  return cut;
}

Batcher::Room::Room(Room&& other) noexcept
    : batcher_(std::exchange(other.batcher_, nullptr)),
      pictures_(std::exchange(other.pictures_, 0)) {}

Batcher::Room& Batcher::Room::operator=(Room&& other) noexcept {
  std::swap(batcher_, other.batcher_);
  std::swap(pictures_, other.pictures_);
  return *this;
}

Batcher::Room::~Room() {
  if (pictures_ > 0) batcher_->GiveBack(pictures_);
}

Batcher::Batcher(Classifier& classifier, const Options& options, ModelMetrics& metrics,
                 int64_t version, Clock& clock)
    : classifier_(classifier),
      options_(options),
      metrics_(metrics),
      version_(version),
      clock_(clock) {
  assert(options.max_batch > 0 && options.max_queue > 0);
  metrics_.AddQueue(0, options_.max_queue);
  thread_ = std::thread([this] { Run(); });
}

Batcher::~Batcher() {
  Drain();
  metrics_.AddQueue(0, -options_.max_queue);
}

absl::StatusOr<Batcher::Room> Batcher::Admit(int pictures) {
  assert(pictures > 0);
  if (pictures > options_.max_queue) {
    return absl::InvalidArgumentError(
        absl::StrCat(pictures, " pictures at once; the queue holds at most ", options_.max_queue));
  }
  absl::MutexLock lock(&mutex_);
  if (draining_) return absl::UnavailableError("this model version is being taken out of service");
  const int waiting = room_taken_ + static_cast<int>(queue_.size());
  const int over = waiting + pictures - options_.max_queue;
  if (over > 0) {
    const absl::Duration pushback =
        seconds_per_picture_ > 0
            ? std::clamp(absl::Seconds(seconds_per_picture_ * over), kLeastPushback, kMostPushback)
            : kUnknownPushback;
    return QueueFull(waiting, options_.max_queue, pictures, pushback);
  }
  room_taken_ += pictures;
  metrics_.AddQueue(pictures, 0);
  return Room(this, pictures);
}

void Batcher::Submit(Room& room, std::vector<Picture> pictures) {
  const int count = static_cast<int>(pictures.size());
  assert(room.batcher_ == this && room.pictures_ >= count);
  room.pictures_ -= count;
  const absl::Time now = clock_.Now();
  absl::MutexLock lock(&mutex_);
  room_taken_ -= count;
  for (Picture& picture : pictures) queue_.push_back({std::move(picture), now});
  news_ = true;
}

void Batcher::Drain() {
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    news_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void Batcher::GiveBack(int pictures) {
  metrics_.AddQueue(-pictures, 0);
  absl::MutexLock lock(&mutex_);
  room_taken_ -= pictures;
  if (draining_) news_ = true;
}

void Batcher::Run() {
  pthread_setname_np(pthread_self(), "batch");
  for (Work work; Next(work); work = Work()) {
    using Rejection = ModelMetrics::Rejection;
    if (!work.expired.empty()) {
      metrics_.CountRejection(Rejection::kExpired, static_cast<int>(work.expired.size()));
    }
    if (!work.cancelled.empty()) {
      metrics_.CountRejection(Rejection::kCancelled, static_cast<int>(work.cancelled.size()));
    }
    for (Waiting& waiting : work.expired) {
      std::move(waiting.picture.done)(
          absl::DeadlineExceededError("the deadline passed while the picture was in the queue"));
    }
    for (Waiting& waiting : work.cancelled) {
      std::move(waiting.picture.done)(
          absl::CancelledError("the caller left while the picture was in the queue"));
    }
    if (!work.batch.empty()) RunBatch(std::move(work.batch));
  }
}

bool Batcher::Next(Work& work) {
  absl::MutexLock lock(&mutex_);
  while (true) {
    news_ = false;
    std::vector<WaitingPicture> snapshot;
    snapshot.reserve(queue_.size());
    for (const Waiting& waiting : queue_) {
      const Picture& picture = waiting.picture;
      snapshot.push_back({picture.height, picture.width, waiting.arrival, picture.deadline,
                          picture.cancelled != nullptr && picture.cancelled->load()});
    }
    const BatchCut cut = CutBatch(snapshot, clock_.Now(), options_, draining_);

    std::deque<Waiting> rest;
    for (size_t i = 0; i < queue_.size(); ++i) {
      switch (cut.verdicts[i]) {
        case Verdict::kWait:
          rest.push_back(std::move(queue_[i]));
          break;
        case Verdict::kRun:
          work.batch.push_back(std::move(queue_[i]));
          break;
        case Verdict::kExpired:
          work.expired.push_back(std::move(queue_[i]));
          break;
        case Verdict::kCancelled:
          work.cancelled.push_back(std::move(queue_[i]));
          break;
      }
    }
    const int taken = static_cast<int>(queue_.size() - rest.size());
    queue_ = std::move(rest);
    if (taken > 0) {
      metrics_.AddQueue(-taken, 0);
      return true;
    }
    if (draining_ && queue_.empty() && room_taken_ == 0) return false;
    clock_.AwaitUntil(mutex_, absl::Condition(&news_), cut.look_again);
  }
}

void Batcher::RunBatch(std::vector<Waiting> batch) {
  const int count = static_cast<int>(batch.size());
  const int height = batch.front().picture.height;
  const int width = batch.front().picture.width;
  std::vector<float> pixels = std::move(batch.front().picture.pixels);
  pixels.reserve(pixels.size() * batch.size());
  for (size_t i = 1; i < batch.size(); ++i) {
    std::vector<float>& one = batch[i].picture.pixels;
    pixels.insert(pixels.end(), one.begin(), one.end());
    std::vector<float>().swap(one);
  }

  const absl::Time started = clock_.Now();
  absl::StatusOr<std::vector<float>> logits = classifier_.Forward(pixels, count, height, width);
  const absl::Duration forward = clock_.Now() - started;
  const size_t classes = static_cast<size_t>(classifier_.manifest().network().num_classes());
  if (logits.ok() && logits->size() != classes * batch.size()) {
    logits = absl::InternalError(absl::StrCat("the network gave ", logits->size(), " logits for ",
                                              count, " pictures of ", classes, " classes"));
  }

  metrics_.ObserveBatch(version_, count);
  metrics_.ObserveStage(ModelMetrics::Stage::kForward, forward);
  for (const Waiting& waiting : batch) {
    metrics_.ObserveStage(ModelMetrics::Stage::kQueue, started - waiting.arrival);
  }
  {
    absl::MutexLock lock(&mutex_);
    const double seconds = absl::ToDoubleSeconds(forward) / count;
    seconds_per_picture_ = seconds_per_picture_ > 0 ? (1 - kNewBatchWeight) * seconds_per_picture_ +
                                                          kNewBatchWeight * seconds
                                                    : seconds;
  }
  for (size_t i = 0; i < batch.size(); ++i) {
    if (!logits.ok()) {
      std::move(batch[i].picture.done)(logits.status());
      continue;
    }
    Answer answer;
    const auto first = logits->begin() + static_cast<std::ptrdiff_t>(i * classes);
    answer.logits.assign(first, first + static_cast<std::ptrdiff_t>(classes));
    answer.queue = started - batch[i].arrival;
    answer.forward = forward;
    std::move(batch[i].picture.done)(std::move(answer));
  }
}

}  // namespace pyramid
