// What a model's folder says beside its versions: state.json, which version each alias names, and
// promotions.jsonl, what happened. The rules of moving aliases are pure functions.
#ifndef PYRAMID_SERVER_SERVING_MODEL_STATE_H_
#define PYRAMID_SERVER_SERVING_MODEL_STATE_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/lifecycle.pb.h"
#include "proto/model.pb.h"

namespace pyramid {

inline constexpr absl::string_view kStateFileName = "state.json";
inline constexpr absl::string_view kEventsFileName = "promotions.jsonl";

// NotFound, DataLoss (not JSON, over 1 MiB), FailedPrecondition (a newer version's).
absl::StatusOr<v1::ModelState> ReadModelState(const std::filesystem::path& model_folder);

// Written aside, synced, renamed.
absl::Status WriteModelState(const std::filesystem::path& model_folder, v1::ModelState state);

// Adds one line and syncs it; after an error it isn't there, as far as the disk still does
// anything. A line that a crash cut short is left alone.
absl::Status AppendModelEvent(const std::filesystem::path& model_folder,
                              const v1::ModelEvent& event);

// The newest `limit`, oldest first; of the last 4 MiB. Lines that aren't events are skipped. No
// file: none.
absl::StatusOr<std::vector<v1::ModelEvent>> ReadModelEvents(
    const std::filesystem::path& model_folder, int limit);

// What a version computes in unless the state says otherwise.
inline constexpr absl::string_view kDefaultDtype = "fp32";

// What there is, in a message about what isn't: "1, 2"; at most 20 names, or the 20 newest
// versions, and how many more.
std::string Listed(const std::vector<std::string>& names);
std::string Listed(const std::map<int64_t, v1::Manifest>& versions);

// Sorted.
std::vector<std::string> AliasesOf(const v1::ModelState& state);

// NotFound, with those that there are.
absl::Status CheckAlias(const v1::ModelState& state, absl::string_view alias);

// 0: there is no such alias.
int64_t VersionOfAlias(const v1::ModelState& state, absl::string_view alias);

std::string DtypeOf(const v1::ModelState& state, int64_t version);

// The version that "stable" leaves is remembered for a rollback. Traffic isn't shared any more once
// both its aliases name one version: the canary has become stable.
void MoveAlias(v1::ModelState& state, absl::string_view alias, int64_t version);

// Nothing goes to an alias that isn't there.
void DropAlias(v1::ModelState& state, absl::string_view alias);

// "stable" names the version of `usable` that it named last before; returns it. 0: there is none.
int64_t GoBack(v1::ModelState& state, const std::set<int64_t>& usable);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_MODEL_STATE_H_
