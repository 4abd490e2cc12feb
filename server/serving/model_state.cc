#include "server/serving/model_state.h"

#include <fcntl.h>
#include <google/protobuf/util/json_util.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "server/serving/route.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
namespace json = google::protobuf::util;

constexpr int kStateVersion = 1;
constexpr int64_t kLargestState = 1 << 20;
constexpr off_t kEventsTail = 4 << 20;
constexpr int kMostEarlier = 32;
constexpr size_t kMostListed = 20;

json::JsonPrintOptions Printed(bool for_people) {
  json::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.add_whitespace = for_people;
  options.always_print_primitive_fields = for_people;
  return options;
}

json::JsonParseOptions Parsed() {
  json::JsonParseOptions options;
  options.ignore_unknown_fields = true;
  return options;
}

void Forget(v1::ModelState& state, int64_t version) {
  auto& earlier = *state.mutable_earlier_stable();
  earlier.erase(std::remove(earlier.begin(), earlier.end(), version), earlier.end());
}

void EndSharingBetweenEquals(v1::ModelState& state) {
  if (VersionOfAlias(state, state.traffic_alias()) != VersionOfAlias(state, kStableAlias)) return;
  state.clear_traffic_alias();
  state.clear_traffic_percent();
}

}  // namespace

absl::StatusOr<v1::ModelState> ReadModelState(const fs::path& model_folder) {
  const fs::path path = model_folder / std::string(kStateFileName);
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kLargestState));
  v1::ModelState state;
  if (const auto status = json::JsonStringToMessage(text, &state, Parsed()); !status.ok()) {
    return absl::DataLossError(absl::StrCat(path.string(), ": ", status.message().ToString()));
  }
  if (state.format_version() > kStateVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(path.string(), " has format_version ", state.format_version(),
                     ", this version reads up to ", kStateVersion));
  }
  return state;
}

absl::Status WriteModelState(const fs::path& model_folder, v1::ModelState state) {
  state.set_format_version(kStateVersion);
  std::string text;
  if (!json::MessageToJsonString(state, &text, Printed(/*for_people=*/true)).ok()) {
    return absl::InternalError("the model's state can't be written as JSON");
  }
  return WriteFileAtomically(model_folder / std::string(kStateFileName), text);
}

absl::Status AppendModelEvent(const fs::path& model_folder, const v1::ModelEvent& event) {
  std::string line;
  if (!json::MessageToJsonString(event, &line, Printed(/*for_people=*/false)).ok()) {
    return absl::InternalError("a model's event can't be written as JSON");
  }
  line += '\n';
  const fs::path path = model_folder / std::string(kEventsFileName);
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (file < 0) return ErrnoStatus(errno, "can't open", path);
  const auto close_file = absl::MakeCleanup([file] { close(file); });
  const off_t size = lseek(file, 0, SEEK_END);
  // A line that may not be on the disk tells of a change that won't happen.
  auto take_back = absl::MakeCleanup([file, size] { (void)!ftruncate(file, size); });
  char last = '\n';
  if (size > 0 && pread(file, &last, 1, size - 1) == 1 && last != '\n')
    line = absl::StrCat("\n", line);
  for (size_t written = 0; written < line.size();) {
    const ssize_t n = write(file, line.data() + written, line.size() - written);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(errno, "can't write", path);
    written += static_cast<size_t>(n);
  }
  if (fsync(file) != 0) return ErrnoStatus(errno, "can't sync", path);
  if (size == 0) RETURN_IF_ERROR(SyncFolder(model_folder));
  std::move(take_back).Cancel();
  return absl::OkStatus();
}

absl::StatusOr<std::vector<v1::ModelEvent>> ReadModelEvents(const fs::path& model_folder,
                                                            int limit) {
  const fs::path path = model_folder / std::string(kEventsFileName);
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0 && errno == ENOENT) return std::vector<v1::ModelEvent>();
  if (file < 0) return ErrnoStatus(errno, "can't open", path);
  const auto close_file = absl::MakeCleanup([file] { close(file); });
  const off_t size = lseek(file, 0, SEEK_END);
  const off_t from = std::max<off_t>(0, size - kEventsTail);
  std::string text(static_cast<size_t>(size - from), '\0');
  size_t got = 0;
  while (got < text.size()) {
    const ssize_t n =
        pread(file, text.data() + got, text.size() - got, from + static_cast<off_t>(got));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(errno, "can't read", path);
    if (n == 0) break;
    got += static_cast<size_t>(n);
  }
  text.resize(got);

  std::vector<v1::ModelEvent> events;
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    v1::ModelEvent event;
    if (json::JsonStringToMessage(std::string(line), &event, Parsed()).ok()) {
      events.push_back(std::move(event));
    }
  }
  const size_t most = static_cast<size_t>(std::max(limit, 0));
  if (events.size() > most) {
    events.erase(events.begin(), events.end() - static_cast<std::ptrdiff_t>(most));
  }
  return events;
}

std::string Listed(const std::vector<std::string>& names) {
  if (names.empty()) return "none";
  const size_t shown = std::min(names.size(), kMostListed);
  std::string text =
      absl::StrJoin(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(shown), ", ");
  if (shown < names.size()) absl::StrAppend(&text, " and ", names.size() - shown, " more");
  return text;
}

std::string Listed(const std::map<int64_t, v1::Manifest>& versions) {
  std::vector<std::string> newest;
  for (auto it = versions.rbegin(); it != versions.rend() && newest.size() < kMostListed; ++it) {
    newest.push_back(absl::StrCat(it->first));
  }
  std::reverse(newest.begin(), newest.end());
  std::string text = Listed(newest);
  if (newest.size() < versions.size()) {
    absl::StrAppend(&text, " and ", versions.size() - newest.size(), " older");
  }
  return text;
}

std::vector<std::string> AliasesOf(const v1::ModelState& state) {
  std::vector<std::string> aliases;
  for (const auto& [alias, version] : state.aliases()) aliases.push_back(alias);
  std::sort(aliases.begin(), aliases.end());
  return aliases;
}

absl::Status CheckAlias(const v1::ModelState& state, absl::string_view alias) {
  if (VersionOfAlias(state, alias) != 0) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("no alias \"", absl::CHexEscape(alias.substr(0, 128)),
                                          "\" of ", state.name(), "; there is ",
                                          Listed(AliasesOf(state))));
}

int64_t VersionOfAlias(const v1::ModelState& state, absl::string_view alias) {
  const auto found = state.aliases().find(std::string(alias));
  return found == state.aliases().end() ? 0 : found->second;
}

std::string DtypeOf(const v1::ModelState& state, int64_t version) {
  const auto found = state.dtypes().find(version);
  return found == state.dtypes().end() ? std::string(kDefaultDtype) : found->second;
}

void MoveAlias(v1::ModelState& state, absl::string_view alias, int64_t version) {
  const int64_t before = VersionOfAlias(state, alias);
  if (alias == kStableAlias) {
    Forget(state, version);
    if (before != 0 && before != version) {
      Forget(state, before);
      state.add_earlier_stable(before);
      auto& earlier = *state.mutable_earlier_stable();
      if (earlier.size() > kMostEarlier) earlier.erase(earlier.begin());
    }
  }
  (*state.mutable_aliases())[std::string(alias)] = version;
  EndSharingBetweenEquals(state);
}

void DropAlias(v1::ModelState& state, absl::string_view alias) {
  state.mutable_aliases()->erase(std::string(alias));
  if (state.traffic_alias() != std::string(alias)) return;
  state.clear_traffic_alias();
  state.clear_traffic_percent();
}

int64_t GoBack(v1::ModelState& state, const std::set<int64_t>& usable) {
  auto& earlier = *state.mutable_earlier_stable();
  while (!earlier.empty()) {
    const int64_t version = earlier[earlier.size() - 1];
    earlier.RemoveLast();
    if (usable.count(version) == 0) continue;
    (*state.mutable_aliases())[std::string(kStableAlias)] = version;
    EndSharingBetweenEquals(state);
    return version;
  }
  return 0;
}

}  // namespace pyramid
