#include "proto/base/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "proto/base/status.h"

namespace pyramid {

absl::Status ErrnoStatus(int error, absl::string_view what, const std::filesystem::path& path) {
  const std::string message =
      absl::StrCat(what, " ", path.string(), ": ", std::generic_category().message(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case EEXIST:
      return absl::AlreadyExistsError(message);
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(message);
    default:
      return absl::InternalError(message);
  }
}

absl::StatusOr<std::string> ReadFile(const std::filesystem::path& path, int64_t max_bytes) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return ErrnoStatus(errno, "can't open", path);
  const absl::Cleanup closer = [fd] { close(fd); };
  struct stat info {};
  if (fstat(fd, &info) != 0) return ErrnoStatus(errno, "can't stat", path);
  if (S_ISDIR(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), " is a folder, not a file"));
  }
  if (info.st_size > max_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), " has ", info.st_size,
                                                   " bytes; at most ", max_bytes, " are read"));
  }
  std::string bytes;
  bytes.resize(static_cast<size_t>(info.st_size));
  size_t done = 0;
  while (true) {
    // A file without a size (a pipe, /proc) grows the buffer as it is read.
    if (done == bytes.size()) {
      if (static_cast<int64_t>(done) >= max_bytes) break;
      bytes.resize(std::min<size_t>(std::max<size_t>(bytes.size() + 4096, bytes.size() * 2),
                                    static_cast<size_t>(max_bytes)));
    }
    const ssize_t got = read(fd, bytes.data() + done, bytes.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, "can't read", path);
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  bytes.resize(done);
  return bytes;
}

absl::Status WriteFileSynced(const std::filesystem::path& path, absl::string_view bytes) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return ErrnoStatus(errno, "can't write", path);
  absl::Status status;
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t put = write(fd, bytes.data() + done, bytes.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) {
      status = ErrnoStatus(errno, "can't write", path);
      break;
    }
    done += static_cast<size_t>(put);
  }
  if (status.ok() && fsync(fd) != 0) status = ErrnoStatus(errno, "can't sync", path);
  if (close(fd) != 0 && status.ok()) status = ErrnoStatus(errno, "can't close", path);
  if (!status.ok()) unlink(path.c_str());
  return status;
}

absl::Status SyncFolder(const std::filesystem::path& folder) {
  const int fd = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return ErrnoStatus(errno, "can't open folder", folder);
  const absl::Cleanup closer = [fd] { close(fd); };
  if (fsync(fd) != 0) return ErrnoStatus(errno, "can't sync folder", folder);
  return absl::OkStatus();
}

absl::Status RenameSynced(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (rename(from.c_str(), to.c_str()) != 0) return ErrnoStatus(errno, "can't rename to", to);
  return SyncFolder(to.parent_path());
}

absl::Status WriteFileAtomically(const std::filesystem::path& path, absl::string_view bytes) {
  std::filesystem::path temporary = path;
  temporary += ".tmp";
  RETURN_IF_ERROR(WriteFileSynced(temporary, bytes));
  if (absl::Status status = RenameSynced(temporary, path); !status.ok()) {
    unlink(temporary.c_str());
    return status;
  }
  return absl::OkStatus();
}

absl::Status MakeFolders(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return ErrnoStatus(error.value(), "can't make folder", folder);
  return absl::OkStatus();
}

}  // namespace pyramid
