#include "server/serving/model_registry.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "server/serving/model_registry_internal.h"
#include "server/serving/model_state.h"

// Starting, finding, listing. model_changes.cc has the changes.
namespace pyramid {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxNameLength = 64;

}  // namespace

int64_t VersionOfFolder(const std::string& folder_name) {
  int64_t version = 0;
  if (folder_name.empty() || folder_name[0] == '0' ||
      !std::all_of(folder_name.begin(), folder_name.end(), absl::ascii_isdigit) ||
      !absl::SimpleAtoi(folder_name, &version)) {
    return 0;
  }
  return version;
}

std::vector<fs::path> EntriesOf(const fs::path& folder, std::error_code& error) {
  std::vector<fs::path> entries;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    entries.push_back(entry->path());
  }
  std::sort(entries.begin(), entries.end());
  return entries;
}

std::set<int64_t> NamedVersions(const v1::ModelState& state) {
  std::set<int64_t> versions;
  for (const auto& [alias, version] : state.aliases()) versions.insert(version);
  return versions;
}

absl::Status CheckModelName(absl::string_view name, absl::string_view what) {
  const bool plain = std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
  if (plain && !name.empty() && name.size() <= kMaxNameLength && name[0] != '.') {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat(what, " \"", absl::CHexEscape(name.substr(0, 2 * kMaxNameLength)),
                   "\" isn't usable; take 1 to ", kMaxNameLength,
                   " letters, digits, '.', '_' or '-', not beginning with '.'"));
}

ModelRegistry::ModelRegistry(Options options, ClassifierLoader loader, SelfTest self_test,
                             Metrics& metrics, Clock& clock)
    : options_(std::move(options)),
      loader_(std::move(loader)),
      self_test_(std::move(self_test)),
      metrics_(metrics),
      clock_(clock),
      reaper_(std::make_shared<VersionReaper>()) {}

ModelRegistry::~ModelRegistry() {
  Models models;
  {
    absl::MutexLock lock(&mutex_);
    models.swap(models_);
  }
  models.clear();
  reaper_->Finish();
}

fs::path ModelRegistry::FolderOf(absl::string_view name, int64_t version) const {
  return options_.folder / std::string(name) / absl::StrCat(version);
}

absl::Status ModelRegistry::Start() {
  RETURN_IF_ERROR(MakeFolders(options_.folder));
  std::error_code error;
  const std::vector<fs::path> entries = EntriesOf(options_.folder, error);
  if (error) return ErrnoStatus(error.value(), "can't read", options_.folder);
  for (const fs::path& entry : entries) {
    const std::string name = entry.filename().string();
    if (fs::is_directory(entry, error) && CheckModelName(name).ok()) StartModel(name);
  }
  return absl::OkStatus();
}

void ModelRegistry::StartModel(const std::string& name) {
  const fs::path folder = options_.folder / name;
  Model model;
  std::error_code error;
  for (const fs::path& entry : EntriesOf(folder, error)) {
    if (entry.extension() == ".tmp") {  // an interrupted promotion
      std::error_code ignored;
      fs::remove_all(entry, ignored);
      continue;
    }
    const int64_t version = VersionOfFolder(entry.filename().string());
    if (version == 0) continue;
    auto manifest = ReadManifest(entry);
    if (manifest.ok()) {
      model.versions[version] = *std::move(manifest);
    } else {
      log::Error("model_version_skipped",
                 {{"model", name}, {"version", version}, {"error", manifest.status().message()}});
      SetAside(model, version, manifest.status());
    }
  }
  if (model.versions.empty() && model.damaged.empty()) return;

  absl::StatusOr<v1::ModelState> state = ReadModelState(folder);
  if (state.ok()) {
    model.state = *std::move(state);
  } else {
    if (!absl::IsNotFound(state.status())) {
      log::Error("model_state_unreadable", {{"model", name}, {"error", state.status().message()}});
    }
    if (!model.versions.empty()) {
      MoveAlias(model.state, kStableAlias, model.versions.rbegin()->first);
    }
  }
  model.state.set_name(name);
  metrics_.ForModel(name);
  if (!model.state.unloaded()) LoadAtStart(model);
  absl::MutexLock lock(&mutex_);
  Model& started = models_[name] = std::move(model);
  ShowState(started);
}

// What can't be loaded loses its alias until somebody changes the state; the file stays.
void ModelRegistry::LoadAtStart(Model& model) {
  const std::string& name = model.state.name();
  const auto load = [&](int64_t version) {
    if (model.loaded.count(version) > 0) return true;
    if (model.versions.count(version) == 0) return false;
    const std::string dtype = DtypeOf(model.state, version);
    auto candidate = LoadAndCheck(name, version, dtype, /*beside=*/false);
    if (candidate.ok()) {
      model.loaded[version].version = Finish(name, version, dtype, *std::move(candidate));
      return true;
    }
    log::Error("model_version_skipped",
               {{"model", name}, {"version", version}, {"error", candidate.status().message()}});
    SetAside(model, version, candidate.status());
    return false;
  };

  const int64_t stable = VersionOfAlias(model.state, kStableAlias);
  if (stable != 0 && !load(stable)) {
    // What was stable before, then the newest that no other alias names.
    std::vector<int64_t> others(model.state.earlier_stable().rbegin(),
                                model.state.earlier_stable().rend());
    const std::set<int64_t> named = NamedVersions(model.state);
    for (auto it = model.versions.rbegin(); it != model.versions.rend(); ++it) {
      if (named.count(it->first) == 0) others.push_back(it->first);
    }
    const auto works = std::find_if(others.begin(), others.end(), load);
    if (works != others.end()) {
      (*model.state.mutable_aliases())[std::string(kStableAlias)] = *works;
    } else {
      model.state.mutable_aliases()->erase(std::string(kStableAlias));
      log::Error("model_not_in_service", {{"model", name}});
    }
  }
  const auto aliases = model.state.aliases();
  for (const auto& [alias, version] : aliases) {
    if (!load(version)) {
      DropAlias(model.state, alias);
      continue;
    }
    log::Info("model_in_service", {{"model", name},
                                   {"alias", alias},
                                   {"version", version},
                                   {"digest", model.versions.at(version).digest()}});
  }
}

// What is loaded answers on, whatever became of its files.
void ModelRegistry::SetAside(Model& model, int64_t version, const absl::Status& why) {
  if (model.loaded.count(version) == 0) model.versions.erase(version);
  model.damaged.emplace(version, why.message());
}

std::shared_ptr<const ModelVersion> ModelRegistry::TakeOut(Model& model,
                                                           LoadedVersions::iterator& at) {
  if (model.damaged.count(at->first) > 0) model.versions.erase(at->first);
  std::shared_ptr<const ModelVersion> version = std::move(at->second.version);
  at = model.loaded.erase(at);
  return version;
}

void ModelRegistry::ShowState(const Model& model) {
  const std::string& name = model.state.name();
  const auto stable = model.loaded.find(VersionOfAlias(model.state, kStableAlias));
  metrics_.SetModelReady(name, IsReady(model));
  if (stable == model.loaded.end()) {
    metrics_.DropModelInfo(name);
  } else {
    const ModelVersion& version = *stable->second.version;
    metrics_.SetModelInfo(name, stable->first, version.manifest(), version.dtype());
  }
  metrics_.SetAliases(model.state);
}

absl::StatusOr<ModelRegistry::Models::const_iterator> ModelRegistry::FindModel(
    absl::string_view name) const {
  const auto names = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    std::vector<std::string> all;
    for (const auto& [known, model] : models_) all.push_back(known);
    return all;
  };
  if (models_.empty()) {
    return absl::NotFoundError(
        absl::StrCat(name.empty() ? "no model is in service"
                                  : absl::StrCat("no model ", absl::CHexEscape(name.substr(0, 128)),
                                                 ": none is in service"),
                     "; promote a checkpoint first"));
  }
  if (name.empty()) {
    if (models_.size() == 1) return models_.begin();
    return absl::InvalidArgumentError(
        absl::StrCat("model is empty and there are several; name one of ", Listed(names())));
  }
  const auto found = models_.find(std::string(name));
  if (found == models_.end()) {
    return absl::NotFoundError(absl::StrCat("no model \"", absl::CHexEscape(name.substr(0, 128)),
                                            "\"; there is ", Listed(names())));
  }
  return found;
}

absl::StatusOr<ModelRegistry::Target> ModelRegistry::Resolve(absl::string_view text,
                                                             int64_t version, const RouteKey* key) {
  ASSIGN_OR_RETURN(const ModelReference reference, ParseModelReference(text, version));
  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(const auto found, FindModel(reference.name));
  const Model& model = found->second;
  const v1::ModelState& state = model.state;
  if (state.unloaded()) {
    return absl::UnavailableError(
        absl::StrCat("model ", found->first, " is unloaded; load it first"));
  }
  Target target{.name = found->first, .version = reference.version, .loaded = nullptr};
  if (!reference.alias.empty()) {
    RETURN_IF_ERROR(CheckAlias(state, reference.alias));
    target.version = VersionOfAlias(state, reference.alias);
  } else if (target.version == 0) {
    target.version = VersionOfAlias(state, kStableAlias);
    if (target.version == 0 && model.versions.empty()) {
      return absl::UnavailableError(absl::StrCat("no version of ", found->first,
                                                 " could be loaded; the server's log says why"));
    }
    if (target.version == 0) {
      return absl::NotFoundError(
          absl::StrCat(found->first, " has no stable version; name a version or an alias of it"));
    }
    if (key != nullptr && state.traffic_percent() > 0 && GoesToTrafficAlias(state, (*key)())) {
      const int64_t other = VersionOfAlias(state, state.traffic_alias());
      if (model.loaded.count(other) > 0) target.version = other;
    }
  }
  const auto loaded = model.loaded.find(target.version);
  if (loaded != model.loaded.end()) {
    loaded->second.last_used = ++uses_;
    target.loaded = loaded->second.version;
    return target;
  }
  if (model.versions.count(target.version) > 0) return target;
  const auto damaged = model.damaged.find(target.version);
  if (damaged != model.damaged.end()) {
    return absl::UnavailableError(absl::StrCat("version ", target.version, " of ", found->first,
                                               " can't be used: ", damaged->second));
  }
  return absl::NotFoundError(absl::StrCat("no version ", target.version, " of ", found->first,
                                          "; there is ", Listed(model.versions)));
}

ModelRegistry::Versions ModelRegistry::Find(absl::string_view model, int64_t version,
                                            RouteKey key) {
  ASSIGN_OR_RETURN(Target target, Resolve(model, version, &key));
  return std::move(target.loaded);
}

ModelRegistry::Versions ModelRegistry::Find(absl::string_view model, int64_t version) {
  ASSIGN_OR_RETURN(Target target, Resolve(model, version, nullptr));
  return std::move(target.loaded);
}

ModelRegistry::Versions ModelRegistry::Get(absl::string_view model, int64_t version, RouteKey key) {
  ASSIGN_OR_RETURN(Target target, Resolve(model, version, &key));
  return GetTarget(std::move(target));
}

ModelRegistry::Versions ModelRegistry::Get(absl::string_view model, int64_t version) {
  ASSIGN_OR_RETURN(Target target, Resolve(model, version, nullptr));
  return GetTarget(std::move(target));
}

ModelRegistry::Versions ModelRegistry::GetTarget(Target target) {
  if (target.loaded != nullptr) return std::move(target.loaded);
  const Work work(*this, target.name);
  // Somebody else may have loaded it, or unloaded the model, meanwhile.
  ASSIGN_OR_RETURN(target, Resolve(target.name, target.version, nullptr));
  if (target.loaded != nullptr) return std::move(target.loaded);

  ASSIGN_OR_RETURN(const v1::ModelState state, CopyState(target.name));
  Versions fresh = Ready(target.name, state, target.version);
  std::shared_ptr<const ModelVersion> gone;  // let go without the lock
  absl::MutexLock lock(&mutex_);
  Model& model = models_[target.name];
  if (!fresh.ok()) {
    log::Error(
        "model_version_skipped",
        {{"model", target.name}, {"version", target.version}, {"error", fresh.status().message()}});
    if (!absl::IsDataLoss(fresh.status())) return absl::UnavailableError(fresh.status().message());
    SetAside(model, target.version, fresh.status());
    return fresh.status();
  }
  model.loaded[target.version] = {*fresh, ++uses_};
  const std::set<int64_t> named = NamedVersions(model.state);
  int extras = 0;
  auto oldest = model.loaded.end();
  for (auto it = model.loaded.begin(); it != model.loaded.end(); ++it) {
    if (named.count(it->first) > 0) continue;
    ++extras;
    if (oldest == model.loaded.end() || it->second.last_used < oldest->second.last_used) {
      oldest = it;
    }
  }
  if (extras > options_.max_extra_versions) gone = TakeOut(model, oldest);
  ShowState(model);
  return fresh;
}

ModelMetrics* ModelRegistry::MetricsOf(absl::string_view model) {
  absl::MutexLock lock(&mutex_);
  const auto found = FindModel(ModelNameOf(model));
  return found.ok() ? &metrics_.ForModel((*found)->first) : nullptr;
}

std::vector<v1::ModelVersion> ModelRegistry::List() const {
  absl::MutexLock lock(&mutex_);
  std::vector<v1::ModelVersion> list;
  for (const auto& [name, model] : models_) {
    const v1::ModelState& state = model.state;
    for (const auto& [version, manifest] : model.versions) {
      v1::ModelVersion& entry = list.emplace_back();
      entry.set_name(name);
      entry.set_version(version);
      entry.set_digest(manifest.digest());
      *entry.mutable_network() = manifest.network();
      *entry.mutable_preprocessing() = manifest.preprocessing();
      *entry.mutable_training() = manifest.training();
      *entry.mutable_created() = manifest.created();
      entry.set_loaded(model.loaded.count(version) > 0);
      entry.set_dtype(DtypeOf(state, version));
      entry.set_unloaded(state.unloaded());
      const bool stable = VersionOfAlias(state, kStableAlias) == version;
      entry.set_serving(stable && !state.unloaded());
      for (const std::string& alias : AliasesOf(state)) {
        if (VersionOfAlias(state, alias) == version) entry.add_aliases(alias);
      }
      double percent = stable ? 100 - state.traffic_percent() : 0;
      if (VersionOfAlias(state, state.traffic_alias()) == version) {
        percent += state.traffic_percent();
      }
      entry.set_traffic_percent(state.unloaded() ? 0 : percent);
    }
  }
  return list;
}

std::map<std::string, bool> ModelRegistry::Readiness() const {
  absl::MutexLock lock(&mutex_);
  std::map<std::string, bool> ready;
  for (const auto& [name, model] : models_) ready[name] = IsReady(model);
  return ready;
}

bool ModelRegistry::IsReady(const Model& model) {
  return !model.state.unloaded() &&
         model.loaded.count(VersionOfAlias(model.state, kStableAlias)) > 0;
}

bool ModelRegistry::Answers() const {
  absl::MutexLock lock(&mutex_);
  bool failed = false;
  for (const auto& [name, model] : models_) {
    if (model.state.unloaded()) continue;
    if (!model.loaded.empty()) return true;
    // At the start what can't be loaded loses its aliases.
    if (!model.state.aliases().empty() || !model.damaged.empty()) failed = true;
  }
  return !failed;
}

std::vector<ModelRegistry::Damaged> ModelRegistry::ListDamaged() const {
  absl::MutexLock lock(&mutex_);
  std::vector<Damaged> list;
  for (const auto& [name, model] : models_) {
    for (const auto& [version, why] : model.damaged) {
      if (model.loaded.count(version) == 0) list.push_back({name, version, why});
    }
  }
  return list;
}

absl::StatusOr<v1::ModelState> ModelRegistry::CopyState(absl::string_view name) const {
  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(const auto found, FindModel(name));
  return found->second.state;
}

absl::StatusOr<v1::ModelState> ModelRegistry::StateOf(absl::string_view name) const {
  return CopyState(name);
}

absl::StatusOr<std::vector<v1::ModelEvent>> ModelRegistry::EventsOf(absl::string_view name,
                                                                    int limit) const {
  ASSIGN_OR_RETURN(const v1::ModelState state, CopyState(name));
  return ReadModelEvents(options_.folder / state.name(), limit);
}

}  // namespace pyramid
