#include "server/serving/model_registry.h"

#include <malloc.h>
#include <pthread.h>

#include <algorithm>
#include <deque>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "model/checkpoint.h"
#include "model/preprocess.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxNameLength = 64;
constexpr absl::string_view kCurrentFile = "current";
constexpr absl::string_view kDefaultDtype = "fp32";

// The number of a version's folder; 0: another name.
int64_t VersionOf(const std::string& folder_name) {
  int64_t version = 0;
  if (folder_name.empty() || folder_name[0] == '0' ||
      !std::all_of(folder_name.begin(), folder_name.end(), absl::ascii_isdigit) ||
      !absl::SimpleAtoi(folder_name, &version)) {
    return 0;
  }
  return version;
}

// "3\ndtype 3 bf16\n": the version in service, and the dtypes that aren't fp32.
struct CurrentRecord {
  int64_t version = 0;  // 0: none recorded
  std::map<int64_t, std::string> dtypes;
};

CurrentRecord ReadCurrent(const fs::path& model_folder) {
  CurrentRecord record;
  const auto text = ReadFile(model_folder / std::string(kCurrentFile), 1 << 20);
  if (!text.ok()) {
    if (!absl::IsNotFound(text.status())) {
      log::Warning("model_current_unreadable", {{"error", text.status().message()}});
    }
    return record;
  }
  for (const absl::string_view line : absl::StrSplit(*text, '\n', absl::SkipEmpty())) {
    const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    if (words.size() == 1) record.version = VersionOf(words[0]);
    if (words.size() == 3 && words[0] == "dtype") record.dtypes[VersionOf(words[1])] = words[2];
  }
  return record;
}

absl::Status WriteCurrent(const fs::path& model_folder, const CurrentRecord& record) {
  std::string text = absl::StrCat(record.version, "\n");
  for (const auto& [version, dtype] : record.dtypes) {
    if (dtype != kDefaultDtype) absl::StrAppend(&text, "dtype ", version, " ", dtype, "\n");
  }
  return WriteFileAtomically(model_folder / std::string(kCurrentFile), text);
}

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

std::string SelfTestGate(const SelfTestResult& result) {
  if (!result.available) return "self-test: not available";
  return absl::StrFormat("self-test: max error %.3g, wanted ≤ %.3g", result.max_error,
                         result.tolerance);
}

absl::Status WarmUp(Classifier& classifier, int max_batch) {
  const v1::Manifest& manifest = classifier.manifest();
  const int side = manifest.preprocessing().crop();
  const int largest = Batcher::MaxBatchOf(max_batch, side, side);
  const size_t picture =
      static_cast<size_t>(manifest.network().in_channels()) * static_cast<size_t>(side * side);
  const std::vector<float> pixels(picture * static_cast<size_t>(largest));
  for (const int batch : std::set<int>{1, largest}) {
    const std::span<const float> part(pixels.data(), picture * static_cast<size_t>(batch));
    const auto logits = classifier.Forward(part, batch, side, side);
    if (!logits.ok()) {
      return Annotate(logits.status(), absl::StrCat("warming up with ", batch, " pictures"));
    }
  }
  return absl::OkStatus();
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

}  // namespace

absl::Status CheckModelName(absl::string_view name) {
  const bool plain = std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
  if (plain && !name.empty() && name.size() <= kMaxNameLength && name[0] != '.') {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("model name \"", absl::CHexEscape(name.substr(0, 2 * kMaxNameLength)),
                   "\" isn't usable; take 1 to ", kMaxNameLength,
                   " letters, digits, '.', '_' or '-', not beginning with '.'"));
}

ModelVersion::ModelVersion(std::string name, int64_t version, std::string dtype,
                           std::vector<std::string> gates, std::unique_ptr<Classifier> classifier,
                           const Batcher::Options& batching, Metrics& metrics, Clock& clock)
    : name_(std::move(name)),
      version_(version),
      dtype_(std::move(dtype)),
      gates_(std::move(gates)),
      metrics_(metrics.ForModel(name_)),
      classifier_(std::move(classifier)) {
  metrics_.StartVersion(version_);
  batcher_ = std::make_unique<Batcher>(*classifier_, batching, metrics_, version_, clock);
}

ModelVersion::~ModelVersion() {
  batcher_.reset();
  metrics_.DropVersion(version_);
}

// Frees versions on a thread of its own: the last holder may be the version's own batch thread,
// which can't join itself.
class ModelRegistry::Reaper {
 public:
  Reaper() : thread_([this] { Run(); }) {}
  ~Reaper() { Finish(); }

  static std::shared_ptr<const ModelVersion> Share(std::shared_ptr<Reaper> reaper,
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

  // Waits until every version has been freed.
  void Finish() {
    {
      absl::MutexLock lock(&mutex_);
      finishing_ = true;
    }
    if (thread_.joinable()) thread_.join();
  }

 private:
  void Run() {
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

  absl::Mutex mutex_;
  std::deque<std::unique_ptr<const ModelVersion>> dead_ ABSL_GUARDED_BY(mutex_);
  int alive_ ABSL_GUARDED_BY(mutex_) = 0;
  bool finishing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

ModelRegistry::ModelRegistry(Options options, ClassifierLoader loader, SelfTest self_test,
                             Metrics& metrics, Clock& clock)
    : options_(std::move(options)),
      loader_(std::move(loader)),
      self_test_(std::move(self_test)),
      metrics_(metrics),
      clock_(clock),
      reaper_(std::make_shared<Reaper>()) {}

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

void ModelRegistry::BeginWork(const std::string& name) {
  absl::MutexLock lock(&mutex_);
  const auto idle = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return busy_.count(name) == 0; };
  mutex_.Await(absl::Condition(&idle));
  busy_.insert(name);
}

void ModelRegistry::EndWork(const std::string& name) {
  absl::MutexLock lock(&mutex_);
  busy_.erase(name);
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
    const int64_t version = VersionOf(entry.filename().string());
    if (version == 0) continue;
    auto manifest = ReadManifest(entry);
    if (manifest.ok()) {
      model.versions[version] = *std::move(manifest);
    } else {
      log::Error("model_version_skipped",
                 {{"model", name}, {"version", version}, {"error", manifest.status().message()}});
    }
  }
  if (model.versions.empty()) return;

  const CurrentRecord record = ReadCurrent(folder);
  std::vector<int64_t> candidates;  // what was in service, then newest first
  if (model.versions.count(record.version) > 0) candidates.push_back(record.version);
  for (auto it = model.versions.rbegin(); it != model.versions.rend(); ++it) {
    if (it->first != record.version) candidates.push_back(it->first);
  }
  for (const int64_t version : candidates) {
    auto loaded = LoadVersion(name, version);
    if (loaded.ok()) {
      model.current = *std::move(loaded);
      break;
    }
    log::Error("model_version_skipped",
               {{"model", name}, {"version", version}, {"error", loaded.status().message()}});
    model.versions.erase(version);
  }
  if (model.current == nullptr) {
    log::Error("model_not_in_service", {{"model", name}});
  } else {
    metrics_.SetModelInfo(name, model.current->version(), model.current->manifest().digest());
    log::Info("model_in_service", {{"model", name},
                                   {"version", model.current->version()},
                                   {"digest", model.current->manifest().digest()}});
  }
  absl::MutexLock lock(&mutex_);
  models_[name] = std::move(model);
}

absl::StatusOr<std::unique_ptr<ModelVersion>> ModelRegistry::LoadAndCheck(
    const std::string& name, int64_t version, const std::string& dtype) {
  const fs::path folder = FolderOf(name, version);
  const ClassifierOptions options{
      .device = options_.device, .dtype = dtype, .threads = options_.forward_threads};
  ASSIGN_OR_RETURN(std::unique_ptr<Classifier> classifier, loader_(folder, options));
  RETURN_IF_ERROR(CheckServable(classifier->manifest()));
  ASSIGN_OR_RETURN(const SelfTestResult self_test, self_test_(*classifier, folder, options));
  RETURN_IF_ERROR(WarmUp(*classifier, options_.batching.max_batch));
  return std::make_unique<ModelVersion>(name, version, dtype,
                                        std::vector<std::string>{SelfTestGate(self_test)},
                                        std::move(classifier), options_.batching, metrics_, clock_);
}

absl::StatusOr<std::shared_ptr<const ModelVersion>> ModelRegistry::LoadVersion(
    const std::string& name, int64_t version, absl::string_view dtype) {
  std::string kind(dtype);
  if (kind.empty()) {
    const CurrentRecord record = ReadCurrent(options_.folder / name);
    const auto found = record.dtypes.find(version);
    kind = found == record.dtypes.end() ? std::string(kDefaultDtype) : found->second;
  }
  const absl::Time started = clock_.Now();
  auto loaded = LoadAndCheck(name, version, kind);
  metrics_.ObserveModelLoad(name, clock_.Now() - started, loaded.ok());
  if (!loaded.ok()) {
    return Annotate(loaded.status(), absl::StrCat("loading ", name, " version ", version));
  }
  return Reaper::Share(reaper_, *std::move(loaded));
}

absl::StatusOr<ModelRegistry::Promoted> ModelRegistry::Promote(const fs::path& folder,
                                                               absl::string_view name,
                                                               absl::string_view dtype) {
  RETURN_IF_ERROR(CheckModelName(name));
  const std::string kind(dtype.empty() ? kDefaultDtype : dtype);
  if (kind != "fp32" && kind != "bf16") {
    return absl::InvalidArgumentError(absl::StrCat("dtype is \"", kind, "\"; use fp32 or bf16"));
  }
  const std::string model(name);
  BeginWork(model);
  const auto end_work = absl::MakeCleanup([&] { EndWork(model); });
  auto promoted = PromoteAlone(folder, model, kind);
  if (!promoted.ok()) {
    log::Warning("model_not_promoted", {{"model", model}, {"error", promoted.status().message()}});
    return Annotate(promoted.status(), absl::StrCat("promoting as ", model));
  }
  log::Info("model_promoted", {{"model", model},
                               {"version", promoted->version},
                               {"digest", promoted->digest},
                               {"existed", promoted->existed}});
  return promoted;
}

absl::StatusOr<ModelRegistry::Promoted> ModelRegistry::PromoteAlone(const fs::path& folder,
                                                                    const std::string& name,
                                                                    const std::string& dtype) {
  ASSIGN_OR_RETURN(v1::Manifest manifest, ReadManifest(folder));
  RETURN_IF_ERROR(CheckServable(manifest));
  const Known known = FindDigest(name, manifest.digest());
  Promoted promoted{
      .version = known.version, .digest = manifest.digest(), .existed = true, .gates = {}};
  std::shared_ptr<const ModelVersion> loaded = known.loaded;
  if (loaded != nullptr && loaded->dtype() != dtype) loaded = nullptr;

  // A new version's folder goes again unless everything works out.
  const fs::path model_folder = options_.folder / name;
  fs::path made;
  auto remove_made = absl::MakeCleanup([&] {
    std::error_code ignored;
    if (!made.empty()) fs::remove_all(made, ignored);
    fs::remove(model_folder, ignored);  // only if empty
  });
  if (known.version == 0) {
    ASSIGN_OR_RETURN(promoted.version, NextVersion(name));
    promoted.existed = false;
    made = FolderOf(name, promoted.version);
    ASSIGN_OR_RETURN(manifest, CopyForServing(folder, made));
  }
  if (loaded == nullptr) {
    ASSIGN_OR_RETURN(loaded, LoadVersion(name, promoted.version, dtype));
  }
  CurrentRecord record = ReadCurrent(model_folder);
  record.version = promoted.version;
  record.dtypes[promoted.version] = dtype;
  RETURN_IF_ERROR(WriteCurrent(model_folder, record));
  std::move(remove_made).Cancel();

  promoted.gates = loaded->gates();
  std::shared_ptr<const ModelVersion> old = loaded;
  Extra extra;
  {
    absl::MutexLock lock(&mutex_);
    Model& model = models_[name];
    if (!promoted.existed) model.versions[promoted.version] = std::move(manifest);
    const auto found = model.extras.find(promoted.version);
    if (found != model.extras.end()) {
      extra = std::move(found->second);
      model.extras.erase(found);
    }
    std::swap(model.current, old);  // requests from here on get the new one
    metrics_.SetModelInfo(name, promoted.version, promoted.digest);
  }
  return promoted;  // `old` is let go of without the lock
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
    const auto extra = model.extras.find(known.version);
    if (extra != model.extras.end()) known.loaded = extra->second.loaded;
    if (model.current != nullptr && model.current->version() == known.version) {
      known.loaded = model.current;
    }
  }
  // A copy that has been damaged since is no use after the next start.
  const auto verified = VerifyCheckpoint(FolderOf(name, known.version));
  if (verified.ok()) return known;
  log::Error("model_version_damaged",
             {{"model", name}, {"version", known.version}, {"error", verified.status().message()}});
  absl::MutexLock lock(&mutex_);
  models_[name].versions.erase(known.version);
  return Known();
}

absl::StatusOr<int64_t> ModelRegistry::NextVersion(const std::string& name) const {
  const fs::path folder = options_.folder / name;
  RETURN_IF_ERROR(MakeFolders(folder));
  std::error_code error;
  int64_t newest = 0;
  for (const fs::path& entry : EntriesOf(folder, error)) {
    newest = std::max(newest, VersionOf(entry.filename().string()));
  }
  if (error) return ErrnoStatus(error.value(), "can't read", folder);
  return newest + 1;
}

absl::StatusOr<ModelRegistry::Models::iterator> ModelRegistry::FindModel(absl::string_view name) {
  const auto names = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return absl::StrJoin(models_, ", ", [](std::string* out, const auto& model) {
      absl::StrAppend(out, model.first);
    });
  };
  if (models_.empty()) {
    return absl::NotFoundError(
        absl::StrCat(name.empty() ? "no model is in service"
                                  : absl::StrCat("no model ", name, ": none is in service"),
                     "; promote a checkpoint first"));
  }
  if (name.empty()) {
    if (models_.size() == 1) return models_.begin();
    return absl::InvalidArgumentError(
        absl::StrCat("model is empty and there are several; name one of ", names()));
  }
  const auto found = models_.find(std::string(name));
  if (found == models_.end()) {
    return absl::NotFoundError(absl::StrCat("no model \"", absl::CHexEscape(name.substr(0, 128)),
                                            "\"; there is ", names()));
  }
  return found;
}

absl::StatusOr<std::shared_ptr<const ModelVersion>> ModelRegistry::FindLocked(
    absl::string_view name, int64_t version) {
  ASSIGN_OR_RETURN(const auto found, FindModel(name));
  Model& model = found->second;
  if (version == 0) {
    if (model.current != nullptr) return model.current;
    return absl::NotFoundError(absl::StrCat("no version of ", found->first,
                                            " could be loaded; the server's log says why"));
  }
  if (model.current != nullptr && model.current->version() == version) return model.current;
  const auto extra = model.extras.find(version);
  if (extra != model.extras.end()) {
    extra->second.last_used = ++uses_;
    return extra->second.loaded;
  }
  if (model.versions.count(version) > 0) return nullptr;
  return absl::NotFoundError(
      absl::StrCat("no version ", version, " of ", found->first, "; there is ",
                   absl::StrJoin(model.versions, ", ", [](std::string* out, const auto& known) {
                     absl::StrAppend(out, known.first);
                   })));
}

absl::StatusOr<std::shared_ptr<const ModelVersion>> ModelRegistry::Find(absl::string_view name,
                                                                        int64_t version) {
  absl::MutexLock lock(&mutex_);
  return FindLocked(name, version);
}

absl::StatusOr<std::shared_ptr<const ModelVersion>> ModelRegistry::Get(absl::string_view name,
                                                                       int64_t version) {
  std::string model_name;
  {
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(std::shared_ptr<const ModelVersion> loaded, FindLocked(name, version));
    if (loaded != nullptr) return loaded;
    ASSIGN_OR_RETURN(const auto found, FindModel(name));
    model_name = found->first;
  }
  BeginWork(model_name);
  const auto end_work = absl::MakeCleanup([&] { EndWork(model_name); });
  ASSIGN_OR_RETURN(std::shared_ptr<const ModelVersion> loaded, Find(model_name, version));
  if (loaded != nullptr) return loaded;  // somebody else has loaded it meanwhile

  auto fresh = LoadVersion(model_name, version);
  absl::MutexLock lock(&mutex_);
  Model& model = models_[model_name];
  if (!fresh.ok()) {
    log::Error("model_version_skipped",
               {{"model", model_name}, {"version", version}, {"error", fresh.status().message()}});
    if (absl::IsDataLoss(fresh.status())) model.versions.erase(version);
    return fresh.status();
  }
  model.extras[version] = {*fresh, ++uses_};
  if (static_cast<int>(model.extras.size()) > options_.max_extra_versions) {
    const auto oldest = std::min_element(
        model.extras.begin(), model.extras.end(),
        [](const auto& a, const auto& b) { return a.second.last_used < b.second.last_used; });
    model.extras.erase(oldest);  // the reaper frees it once nobody holds it
  }
  return fresh;
}

ModelMetrics* ModelRegistry::MetricsOf(absl::string_view name) {
  absl::MutexLock lock(&mutex_);
  const auto found = FindModel(name);
  return found.ok() ? &metrics_.ForModel((*found)->first) : nullptr;
}

std::vector<v1::ModelVersion> ModelRegistry::List() const {
  absl::MutexLock lock(&mutex_);
  std::vector<v1::ModelVersion> list;
  for (const auto& [name, model] : models_) {
    for (const auto& [version, manifest] : model.versions) {
      v1::ModelVersion& entry = list.emplace_back();
      entry.set_name(name);
      entry.set_version(version);
      entry.set_serving(model.current != nullptr && model.current->version() == version);
      entry.set_digest(manifest.digest());
      *entry.mutable_network() = manifest.network();
      *entry.mutable_preprocessing() = manifest.preprocessing();
      *entry.mutable_training() = manifest.training();
      *entry.mutable_created() = manifest.created();
    }
  }
  return list;
}

}  // namespace pyramid
