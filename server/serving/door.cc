#include "server/serving/door.h"

#include <algorithm>
#include <utility>

namespace pyramid {
namespace {

constexpr int kAlike = 32;
constexpr int kLetIn = 16;
constexpr absl::Duration kLetInEvery = absl::Milliseconds(25);
constexpr absl::Duration kMemory = absl::Minutes(1);
constexpr absl::Duration kReading = absl::Milliseconds(25);

}  // namespace

bool Door::Wish::operator==(const Wish& other) const {
  const BatchQueue::Request& a = pictures;
  const BatchQueue::Request& b = other.pictures;
  return model == other.model && version == other.version && decode == other.decode &&
         a.pictures == b.pictures && a.height == b.height && a.width == b.width &&
         a.priority == b.priority;
}

void Door::Read(const Wish& wish, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  if (wish == wish_) {
    alike_ = std::min(alike_ + 1, kAlike);
    return;
  }
  if (alike_ > 0) differed_ = now;  // not with the very first one
  wish_ = wish;
  alike_ = 1;
}

std::optional<Door::Wish> Door::Expect(absl::Time now) const {
  absl::MutexLock lock(&mutex_);
  if (alike_ < kAlike || now - differed_ < kMemory) return std::nullopt;
  return wish_;
}

bool Door::Refuse(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  if (++refused_ < kLetIn || now - read_all_the_same_ < kLetInEvery) return true;
  refused_ = 0;
  read_all_the_same_ = now;
  return false;
}

Door::Pass::Pass(Pass&& other) noexcept
    : door_(std::exchange(other.door_, nullptr)), number_(other.number_) {}

Door::Pass& Door::Pass::operator=(Pass&& other) noexcept {
  std::swap(door_, other.door_);
  std::swap(number_, other.number_);
  return *this;
}

Door::Pass::~Pass() {
  if (door_ != nullptr) door_->Leave(number_);
}

Door::Pass Door::Enter(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  reading_.emplace_hint(reading_.end(), ++entered_, now);
  return Pass(this, entered_);
}

int Door::Reading(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  while (!reading_.empty() && now - reading_.begin()->second > kReading) {
    reading_.erase(reading_.begin());
  }
  return static_cast<int>(reading_.size());
}

void Door::Leave(int64_t number) {
  absl::MutexLock lock(&mutex_);
  reading_.erase(number);
}

}  // namespace pyramid
