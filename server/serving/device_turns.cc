#include "server/serving/device_turns.h"

#include <algorithm>
#include <cassert>

namespace pyramid {

DeviceTurns::Turn::Turn(Turn&& other) noexcept
    : device_(std::exchange(other.device_, nullptr)), number_(other.number_) {}

DeviceTurns::Turn& DeviceTurns::Turn::operator=(Turn&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(number_, other.number_);
  return *this;
}

void DeviceTurns::Turn::Expect(absl::Time end) {
  absl::MutexLock lock(&device_->mutex_);
  device_->running_.at(number_).end = end;
}

void DeviceTurns::Turn::GiveBack(absl::Duration used) {
  if (device_ != nullptr) std::exchange(device_, nullptr)->End(number_, used);
}

DeviceTurns::DeviceTurns(int instances) : instances_(instances) { assert(instances > 0); }

int DeviceTurns::Join() {
  absl::MutexLock lock(&mutex_);
  users_[++joined_];
  return joined_;
}

void DeviceTurns::Leave(int user) {
  absl::MutexLock lock(&mutex_);
  assert(users_.at(user).active == 0);
  users_.erase(user);
}

DeviceTurns::Turn DeviceTurns::Take(int user) {
  absl::MutexLock lock(&mutex_);
  Use& use = users_.at(user);
  if (use.active++ == 0) use.seconds = std::max(use.seconds, reached_);
  const int64_t turn = ++turns_;
  waiters_.push_back({user, turn});
  const auto mine = [this, turn]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return static_cast<int>(running_.size()) < instances_ && NextTurn() == turn;
  };
  mutex_.Await(absl::Condition(&mine));
  waiters_.erase(std::find_if(waiters_.begin(), waiters_.end(),
                              [turn](const Waiter& waiter) { return waiter.turn == turn; }));
  reached_ = std::max(reached_, use.seconds);
  running_[turn].user = user;
  return Turn(this, turn);
}

int64_t DeviceTurns::NextTurn() const {
  const auto before = [this](const Waiter& a, const Waiter& b) ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    const double used_a = users_.at(a.user).seconds;
    const double used_b = users_.at(b.user).seconds;
    return used_a != used_b ? used_a < used_b : a.turn < b.turn;
  };
  return std::min_element(waiters_.begin(), waiters_.end(), before)->turn;
}

void DeviceTurns::End(int64_t number, absl::Duration used) {
  absl::MutexLock lock(&mutex_);
  const auto found = running_.find(number);
  Use& use = users_.at(found->second.user);
  use.seconds += absl::ToDoubleSeconds(used);
  --use.active;
  running_.erase(found);
}

DeviceOutlook DeviceTurns::Look(int user, absl::Time now) const {
  DeviceOutlook outlook;
  outlook.guests = guests_ > 0;
  absl::MutexLock lock(&mutex_);
  outlook.instances = instances_;
  outlook.running = static_cast<int>(running_.size());
  outlook.busy = static_cast<int>(running_.size()) >= instances_;
  if (outlook.busy) {
    absl::Time first = absl::InfiniteFuture();
    for (const auto& [number, running] : running_) first = std::min(first, running.end);
    outlook.free_in = std::max(absl::ZeroDuration(), first - now);
  }
  for (const auto& [other, use] : users_) outlook.rivals += other != user && use.active > 0;
  return outlook;
}

}  // namespace pyramid
