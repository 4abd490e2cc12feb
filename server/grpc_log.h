// gRPC's own messages as events of our log.
#ifndef PYRAMID_SERVER_GRPC_LOG_H_
#define PYRAMID_SERVER_GRPC_LOG_H_

namespace pyramid {

// From now on, for the whole process. A port scan of a TLS port makes one message a connection: ten
// lines a second at most, with the number of those left out.
void LogWhatGrpcSays();

}  // namespace pyramid

#endif  // PYRAMID_SERVER_GRPC_LOG_H_
