// Calls by path, with the message's bytes: services whose proto isn't ours, methods that aren't
// there.
#ifndef PYRAMID_TESTS_TESTING_RAW_CALL_H_
#define PYRAMID_TESTS_TESTING_RAW_CALL_H_

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <future>
#include <memory>
#include <string>
#include <vector>

namespace pyramid::testing {

inline grpc::ByteBuffer BytesOf(const std::string& text) {
  const grpc::Slice slice(text);
  return grpc::ByteBuffer(&slice, 1);
}

inline std::string TextOf(const grpc::ByteBuffer& bytes) {
  std::vector<grpc::Slice> slices;
  bytes.Dump(&slices);
  std::string text;
  for (const grpc::Slice& slice : slices) {
    text.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return text;
}

// A unary call; `response` gets the bytes of the answer.
inline grpc::Status RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& path,
                            const std::string& request, std::string* response = nullptr,
                            std::chrono::milliseconds limit = std::chrono::seconds(10),
                            grpc_compression_algorithm compression = GRPC_COMPRESS_NONE) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_compression_algorithm(compression);
  context.set_deadline(std::chrono::system_clock::now() + limit);
  const grpc::ByteBuffer sent = BytesOf(request);
  grpc::ByteBuffer received;
  std::promise<grpc::Status> done;
  stub.UnaryCall(&context, path, grpc::StubOptions(), &sent, &received,
                 [&](grpc::Status status) { done.set_value(std::move(status)); });
  grpc::Status status = done.get_future().get();
  if (response != nullptr) *response = TextOf(received);
  return status;
}

// grpc.health.v1: the request for a service of this name, and the status in an answer
// (1 SERVING, 2 NOT_SERVING, 3 SERVICE_UNKNOWN; 0: none).
inline std::string HealthRequest(const std::string& service) {
  if (service.empty()) return "";
  return std::string("\x0a") + static_cast<char>(service.size()) + service;
}
inline int HealthStatus(const std::string& response) {
  return response.size() == 2 && response[0] == '\x08' ? response[1] : 0;
}

inline constexpr char kHealthCheck[] = "/grpc.health.v1.Health/Check";
inline constexpr char kHealthWatch[] = "/grpc.health.v1.Health/Watch";

// A Watch in progress. Ends in the destructor.
class HealthWatch {
 public:
  HealthWatch(const std::shared_ptr<grpc::Channel>& channel, const std::string& service)
      : stub_(channel) {
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    call_ = stub_.PrepareCall(&context_, kHealthWatch, &queue_);
    call_->StartCall(Tag(1));
    Wait(1);
    call_->Write(BytesOf(HealthRequest(service)), Tag(2));
    Wait(2);
    call_->Read(&received_, Tag(3));
  }
  ~HealthWatch() {
    context_.TryCancel();
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  // The next status; 0 if none comes in time, -1 if the stream ended.
  int Next(std::chrono::milliseconds limit = std::chrono::seconds(10)) {
    void* tag = nullptr;
    bool ok = false;
    if (queue_.AsyncNext(&tag, &ok, std::chrono::system_clock::now() + limit) !=
        grpc::CompletionQueue::GOT_EVENT) {
      return 0;
    }
    if (!ok) return -1;
    const int status = HealthStatus(TextOf(received_));
    received_.Clear();
    call_->Read(&received_, Tag(3));
    return status;
  }

 private:
  static void* Tag(intptr_t number) { return reinterpret_cast<void*>(number); }
  void Wait(intptr_t number) {
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok) && tag != Tag(number)) {
    }
  }

  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  grpc::ByteBuffer received_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_RAW_CALL_H_
