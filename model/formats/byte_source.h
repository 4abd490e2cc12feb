// Bytes that are read piece by piece: a file, or memory in tests.
#ifndef PYRAMID_MODEL_FORMATS_BYTE_SOURCE_H_
#define PYRAMID_MODEL_FORMATS_BYTE_SOURCE_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pyramid {

// Thread-safe.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual int64_t size() const = 0;

  // Fills `out` from `offset`.
  //   DataLoss  [offset, offset + out.size()) isn't within the source, or it shrank since it was
  //             opened
  //   Internal  the system's read failed
  virtual absl::Status Read(int64_t offset, std::span<char> out) const = 0;
};

// Reads with pread: nothing stays mapped, a file that shrinks meanwhile is an error and no signal.
//   NotFound, PermissionDenied, InvalidArgument (a folder, a pipe)
absl::StatusOr<std::shared_ptr<const ByteSource>> OpenByteSource(const std::filesystem::path& path);

std::shared_ptr<const ByteSource> MakeMemorySource(std::string bytes);

// Walks through a part of a source, front to back, with 64 KiB of buffer. Not thread-safe.
class BufferedReader {
 public:
  // [begin, end), cut to the source. `source` must outlive this.
  BufferedReader(const ByteSource& source, int64_t begin, int64_t end);

  int64_t offset() const { return offset_; }  // of the next byte, from the source's beginning
  int64_t remaining() const { return end_ - offset_; }

  // DataLoss: fewer bytes remain. Internal: the source's.
  absl::StatusOr<uint8_t> Byte();
  absl::Status Read(std::span<char> out);
  absl::Status Skip(int64_t bytes);
  absl::StatusOr<std::string> Text(int64_t bytes);           // remaining() is checked first
  absl::StatusOr<uint64_t> LittleEndian(int bytes);          // 1..8
  absl::StatusOr<std::string> Line(int64_t max_characters);  // without its '\n'

 private:
  const ByteSource& source_;
  int64_t offset_;
  int64_t end_;
  std::string buffer_;
  int64_t buffer_begin_ = 0;
};

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FORMATS_BYTE_SOURCE_H_
