#include "server/serving/batcher.h"

#include <pthread.h>

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/thread_limit.h"
#include "proto/base/status.h"
#include "server/serving/pushback.h"
#include "server/serving/stand_back.h"

namespace pyramid {
namespace {

// After passes ran side by side none takes all threads for so long: a thread that waits for one
// that another pass has pushed aside costs more than it brings. pvt_v2_b0 at 224 on two cores,
// JPEGs within 10 times the answer alone: 475 a second in passes of one thread, 404 in passes of
// two.
constexpr absl::Duration kCrowded = absl::Milliseconds(20);

Pieces FloatsOf(const BatchQueue::Picture& picture) {
  return picture.pixels.empty()
             ? picture.values
             : Pieces(absl::string_view(reinterpret_cast<const char*>(picture.pixels.data()),
                                        picture.pixels.size() * sizeof(float)));
}

absl::Status NotFinite(const Pieces& floats) {
  return absl::InvalidArgumentError(
      absl::StrCat("tensor.values[", FirstNotFinite(floats), "] isn't finite"));
}

absl::Status TooLate() {
  return PredictedLate(WithPushback(
      absl::ResourceExhaustedError("the answer would come after the deadline; try again"),
      absl::Milliseconds(10)));
}

}  // namespace

Batcher::Room::Room(Room&& other) noexcept
    : batcher_(std::exchange(other.batcher_, nullptr)),
      ticket_(other.ticket_),
      pictures_(std::exchange(other.pictures_, 0)) {}

Batcher::Room& Batcher::Room::operator=(Room&& other) noexcept {
  std::swap(batcher_, other.batcher_);
  std::swap(ticket_, other.ticket_);
  std::swap(pictures_, other.pictures_);
  return *this;
}

Batcher::Room::~Room() {
  if (pictures_ > 0) batcher_->GiveBack(ticket_, pictures_);
}

Batcher::Batcher(Classifier& classifier, const Options& options, ModelMetrics& metrics,
                 int64_t version, Clock& clock)
    : classifier_(classifier),
      options_(options),
      metrics_(metrics),
      version_(version),
      clock_(clock),
      device_(options.device != nullptr ? options.device : std::make_shared<DeviceTurns>()),
      user_(device_->Join()),
      queue_({.max_batch = options.max_batch,
              .max_delay = options.max_delay,
              .max_queue = options.max_queue,
              .threads = options.threads,
              .decoded_here = options.decoded_here}) {
  assert(options.max_batch > 0 && options.max_queue > 0);
  metrics_.AddQueue(0, options_.max_queue);
  for (int i = 0; i < device_->instances(); ++i) threads_.emplace_back([this] { Run(); });
}

Batcher::~Batcher() {
  Drain();
  device_->Leave(user_);
  metrics_.AddQueue(0, -options_.max_queue);
}

absl::StatusOr<Batcher::Room> Batcher::Admit(const Request& request) {
  if (request.pictures > options_.max_queue) {
    return absl::InvalidArgumentError(absl::StrCat(
        request.pictures, " pictures at once; the queue holds at most ", options_.max_queue));
  }
  const absl::Time now = clock_.Now();
  absl::MutexLock lock(&mutex_);
  if (draining_) return absl::UnavailableError("this model version is being taken out of service");
  const DeviceOutlook device = Look(now);
  ASSIGN_OR_RETURN(const BatchQueue::Ticket ticket, queue_.Admit(request, device, now));
  metrics_.AddQueue(request.pictures, 0);
  metrics_.SetPredictedWait(version_, queue_.PredictedWait(device));
  return Room(this, ticket, request.pictures);
}

absl::Status Batcher::Check(const Request& request) {
  const absl::Time now = clock_.Now();
  absl::MutexLock lock(&mutex_);
  return draining_ ? absl::OkStatus() : queue_.Check(request, Look(now), now);
}

void Batcher::Submit(Room& room, std::vector<Picture> pictures) {
  const int count = static_cast<int>(pictures.size());
  assert(room.batcher_ == this && room.pictures_ >= count);
  if (count == 0) return;
  room.pictures_ -= count;
  const absl::Time now = clock_.Now();
  absl::MutexLock lock(&mutex_);
  queue_.Submit(room.ticket_, std::move(pictures), now);
  ++news_;
}

absl::Status Batcher::CheckInTime(const Room& room) {
  assert(room.pictures_ > 0);
  const absl::Time now = clock_.Now();
  absl::MutexLock lock(&mutex_);
  return queue_.TooLate(room.ticket_, now) ? TooLate() : absl::OkStatus();
}

void Batcher::Drain() {
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    ++news_;
  }
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void Batcher::GiveBack(BatchQueue::Ticket ticket, int pictures) {
  metrics_.AddQueue(-pictures, 0);
  const absl::Time now = clock_.Now();
  absl::MutexLock lock(&mutex_);
  queue_.GiveBack(ticket, pictures);
  metrics_.SetPredictedWait(version_, queue_.PredictedWait(Look(now)));
  ++news_;  // a batch may have waited for them, and Drain does
}

void Batcher::Run() {
  using Rejection = ModelMetrics::Rejection;
  pthread_setname_np(pthread_self(), "batch");
  StandBack(0);
  Turn turn;
  std::vector<float> memory;  // the classifier's
  for (Cut cut; Next(cut, turn);) {
    Refuse(cut.expired,
           absl::DeadlineExceededError("the deadline passed while the picture was in the queue"),
           Rejection::kExpired);
    Refuse(cut.late, TooLate(), Rejection::kPredictedLate);
    Refuse(cut.cancelled,
           absl::CancelledError("the caller left while the picture was in the queue"),
           Rejection::kCancelled);
    if (!cut.batch.empty()) RunBatch(cut, turn, memory);
  }
}

// `alone` as for one that holds no turn.
DeviceOutlook Batcher::Look(absl::Time now) {
  DeviceOutlook device = device_->Look(user_, now);
  device.alone = options_.threads > 1 && device.instances > 1 && device.running == 0 &&
                 device.rivals == 0 && !device.guests && now - crowded_ > kCrowded;
  return device;
}

void Batcher::Refuse(std::vector<BatchQueue::Waiting>& pictures, const absl::Status& status,
                     ModelMetrics::Rejection reason) {
  if (pictures.empty()) return;
  metrics_.CountRejection(reason, static_cast<int>(pictures.size()));
  for (BatchQueue::Waiting& waiting : pictures) std::move(waiting.picture.done)(status);
}

bool Batcher::Next(Cut& cut, Turn& turn) {
  bool fetched = false;
  mutex_.Lock();
  while (true) {
    const int64_t seen = news_;
    const absl::Time now = clock_.Now();
    const DeviceOutlook device = device_->Look(user_, now);
    const int others = device.running - (turn.held() ? 1 : 0);
    if (turn.held() && (others > 0 || device.rivals > 0 || device.guests)) crowded_ = now;
    const bool shared = options_.threads > 1 && device.instances > 1;
    static_cast<BatchQueue::Cut&>(cut) =
        queue_.Next(now, draining_, turn.held(), shared && now - crowded_ > kCrowded);
    if (!cut.batch.empty() && !cut.alone) crowded_ = now;
    cut.threads =
        cut.alone || !shared
            ? options_.threads
            : std::max(1, options_.threads / (1 + std::max(1, others + queue_.waiting())));
    if (fetched) {
      fetching_ = fetched = false;
      if (queue_.waiting() > 0) ++news_;
    }
    if (cut.pictures() > 0) {
      metrics_.AddQueue(-cut.pictures(), 0);
      if (cut.batch.empty()) metrics_.SetPredictedWait(version_, queue_.PredictedWait(device));
      if (draining_) ++news_;  // the other batch threads end with the last picture
      mutex_.Unlock();
      return true;
    }
    if (cut.wants_device && !fetching_) {
      // The batch is cut when its turn has come: until then more may join it.
      fetching_ = fetched = true;
      mutex_.Unlock();
      turn = device_->Take(user_);
      mutex_.Lock();
      continue;
    }
    turn.GiveBack(absl::ZeroDuration());  // the others went without the network
    if (draining_ && queue_.waiting() == 0) {
      mutex_.Unlock();
      return false;
    }
    const auto changed = [this, seen]()
                             ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return news_ != seen; };
    clock_.AwaitUntil(mutex_, absl::Condition(&changed), cut.look_again);
  }
}

void Batcher::RunBatch(Cut& cut, Turn& turn, std::vector<float>& memory) {
  std::vector<BatchQueue::Waiting> batch = std::exchange(cut.batch, {});
  const int height = batch.front().picture.height;
  const int width = batch.front().picture.width;
  const int count = static_cast<int>(batch.size());
  // The network reads them where they are, and tells of values that aren't finite: they come from
  // far away, so once must do. One that is refused for such a value has cost its place in the
  // batch.
  std::vector<Pieces> pictures;
  bool look = false;
  for (const BatchQueue::Waiting& waiting : batch) {
    pictures.push_back(FloatsOf(waiting.picture));
    look = look || waiting.picture.refuse_non_finite;
  }

  const int64_t each = int64_t{height} * width;
  const absl::Time started = clock_.Now();
  {
    absl::MutexLock lock(&mutex_);
    turn.Expect(started + queue_.times(cut.alone).For(each).Of(count));
  }
  std::vector<uint8_t> finite;
  absl::StatusOr<std::vector<float>> logits = [&] {
    const ThreadLimit limit(cut.threads);
    return classifier_.ForwardPieces(pictures, height, width, look ? &finite : nullptr, memory);
  }();
  const absl::Time ended = clock_.Now();
  const absl::Duration forward = ended - started;
  turn.GiveBack(forward);
  const size_t classes = static_cast<size_t>(classifier_.manifest().network().num_classes());
  if (logits.ok() && logits->size() != classes * batch.size()) {
    logits = absl::InternalError(absl::StrCat("the network gave ", logits->size(), " logits for ",
                                              count, " pictures of ", classes, " classes"));
  }

  metrics_.ObserveBatch(version_, count);
  metrics_.ObserveStage(ModelMetrics::Stage::kForward, forward);
  for (const BatchQueue::Waiting& waiting : batch) {
    metrics_.ObserveStage(ModelMetrics::Stage::kQueue, started - waiting.arrival);
  }
  {
    absl::MutexLock lock(&mutex_);
    if (logits.ok()) queue_.times(cut.alone).Observe(each, count, forward, ended);
    metrics_.SetPredictedWait(version_, queue_.PredictedWait(Look(ended)));
  }
  for (size_t i = 0; i < batch.size(); ++i) {
    if (!logits.ok()) {
      std::move(batch[i].picture.done)(logits.status());
      continue;
    }
    if (batch[i].picture.refuse_non_finite && finite[i] == 0) {
      std::move(batch[i].picture.done)(NotFinite(pictures[i]));
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
