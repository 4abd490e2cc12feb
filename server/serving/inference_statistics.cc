#include "server/serving/inference_statistics.h"

#include "absl/time/clock.h"

namespace pyramid {

void InferenceStatistics::AddAnswer(int pictures, const Times& times, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  sums_.last = now;
  sums_.pictures += pictures;
  sums_.success.Add(times.total);
  sums_.queue.Add(times.queue);
  sums_.input.Add(times.input);
  sums_.infer.Add(times.infer);
  sums_.output.Add(times.output);
}

void InferenceStatistics::AddFailure(absl::Duration total) {
  absl::MutexLock lock(&mutex_);
  sums_.fail.Add(total);
}

void InferenceStatistics::AddBatch(int pictures, absl::Duration forward) {
  absl::MutexLock lock(&mutex_);
  ++sums_.executions;
  sums_.batches[pictures].Add(forward);
}

InferenceStatistics::Snapshot InferenceStatistics::Get() const {
  absl::MutexLock lock(&mutex_);
  return sums_;
}

absl::StatusOr<std::vector<float>> CountedClassifier::Forward(std::span<const float> pixels,
                                                              int batch, int height, int width) {
  return Counted(batch, [&] { return classifier_.Forward(pixels, batch, height, width); });
}

absl::StatusOr<std::vector<float>> CountedClassifier::ForwardPieces(
    std::span<const Pieces> pictures, int height, int width, std::vector<uint8_t>* finite,
    std::vector<float>& memory) {
  return Counted(static_cast<int>(pictures.size()), [&] {
    return classifier_.ForwardPieces(pictures, height, width, finite, memory);
  });
}

absl::StatusOr<std::vector<float>> CountedClassifier::Counted(
    int pictures, absl::FunctionRef<absl::StatusOr<std::vector<float>>()> pass) {
  const absl::Time started = absl::Now();
  absl::StatusOr<std::vector<float>> logits = pass();
  if (logits.ok()) statistics_.AddBatch(pictures, absl::Now() - started);
  return logits;
}

}  // namespace pyramid
