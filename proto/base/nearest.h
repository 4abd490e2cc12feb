// "did you mean …": the known word nearest to a misspelt one.
#ifndef PYRAMID_PROTO_BASE_NEAREST_H_
#define PYRAMID_PROTO_BASE_NEAREST_H_

#include <span>
#include <string>

#include "absl/strings/string_view.h"

namespace pyramid {

// Edits (insert, delete, replace, swap of neighbours) that turn `a` into `b`.
int EditDistance(absl::string_view a, absl::string_view b);

// The nearest of `known` (the first of equals); empty if there is none.
std::string Nearest(absl::string_view word, std::span<const std::string> known);

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_NEAREST_H_
