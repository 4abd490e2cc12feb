// What `pyramid-worker data export DATA --split S --out -` writes: a line of JSON {"count": N,
// "classes": [...]}, then N records of u32 label, u32 byte count (little-endian) and the bytes of a
// picture file. No length in it is trusted.
#ifndef PYRAMID_CLIENT_EXPORTED_PICTURES_H_
#define PYRAMID_CLIENT_EXPORTED_PICTURES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pyramid {

struct LabelledPicture {
  int label = 0;
  std::string bytes;  // of a PNG or JPEG file
};

// Not thread-safe.
class ExportedPictures {
 public:
  // Up to `size` bytes; 0: the end.
  using Source = absl::AnyInvocable<absl::StatusOr<size_t>(char* to, size_t size)>;

  // Reads the first line. DataLoss: there is none, or it isn't what it should be.
  static absl::StatusOr<ExportedPictures> Open(Source source);

  int64_t count() const { return count_; }
  const std::vector<std::string>& classes() const { return classes_; }

  // The next one; nothing after the last. DataLoss: the stream ends early or goes on too long, a
  // label outside the classes, a picture of 0 bytes or over 64 MiB.
  absl::StatusOr<std::optional<LabelledPicture>> Next();

 private:
  explicit ExportedPictures(Source source) : source_(std::move(source)) {}
  // False: the stream ended before the first byte.
  absl::StatusOr<bool> ReadExactly(char* to, size_t size);

  Source source_;
  int64_t count_ = 0;
  int64_t read_ = 0;
  std::vector<std::string> classes_;
  std::string buffer_;  // read but not yet consumed
  size_t consumed_ = 0;
};

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_EXPORTED_PICTURES_H_
