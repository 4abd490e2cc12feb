#include "server/serving/loading.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <span>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "model/thread_limit.h"
#include "proto/base/status.h"
#include "server/serving/stand_back.h"

namespace pyramid {
namespace {

// Between serving and its p99 on one side, and how long loading takes at saturation on the other:
// pvt_v2_b0 on two cores (Zen 4), 10 steps: p99 1.3 to 1.6 times what it is without, 7 s; 15: 1.3
// times, 16 to 20 s. Where the network is faster the nice thread hurts more, as those that wake up
// queue for the other core (Zen 5: 1.7 to 3 times); one that stands aside counts as an idle core
// (1.2 to 1.4 times). At saturation it would take minutes, hence the limit.
constexpr int kNice = 15;
constexpr size_t kLeastPasses = 3;
constexpr size_t kMostPasses = 20;
constexpr absl::Duration kMostTime = absl::Seconds(2);

// Blank pictures for the classifier.
class Blanks {
 public:
  Blanks(Classifier& classifier, int most)
      : classifier_(classifier),
        side_(classifier.manifest().preprocessing().crop()),
        picture_(static_cast<size_t>(classifier.manifest().network().in_channels()) *
                 static_cast<size_t>(side_ * side_)),
        pixels_(picture_ * static_cast<size_t>(most)) {}

  absl::Status Forward(int batch) {
    const std::span<const float> part(pixels_.data(), picture_ * static_cast<size_t>(batch));
    return classifier_.Forward(part, batch, side_, side_).status();
  }

 private:
  Classifier& classifier_;
  const int side_;
  const size_t picture_;
  const std::vector<float> pixels_;
};

}  // namespace

void RunBesideServing(int threads, DeviceTurns* device, absl::FunctionRef<void()> work,
                      absl::Duration aside) {
  std::optional<DeviceTurns::Guest> guest;
  if (device != nullptr) guest.emplace(*device);
  absl::Notification done;
  std::atomic<int> stands_aside{0};  // the thread that does
  std::thread thread([&] {
    pthread_setname_np(pthread_self(), "model-load");
    StandBack(kNice, absl::Milliseconds(1));
    // Threads that those of a larger pass make would stand aside for ever.
    if (threads == 1 && StandAside()) stands_aside = gettid();
    const ThreadLimit limit(threads);
    work();
    done.Notify();
  });
  if (!done.WaitForNotificationWithTimeout(aside) && stands_aside != 0) {
    EndStandingAside(stands_aside);
  }
  thread.join();
}

std::vector<int> WarmUpSizes(int largest, absl::string_view device) {
  std::vector<int> sizes;
  for (int size = 1; size < largest; size = device == "cpu" ? 2 * size : size + 1) {
    sizes.push_back(size);
  }
  sizes.push_back(largest);
  return sizes;
}

absl::Status WarmUp(Classifier& classifier, const std::vector<int>& sizes) {
  Blanks blanks(classifier, *std::max_element(sizes.begin(), sizes.end()));
  for (const int size : sizes) {
    RETURN_IF_ERROR(
        Annotate(blanks.Forward(size), absl::StrCat("warming up with ", size, " pictures")));
  }
  return absl::OkStatus();
}

absl::StatusOr<absl::Duration> MeasureLatency(Classifier& classifier, int batch, Clock& clock) {
  Blanks blanks(classifier, batch);
  std::vector<absl::Duration> passes;
  const absl::Time until = clock.Now() + kMostTime;
  while (passes.size() < kLeastPasses || (passes.size() < kMostPasses && clock.Now() < until)) {
    const absl::Time started = clock.Now();
    RETURN_IF_ERROR(Annotate(blanks.Forward(batch), "measuring latency"));
    passes.push_back(clock.Now() - started);
  }
  const auto middle = passes.begin() + static_cast<std::ptrdiff_t>(passes.size() / 2);
  std::nth_element(passes.begin(), middle, passes.end());
  return *middle;
}

}  // namespace pyramid
