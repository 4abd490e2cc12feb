// Files that survive a power cut: written aside, synced, renamed. Every error names the path and
// the system's reason; a full disk is ResourceExhausted, a missing file NotFound, a refused one
// PermissionDenied.
#ifndef PYRAMID_PROTO_BASE_FILE_H_
#define PYRAMID_PROTO_BASE_FILE_H_

#include <cstdint>
#include <filesystem>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pyramid {

// errno as a Status: "<what> <path>: <reason>".
absl::Status ErrnoStatus(int error, absl::string_view what, const std::filesystem::path& path);

absl::StatusOr<std::string> ReadFile(const std::filesystem::path& path,
                                     int64_t max_bytes = int64_t{1} << 33);

// Writes to "<path>.tmp", syncs it, renames it over `path`, syncs the folder. On error the old file
// stays and no temporary one is left.
absl::Status WriteFileAtomically(const std::filesystem::path& path, absl::string_view bytes);

// Writes and syncs without renaming, for files of a folder that is renamed as a whole. An existing
// file is replaced.
absl::Status WriteFileSynced(const std::filesystem::path& path, absl::string_view bytes);

absl::Status SyncFolder(const std::filesystem::path& folder);

// Renames and syncs the folder that holds `to`.
absl::Status RenameSynced(const std::filesystem::path& from, const std::filesystem::path& to);

absl::Status MakeFolders(const std::filesystem::path& folder);

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_FILE_H_
