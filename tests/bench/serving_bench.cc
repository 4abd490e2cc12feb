// What admission, refusal and the way through the pipeline cost, without network and wire.
//
//   serving_bench
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "server/serving/classify.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using testing::FakeNetwork;

void Report(const char* what, int rounds, absl::Duration time) {
  std::printf("%-64s %8.2f us\n", what, absl::ToDoubleMicroseconds(time) / rounds);
}

// Repeats `step` for about a second.
template <typename Step>
void Measure(const char* what, Step step) {
  int rounds = 0;
  const absl::Time started = absl::Now();
  absl::Duration time;
  do {
    for (int i = 0; i < 100; ++i) step();
    rounds += 100;
    time = absl::Now() - started;
  } while (time < absl::Seconds(1));
  Report(what, rounds, time);
}

void MeasureQueue() {
  const absl::Time now = absl::Now();
  DeviceOutlook device;
  for (const int waiting : {0, 16, 128, 255}) {
    BatchQueue queue({});
    queue.times().Observe(int64_t{224} * 224, 1, absl::Milliseconds(4), now);
    queue.times().Observe(int64_t{224} * 224, 32, absl::Milliseconds(80), now);
    for (int i = 0; i < waiting; ++i) (void)queue.Admit({.priority = 1}, device, now);
    Measure(absl::StrFormat("queue: admit and give back, %d requests wait", waiting).c_str(), [&] {
      queue.GiveBack(*queue.Admit({.deadline = now + absl::Seconds(100)}, device, now), 1);
    });
    Measure(absl::StrFormat("queue: refuse as late, %d requests wait", waiting).c_str(), [&] {
      if (queue.Admit({.deadline = now + absl::Milliseconds(3)}, device, now).ok()) std::abort();
    });
  }
  BatchQueue full({.max_queue = 1});
  (void)full.Admit({}, device, now);
  Measure("queue: refuse as full", [&] {
    if (full.Admit({}, device, now).ok()) std::abort();
  });
}

void MeasurePipeline() {
  testing::TempFolder folder;
  FakeNetwork network;
  Metrics metrics;
  ModelRegistry::Options options;
  options.folder = folder / "models";
  options.batching.max_queue = 4;
  ModelRegistry registry(options, testing::FakeLoader(network), testing::PassingSelfTest, metrics);
  if (!registry.Start().ok() || !testing::WriteFakeCheckpoint(folder / "checkpoint", 0).ok() ||
      !registry.Promote(folder / "checkpoint", "m", "").ok()) {
    std::fprintf(stderr, "the fake model doesn't load\n");
    std::exit(1);
  }
  ClassifyPipeline pipeline({.max_pictures = 4}, registry, metrics);
  v1::ClassifyRequest request;
  request.set_model("m");
  request.add_pictures()->set_encoded(std::string(60'000, 'x'));

  network.Shut();
  std::vector<std::unique_ptr<absl::Notification>> waiting;
  v1::ClassifyRequest small;
  small.add_pictures()->mutable_tensor()->mutable_values()->Resize(32 * 32, 0);
  small.mutable_pictures(0)->mutable_tensor()->set_channels(1);
  small.mutable_pictures(0)->mutable_tensor()->set_height(32);
  small.mutable_pictures(0)->mutable_tensor()->set_width(32);
  std::atomic<bool> full{false};
  while (!full) {
    auto& done = waiting.emplace_back(std::make_unique<absl::Notification>());
    pipeline.Classify(small, absl::InfiniteFuture(), nullptr,
                      [&full, &notify = *done](absl::StatusOr<v1::ClassifyResponse> result) {
                        if (!result.ok()) full = true;
                        notify.Notify();
                      });
    absl::SleepFor(absl::Milliseconds(5));
  }
  int refused = 0;
  Measure("pipeline: refuse as full", [&] {
    pipeline.Classify(request, absl::InfiniteFuture(), nullptr,
                      [&](absl::StatusOr<v1::ClassifyResponse> r) { refused += !r.ok(); });
  });
  Measure("pipeline: expired on arrival", [&] {
    pipeline.Classify(request, absl::Now(), nullptr,
                      [&](absl::StatusOr<v1::ClassifyResponse> r) { refused += !r.ok(); });
  });
  network.Open();
  for (const auto& done : waiting) done->WaitForNotification();
  Measure("pipeline: one tensor of 32x32, one at a time", [&] {
    absl::Notification done;
    pipeline.Classify(small, absl::InfiniteFuture(), nullptr,
                      [&](absl::StatusOr<v1::ClassifyResponse>) { done.Notify(); });
    done.WaitForNotification();
    network.Forget();
  });
}

}  // namespace
}  // namespace pyramid

int main() {
  pyramid::MeasureQueue();
  pyramid::MeasurePipeline();
}
