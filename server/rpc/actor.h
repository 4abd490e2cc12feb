// Who asks for a change, for its record.
#ifndef PYRAMID_SERVER_RPC_ACTOR_H_
#define PYRAMID_SERVER_RPC_ACTOR_H_

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "grpcpp/server_context.h"

namespace pyramid {

// The name that the call proved (its certificate's, or what an authentication put into the auth
// context as peer identity), with what the caller says of himself behind it; that alone if it
// proved none.
inline std::string ActorOf(const grpc::ServerContextBase& context, absl::string_view claimed) {
  const auto auth = context.auth_context();
  if (auth == nullptr || !auth->IsPeerAuthenticated()) return std::string(claimed);
  const auto identity = auth->GetPeerIdentity();
  if (identity.empty()) return std::string(claimed);
  const std::string proved(identity.front().data(), identity.front().size());
  return claimed.empty() ? proved : absl::StrCat(proved, " (", claimed, ")");
}

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_ACTOR_H_
