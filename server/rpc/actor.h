// Who asks for a change, for its record.
#ifndef PYRAMID_SERVER_RPC_ACTOR_H_
#define PYRAMID_SERVER_RPC_ACTOR_H_

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/security/grpc_credentials.h"

namespace pyramid {

// The name that the call proved (its key's or its certificate's), with what the caller says of
// himself behind it; that alone if it proved none.
inline std::string ActorOf(const grpc::ServerContextBase& context, absl::string_view claimed) {
  const std::string proved = CallerName(context);
  if (proved.empty()) return std::string(claimed);
  return claimed.empty() ? proved : absl::StrCat(proved, " (", claimed, ")");
}

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_ACTOR_H_
