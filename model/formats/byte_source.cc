#include "model/formats/byte_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

static_assert(std::endian::native == std::endian::little, "formats are read as they lie");

constexpr int64_t kBuffer = 64 * 1024;

// DataLoss unless [offset, offset + count) lies in `size` bytes.
absl::Status CheckRange(int64_t offset, size_t count, int64_t size) {
  if (offset < 0 || offset > size || count > static_cast<size_t>(size - offset)) {
    return absl::DataLossError(
        absl::StrCat("bytes ", offset, " to ", offset, " + ", count, " of ", size, ": truncated"));
  }
  return absl::OkStatus();
}

class FileSource : public ByteSource {
 public:
  FileSource(int descriptor, int64_t size, std::filesystem::path path)
      : descriptor_(descriptor), size_(size), path_(std::move(path)) {}
  ~FileSource() override { close(descriptor_); }
  int64_t size() const override { return size_; }

  absl::Status Read(int64_t offset, std::span<char> out) const override {
    RETURN_IF_ERROR(CheckRange(offset, out.size(), size_));
    while (!out.empty()) {
      const ssize_t got = pread(descriptor_, out.data(), out.size(), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) {
        return absl::InternalError(
            absl::StrCat("reading ", path_.string(), ": ", std::strerror(errno)));
      }
      if (got == 0) {
        return absl::DataLossError(absl::StrCat("ends at byte ", offset, " where it had ", size_,
                                                " bytes when it was opened"));
      }
      offset += got;
      out = out.subspan(static_cast<size_t>(got));
    }
    return absl::OkStatus();
  }

 private:
  const int descriptor_;
  const int64_t size_;
  const std::filesystem::path path_;
};

class MemorySource : public ByteSource {
 public:
  explicit MemorySource(std::string bytes) : bytes_(std::move(bytes)) {}
  int64_t size() const override { return static_cast<int64_t>(bytes_.size()); }
  absl::Status Read(int64_t offset, std::span<char> out) const override {
    RETURN_IF_ERROR(CheckRange(offset, out.size(), size()));
    if (!out.empty()) std::memcpy(out.data(), bytes_.data() + offset, out.size());
    return absl::OkStatus();
  }

 private:
  const std::string bytes_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const ByteSource>> OpenByteSource(
    const std::filesystem::path& path) {
  // Non-blocking, so that a pipe is refused and not waited for.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return ErrnoStatus(errno, "opening", path);
  struct stat facts = {};
  if (fstat(descriptor, &facts) != 0) {
    const int error = errno;
    close(descriptor);
    return ErrnoStatus(error, "opening", path);
  }
  if (!S_ISREG(facts.st_mode)) {
    close(descriptor);
    return absl::InvalidArgumentError(absl::StrCat(
        path.string(), S_ISDIR(facts.st_mode) ? " is a folder" : " isn't a regular file"));
  }
  return std::make_shared<const FileSource>(descriptor, facts.st_size, path);
}

std::shared_ptr<const ByteSource> MakeMemorySource(std::string bytes) {
  return std::make_shared<const MemorySource>(std::move(bytes));
}

BufferedReader::BufferedReader(const ByteSource& source, int64_t begin, int64_t end)
    : source_(source),
      offset_(std::clamp<int64_t>(begin, 0, source.size())),
      end_(std::clamp<int64_t>(end, offset_, source.size())) {}

absl::StatusOr<uint8_t> BufferedReader::Byte() {
  if (offset_ >= buffer_begin_ && offset_ < buffer_begin_ + static_cast<int64_t>(buffer_.size())) {
    return static_cast<uint8_t>(buffer_[static_cast<size_t>(offset_++ - buffer_begin_)]);
  }
  char byte = 0;
  RETURN_IF_ERROR(Read({&byte, 1}));
  return static_cast<uint8_t>(byte);
}

absl::Status BufferedReader::Read(std::span<char> out) {
  if (out.size() > static_cast<size_t>(remaining())) {
    return absl::DataLossError(absl::StrCat("truncated: ", out.size(), " bytes expected at byte ",
                                            offset_, ", where ", remaining(), " are left"));
  }
  while (!out.empty()) {
    const int64_t buffered = buffer_begin_ + static_cast<int64_t>(buffer_.size()) - offset_;
    if (offset_ < buffer_begin_ || buffered <= 0) {
      if (static_cast<int64_t>(out.size()) >= kBuffer) {
        RETURN_IF_ERROR(source_.Read(offset_, out));
        offset_ += static_cast<int64_t>(out.size());
        return absl::OkStatus();
      }
      buffer_.resize(static_cast<size_t>(std::min(kBuffer, remaining())));
      buffer_begin_ = offset_;
      if (absl::Status read = source_.Read(offset_, std::span<char>(buffer_)); !read.ok()) {
        buffer_.clear();
        return read;
      }
      continue;
    }
    const size_t taken = std::min(out.size(), static_cast<size_t>(buffered));
    std::memcpy(out.data(), buffer_.data() + (offset_ - buffer_begin_), taken);
    offset_ += static_cast<int64_t>(taken);
    out = out.subspan(taken);
  }
  return absl::OkStatus();
}

absl::Status BufferedReader::Skip(int64_t bytes) {
  if (bytes < 0 || bytes > remaining()) {
    return absl::DataLossError(absl::StrCat("truncated: ", bytes, " bytes expected at byte ",
                                            offset_, ", where ", remaining(), " are left"));
  }
  offset_ += bytes;
  return absl::OkStatus();
}

absl::StatusOr<std::string> BufferedReader::Text(int64_t bytes) {
  if (bytes < 0 || bytes > remaining()) return Skip(bytes);
  std::string text(static_cast<size_t>(bytes), '\0');
  RETURN_IF_ERROR(Read(std::span<char>(text)));
  return text;
}

absl::StatusOr<uint64_t> BufferedReader::LittleEndian(int bytes) {
  uint64_t value = 0;
  RETURN_IF_ERROR(Read({reinterpret_cast<char*>(&value), static_cast<size_t>(bytes)}));
  return value;
}

absl::StatusOr<std::string> BufferedReader::Line(int64_t max_characters) {
  std::string line;
  while (true) {
    ASSIGN_OR_RETURN(const uint8_t byte, Byte());
    if (byte == '\n') return line;
    if (static_cast<int64_t>(line.size()) >= max_characters) {
      return absl::DataLossError(absl::StrCat("the line before byte ", offset_, " has more than ",
                                              max_characters, " characters"));
    }
    line += static_cast<char>(byte);
  }
}

}  // namespace pyramid
