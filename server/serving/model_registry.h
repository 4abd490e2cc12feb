// The models in service: <data>/models/<name>/<number>/, and the aliases that name their versions.
// "stable" answers requests that name nothing; a share of those may go to another alias.
//
// A change makes what it needs ready beside what is served (verify, load, self-test, gates, warm
// up), records itself in <name>/promotions.jsonl, becomes <name>/state.json, and swaps one pointer.
// Requests that hold the old version finish on it; it is freed, on a thread of this class, when the
// last one lets go. Any failure before the swap leaves everything as it was. Thread-safe.
#ifndef PYRAMID_SERVER_SERVING_MODEL_REGISTRY_H_
#define PYRAMID_SERVER_SERVING_MODEL_REGISTRY_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "model/classifier.h"
#include "proto/base/clock.h"
#include "proto/classification.pb.h"
#include "proto/lifecycle.pb.h"
#include "server/metrics.h"
#include "server/serving/batcher.h"
#include "server/serving/gates.h"
#include "server/serving/model_version.h"
#include "server/serving/route.h"

namespace pyramid {

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
    int load_threads = 1;     // of a forward pass of what isn't in service yet
    Batcher::Options batching;
    int max_extra_versions = 2;  // loaded because a request named them, per model; the least
                                 // recently used one goes first
    GateLimits gates;            // where a promotion leaves them open
  };
  struct Promotion {
    std::string dtype;                              // "fp32" (or empty), "bf16"
    std::string alias = std::string(kStableAlias);  // that names the version afterwards
    GateLimits limits;
    std::optional<double> traffic_percent;  // as SetTraffic; unset: as it is
    std::string actor;                      // for the record
  };
  struct Promoted {
    int64_t version = 0;
    std::string digest;
    bool existed = false;  // the digest already was a version of this model
    int64_t previous = 0;  // what the alias named before; 0: nothing
    std::vector<v1::GateResult> gates;
  };
  using Versions = absl::StatusOr<std::shared_ptr<const ModelVersion>>;
  using RouteKey = absl::FunctionRef<uint64_t()>;  // called at most once, only if traffic is shared

  // `metrics` and `clock` must outlive the registry.
  ModelRegistry(Options options, ClassifierLoader loader, SelfTest self_test, Metrics& metrics,
                Clock& clock = Clock::Real());
  // Waits until nobody holds a version any more.
  ~ModelRegistry();
  ModelRegistry(const ModelRegistry&) = delete;
  ModelRegistry& operator=(const ModelRegistry&) = delete;

  // Loads what was in service. A version that can't be loaded is logged; in place of the stable one
  // an earlier one is tried. Once, before anything else. An error only if the folder itself can't
  // be read or made.
  absl::Status Start();

  // The version to answer with, if it is loaded; null: it is on disk and Get makes it ready.
  // `model` as ParseModelReference; an empty name: the only model. A name alone means "stable", or
  // by `key` the alias that shares its traffic. Never blocks for long.
  //   NotFound         no such model, version or alias; lists what there is
  //   InvalidArgument  no name though there are several models; and what ParseModelReference says
  //   Unavailable      the model is unloaded, or the version damaged, or all that it had
  Versions Find(absl::string_view model, int64_t version, RouteKey key);
  Versions Find(absl::string_view model, int64_t version);  // never shared: "stable"

  // As Find, but loads what isn't loaded. Unavailable as well: that failed, for a reason that may
  // pass. DataLoss: its files turned out to be damaged; from then on Find says Unavailable.
  Versions Get(absl::string_view model, int64_t version, RouteKey key);
  Versions Get(absl::string_view model, int64_t version);

  // Metrics of the model that a request names; null if there is no such model.
  ModelMetrics* MetricsOf(absl::string_view model);

  // Every usable version on disk, by name, then number.
  std::vector<v1::ModelVersion> List() const;

  // Each model's name, and whether it answers requests that name it alone now. Costs next to
  // nothing.
  std::map<std::string, bool> Readiness() const;

  // False: there are models that should answer, and no version of any is loaded. Those that are
  // unloaded, or that no alias names a version of, needn't. True without any.
  bool Answers() const;

  // Versions that are on disk and can't be used, with why, by name and number. Not those that were
  // loaded before it: they answer until they are let go.
  struct Damaged {
    std::string name;
    int64_t version = 0;
    std::string why;
  };
  std::vector<Damaged> ListDamaged() const;

  // From here on changes get Unavailable. One that is being made is made to its end.
  void StopChanges();

  // Aliases and traffic. NotFound.
  absl::StatusOr<v1::ModelState> StateOf(absl::string_view name) const;

  // What happened to a model, the newest `limit`, oldest first. NotFound.
  absl::StatusOr<std::vector<v1::ModelEvent>> EventsOf(absl::string_view name, int limit) const;

  // The changes. Each blocks until it is done, one at a time per name; `actor` is for the record.
  // One that puts an unloaded model back into service loads what its other aliases name too, and is
  // refused, by the code of loading it, where one of those can't be.
  //
  // Puts the checkpoint in `folder` into service under `name`. A digest that is a version of this
  // name already goes into service as that version.
  //   InvalidArgument     the name or alias (letters, digits, '.', '_', '-'; at most 64; not
  //                       beginning with '.'), dtype, limits, preprocessing or labels
  //   NotFound            no checkpoint there
  //   DataLoss            a file of it is damaged
  //   FailedPrecondition  the self-test or a gate failed: name, value, limit
  //   ResourceExhausted   disk full or out of memory
  absl::StatusOr<Promoted> Promote(const std::filesystem::path& folder, absl::string_view name,
                                   const Promotion& promotion);
  absl::StatusOr<Promoted> Promote(const std::filesystem::path& folder, absl::string_view name,
                                   absl::string_view dtype);
  // As ModelService in proto/lifecycle.proto says, errors included.
  absl::StatusOr<v1::ModelState> SetAlias(absl::string_view name, absl::string_view alias,
                                          int64_t version, absl::string_view actor);
  absl::StatusOr<v1::ModelState> RemoveAlias(absl::string_view name, absl::string_view alias,
                                             absl::string_view actor);
  absl::StatusOr<v1::ModelState> SetTraffic(absl::string_view name, absl::string_view alias,
                                            double percent, absl::string_view actor);
  absl::StatusOr<v1::ModelState> Rollback(absl::string_view name, absl::string_view actor);
  // (Re)loads every version that an alias names. Requests don't notice.
  absl::StatusOr<v1::ModelState> Load(absl::string_view name, absl::string_view actor);
  // Requests get Unavailable from here on; those in progress are answered before memory is freed.
  absl::StatusOr<v1::ModelState> Unload(absl::string_view name, absl::string_view actor);

 private:
  struct Loaded {
    std::shared_ptr<const ModelVersion> version;
    mutable int64_t last_used = 0;  // order of use
  };
  using LoadedVersions = std::map<int64_t, Loaded>;
  struct Model {
    v1::ModelState state;
    std::map<int64_t, v1::Manifest> versions;  // usable, on disk
    std::map<int64_t, std::string> damaged;    // on disk too, with why they aren't; in `versions`
                                               // as well while loaded
    LoadedVersions loaded;
  };
  struct Known {
    int64_t version = 0;                         // 0: none has the digest
    std::shared_ptr<const ModelVersion> loaded;  // null: not loaded
  };
  struct Candidate {                             // on its way into service
    std::shared_ptr<const ModelVersion> loaded;  // it was loaded before
    std::unique_ptr<Classifier> fresh;           // else
    SelfTestResult self_test;
    Classifier& classifier() const { return fresh != nullptr ? *fresh : loaded->classifier(); }
  };
  // What a change swaps in, beside the new state.
  struct Swap {
    std::vector<std::shared_ptr<const ModelVersion>> loaded;
    std::optional<v1::Manifest> made;  // of loaded[0]: a version that wasn't there before
    bool drop_all = false;             // nothing stays loaded
  };
  using Models = std::map<std::string, Model, std::less<>>;
  class Work;  // the right to change a model

  void StartModel(const std::string& name);
  void LoadAtStart(Model& model);
  absl::StatusOr<Promoted> PromoteAlone(const std::filesystem::path& folder,
                                        const std::string& name, const Promotion& promotion,
                                        v1::ModelEvent& event);
  absl::Status PassGates(const std::string& name, const Candidate& candidate,
                         const GateLimits& limits, v1::ModelEvent& event);
  Agreement AgreementWithStable(const std::string& name, const Candidate& candidate);
  Known FindDigest(const std::string& name, const std::string& digest);
  absl::StatusOr<int64_t> NextVersion(const std::string& name) const;

  void RunBeside(absl::FunctionRef<void()> work);  // as RunBesideServing, with the options
  // `beside`: others are being served.
  absl::StatusOr<Candidate> LoadAndCheck(const std::string& name, int64_t version,
                                         const std::string& dtype, bool beside);
  absl::StatusOr<Candidate> LoadAndCheckHere(const std::string& name, int64_t version,
                                             const std::string& dtype);
  std::shared_ptr<const ModelVersion> Finish(const std::string& name, int64_t version,
                                             const std::string& dtype, Candidate candidate);
  // The version, loaded now unless it is already.
  Versions Ready(const std::string& name, const v1::ModelState& state, int64_t version);

  // Takes `state` back into service: makes ready what its aliases name beside what is in `swap`.
  absl::Status BringBack(v1::ModelState& state, Swap& swap);

  // Records the event, writes the state, then swaps; in this order, and nothing after an error. The
  // error says so where the event is on record already.
  absl::Status Commit(const v1::ModelState& state, v1::ModelEvent event, Swap swap);
  // Records that a change failed, if there is a model or a record; gives back `status`.
  absl::Status Refused(const std::string& name, const absl::Status& status, v1::ModelEvent event);
  // Changes `state`, says what it did in `event` and what to swap in.
  using Changing =
      absl::FunctionRef<absl::Status(v1::ModelState& state, v1::ModelEvent& event, Swap& swap)>;
  absl::StatusOr<v1::ModelState> Change(absl::string_view name, v1::ModelEvent event,
                                        Changing change);

  absl::StatusOr<v1::ModelState> CopyState(absl::string_view name) const;
  absl::Status CheckChangeable() const;  // Unavailable after StopChanges
  // The version to move an alias to is in `versions`; NotFound, DataLoss.
  absl::Status CheckVersion(const std::string& name, int64_t version) const;
  absl::StatusOr<Models::const_iterator> FindModel(absl::string_view name) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  struct Target {
    std::string name;
    int64_t version = 0;
    std::shared_ptr<const ModelVersion> loaded;
  };
  absl::StatusOr<Target> Resolve(absl::string_view model, int64_t version, const RouteKey* key);
  Versions GetTarget(Target target);
  static void SetAside(Model& model, int64_t version, const absl::Status& why);
  // Takes a version out of model.loaded and moves `at` on. To be let go without the lock.
  static std::shared_ptr<const ModelVersion> TakeOut(Model& model, LoadedVersions::iterator& at);
  static bool IsReady(const Model& model);
  void ShowState(const Model& model) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::filesystem::path FolderOf(absl::string_view name, int64_t version) const;

  const Options options_;
  const ClassifierLoader loader_;
  const SelfTest self_test_;  // may run for several models at once
  Metrics& metrics_;
  Clock& clock_;
  const std::shared_ptr<VersionReaper> reaper_;

  mutable absl::Mutex mutex_;  // never held while loading
  Models models_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string, std::less<>> busy_
      ABSL_GUARDED_BY(mutex_);  // names being changed or loaded
  int64_t uses_ ABSL_GUARDED_BY(mutex_) = 0;
  bool no_changes_ ABSL_GUARDED_BY(mutex_) = false;
};

// InvalidArgument unless `name` may be a model's (or, `what`, an alias's).
absl::Status CheckModelName(absl::string_view name, absl::string_view what = "model name");

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_MODEL_REGISTRY_H_
