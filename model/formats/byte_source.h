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
//   NotFound, PermissionDenied, InvalidArgument (a folder)
absl::StatusOr<std::shared_ptr<const ByteSource>> OpenByteSource(const std::filesystem::path& path);

std::shared_ptr<const ByteSource> MakeMemorySource(std::string bytes);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FORMATS_BYTE_SOURCE_H_
