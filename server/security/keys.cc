#include "server/security/keys.h"

#include <sys/stat.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/file.h"
#include "proto/base/key.h"
#include "proto/base/log.h"
#include "proto/base/nearest.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr Scope kAllScopes[] = {Scope::kInfer, Scope::kSubmit, Scope::kWorker, Scope::kAdmin};
constexpr absl::Duration kLookAgain = absl::Seconds(1);
constexpr double kMostImages = 1e9;

std::string StampOf(const std::filesystem::path& path) {
  struct stat found {};
  if (stat(path.c_str(), &found) != 0) return "-";
  return absl::StrCat(found.st_ino, ",", found.st_size, ",", found.st_mtim.tv_sec, ".",
                      found.st_mtim.tv_nsec);
}

absl::Status ReadScopes(const YAML::Node& node, absl::string_view where, Scopes& scopes) {
  const std::string names =
      Scopes{kAllScopes[0], kAllScopes[1], kAllScopes[2], kAllScopes[3]}.Text();
  if (!node.IsSequence()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ".scopes is not a list; use [infer], for instance, of ", names));
  }
  for (const YAML::Node& word : node) {
    const std::string text = word.IsScalar() ? word.Scalar() : "";
    const auto* found = std::find_if(std::begin(kAllScopes), std::end(kAllScopes),
                                     [&](Scope scope) { return ScopeName(scope) == text; });
    if (found == std::end(kAllScopes)) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ".scopes has \"", text, "\"; use ", names));
    }
    scopes.Add(*found);
  }
  return absl::OkStatus();
}

absl::Status ReadField(const std::string& key, const YAML::Node& node, absl::string_view where,
                       KeyEntry& entry) {
  if (key == "scopes") return ReadScopes(node, where, entry.scopes);
  const std::string field = absl::StrCat(where, ".", key);
  if (!node.IsScalar()) return absl::InvalidArgumentError(field + " is not a single value");
  const std::string& text = node.Scalar();
  if (key == "name") {
    entry.name = text;
  } else if (key == "sha256") {
    entry.sha256 = absl::AsciiStrToLower(text);
    if (text.size() != 64 || text.find_first_not_of("0123456789abcdefABCDEF") != text.npos) {
      return absl::InvalidArgumentError(
          field + " is not 64 hex digits; `pyramid key new` prints the whole entry");
    }
  } else if (key == "images_per_second") {
    if (!absl::SimpleAtod(text, &entry.images_per_second) || !(entry.images_per_second > 0) ||
        entry.images_per_second > kMostImages) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, " is ", text, "; use a number over 0, or leave it out for no limit"));
    }
  } else if (key == "expires") {
    std::string error;
    if (!absl::ParseTime("%Y-%m-%d", text, absl::UTCTimeZone(), &entry.expires, &error)) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, " is ", text, "; use a day like 2027-01-31"));
    }
  } else {
    const std::vector<std::string> known = {"name", "sha256", "scopes", "images_per_second",
                                            "expires"};
    return absl::InvalidArgumentError(
        absl::StrCat(field, " is not a known key; did you mean ", Nearest(key, known), "?"));
  }
  return absl::OkStatus();
}

absl::StatusOr<KeyEntry> ReadEntry(const YAML::Node& node, absl::string_view where) {
  if (!node.IsMap()) {
    return absl::InvalidArgumentError(absl::StrCat(where, " is not a map of keys and values"));
  }
  KeyEntry entry;
  std::set<std::string> seen;
  for (const auto& field : node) {
    const std::string key = field.first.IsScalar() ? field.first.Scalar() : "";
    if (!seen.insert(key).second) {
      return absl::InvalidArgumentError(absl::StrCat(where, ".", key, " stands twice"));
    }
    RETURN_IF_ERROR(ReadField(key, field.second, where, entry));
  }
  if (entry.name.empty() || entry.name.size() > 64 ||
      entry.name.find_first_of(" \t\r\n\"") != entry.name.npos) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ".name is \"", entry.name, "\"; use 1..64 characters without blanks"));
  }
  if (entry.sha256.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, " (", entry.name, ") has no sha256; `pyramid key new` prints one"));
  }
  if (entry.scopes.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        where, " (", entry.name, ") has no scopes; give it one of infer, submit, worker, admin"));
  }
  return entry;
}

}  // namespace

absl::string_view ScopeName(Scope scope) {
  switch (scope) {
    case Scope::kInfer:
      return "infer";
    case Scope::kSubmit:
      return "submit";
    case Scope::kWorker:
      return "worker";
    case Scope::kAdmin:
      return "admin";
  }
  return "";
}

std::string Scopes::Text() const {
  std::vector<absl::string_view> names;
  for (const Scope scope : kAllScopes) {
    if (Has(scope)) names.push_back(ScopeName(scope));
  }
  return absl::StrJoin(names, ", ");
}

absl::Duration Caller::Charge(int images, absl::Time now) const {
  absl::MutexLock lock(&mutex_);
  if (bucket_.rate() <= 0) return absl::ZeroDuration();
  return bucket_.Take(images, now);
}

absl::StatusOr<std::vector<KeyEntry>> ParseKeys(absl::string_view yaml) {
  std::vector<KeyEntry> entries;
  try {
    const YAML::Node root = YAML::Load(std::string(yaml));
    if (root.IsNull()) return entries;
    if (!root.IsSequence()) {
      return absl::InvalidArgumentError("not a list of keys; each begins with \"- name:\"");
    }
    std::set<std::string> names;
    std::set<std::string> hashes;
    for (size_t i = 0; i < root.size(); ++i) {
      ASSIGN_OR_RETURN(KeyEntry entry, ReadEntry(root[i], absl::StrCat("key ", i + 1)));
      if (!names.insert(entry.name).second) {
        return absl::InvalidArgumentError(absl::StrCat("the name ", entry.name, " stands twice"));
      }
      if (!hashes.insert(entry.sha256).second) {
        return absl::InvalidArgumentError(
            absl::StrCat("the sha256 of ", entry.name, " stands twice"));
      }
      entries.push_back(std::move(entry));
    }
  } catch (const YAML::Exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("not YAML: ", error.what()));
  }
  return entries;
}

absl::StatusOr<std::unique_ptr<KeyRing>> KeyRing::Open(const std::filesystem::path& path,
                                                       Clock& clock) {
  std::unique_ptr<KeyRing> ring(new KeyRing(path, clock));
  absl::MutexLock lock(&ring->mutex_);
  RETURN_IF_ERROR(ring->Read());
  if (ring->keys_.empty()) {
    log::Warning("no_keys", {{"path", path.string()}, {"effect", "every call is refused"}});
  }
  return ring;
}

absl::Status KeyRing::Read() {
  stamp_ = StampOf(path_);
  looked_ = clock_.Now();
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path_, 16 << 20));
  absl::StatusOr<std::vector<KeyEntry>> entries = ParseKeys(text);
  if (!entries.ok()) return Annotate(entries.status(), path_.string());
  ByHash keys;
  for (const KeyEntry& entry : *entries) {
    auto caller = std::make_shared<const Caller>(entry.name, entry.scopes, entry.images_per_second,
                                                 entry.expires);
    // An unchanged entry keeps its caller and with it what its rate has left.
    for (const auto& [half, known] : keys_) {
      const Caller& old = *known.caller;
      if (known.hash == entry.sha256 && old.name() == entry.name &&
          old.scopes().Text() == entry.scopes.Text() && old.expires() == entry.expires &&
          std::abs(old.images_per_second() - entry.images_per_second) < 1e-9) {
        caller = std::const_pointer_cast<const Caller>(known.caller);
      }
    }
    keys.emplace(entry.sha256.substr(0, 32), Known{entry.sha256, std::move(caller)});
  }
  keys_ = std::move(keys);
  return absl::OkStatus();
}

void KeyRing::Refresh() {
  const absl::Time now = clock_.Now();
  if (now - looked_ < kLookAgain) return;
  looked_ = now;
  if (StampOf(path_) == stamp_) return;
  if (const absl::Status status = Read(); !status.ok()) {
    log::Error("keys_not_reloaded", {{"error", status.message()}});
  } else {
    log::Info("keys_reloaded", {{"path", path_.string()}, {"keys", keys_.size()}});
  }
}

std::shared_ptr<const Caller> KeyRing::Find(absl::string_view key) {
  const std::string hash = KeyHash(key);
  absl::MutexLock lock(&mutex_);
  Refresh();
  // The search sees half of a hash, never of a key: its time tells nothing that helps to guess one.
  const auto [begin, end] = keys_.equal_range(hash.substr(0, 32));
  for (auto it = begin; it != end; ++it) {
    if (SameSecret(it->second.hash, hash)) return it->second.caller;
  }
  return nullptr;
}

}  // namespace pyramid
