// The models in service: <data>/models/<name>/<number>/, one version of each answering requests
// that name none.
//
// Promote puts a checkpoint into service: copy, load, self-test, warm up, swap one pointer.
// Requests that hold the old version finish on it; it is freed, on a thread of this class, when the
// last one lets go. Any failure before the swap leaves the old version alone.
// `<name>/current` records the version in service and its dtype. Thread-safe.
#ifndef PYRAMID_SERVER_SERVING_MODEL_REGISTRY_H_
#define PYRAMID_SERVER_SERVING_MODEL_REGISTRY_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "model/classifier.h"
#include "proto/base/clock.h"
#include "proto/classification.pb.h"
#include "server/metrics.h"
#include "server/serving/batcher.h"

namespace pyramid {

// One loaded version with its batch thread. Whoever holds it keeps it alive.
class ModelVersion {
 public:
  ModelVersion(std::string name, int64_t version, std::string dtype, std::vector<std::string> gates,
               std::unique_ptr<Classifier> classifier, const Batcher::Options& batching,
               Metrics& metrics, Clock& clock);
  ~ModelVersion();
  ModelVersion(const ModelVersion&) = delete;
  ModelVersion& operator=(const ModelVersion&) = delete;

  const std::string& name() const { return name_; }
  int64_t version() const { return version_; }
  const std::string& dtype() const { return dtype_; }
  const std::vector<std::string>& gates() const {
    return gates_;
  }  // one line each, as measured when it was loaded
  const v1::Manifest& manifest() const { return classifier_->manifest(); }
  Batcher& batcher() const { return *batcher_; }
  ModelMetrics& metrics() const { return metrics_; }

 private:
  const std::string name_;
  const int64_t version_;
  const std::string dtype_;
  const std::vector<std::string> gates_;
  ModelMetrics& metrics_;
  const std::unique_ptr<Classifier> classifier_;
  std::unique_ptr<Batcher> batcher_;
};

// RunSelfTest of model/classifier.h; tests give their own.
using SelfTest = absl::AnyInvocable<absl::StatusOr<SelfTestResult>(
    Classifier& classifier, const std::filesystem::path& folder, const ClassifierOptions& options)
                                        const>;

class ModelRegistry {
 public:
  struct Options {
    std::filesystem::path folder;  // <data>/models
    std::string device = "cpu";
    int forward_threads = 0;  // as ClassifierOptions::threads
    Batcher::Options batching;
    int max_extra_versions = 2;  // loaded because a request named them, per model; the least
                                 // recently used one goes first
  };
  struct Promoted {
    int64_t version = 0;
    std::string digest;
    bool existed = false;            // the digest already was a version of this model
    std::vector<std::string> gates;  // "self-test: max error 1e-6, wanted ≤ 1e-4"
  };

  // `metrics` and `clock` must outlive the registry.
  ModelRegistry(Options options, ClassifierLoader loader, SelfTest self_test, Metrics& metrics,
                Clock& clock = Clock::Real());
  // Waits until nobody holds a version any more.
  ~ModelRegistry();
  ModelRegistry(const ModelRegistry&) = delete;
  ModelRegistry& operator=(const ModelRegistry&) = delete;

  // Loads what was in service. A version that can't be loaded is logged and an older one tried.
  // Once, before anything else. An error only if the folder itself can't be read or made.
  absl::Status Start();

  // Puts the checkpoint in `folder` into service under `name`. Blocks while it loads; one at a time
  // per name. A digest that is a version of this name already goes back into service as that
  // version. `dtype`: empty is fp32.
  //   InvalidArgument     the name (letters, digits, '.', '_', '-'; at most 64; not beginning with
  //   '.'), dtype, preprocessing or labels NotFound            no checkpoint there DataLoss a file
  //   of it is damaged FailedPrecondition  the self-test failed ResourceExhausted   disk full or
  //   out of memory
  absl::StatusOr<Promoted> Promote(const std::filesystem::path& folder, absl::string_view name,
                                   absl::string_view dtype);

  // The version to answer with, if it is loaded; null: it is on disk and Load makes it ready.
  // `version` 0: the one in service. An empty name: the only model. Never blocks for long.
  //   NotFound         no such model or version; lists what there is
  //   InvalidArgument  no name though there are several models
  absl::StatusOr<std::shared_ptr<const ModelVersion>> Find(absl::string_view name, int64_t version);

  // As Find, but loads what isn't loaded. Also DataLoss, FailedPrecondition, ResourceExhausted.
  absl::StatusOr<std::shared_ptr<const ModelVersion>> Get(absl::string_view name, int64_t version);

  // Metrics of the model that a request names; null if there is no such model.
  ModelMetrics* MetricsOf(absl::string_view name);

  // Every usable version on disk, by name, then number.
  std::vector<v1::ModelVersion> List() const;

 private:
  class Reaper;
  struct Extra {
    std::shared_ptr<const ModelVersion> loaded;
    int64_t last_used = 0;  // order of use
  };
  struct Model {
    std::shared_ptr<const ModelVersion> current;  // null: no version could be loaded
    std::map<int64_t, v1::Manifest> versions;     // usable, on disk
    std::map<int64_t, Extra> extras;
  };
  struct Known {
    int64_t version = 0;                         // 0: none has the digest
    std::shared_ptr<const ModelVersion> loaded;  // null: not loaded
  };
  using Models = std::map<std::string, Model, std::less<>>;

  void StartModel(const std::string& name);
  // By the thread that has begun work on `name`.
  absl::StatusOr<Promoted> PromoteAlone(const std::filesystem::path& folder,
                                        const std::string& name, const std::string& dtype);
  Known FindDigest(const std::string& name, const std::string& digest);
  absl::StatusOr<int64_t> NextVersion(const std::string& name) const;
  // `dtype` empty: as recorded.
  absl::StatusOr<std::shared_ptr<const ModelVersion>> LoadVersion(const std::string& name,
                                                                  int64_t version,
                                                                  absl::string_view dtype = "");
  absl::StatusOr<std::unique_ptr<ModelVersion>> LoadAndCheck(const std::string& name,
                                                             int64_t version,
                                                             const std::string& dtype);
  absl::StatusOr<Models::iterator> FindModel(absl::string_view name)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<std::shared_ptr<const ModelVersion>> FindLocked(absl::string_view name,
                                                                 int64_t version)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void BeginWork(const std::string& name) ABSL_LOCKS_EXCLUDED(mutex_);
  void EndWork(const std::string& name) ABSL_LOCKS_EXCLUDED(mutex_);
  std::filesystem::path FolderOf(absl::string_view name, int64_t version) const;

  const Options options_;
  const ClassifierLoader loader_;
  const SelfTest self_test_;  // may run for several models at once
  Metrics& metrics_;
  Clock& clock_;
  const std::shared_ptr<Reaper> reaper_;

  mutable absl::Mutex mutex_;  // never held while loading
  Models models_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string, std::less<>> busy_
      ABSL_GUARDED_BY(mutex_);  // names being promoted or loaded
  int64_t uses_ ABSL_GUARDED_BY(mutex_) = 0;
};

// InvalidArgument unless `name` may be a model's.
absl::Status CheckModelName(absl::string_view name);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_MODEL_REGISTRY_H_
