// absl's times and durations as protobuf's and back.
#ifndef PYRAMID_PROTO_BASE_TIME_H_
#define PYRAMID_PROTO_BASE_TIME_H_

#include <google/protobuf/duration.pb.h>
#include <google/protobuf/timestamp.pb.h>

#include "absl/time/time.h"

namespace pyramid {

google::protobuf::Timestamp ToProto(absl::Time time);
absl::Time FromProto(const google::protobuf::Timestamp& proto);
google::protobuf::Duration ToProto(absl::Duration duration);
absl::Duration FromProto(const google::protobuf::Duration& proto);

}  // namespace pyramid

#endif  // PYRAMID_PROTO_BASE_TIME_H_
