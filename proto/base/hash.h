// SHA-256, for checkpoints and their identity.
#ifndef PYRAMID_PROTO_BASE_HASH_H_
#define PYRAMID_PROTO_BASE_HASH_H_

#include <filesystem>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pyramid {

// Bytes fed in pieces. Not thread-safe.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  void Update(absl::string_view bytes);
  std::string HexDigest();  // 64 lower-case characters; ends the computation

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string Sha256Hex(absl::string_view bytes);

// Reads the file in pieces of 1 MiB. NotFound, or Internal on a read error.
absl::StatusOr<std::string> Sha256HexOfFile(const std::filesystem::path& path);

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_HASH_H_
