// One loaded version of a model, and the thread that frees versions nobody holds any more.
#ifndef PYRAMID_SERVER_SERVING_MODEL_VERSION_H_
#define PYRAMID_SERVER_SERVING_MODEL_VERSION_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "model/classifier.h"
#include "proto/base/clock.h"
#include "server/metrics.h"
#include "server/serving/batcher.h"
#include "server/serving/drift.h"
#include "server/serving/inference_statistics.h"

namespace pyramid {

// With its batch threads. Whoever holds it keeps it alive. Its metric series begin and end with it.
class ModelVersion {
 public:
  ModelVersion(std::string name, int64_t version, std::string dtype,
               std::unique_ptr<Classifier> classifier, const Batcher::Options& batching,
               Metrics& metrics, Clock& clock);
  ~ModelVersion();
  ModelVersion(const ModelVersion&) = delete;
  ModelVersion& operator=(const ModelVersion&) = delete;

  const std::string& name() const { return name_; }
  int64_t version() const { return version_; }
  const std::string& dtype() const { return dtype_; }
  const v1::Manifest& manifest() const { return classifier_->manifest(); }
  Classifier& classifier() const { return *classifier_; }
  Batcher& batcher() const { return *batcher_; }
  ModelMetrics& metrics() const { return metrics_; }
  // A picture's best class, of how many, and its probability.
  void ObserveAnswer(int index, int classes, double probability) const;
  InferenceStatistics& statistics() const { return statistics_; }

 private:
  void ShowDrift(const DriftMeter::Index& drift) const;

  const std::string name_;
  const int64_t version_;
  const std::string dtype_;
  ModelMetrics& metrics_;
  const std::unique_ptr<Classifier> classifier_;
  const int64_t weight_bytes_;
  mutable InferenceStatistics statistics_;
  mutable DriftMeter drift_;
  CountedClassifier counted_;
  std::unique_ptr<Batcher> batcher_;
};

// Frees versions on a thread of its own: the last holder may be the version's own batch thread,
// which can't join itself. Memory goes back to the system. Thread-safe.
class VersionReaper {
 public:
  VersionReaper();
  ~VersionReaper() { Finish(); }
  VersionReaper(const VersionReaper&) = delete;
  VersionReaper& operator=(const VersionReaper&) = delete;

  // A pointer whose last copy hands the version to the reaper.
  static std::shared_ptr<const ModelVersion> Share(std::shared_ptr<VersionReaper> reaper,
                                                   std::unique_ptr<ModelVersion> version);

  // Waits until every version has been freed.
  void Finish();

 private:
  void Run();

  absl::Mutex mutex_;
  std::deque<std::unique_ptr<const ModelVersion>> dead_ ABSL_GUARDED_BY(mutex_);
  int alive_ ABSL_GUARDED_BY(mutex_) = 0;
  bool finishing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_MODEL_VERSION_H_
