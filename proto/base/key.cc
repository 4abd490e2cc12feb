#include "proto/base/key.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>

#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "proto/base/hash.h"
#include "proto/base/status.h"

namespace pyramid {

absl::StatusOr<std::string> RandomBytes(int bytes) {
  std::string random(static_cast<size_t>(bytes), '\0');
  if (RAND_bytes(reinterpret_cast<unsigned char*>(random.data()), bytes) != 1) {
    return absl::InternalError("the system gives no random numbers");
  }
  return random;
}

absl::StatusOr<std::string> NewKey() {
  ASSIGN_OR_RETURN(const std::string random, RandomBytes(32));
  std::string text;
  absl::WebSafeBase64Escape(random, &text);
  return absl::StrCat("pyr_", text);
}

std::string KeyHash(absl::string_view key) { return Sha256Hex(key); }

bool SameSecret(absl::string_view a, absl::string_view b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

std::string HmacHex(absl::string_view secret, absl::string_view text) {
  unsigned char mac[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  HMAC(EVP_sha256(), secret.data(), static_cast<int>(secret.size()),
       reinterpret_cast<const unsigned char*>(text.data()), text.size(), mac, &size);
  return absl::BytesToHexString({reinterpret_cast<const char*>(mac), size});
}

}  // namespace pyramid
