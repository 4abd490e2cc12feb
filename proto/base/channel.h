// How a client or a worker opens a channel to the server: plain or TLS, with a key on every call.
#ifndef PYRAMID_PROTO_BASE_CHANNEL_H_
#define PYRAMID_PROTO_BASE_CHANNEL_H_

#include <grpcpp/grpcpp.h>

#include <filesystem>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pyramid {

// What the caller shows and what it trusts. Files are PEM and read when the channel is opened.
struct ChannelSecurity {
  std::string key;             // "authorization: Bearer KEY" on every call; empty: none
  bool tls = false;            // without `ca`: the system's certificate authorities are trusted
  std::filesystem::path ca;    // trusted to sign the server's certificate; implies tls
  std::filesystem::path cert;  // with `private_key`: shown to a server that asks; implies tls
  std::filesystem::path private_key;
  std::string name;  // that the server's certificate must bear; empty: the host of the target

  bool UsesTls() const { return tls || !ca.empty() || !cert.empty() || !private_key.empty(); }
};

// Nothing is sent before the first call.
//   NotFound, PermissionDenied  a file can't be read
//   InvalidArgument             `cert` without `private_key` or the reverse; a key that no header
//                               can carry
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(absl::string_view target,
                                                           const ChannelSecurity& security,
                                                           grpc::ChannelArguments arguments);

// What a server.json says about TLS: {"tls": {"ca": PATH, "name": NAME}}. `security` keeps what it
// has.
void FillFromServerFile(absl::string_view json, ChannelSecurity& security);

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_CHANNEL_H_
