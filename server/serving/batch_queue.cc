#include "server/serving/batch_queue.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status.h"
#include "server/serving/pushback.h"

namespace pyramid {
namespace {

constexpr int64_t kUsualPixels = int64_t{224} * 224;  // of a picture: what max_batch is meant for

// Of the time that is left, what is promised away: waits are predictions too.
constexpr double kPromised = 0.92;
// How full the batches before are taken to be: one that isn't pushes pictures into the next.
constexpr double kFill = 0.8;
// Batch times that nobody has measured for so many times what they predict may be wrong, and those
// that are only guessed even more so; one request may try. A single pass that a burst had slowed
// down locked everybody out for a second otherwise.
constexpr double kTrialAfter = 4;
constexpr absl::Duration kLeastTrialAfter = absl::Milliseconds(100);
constexpr absl::Duration kMostTrialAfter = absl::Seconds(1);
// Pictures that are being decoded on the network's own cores are worth a wait of so many times the
// pass of one: nothing stands still meanwhile, and one pass reads all weights for all of them.
constexpr double kCompany = 2;

constexpr absl::Duration kUnknownPushback = absl::Milliseconds(100);  // before the first batch
constexpr absl::Duration kLeastPushback = absl::Milliseconds(10);
constexpr absl::Duration kMostPushback = absl::Seconds(10);

absl::Duration Pushback(absl::Duration wanted) {
  return std::clamp(wanted, kLeastPushback, kMostPushback);
}

// What goes before a request.
struct Ahead {
  double pixels = 0;
  double ready = 0;    // batches, by how large each picture allows its own to be
  double unready = 0;  // the same of what is being decoded
};

// What `batches` full ones take, other models' turns between them.
absl::Duration BatchesTake(double batches, int most, const BatchTime& time,
                           const DeviceOutlook& device) {
  return time.Of(most) * (batches * (1 + device.rivals) / device.instances);
}

// From now to the answer of the last of `count` pictures of `pixels`. Its batch is taken to be
// full: others may come and join. What isn't decoded yet is worked on once all of it is:
// `until_ready`.
absl::Duration AnswerIn(const Ahead& ahead, int count, int64_t pixels, int most,
                        absl::Duration until_ready, const BatchTime& time,
                        const DeviceOutlook& device) {
  constexpr double kRounding = 1e-9;
  const double own = static_cast<double>(count - 1) / most;
  const double all = ahead.ready + ahead.unready + own;
  const double batches = std::floor((ahead.ready + ahead.unready) / kFill + own + kRounding);
  const double ready = std::min(batches, std::floor(ahead.ready / kFill + kRounding));
  const double pictures = ahead.pixels / static_cast<double>(pixels) + count - 1;
  const int usual = std::max(1, static_cast<int>(std::lround(pictures / std::max(1.0, all))));
  const absl::Duration start =
      std::max(device.free_in + BatchesTake(ready, usual, time, device), until_ready);
  return start + BatchesTake(batches - ready, usual, time, device) + time.AtMost(most);
}

// How many pictures a second a batch of `pictures` makes.
double Rate(int pictures, const BatchTime& time) {
  return pictures / absl::ToDoubleSeconds(time.Of(pictures));
}

// Where the next batch begins among `order`, those that can be answered, of one size: the first
// one that isn't worth giving up.
size_t FirstWorthwhile(std::span<const WaitingPicture> queue, std::span<const size_t> order,
                       absl::Time now, const BatchTime& time, int room) {
  const int priority = queue[order[0]].priority;
  std::vector<double> rates;
  for (size_t i = 0; i < order.size(); ++i) {
    const WaitingPicture& picture = queue[order[i]];
    if (picture.priority != priority || picture.deadline == absl::InfiniteFuture()) break;
    if (picture.trial) return 0;
    const int most = std::min({room, picture.most, static_cast<int>(order.size() - i)});
    rates.push_back(Rate(std::max(1, time.Largest(picture.deadline - now, most)), time));
  }
  if (rates.empty() || !time.known()) return 0;
  const double best = *std::max_element(rates.begin(), rates.end());
  size_t first = 0;
  while (rates[first] < best / 2) ++first;
  return first;
}

}  // namespace

int MaxBatchOf(int max_batch, int height, int width) {
  const int64_t fit = max_batch * kUsualPixels / std::max<int64_t>(1, int64_t{height} * width);
  return static_cast<int>(std::clamp<int64_t>(fit, 1, max_batch));
}

BatchCut CutBatch(std::span<const WaitingPicture> queue, absl::Time now,
                  const BatchQueue::Options& options, TimeOf times, bool draining, bool company) {
  BatchCut cut;
  cut.verdicts.assign(queue.size(), Verdict::kWait);
  // Those that can be answered, up to the first one of another size: it can't join the batch, so
  // nor can those behind it.
  std::vector<size_t> order;
  bool closed = false;
  BatchTime time;
  int64_t time_pixels = 0;  // for which `time` holds
  for (size_t i = 0; i < queue.size(); ++i) {
    const WaitingPicture& picture = queue[i];
    const int64_t pixels = int64_t{picture.height} * picture.width;
    if (pixels != time_pixels) time = times(time_pixels = pixels);
    const absl::Duration left = picture.deadline - now;
    if (left <= absl::ZeroDuration()) {
      cut.verdicts[i] = Verdict::kExpired;
    } else if (picture.cancelled) {
      cut.verdicts[i] = Verdict::kCancelled;
    } else if (time.AtMost(1) > left && !picture.trial) {
      cut.verdicts[i] = Verdict::kLate;
    } else if (!closed) {
      closed = !order.empty() &&
               (picture.height != queue[order[0]].height || picture.width != queue[order[0]].width);
      if (!closed) order.push_back(i);
    }
  }
  if (order.empty()) return cut;

  const WaitingPicture& head = queue[order[0]];
  time = times(int64_t{head.height} * head.width);
  int room = MaxBatchOf(options.max_batch, head.height, head.width);
  const size_t first = FirstWorthwhile(queue, order, now, time, room);
  for (size_t i = 0; i < first; ++i) cut.verdicts[order[i]] = Verdict::kLate;
  std::vector<size_t> batch;
  for (size_t i = first; i < order.size(); ++i) {
    const WaitingPicture& picture = queue[order[i]];
    const int most =
        std::max(1, std::min(picture.most, time.Largest(picture.deadline - now, room)));
    if (static_cast<int>(batch.size()) >= std::min(room, most)) {
      closed = true;
      break;
    }
    room = std::min(room, most);
    batch.push_back(order[i]);
  }

  absl::Duration delay = options.max_delay;
  if (company) delay = std::max(delay, kCompany * time.Of(1));
  absl::Time due = absl::InfiniteFuture();
  for (const size_t i : batch) due = std::min(due, queue[i].arrival + delay);
  // Nobody waits for company longer than his deadline allows.
  const bool pressed = std::any_of(batch.begin(), batch.end(), [&](size_t i) {
    return queue[i].deadline - time.AtMost(room) <= due;
  });
  const bool full = closed || static_cast<int>(batch.size()) >= room;
  if (full || draining || pressed || due <= now) {
    for (const size_t i : batch) cut.verdicts[i] = Verdict::kRun;
  } else {
    cut.look_again = due;
  }
  return cut;
}

absl::StatusOr<BatchQueue::Ticket> BatchQueue::Admit(const Request& request,
                                                     const DeviceOutlook& device, absl::Time now) {
  ASSIGN_OR_RETURN(Line line, Judge(request, device, now));
  if (line.trial) times(AloneNow(device)).Try(line.pixels, now);
  waiting_ += request.pictures;
  return lines_.emplace(Order{request.priority, request.deadline, ++arrivals_}, std::move(line))
      .first;
}

absl::Status BatchQueue::Check(const Request& request, const DeviceOutlook& device,
                               absl::Time now) const {
  return Judge(request, device, now).status();
}

absl::StatusOr<BatchQueue::Line> BatchQueue::Judge(const Request& request,
                                                   const DeviceOutlook& device,
                                                   absl::Time now) const {
  assert(request.pictures > 0);
  const int64_t pixels = int64_t{request.height} * request.width;
  const BatchTime time = TimeFor(pixels, AloneNow(device));
  const int over = waiting_ + request.pictures - options_.max_queue;
  if (over > 0) {
    const double each = absl::ToDoubleSeconds(time.Of(options_.max_batch)) / options_.max_batch;
    const absl::Duration pushback =
        time.known() ? Pushback(absl::Seconds(each * over)) : kUnknownPushback;
    return WithPushback(absl::ResourceExhaustedError(absl::StrCat(
                            "the queue is full: ", waiting_, " of ", options_.max_queue,
                            " pictures wait and ", request.pictures, " more came; try again in ",
                            absl::ToInt64Milliseconds(pushback), " ms")),
                        pushback);
  }

  const Order order{request.priority, request.deadline, arrivals_ + 1};
  const int room = MaxBatchOf(options_.max_batch, request.height, request.width);
  Line line{.pixels = pixels, .most = room, .reserved = request.pictures};
  if (time.known() && request.deadline != absl::InfiniteFuture()) {
    const absl::Duration promised = kPromised * (request.deadline - now);
    const absl::Duration spare = promised - request.until_ready;
    const int together = std::min(request.pictures, room);  // of its own, however long they take
    line.most = std::max(1, time.Largest(std::min(promised / 2, spare), room));
    if (time.AtMost(together) <= spare) line.most = std::max(line.most, together);
    line.trial = MayTry(request, device, time, together, now);
    if (!line.trial) {
      RETURN_IF_ERROR(CheckInTime(request, order, line, time, device, now));
    }
  }
  return line;
}

// Only the times that it would be refused for count, those of its size and of its kind: others may
// stay fresh for ever.
bool BatchQueue::MayTry(const Request& request, const DeviceOutlook& device, const BatchTime& time,
                        int together, absl::Time now) const {
  const int64_t pixels = int64_t{request.height} * request.width;
  const BatchTimes& kind = AloneNow(device) ? alone_times_ : times_;
  // Where our own passes have the whole device, one of them will tell; and who gets it too late
  // needn't try.
  const bool will_tell = device.busy && device.rivals == 0;
  const bool too_late = device.free_in >= kPromised * (request.deadline - now);
  // Those that wait would wait for it too; for a first measurement they do.
  const bool guessed = !kind.For(pixels).known();
  return (waiting_ == 0 || guessed) && !will_tell && !too_late &&
         now - kind.newest(pixels) >
             std::clamp(kTrialAfter * time.AtMost(together), kLeastTrialAfter, kMostTrialAfter);
}

absl::Status BatchQueue::CheckInTime(const Request& request, const Order& order, const Line& line,
                                     const BatchTime& time, const DeviceOutlook& device,
                                     absl::Time now) const {
  const auto refuse = [&](absl::Duration late_by, absl::string_view what) {
    const absl::Duration pushback = Pushback(late_by);
    return PredictedLate(WithPushback(
        absl::ResourceExhaustedError(absl::StrCat(
            what, ": ", waiting_, " pictures wait, and ",
            absl::FormatDuration(absl::Floor(std::max(absl::ZeroDuration(), request.deadline - now),
                                             absl::Milliseconds(1))),
            " are left; try again in ", absl::ToInt64Milliseconds(pushback), " ms")),
        pushback));
  };
  Ahead ahead;
  const auto add = [](const Line& one, Ahead& to) {
    to.pixels += static_cast<double>(one.pixels) * one.waiting();
    to.ready += static_cast<double>(one.ready.size()) / one.most;
    to.unready += static_cast<double>(one.reserved) / one.most;
  };
  auto other = lines_.begin();
  for (; other != lines_.end() && other->first < order; ++other) add(other->second, ahead);
  const absl::Duration answer =
      AnswerIn(ahead, request.pictures, line.pixels, line.most, request.until_ready, time, device);
  const absl::Duration promised = kPromised * (request.deadline - now);
  if (answer > promised) {
    return refuse(answer - promised, "the answer would come after the deadline");
  }
  // Those behind it that could be answered in time must still be.
  Ahead with_it = ahead;
  add(line, with_it);
  for (; other != lines_.end() && other->first.priority == order.priority &&
         other->first.deadline != absl::InfiniteFuture();
       ++other) {
    const Line& behind = other->second;
    const BatchTime its_time = behind.pixels == line.pixels ? time : TimeFor(behind.pixels, false);
    const auto its_answer = [&](const Ahead& before) {
      return AnswerIn(before, behind.waiting(), behind.pixels, behind.most, absl::ZeroDuration(),
                      its_time, device);
    };
    const absl::Duration its_left = other->first.deadline - now;
    if (its_answer(with_it) > its_left && its_answer(ahead) <= its_left) {
      return refuse(its_answer(with_it) - its_left, "one that waits would become late");
    }
    add(behind, ahead);
    add(behind, with_it);
  }
  return absl::OkStatus();
}

void BatchQueue::Submit(Ticket ticket, std::vector<Picture> pictures, absl::Time now) {
  Line& line = ticket->second;
  assert(line.reserved >= static_cast<int>(pictures.size()));
  line.reserved -= static_cast<int>(pictures.size());
  for (Picture& picture : pictures) line.ready.push_back({std::move(picture), now});
}

void BatchQueue::GiveBack(Ticket ticket, int pictures) {
  ticket->second.reserved -= pictures;
  waiting_ -= pictures;
  EraseIfEmpty(ticket);
}

bool BatchQueue::TooLate(Ticket ticket, absl::Time now) const {
  const Line& line = ticket->second;
  return !line.trial && now + TimeFor(line.pixels, true).AtMost(1) > ticket->first.deadline;
}

void BatchQueue::EraseIfEmpty(Ticket ticket) {
  if (ticket->second.waiting() == 0) lines_.erase(ticket);
}

BatchTime BatchQueue::TimeFor(int64_t pixels, bool alone) const {
  BatchTime time = (alone ? alone_times_ : times_).For(pixels);
  if (time.known()) return time;
  time = (alone ? times_ : alone_times_).For(pixels);
  if (!alone) {  // the worst case: as if the threads had been of use all the time
    time.per_picture *= options_.threads;
    time.fixed *= options_.threads;
  }
  return time;
}

BatchQueue::Cut BatchQueue::Next(absl::Time now, bool draining, bool with_device, bool alone) {
  std::vector<WaitingPicture> snapshot;
  snapshot.reserve(static_cast<size_t>(waiting_));
  for (const auto& [order, line] : lines_) {
    for (const auto& [picture, arrival] : line.ready) {
      snapshot.push_back({.height = picture.height,
                          .width = picture.width,
                          .arrival = arrival,
                          .deadline = order.deadline,
                          .priority = order.priority,
                          .most = line.most,
                          .trial = line.trial,
                          .cancelled = picture.cancelled != nullptr && picture.cancelled->load()});
    }
  }
  // What is being decoded will be there during the pass, and so will what doesn't fit.
  const bool decoding = static_cast<int>(snapshot.size()) < waiting_;
  alone = alone && !decoding && waiting_ <= options_.max_batch;
  // The worst case is for those who may still go elsewhere: whoever is in isn't given up for it.
  const auto time_for = [&](int64_t pixels) {
    return TimeFor(pixels, alone || !times_.For(pixels).known());
  };
  const BatchCut plan =
      CutBatch(snapshot, now, options_, time_for, draining, options_.decoded_here && decoding);

  Cut cut;
  cut.alone = alone;
  cut.look_again = plan.look_again;
  size_t next = 0;
  for (auto it = lines_.begin(); it != lines_.end();) {
    const Ticket ticket = it++;
    std::vector<Waiting>& ready = ticket->second.ready;
    size_t kept = 0;
    for (Waiting& waiting : ready) {
      Verdict verdict = plan.verdicts[next++];
      if (verdict == Verdict::kRun && !with_device) {
        cut.wants_device = true;
        verdict = Verdict::kWait;
      }
      switch (verdict) {
        case Verdict::kWait:
          if (&ready[kept] != &waiting) ready[kept] = std::move(waiting);
          ++kept;
          break;
        case Verdict::kRun:
          cut.batch.push_back(std::move(waiting));
          break;
        case Verdict::kExpired:
          cut.expired.push_back(std::move(waiting));
          break;
        case Verdict::kLate:
          cut.late.push_back(std::move(waiting));
          break;
        case Verdict::kCancelled:
          cut.cancelled.push_back(std::move(waiting));
          break;
      }
    }
    ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(kept), ready.end());
    EraseIfEmpty(ticket);
  }
  waiting_ -= cut.pictures();
  return cut;
}

absl::Duration BatchQueue::PredictedWait(const DeviceOutlook& device) const {
  if (lines_.empty()) return device.free_in;
  double pixels = 0;
  for (const auto& [order, line] : lines_) {
    pixels += static_cast<double>(line.pixels) * line.waiting();
  }
  const int64_t each = lines_.begin()->second.pixels;
  const double batches = std::floor(pixels / static_cast<double>(each) / options_.max_batch);
  return device.free_in + BatchesTake(batches, options_.max_batch, TimeFor(each, false), device);
}

}  // namespace pyramid
