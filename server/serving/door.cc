#include "server/serving/door.h"

#include <algorithm>

namespace pyramid {
namespace {

constexpr int kAlike = 32;
constexpr int kLetIn = 16;
constexpr absl::Duration kMemory = absl::Minutes(1);

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

bool Door::Refuse() {
  absl::MutexLock lock(&mutex_);
  return ++refused_ % kLetIn != 0;
}

}  // namespace pyramid
