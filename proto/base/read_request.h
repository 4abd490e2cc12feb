// How requests are read, in place of gRPC's own way, which has no bound: a message that came
// compressed may become a thousand times its size, and one of empty entries a hundred times in
// memory. Every generated *.grpc.pb.h includes this file (proto/CMakeLists.txt), so it holds for
// every method; answers are read as ever. Thread-safe.
#ifndef PYRAMID_PROTO_BASE_READ_REQUEST_H_
#define PYRAMID_PROTO_BASE_READ_REQUEST_H_

#include <google/protobuf/message.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include <cstdint>
#include <type_traits>

namespace pyramid {

// Of one message: fields, and numbers of packed ones that aren't of a fixed size. The largest kind
// takes 200 bytes.
inline constexpr int64_t kMostEntries = int64_t{1} << 18;

// What a message of `packed` bytes may become: 16 times as much, 8 MiB in any case, 64 MiB at most.
int64_t MostUnpacked(int64_t packed);

// `message` as it was before its sender compressed it (gzip, deflate); others stay as they are. The
// server must have been told not to do that itself (GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION).
//   ResourceExhausted  it would have more than MostUnpacked
//   InvalidArgument    it is damaged
grpc::Status Unpack(grpc::ByteBuffer& message);

// Parses `message`; nothing is left of it. Only what is called …Request has bounds.
//   InvalidArgument    it isn't a `parsed`, or has more than kMostEntries
//   ResourceExhausted  as Unpack
grpc::Status ReadMessage(grpc::ByteBuffer& message, google::protobuf::MessageLite& parsed);

}  // namespace pyramid

namespace grpc {

// More special than gRPC's own by its constraint, and otherwise the same.
template <class T>
requires std::is_base_of_v<google::protobuf::MessageLite, T>
class SerializationTraits<
    T, typename std::enable_if<std::is_base_of<grpc::protobuf::MessageLite, T>::value>::type> {
 public:
  static Status Serialize(const grpc::protobuf::MessageLite& message, ByteBuffer* bytes,
                          bool* own) {
    return GenericSerialize<ProtoBufferWriter, T>(message, bytes, own);
  }
  static Status Deserialize(ByteBuffer* bytes, grpc::protobuf::MessageLite* message) {
    if (bytes == nullptr) return Status(StatusCode::INTERNAL, "No payload");
    return pyramid::ReadMessage(*bytes, *message);
  }
};

}  // namespace grpc

#endif  // PYRAMID_PROTO_BASE_READ_REQUEST_H_
