// Keys of people and programs: made here, shown once, kept only as a hash.
//
// A key is 256 random bits, so a plain SHA-256 of it can't be turned round; a slow hash, which
// short passwords need, would only slow the server down.
#ifndef PYRAMID_PROTO_BASE_KEY_H_
#define PYRAMID_PROTO_BASE_KEY_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pyramid {

// "pyr_" and 43 letters, digits, '-' and '_'. Internal: the system gives no random numbers.
absl::StatusOr<std::string> NewKey();

// Lower-case hex of the SHA-256: what a keys file holds.
std::string KeyHash(absl::string_view key);

// Whether two texts are the same, in a time that depends on their lengths only.
bool SameSecret(absl::string_view a, absl::string_view b);

// `bytes` random bytes for keys and secrets. Internal, as above.
absl::StatusOr<std::string> RandomBytes(int bytes);

// Lower-case hex of HMAC-SHA256.
std::string HmacHex(absl::string_view secret, absl::string_view text);

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_KEY_H_
