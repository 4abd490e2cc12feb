// Which version of a model a request means. Pure.
#ifndef PYRAMID_SERVER_SERVING_ROUTE_H_
#define PYRAMID_SERVER_SERVING_ROUTE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/base/pieces.h"
#include "proto/classification.pb.h"
#include "proto/lifecycle.pb.h"

namespace pyramid {

inline constexpr absl::string_view kStableAlias = "stable";  // answers requests that name nothing
inline constexpr absl::string_view kCanaryAlias = "canary";  // only a habit

// What a request names. `version` and `alias` exclude each other.
struct ModelReference {
  absl::string_view name;   // empty: the only model
  int64_t version = 0;      // 0: none
  absl::string_view alias;  // empty: none
};

// "NAME", "NAME:VERSION", "NAME@ALIAS"; `version` beside it must be 0 or say the same. The parts
// are of `text`.
//   InvalidArgument  a version that is no number from 1, an empty alias, two versions, a version
//   and
//                    an alias
absl::StatusOr<ModelReference> ParseModelReference(absl::string_view text, int64_t version = 0);

// The part before ':' or '@'.
absl::string_view ModelNameOf(absl::string_view text);

// What decides the way of a request where traffic is shared: its sticky_key, else its request_id,
// else bytes of its first picture, encoded or floats. The same in every process.
uint64_t RouteKeyOf(const v1::ClassifyRequest& request, const Pieces& first_picture);

uint64_t RouteKeyOf(absl::string_view text);

// True if requests of this model with this key go to state.traffic_alias(). Who is in at some
// percentage stays in at a larger one, and each model draws anew.
bool GoesToTrafficAlias(const v1::ModelState& state, uint64_t key);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_ROUTE_H_
