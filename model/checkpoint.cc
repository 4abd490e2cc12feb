#include "model/checkpoint.h"

#include <google/protobuf/util/field_comparator.h>
#include <google/protobuf/util/json_util.h>
#include <google/protobuf/util/message_differencer.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "proto/base/hash.h"
#include "proto/base/status.h"
#include "proto/base/time.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// The 21,841 names of ImageNet's whole tree need 0.8 MB. Parsed, a manifest may need forty times
// its text.
constexpr size_t kMaxManifestBytes = size_t{3} << 19;
constexpr int kMaxManifestDepth = 32;
constexpr absl::string_view kStepPrefix = "step-";
constexpr size_t kStepDigits = 8;

// A manifest both ways: as message, and as the JSON it was read from, which may hold fields that
// the message doesn't know.
struct Document {
  json tree;
  v1::Manifest manifest;
};

// A name of a file in this folder and nothing else: manifests may come from strangers.
bool IsPlainFileName(absl::string_view name) {
  return !name.empty() && name.size() <= 128 && name[0] != '.' && name != kManifestFile &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' ||
                  c == '-';
         });
}

// Nesting of brackets outside texts. Checked before the tree is built, because writing a tree
// recurses.
int Depth(absl::string_view text) {
  int depth = 0;
  int deepest = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return deepest;
}

void SetChecksum(json& tree) {
  tree.erase("checksum");
  std::string checksum = Sha256Hex(tree.dump());
  tree["checksum"] = std::move(checksum);
}

// The file's text. Indented, keys sorted: the same tree always gives the same bytes.
std::string TextOf(const json& tree) { return tree.dump(2) + "\n"; }

absl::Status CheckTextSize(absl::string_view text) {
  if (text.size() <= kMaxManifestBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the manifest would have ", text.size(), " bytes, at most ", kMaxManifestBytes,
                   " can be read back; use shorter labels or a shorter recipe"));
}

// Taken from the tree, so that fields this version doesn't know count too. Missing parts count as
// null.
std::string DigestOf(const json& tree) {
  json covered = json::object();
  for (const char* key : {"network", "origin", "preprocessing", "labels"}) {
    covered[key] = tree.contains(key) ? tree[key] : json();
  }
  covered["weights_sha256"] = json();
  if (tree.contains("files") && tree["files"].is_array()) {
    for (const json& file : tree["files"]) {
      if (file.is_object() && file.value("name", json()) == std::string(kWeightsFile)) {
        covered["weights_sha256"] = file.value("sha256", json());
      }
    }
  }
  return absl::StrCat("sha256:", Sha256Hex(covered.dump()));
}

// Equal, NaN counting as equal to NaN: a diverged run has a loss of NaN.
bool SameManifest(const v1::Manifest& a, const v1::Manifest& b) {
  google::protobuf::util::DefaultFieldComparator comparator;
  comparator.set_treat_nan_as_equal(true);
  google::protobuf::util::MessageDifferencer differencer;
  differencer.set_field_comparator(&comparator);
  return differencer.Compare(a, b);
}

absl::StatusOr<json> TreeOf(const v1::Manifest& manifest) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string text;
  v1::Manifest back;
  // protobuf leaves out texts that aren't UTF-8 without an error, hence the way back.
  if (!google::protobuf::util::MessageToJsonString(manifest, &text, options).ok() ||
      !google::protobuf::util::JsonStringToMessage(text, &back).ok() ||
      !SameManifest(back, manifest)) {
    return absl::InvalidArgumentError("the manifest can't be written as JSON: a text isn't UTF-8");
  }
  json tree = json::parse(text, nullptr, false);
  if (!tree.is_object()) return absl::InternalError("protobuf wrote a manifest that isn't JSON");
  SetChecksum(tree);
  return tree;
}

absl::StatusOr<Document> ParseDocument(absl::string_view text) {
  if (text.size() > kMaxManifestBytes) {
    return absl::DataLossError(absl::StrCat("not a manifest: ", text.size(), " bytes, at most ",
                                            kMaxManifestBytes, " are read"));
  }
  if (Depth(text) > kMaxManifestDepth) {
    return absl::DataLossError(
        absl::StrCat("not a manifest: nested deeper than ", kMaxManifestDepth));
  }
  Document document;
  document.tree = json::parse(text.begin(), text.end(), nullptr, false);
  if (!document.tree.is_object()) return absl::DataLossError("not a JSON object");
  const auto checksum = document.tree.find("checksum");
  if (checksum == document.tree.end() || !checksum->is_string()) {
    return absl::DataLossError("has no checksum");
  }
  std::string stated = std::move(checksum->get_ref<std::string&>());
  document.tree.erase(checksum);
  const std::string covered = document.tree.dump();
  const std::string computed = Sha256Hex(covered);
  if (stated != computed) {
    return absl::DataLossError(
        absl::StrCat("checksum is ", stated, ", its contents give ", computed));
  }
  document.tree["checksum"] = std::move(stated);
  // Catches what the checksum of the meaning can't see, such as 1e-05 turned into 1E-05.
  if (TextOf(document.tree) != text) {
    return absl::DataLossError("its text isn't in the form in which it is written");
  }
  const auto version = document.tree.find("format_version");
  if (version == document.tree.end() || !version->is_number_integer() ||
      version->get<int64_t>() < 1) {
    return absl::DataLossError("has no format_version");
  }
  if (version->get<int64_t>() > kManifestVersion) {
    return absl::FailedPreconditionError(absl::StrCat("format_version is ", version->get<int64_t>(),
                                                      "; this program reads up to ",
                                                      kManifestVersion, ". Use a newer pyramid"));
  }
  google::protobuf::util::JsonParseOptions options;
  options.ignore_unknown_fields = true;
  const auto status =
      google::protobuf::util::JsonStringToMessage(covered, &document.manifest, options);
  if (!status.ok()) return absl::DataLossError(absl::StrCat("not a manifest: ", status.ToString()));
  std::set<std::string> names;
  for (const v1::FileEntry& file : document.manifest.files()) {
    if (!IsPlainFileName(file.name()) || file.bytes() < 0 || !names.insert(file.name()).second) {
      return absl::DataLossError(absl::StrCat("lists the file \"", file.name(), "\", ",
                                              file.bytes(), " bytes, which can't be"));
    }
  }
  return document;
}

absl::StatusOr<Document> ReadDocument(const fs::path& folder) {
  const fs::path path = folder / std::string(kManifestFile);
  const auto text = ReadFile(path, kMaxManifestBytes);
  if (absl::IsInvalidArgument(text.status())) {  // too large, or a folder
    return absl::DataLossError(text.status().message());
  }
  RETURN_IF_ERROR(text.status());
  auto document = ParseDocument(*text);
  if (!document.ok()) return Annotate(document.status(), path.string());
  return document;
}

const v1::FileEntry* FindFile(const v1::Manifest& manifest, absl::string_view name) {
  for (const v1::FileEntry& file : manifest.files()) {
    if (file.name() == name) return &file;
  }
  return nullptr;
}

absl::Status CheckHash(const fs::path& path, const v1::FileEntry& file, absl::string_view hash) {
  if (hash == file.sha256()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(path.string(), ": SHA-256 is ", hash, ", the manifest says ", file.sha256()));
}

// Before the bytes are read: a file that is missing or has another size.
absl::Status CheckSize(const fs::path& path, const v1::FileEntry& file) {
  std::error_code error;
  const uintmax_t size = fs::file_size(path, error);
  if (error) {
    return absl::DataLossError(
        absl::StrCat(path.string(), " is in the manifest but can't be read: ", error.message()));
  }
  if (size != static_cast<uintmax_t>(file.bytes())) {
    return absl::DataLossError(
        absl::StrCat(path.string(), " has ", size, " bytes, the manifest says ", file.bytes()));
  }
  return absl::OkStatus();
}

absl::Status CheckDigest(const fs::path& folder, const Document& document) {
  const std::string computed = DigestOf(document.tree);
  if (document.manifest.digest() == computed) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(folder.string(), ": digest is ",
                                          document.manifest.digest(), ", its contents give ",
                                          computed));
}

// Bytes that an unprivileged writer still has in the file system of `folder`; -1: unknown.
int64_t FreeBytes(const fs::path& folder) {
  struct statvfs info {};
  if (statvfs(folder.empty() ? "." : folder.c_str(), &info) != 0) return -1;
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

absl::Status CheckSpace(const fs::path& parent, const std::vector<CheckpointFile>& files,
                        size_t manifest_bytes) {
  constexpr int64_t kBlock = 4096;  // a file fills whole blocks; one more for the folder
  int64_t needed = kBlock + (static_cast<int64_t>(manifest_bytes) + kBlock - 1) / kBlock * kBlock;
  for (const CheckpointFile& file : files) {
    needed += (static_cast<int64_t>(file.bytes.size()) + kBlock - 1) / kBlock * kBlock;
  }
  const int64_t available = FreeBytes(parent);
  if (available < 0 || needed <= available) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("disk full: the checkpoint needs ", needed,
                                                   " bytes, ", parent.string(), " has ", available,
                                                   " free"));
}

// Everything into "<folder>.tmp", the manifest last, then renamed. Nothing stays behind on an
// error.
absl::Status WriteFolder(const fs::path& folder, const std::string& manifest_text,
                         const std::vector<CheckpointFile>& files) {
  fs::path temporary = folder;
  temporary += ".tmp";
  std::error_code error;
  fs::remove_all(temporary, error);
  if (error) return ErrnoStatus(error.value(), "can't remove", temporary);
  RETURN_IF_ERROR(MakeFolders(folder.parent_path().empty() ? "." : folder.parent_path()));
  RETURN_IF_ERROR(CheckSpace(folder.parent_path(), files, manifest_text.size()));

  auto remove_rest = absl::MakeCleanup([&temporary] {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
  });
  RETURN_IF_ERROR(MakeFolders(temporary));
  for (const CheckpointFile& file : files) {
    RETURN_IF_ERROR(WriteFileSynced(temporary / file.name, file.bytes));
  }
  RETURN_IF_ERROR(WriteFileSynced(temporary / std::string(kManifestFile), manifest_text));
  RETURN_IF_ERROR(SyncFolder(temporary));
  RETURN_IF_ERROR(RenameSynced(temporary, folder));
  std::move(remove_rest).Cancel();
  return absl::OkStatus();
}

absl::Status CheckAbsent(const fs::path& folder) {
  std::error_code error;
  if (!fs::exists(fs::symlink_status(folder, error))) return absl::OkStatus();
  return absl::AlreadyExistsError(
      absl::StrCat(folder.string(), " exists; remove it or use another name"));
}

// The step of "step-00001880"; -1: another name.
int64_t StepOf(const std::string& name) {
  if (!absl::StartsWith(name, kStepPrefix)) return -1;
  const absl::string_view digits = absl::string_view(name).substr(kStepPrefix.size());
  int64_t step = -1;
  if (digits.size() < kStepDigits ||
      !std::all_of(digits.begin(), digits.end(), absl::ascii_isdigit) ||
      !absl::SimpleAtoi(digits, &step)) {
    return -1;
  }
  return step;
}

}  // namespace

absl::StatusOr<v1::Manifest> WriteCheckpoint(const fs::path& folder, v1::Manifest manifest,
                                             const std::vector<CheckpointFile>& files) {
  RETURN_IF_ERROR(CheckAbsent(folder));
  manifest.set_format_version(kManifestVersion);
  manifest.set_created_by("pyramid " PYRAMID_VERSION);
  *manifest.mutable_created() = ToProto(absl::Now());
  manifest.clear_files();
  std::set<std::string> names;
  for (const CheckpointFile& file : files) {
    if (!IsPlainFileName(file.name) || !names.insert(file.name).second) {
      return absl::InvalidArgumentError(absl::StrCat(
          "\"", file.name, "\" can't be a checkpoint's file: not a plain name, or twice"));
    }
    v1::FileEntry& entry = *manifest.add_files();
    entry.set_name(file.name);
    entry.set_bytes(static_cast<int64_t>(file.bytes.size()));
    entry.set_sha256(Sha256Hex(file.bytes));
  }
  if (names.count(std::string(kWeightsFile)) == 0) {
    return absl::InvalidArgumentError(absl::StrCat("a checkpoint needs ", kWeightsFile));
  }
  ASSIGN_OR_RETURN(json tree, TreeOf(manifest));
  manifest.set_digest(DigestOf(tree));
  tree["digest"] = manifest.digest();
  SetChecksum(tree);
  const std::string text = TextOf(tree);
  RETURN_IF_ERROR(CheckTextSize(text));
  if (absl::Status status = WriteFolder(folder, text, files); !status.ok()) {
    return Annotate(status, absl::StrCat("saving checkpoint ", folder.string()));
  }
  return manifest;
}

absl::StatusOr<v1::Manifest> ReadManifest(const fs::path& folder) {
  ASSIGN_OR_RETURN(Document document, ReadDocument(folder));
  return std::move(document.manifest);
}

absl::StatusOr<std::string> ReadCheckpointFile(const fs::path& folder, const v1::Manifest& manifest,
                                               absl::string_view name) {
  const v1::FileEntry* file = FindFile(manifest, name);
  if (file == nullptr) {
    return absl::NotFoundError(absl::StrCat(folder.string(), ": the manifest lists no ", name));
  }
  const fs::path path = folder / file->name();
  RETURN_IF_ERROR(CheckSize(path, *file));
  ASSIGN_OR_RETURN(std::string bytes, ReadFile(path, file->bytes() + 1));
  RETURN_IF_ERROR(CheckHash(path, *file, Sha256Hex(bytes)));
  return bytes;
}

absl::StatusOr<v1::Manifest> VerifyCheckpoint(const fs::path& folder) {
  ASSIGN_OR_RETURN(Document document, ReadDocument(folder));
  for (const v1::FileEntry& file : document.manifest.files()) {
    const fs::path path = folder / file.name();
    RETURN_IF_ERROR(CheckSize(path, file));
    ASSIGN_OR_RETURN(const std::string hash, Sha256HexOfFile(path));
    RETURN_IF_ERROR(CheckHash(path, file, hash));
  }
  RETURN_IF_ERROR(CheckDigest(folder, document));
  return std::move(document.manifest);
}

absl::StatusOr<v1::Manifest> CopyForServing(const fs::path& from, const fs::path& to) {
  RETURN_IF_ERROR(CheckAbsent(to));
  ASSIGN_OR_RETURN(Document document, ReadDocument(from));
  RETURN_IF_ERROR(CheckDigest(from, document));
  std::vector<std::string> contents;
  std::vector<std::string> names;
  for (const v1::FileEntry& file : document.manifest.files()) {
    if (file.name() == kStateFile) continue;
    ASSIGN_OR_RETURN(std::string bytes, ReadCheckpointFile(from, document.manifest, file.name()));
    contents.push_back(std::move(bytes));
    names.push_back(file.name());
  }
  std::vector<CheckpointFile> files;
  for (size_t i = 0; i < names.size(); ++i) files.push_back({names[i], contents[i]});

  // The tree, not the message, is written: fields that this version doesn't know go along.
  json kept = json::array();
  for (const json& file : document.tree["files"]) {
    if (file.value("name", json()) != std::string(kStateFile)) kept.push_back(file);
  }
  document.tree["files"] = std::move(kept);
  SetChecksum(document.tree);
  if (absl::Status status = WriteFolder(to, TextOf(document.tree), files); !status.ok()) {
    return Annotate(status, absl::StrCat("copying ", from.string(), " to ", to.string()));
  }
  return ReadManifest(to);
}

std::vector<fs::path> ListCheckpoints(const fs::path& folder) {
  std::vector<std::pair<int64_t, fs::path>> found;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    const int64_t step = StepOf(entry->path().filename().string());
    std::error_code ignored;
    if (step < 0 || !fs::is_regular_file(entry->path() / std::string(kManifestFile), ignored))
      continue;
    found.emplace_back(step, entry->path());
  }
  std::sort(found.begin(), found.end());
  std::vector<fs::path> paths;
  for (auto& [step, path] : found) paths.push_back(std::move(path));
  return paths;
}

std::string CheckpointName(int64_t step) { return absl::StrFormat("%s%08d", kStepPrefix, step); }

std::string ManifestDigest(v1::Manifest manifest, absl::string_view weights_sha256) {
  manifest.clear_files();
  v1::FileEntry& weights = *manifest.add_files();
  weights.set_name(std::string(kWeightsFile));
  weights.set_sha256(std::string(weights_sha256));
  const auto tree = TreeOf(manifest);
  return tree.ok() ? DigestOf(*tree) : "";
}

std::string ManifestToJson(const v1::Manifest& manifest) {
  const auto tree = TreeOf(manifest);
  if (!tree.ok()) return "";
  std::string text = TextOf(*tree);
  return CheckTextSize(text).ok() ? text : "";
}

absl::StatusOr<v1::Manifest> ManifestFromJson(absl::string_view json_text) {
  ASSIGN_OR_RETURN(Document document, ParseDocument(json_text));
  return std::move(document.manifest);
}

}  // namespace pyramid
