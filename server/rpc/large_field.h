// A message's large field, found where it came in, so that nobody copies it out of the buffers that
// it was received in: protobuf copies a tensor's 150,528 floats twice, as its array of them grows.
#ifndef PYRAMID_SERVER_RPC_LARGE_FIELD_H_
#define PYRAMID_SERVER_RPC_LARGE_FIELD_H_

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "proto/base/pieces.h"

namespace pyramid {

struct LargeField {
  int index = 0;  // of the element of the path's first field that it is, or lies in
  Pieces bytes;   // of the message
};

struct MessageAround {
  std::string rest;               // the message with those fields empty
  std::vector<LargeField> large;  // one or more
};

// `path`: numbers of the fields from the message to one of bytes or packed floats; the first is
// repeated, the others aren't. Fields under 4 kB stay in the message. Nothing: none is larger, one
// is over 2 MB (gRPC counts its buffers against connections.memory_bytes until they are free), or
// the message is broken or unusual in any way (a field that isn't repeated and comes twice,
// groups, much else beside); parse it whole then.
//
// Wire format: protobuf.dev/programming-guides/encoding.
std::optional<MessageAround> FindLargeFields(const Pieces& message, std::span<const int> path);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_LARGE_FIELD_H_
