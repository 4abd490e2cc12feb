#include "server/serving/model_version.h"

#include <malloc.h>
#include <pthread.h>

#include <optional>
#include <utility>

#include "proto/base/log.h"

namespace pyramid {

ModelVersion::ModelVersion(std::string name, int64_t version, std::string dtype,
                           std::unique_ptr<Classifier> classifier, const Batcher::Options& batching,
                           Metrics& metrics, Clock& clock)
    : name_(std::move(name)),
      version_(version),
      dtype_(std::move(dtype)),
      metrics_(metrics.ForModel(name_)),
      classifier_(std::move(classifier)),
      weight_bytes_(classifier_->weight_bytes()),
      drift_(classifier_->manifest().training().val_answers()),
      counted_(*classifier_, statistics_) {
  metrics_.StartVersion(version_, weight_bytes_);
  metrics_.StartClasses(manifest().network().num_classes());
  if (drift_.available()) ShowDrift({});
  batcher_ = std::make_unique<Batcher>(counted_, batching, metrics_, version_, clock);
}

ModelVersion::~ModelVersion() {
  batcher_.reset();
  metrics_.DropVersion(version_, weight_bytes_);
}

void ModelVersion::ObserveAnswer(int index, int classes, double probability) const {
  metrics_.ObserveAnswer(index, classes, probability);
  const std::optional<DriftMeter::Index> drift = drift_.Observe(index, probability);
  if (drift.has_value()) ShowDrift(*drift);
}

void ModelVersion::ShowDrift(const DriftMeter::Index& drift) const {
  metrics_.SetDrift(version_, ModelMetrics::Drift::kClasses, drift.classes);
  metrics_.SetDrift(version_, ModelMetrics::Drift::kConfidence, drift.confidence);
}

VersionReaper::VersionReaper() : thread_([this] { Run(); }) {}

std::shared_ptr<const ModelVersion> VersionReaper::Share(std::shared_ptr<VersionReaper> reaper,
                                                         std::unique_ptr<ModelVersion> version) {
  {
    absl::MutexLock lock(&reaper->mutex_);
    ++reaper->alive_;
  }
  return {version.release(), [reaper = std::move(reaper)](const ModelVersion* gone) {
            absl::MutexLock lock(&reaper->mutex_);
            reaper->dead_.emplace_back(gone);
          }};
}

void VersionReaper::Finish() {
  {
    absl::MutexLock lock(&mutex_);
    finishing_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void VersionReaper::Run() {
  pthread_setname_np(pthread_self(), "model-reaper");
  while (true) {
    std::unique_ptr<const ModelVersion> gone;
    {
      absl::MutexLock lock(&mutex_);
      const auto ready = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
        return !dead_.empty() || (finishing_ && alive_ == 0);
      };
      mutex_.Await(absl::Condition(&ready));
      if (dead_.empty()) return;
      gone = std::move(dead_.front());
      dead_.pop_front();
    }
    const std::string name = gone->name();
    const int64_t version = gone->version();
    gone.reset();
    malloc_trim(0);  // weights go back to the system, not to the allocator's arenas
    log::Info("model_unloaded", {{"model", name}, {"version", version}});
    absl::MutexLock lock(&mutex_);
    --alive_;
  }
}

}  // namespace pyramid
