// Whether an address can be reached from other machines, and whether it may be.
#ifndef PYRAMID_SERVER_SECURITY_EXPOSURE_H_
#define PYRAMID_SERVER_SECURITY_EXPOSURE_H_

#include <string>

#include "absl/status/status.h"

namespace pyramid {

// Of an address or name to listen on: whether every address it stands for is this machine's alone.
// A name that can't be resolved isn't.
bool IsLoopback(const std::string& host);

struct Protection {
  bool keys = false;
  bool tls = false;
  bool client_certificates = false;
  bool allow_insecure = false;
};

// FailedPrecondition: other machines can reach `host`, nothing protects it, and nobody has said
// that this is meant.
absl::Status CheckExposure(const std::string& host, const Protection& protection);

// What is still open although `host` may be listened on; empty: nothing. For the log.
std::string Exposed(const std::string& host, const Protection& protection);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_EXPOSURE_H_
