#include <malloc.h>

#include <algorithm>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "model/preprocess.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "proto/base/time.h"
#include "server/serving/loading.h"
#include "server/serving/model_registry_internal.h"
#include "server/serving/model_state.h"

// How the models in service change: promotion, aliases, traffic, rollback, loading.
namespace pyramid {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLongestActor = 256;
constexpr size_t kLongestError = 1024;
constexpr size_t kLongestEcho = 100;

// What serving needs from a manifest beyond what loading checks.
absl::Status CheckServable(const v1::Manifest& manifest) {
  RETURN_IF_ERROR(Annotate(CheckPreprocessing(manifest.preprocessing()), "preprocessing"));
  const v1::NetworkConfig& network = manifest.network();
  if (manifest.preprocessing().channels() != network.in_channels()) {
    return absl::InvalidArgumentError(
        absl::StrCat("preprocessing.channels is ", manifest.preprocessing().channels(),
                     ", the network's in_channels is ", network.in_channels()));
  }
  if (manifest.labels_size() != 0 && manifest.labels_size() != network.num_classes()) {
    return absl::InvalidArgumentError(absl::StrCat("labels has ", manifest.labels_size(),
                                                   " entries, the network has ",
                                                   network.num_classes(), " classes"));
  }
  return absl::OkStatus();
}

absl::Status CheckTraffic(absl::string_view alias, double percent) {
  if (!(percent >= 0 && percent <= 100)) {
    return absl::InvalidArgumentError(absl::StrCat("traffic_percent is ", percent, "; use 0..100"));
  }
  if (alias == kStableAlias) {
    return absl::InvalidArgumentError(
        "stable gets what no other alias does; give the share of another alias, such as canary");
  }
  return absl::OkStatus();
}

// `percent` 0: nobody shares.
void ShareTraffic(v1::ModelState& state, absl::string_view alias, double percent) {
  state.clear_traffic_alias();
  state.clear_traffic_percent();
  if (percent <= 0) return;
  state.set_traffic_alias(std::string(alias));
  state.set_traffic_percent(percent);
}

v1::ModelEvent MakeEvent(absl::string_view action, absl::string_view actor,
                         absl::string_view alias) {
  v1::ModelEvent event;
  event.set_action(std::string(action));
  event.set_actor(std::string(actor.substr(0, kLongestActor)));
  event.set_alias(std::string(alias));
  return event;
}

void Describe(v1::ModelEvent& event, const v1::Manifest& manifest) {
  event.set_digest(manifest.digest());
  event.set_job_id(manifest.training().job_id());
  event.set_step(manifest.training().step());
}

}  // namespace

absl::StatusOr<ModelRegistry::Candidate> ModelRegistry::LoadAndCheckHere(const std::string& name,
                                                                         int64_t version,
                                                                         const std::string& dtype) {
  const fs::path folder = FolderOf(name, version);
  const ClassifierOptions options{
      .device = options_.device, .dtype = dtype, .threads = options_.forward_threads};
  Candidate candidate;
  ASSIGN_OR_RETURN(candidate.fresh, loader_(folder, options));
  const v1::Manifest& manifest = candidate.fresh->manifest();
  RETURN_IF_ERROR(CheckServable(manifest));
  ASSIGN_OR_RETURN(candidate.self_test, self_test_(*candidate.fresh, folder, options));
  const int side = manifest.preprocessing().crop();
  const int largest = MaxBatchOf(options_.batching.max_batch, side, side);
  RETURN_IF_ERROR(WarmUp(*candidate.fresh, WarmUpSizes(largest, options_.device)));
  return candidate;
}

void ModelRegistry::RunBeside(absl::FunctionRef<void()> work) {
  RunBesideServing(options_.load_threads, options_.batching.device.get(), work);
}

absl::StatusOr<ModelRegistry::Candidate> ModelRegistry::LoadAndCheck(const std::string& name,
                                                                     int64_t version,
                                                                     const std::string& dtype,
                                                                     bool beside) {
  const absl::Time started = clock_.Now();
  absl::StatusOr<Candidate> candidate;
  const auto load = [&] { candidate = LoadAndCheckHere(name, version, dtype); };
  if (beside) {
    RunBeside(load);
  } else {
    load();
  }
  metrics_.ObserveModelLoad(name, clock_.Now() - started, candidate.ok());
  if (candidate.ok()) return candidate;
  malloc_trim(0);
  return Annotate(candidate.status(), absl::StrCat("loading ", name, " version ", version));
}

std::shared_ptr<const ModelVersion> ModelRegistry::Finish(const std::string& name, int64_t version,
                                                          const std::string& dtype,
                                                          Candidate candidate) {
  if (candidate.loaded != nullptr) return std::move(candidate.loaded);
  return VersionReaper::Share(
      reaper_, std::make_unique<ModelVersion>(name, version, dtype, std::move(candidate.fresh),
                                              options_.batching, metrics_, clock_));
}

ModelRegistry::Versions ModelRegistry::Ready(const std::string& name, const v1::ModelState& state,
                                             int64_t version) {
  const std::string dtype = DtypeOf(state, version);
  {
    absl::MutexLock lock(&mutex_);
    const Model& model = models_[name];
    const auto loaded = model.loaded.find(version);
    if (loaded != model.loaded.end() && loaded->second.version->dtype() == dtype) {
      return loaded->second.version;
    }
  }
  ASSIGN_OR_RETURN(Candidate candidate, LoadAndCheck(name, version, dtype, /*beside=*/true));
  return Finish(name, version, dtype, std::move(candidate));
}

absl::Status ModelRegistry::Commit(const v1::ModelState& state, v1::ModelEvent event, Swap swap) {
  const fs::path folder = options_.folder / state.name();
  *event.mutable_time() = ToProto(clock_.Now());
  if (!event.alias().empty() && event.alias() == state.traffic_alias()) {
    event.set_traffic_percent(state.traffic_percent());
  }
  RETURN_IF_ERROR(AppendModelEvent(folder, event));
  if (const absl::Status written = WriteModelState(folder, state); !written.ok()) {
    return Annotate(written, absl::StrCat("nothing has changed, and the line of ", kEventsFileName,
                                          " before this refusal's is void"));
  }

  std::vector<std::shared_ptr<const ModelVersion>> gone;  // let go without the lock
  {
    absl::MutexLock lock(&mutex_);
    Model& model = models_[state.name()];
    if (swap.made.has_value()) {
      model.versions[swap.loaded.front()->version()] = *std::move(swap.made);
    }
    const std::set<int64_t> before = NamedVersions(model.state);
    const std::set<int64_t> now = NamedVersions(state);
    model.state = state;
    for (std::shared_ptr<const ModelVersion>& version : swap.loaded) {
      std::swap(model.loaded[version->version()].version, version);  // the next request gets it
      gone.push_back(std::move(version));
    }
    for (auto it = model.loaded.begin(); it != model.loaded.end();) {
      const bool left = before.count(it->first) > 0 && now.count(it->first) == 0;
      if (!left && !swap.drop_all) {
        ++it;
        continue;
      }
      gone.push_back(TakeOut(model, it));
    }
    ShowState(model);
  }
  log::Info("model_changed", {{"model", state.name()},
                              {"action", event.action()},
                              {"alias", event.alias()},
                              {"version", event.version()},
                              {"previous", event.previous_version()},
                              {"digest", event.digest()},
                              {"traffic_percent", event.traffic_percent()},
                              {"actor", event.actor()}});
  return absl::OkStatus();
}

absl::Status ModelRegistry::Refused(const std::string& name, const absl::Status& status,
                                    v1::ModelEvent event) {
  log::Warning("model_not_changed", {{"model", name},
                                     {"action", event.action()},
                                     {"actor", event.actor()},
                                     {"error", status.message()}});
  {
    absl::MutexLock lock(&mutex_);
    std::error_code ignored;
    if (models_.count(name) == 0 &&
        !fs::exists(options_.folder / name / std::string(kEventsFileName), ignored)) {
      return status;  // there is nothing yet that it could be kept with
    }
  }
  *event.mutable_time() = ToProto(clock_.Now());
  event.set_code(static_cast<int>(status.code()));
  event.set_error(std::string(status.message().substr(0, kLongestError)));
  const absl::Status recorded = AppendModelEvent(options_.folder / name, event);
  if (!recorded.ok()) {
    log::Error("model_event_lost", {{"model", name}, {"error", recorded.message()}});
  }
  return status;
}

void ModelRegistry::StopChanges() {
  absl::MutexLock lock(&mutex_);
  no_changes_ = true;
}

absl::Status ModelRegistry::CheckChangeable() const {
  absl::MutexLock lock(&mutex_);
  return no_changes_
             ? absl::UnavailableError("the server is shutting down; models stay as they are")
             : absl::OkStatus();
}

absl::Status ModelRegistry::CheckVersion(const std::string& name, int64_t version) const {
  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(const auto found, FindModel(name));
  const Model& model = found->second;
  if (model.versions.count(version) > 0) return absl::OkStatus();
  if (const auto damaged = model.damaged.find(version); damaged != model.damaged.end()) {
    return absl::DataLossError(
        absl::StrCat("version ", version, " of ", name, " can't be used: ", damaged->second));
  }
  return absl::NotFoundError(
      absl::StrCat("no version ", version, " of ", name, "; there is ", Listed(model.versions)));
}

absl::Status ModelRegistry::BringBack(v1::ModelState& state, Swap& swap) {
  if (!state.unloaded()) return absl::OkStatus();
  for (const std::string& alias : AliasesOf(state)) {
    const int64_t version = VersionOfAlias(state, alias);
    const auto is_it = [version](const auto& one) { return one->version() == version; };
    if (std::any_of(swap.loaded.begin(), swap.loaded.end(), is_it)) continue;
    const absl::Status known = CheckVersion(state.name(), version);
    Versions ready = known.ok() ? Ready(state.name(), state, version) : Versions(known);
    if (!ready.ok()) {
      return Annotate(
          ready.status(),
          absl::StrCat(state.name(), " is unloaded and comes back with all its aliases; let ",
                       alias, " name another version than ", version,
                       alias == kStableAlias ? "" : ", or remove it"));
    }
    swap.loaded.push_back(*std::move(ready));
  }
  state.set_unloaded(false);
  return absl::OkStatus();
}

absl::StatusOr<ModelRegistry::Promoted> ModelRegistry::Promote(const fs::path& folder,
                                                               absl::string_view name,
                                                               absl::string_view dtype) {
  return Promote(folder, name, Promotion{.dtype = std::string(dtype)});
}

absl::StatusOr<ModelRegistry::Promoted> ModelRegistry::Promote(const fs::path& folder,
                                                               absl::string_view name,
                                                               const Promotion& promotion) {
  RETURN_IF_ERROR(CheckModelName(name));
  Promotion asked = promotion;
  if (asked.dtype.empty()) asked.dtype = std::string(kDefaultDtype);
  if (asked.alias.empty()) asked.alias = std::string(kStableAlias);
  if (asked.dtype != "fp32" && asked.dtype != "bf16") {
    return absl::InvalidArgumentError(
        absl::StrCat("dtype is \"", absl::CHexEscape(asked.dtype.substr(0, kLongestEcho)),
                     "\"; use fp32 or bf16"));
  }
  RETURN_IF_ERROR(CheckModelName(asked.alias, "alias"));
  if (asked.traffic_percent.has_value()) {
    RETURN_IF_ERROR(CheckTraffic(asked.alias, *asked.traffic_percent));
  }
  RETURN_IF_ERROR(CheckLimits(asked.limits, options_.batching.max_batch));
  asked.limits = MergeLimits(asked.limits, options_.gates);

  const std::string model(name);
  const Work work(*this, model);
  RETURN_IF_ERROR(CheckChangeable());
  v1::ModelEvent event = MakeEvent("promote", asked.actor, asked.alias);
  event.set_dtype(asked.dtype);
  auto promoted = PromoteAlone(folder, model, asked, event);
  if (!promoted.ok()) {
    return Annotate(Refused(model, promoted.status(), std::move(event)),
                    absl::StrCat("promoting as ", model));
  }
  return promoted;
}

// `event` fills up on the way, so that a refusal is recorded with what had been measured.
absl::StatusOr<ModelRegistry::Promoted> ModelRegistry::PromoteAlone(const fs::path& folder,
                                                                    const std::string& name,
                                                                    const Promotion& promotion,
                                                                    v1::ModelEvent& event) {
  ASSIGN_OR_RETURN(v1::Manifest manifest, ReadManifest(folder));
  RETURN_IF_ERROR(CheckServable(manifest));
  Describe(event, manifest);
  *event.add_gates() = Top1Gate(manifest, promotion.limits);
  RETURN_IF_ERROR(CheckGate(event.gates(0)));

  const Known known = FindDigest(name, manifest.digest());
  Promoted promoted{
      .version = known.version, .digest = manifest.digest(), .existed = known.version != 0};
  // A new version's folder goes again unless everything works out.
  const fs::path model_folder = options_.folder / name;
  fs::path made;
  auto remove_made = absl::MakeCleanup([&] {
    std::error_code ignored;
    if (!made.empty()) fs::remove_all(made, ignored);
    fs::remove(model_folder, ignored);  // only if empty
  });
  if (!promoted.existed) {
    ASSIGN_OR_RETURN(promoted.version, NextVersion(name));
    made = FolderOf(name, promoted.version);
    ASSIGN_OR_RETURN(manifest, CopyForServing(folder, made));  // verifies every digest
  }
  event.set_version(promoted.version);

  Candidate candidate;
  if (known.loaded != nullptr && known.loaded->dtype() == promotion.dtype) {
    candidate.loaded = known.loaded;
    absl::StatusOr<SelfTestResult> self_test;
    RunBeside([&] {
      self_test = self_test_(known.loaded->classifier(), FolderOf(name, promoted.version),
                             {.device = options_.device, .dtype = promotion.dtype});
    });
    ASSIGN_OR_RETURN(candidate.self_test, std::move(self_test));
  } else {
    ASSIGN_OR_RETURN(candidate,
                     LoadAndCheck(name, promoted.version, promotion.dtype, /*beside=*/true));
  }
  RETURN_IF_ERROR(PassGates(name, candidate, promotion.limits, event));

  v1::ModelState state;
  if (auto there = CopyState(name); there.ok()) state = *std::move(there);
  state.set_name(name);
  promoted.previous = VersionOfAlias(state, promotion.alias);
  event.set_previous_version(promoted.previous);
  state.mutable_dtypes()->erase(promoted.version);
  if (promotion.dtype != kDefaultDtype) {
    (*state.mutable_dtypes())[promoted.version] = promotion.dtype;
  }
  MoveAlias(state, promotion.alias, promoted.version);
  if (promotion.traffic_percent.has_value()) {
    ShareTraffic(state, promotion.alias, *promotion.traffic_percent);
  }
  Swap swap;
  swap.loaded.push_back(Finish(name, promoted.version, promotion.dtype, std::move(candidate)));
  if (!promoted.existed) swap.made = std::move(manifest);
  RETURN_IF_ERROR(BringBack(state, swap));
  RETURN_IF_ERROR(Commit(state, event, std::move(swap)));
  std::move(remove_made).Cancel();
  promoted.gates.assign(event.gates().begin(), event.gates().end());
  return promoted;
}

absl::Status ModelRegistry::PassGates(const std::string& name, const Candidate& candidate,
                                      const GateLimits& limits, v1::ModelEvent& event) {
  const int first = event.gates_size();
  *event.add_gates() = SelfTestGate(candidate.self_test, limits);
  *event.add_gates() = AgreementGate(AgreementWithStable(name, candidate), limits);
  if (limits.max_latency.value_or(absl::ZeroDuration()) > absl::ZeroDuration()) {
    const int side = candidate.classifier().manifest().preprocessing().crop();
    const int batch = std::min(limits.latency_batch.value_or(1),
                               MaxBatchOf(options_.batching.max_batch, side, side));
    ASSIGN_OR_RETURN(const absl::Duration median,
                     MeasureLatency(candidate.classifier(), batch, clock_));
    *event.add_gates() = LatencyGate(median, batch, limits);
  }
  for (int i = first; i < event.gates_size(); ++i) RETURN_IF_ERROR(CheckGate(event.gates(i)));
  return absl::OkStatus();
}

Agreement ModelRegistry::AgreementWithStable(const std::string& name, const Candidate& candidate) {
  Agreement agreement;
  std::shared_ptr<const ModelVersion> stable;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = models_.find(name);
    const int64_t version =
        found == models_.end() ? 0 : VersionOfAlias(found->second.state, kStableAlias);
    agreement.first = version == 0;
    agreement.with = version == 0 ? "nothing is stable yet" : "the stable version isn't loaded";
    if (version == 0) return agreement;
    const auto loaded = found->second.loaded.find(version);
    if (loaded == found->second.loaded.end()) return agreement;
    stable = loaded->second.version;
  }
  const SelfTestResult& test = candidate.self_test;
  const v1::Manifest& manifest = candidate.classifier().manifest();
  agreement.with = test.pixels.empty() ? "the checkpoint has no self-test"
                                       : WhyNotComparable(manifest, stable->manifest());
  if (!agreement.with.empty()) return agreement;
  absl::StatusOr<std::vector<float>> answers;
  RunBeside([&] {
    answers = stable->classifier().Forward(test.pixels, test.pictures, test.height, test.width);
  });
  if (!answers.ok()) {
    agreement.with = std::string(answers.status().message());
    return agreement;
  }
  agreement.available = true;
  agreement.with = absl::StrCat("version ", stable->version());
  agreement.pictures = test.pictures;
  agreement.share = ShareOfSameAnswers(test.logits, *answers, manifest.network().num_classes());
  return agreement;
}

ModelRegistry::Known ModelRegistry::FindDigest(const std::string& name, const std::string& digest) {
  Known known;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = models_.find(name);
    if (found == models_.end()) return known;
    const Model& model = found->second;
    for (const auto& [version, manifest] : model.versions) {
      if (manifest.digest() == digest) known.version = version;
    }
    if (known.version == 0) return known;
    const auto loaded = model.loaded.find(known.version);
    if (loaded != model.loaded.end()) known.loaded = loaded->second.version;
  }
  // A copy that has been damaged since is no use once it has to be loaded again.
  const auto verified = VerifyCheckpoint(FolderOf(name, known.version));
  if (verified.ok()) return known;
  log::Error("model_version_damaged",
             {{"model", name}, {"version", known.version}, {"error", verified.status().message()}});
  absl::MutexLock lock(&mutex_);
  SetAside(models_[name], known.version, verified.status());
  return Known();
}

absl::StatusOr<int64_t> ModelRegistry::NextVersion(const std::string& name) const {
  const fs::path folder = options_.folder / name;
  RETURN_IF_ERROR(MakeFolders(folder));
  std::error_code error;
  int64_t newest = 0;
  for (const fs::path& entry : EntriesOf(folder, error)) {
    newest = std::max(newest, VersionOfFolder(entry.filename().string()));
  }
  if (error) return ErrnoStatus(error.value(), "can't read", folder);
  return newest + 1;
}

// The frame of every change but a promotion: alone with the model, and what it refuses is recorded.
absl::StatusOr<v1::ModelState> ModelRegistry::Change(absl::string_view name, v1::ModelEvent event,
                                                     Changing change) {
  ASSIGN_OR_RETURN(const v1::ModelState there, CopyState(name));
  const std::string& model = there.name();
  const Work work(*this, model);
  RETURN_IF_ERROR(CheckChangeable());
  ASSIGN_OR_RETURN(v1::ModelState state, CopyState(model));
  Swap swap;
  absl::Status status = change(state, event, swap);
  if (status.ok() && event.version() != 0) {
    absl::MutexLock lock(&mutex_);
    const Model& known = models_[model];
    const auto manifest = known.versions.find(event.version());
    if (manifest != known.versions.end()) Describe(event, manifest->second);
    event.set_dtype(DtypeOf(state, event.version()));
  }
  if (status.ok()) status = Commit(state, event, std::move(swap));
  if (!status.ok()) return Refused(model, status, std::move(event));
  return state;
}

absl::StatusOr<v1::ModelState> ModelRegistry::SetAlias(absl::string_view name,
                                                       absl::string_view alias, int64_t version,
                                                       absl::string_view actor) {
  if (alias.empty()) alias = kStableAlias;
  RETURN_IF_ERROR(CheckModelName(alias, "alias"));
  return Change(name, MakeEvent("alias", actor, alias),
                [&](v1::ModelState& state, v1::ModelEvent& event, Swap& swap) -> absl::Status {
                  event.set_version(version);
                  event.set_previous_version(VersionOfAlias(state, alias));
                  RETURN_IF_ERROR(CheckVersion(state.name(), version));
                  ASSIGN_OR_RETURN(swap.loaded.emplace_back(), Ready(state.name(), state, version));
                  MoveAlias(state, alias, version);
                  return BringBack(state, swap);
                });
}

absl::StatusOr<v1::ModelState> ModelRegistry::RemoveAlias(absl::string_view name,
                                                          absl::string_view alias,
                                                          absl::string_view actor) {
  return Change(name, MakeEvent("remove-alias", actor, alias),
                [&](v1::ModelState& state, v1::ModelEvent& event, Swap&) -> absl::Status {
                  RETURN_IF_ERROR(CheckAlias(state, alias));
                  if (alias == kStableAlias) {
                    return absl::FailedPreconditionError(
                        "stable can't be removed; let it name another version, or unload the "
                        "model");
                  }
                  event.set_previous_version(VersionOfAlias(state, alias));
                  DropAlias(state, alias);
                  return absl::OkStatus();
                });
}

absl::StatusOr<v1::ModelState> ModelRegistry::SetTraffic(absl::string_view name,
                                                         absl::string_view alias, double percent,
                                                         absl::string_view actor) {
  if (alias.empty()) alias = kCanaryAlias;
  RETURN_IF_ERROR(CheckTraffic(alias, percent));
  return Change(
      name, MakeEvent("traffic", actor, alias),
      [&](v1::ModelState& state, v1::ModelEvent& event, Swap&) -> absl::Status {
        event.set_version(VersionOfAlias(state, alias));
        if (percent > 0) {
          RETURN_IF_ERROR(CheckAlias(state, alias));
          if (VersionOfAlias(state, kStableAlias) == 0) {
            return absl::FailedPreconditionError(absl::StrCat(
                state.name(), " has no stable version to share traffic with; promote one"));
          }
        }
        ShareTraffic(state, alias, percent);
        return absl::OkStatus();
      });
}

absl::StatusOr<v1::ModelState> ModelRegistry::Rollback(absl::string_view name,
                                                       absl::string_view actor) {
  return Change(name, MakeEvent("rollback", actor, kStableAlias),
                [&](v1::ModelState& state, v1::ModelEvent& event, Swap& swap) -> absl::Status {
                  event.set_previous_version(VersionOfAlias(state, kStableAlias));
                  std::set<int64_t> usable;
                  {
                    absl::MutexLock lock(&mutex_);
                    for (const auto& [version, manifest] : models_[state.name()].versions) {
                      usable.insert(version);
                    }
                  }
                  const int64_t version = GoBack(state, usable);
                  event.set_version(version);
                  if (version == 0) {
                    return absl::FailedPreconditionError(
                        absl::StrCat(state.name(),
                                     " has no earlier stable version to go back to; let the alias "
                                     "stable name a version"));
                  }
                  ASSIGN_OR_RETURN(swap.loaded.emplace_back(), Ready(state.name(), state, version));
                  return BringBack(state, swap);
                });
}

absl::StatusOr<v1::ModelState> ModelRegistry::Load(absl::string_view name,
                                                   absl::string_view actor) {
  return Change(
      name, MakeEvent("load", actor, ""),
      [&](v1::ModelState& state, v1::ModelEvent& event, Swap& swap) -> absl::Status {
        event.set_version(VersionOfAlias(state, kStableAlias));
        for (const int64_t version : NamedVersions(state)) {
          RETURN_IF_ERROR(CheckVersion(state.name(), version));
          const std::string dtype = DtypeOf(state, version);
          ASSIGN_OR_RETURN(Candidate candidate,
                           LoadAndCheck(state.name(), version, dtype, /*beside=*/true));
          swap.loaded.push_back(Finish(state.name(), version, dtype, std::move(candidate)));
        }
        state.set_unloaded(false);
        return absl::OkStatus();
      });
}

absl::StatusOr<v1::ModelState> ModelRegistry::Unload(absl::string_view name,
                                                     absl::string_view actor) {
  return Change(name, MakeEvent("unload", actor, ""),
                [&](v1::ModelState& state, v1::ModelEvent& event, Swap& swap) -> absl::Status {
                  event.set_version(VersionOfAlias(state, kStableAlias));
                  state.set_unloaded(true);
                  swap.drop_all = true;
                  return absl::OkStatus();
                });
}

}  // namespace pyramid
