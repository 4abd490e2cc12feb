// Unary methods with large messages, by hand: a call is looked at once its headers are here, and
// the message of one that is refused then is never read. gRPC's generated handlers read it first;
// under five times the load that can be answered, reading what is refused took more of the
// processor than the network did. On the wire nothing differs from any other unary method.
//
//   class ClassifyCall final : public LargeCall<v1::ClassifyRequest, v1::ClassifyResponse> {
//     // The headers are here.
//     absl::StatusOr<Door::Pass> EnterDoor() override;
//     // So is request(). Ends with one Answer, from any thread.
//     void Run() override;
//     // The answer is on its way.
//     void Sent(absl::Duration time) override;
//   };
//   calls.Add("pyramid.v1.ClassificationService", "Classify",
//             [&](grpc::GenericCallbackServerContext& context) { return new ClassifyCall(…); });
#ifndef PYRAMID_SERVER_RPC_LARGE_CALLS_H_
#define PYRAMID_SERVER_RPC_LARGE_CALLS_H_

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/proto_utils.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "proto/base/grpc_status.h"
#include "proto/base/read_request.h"
#include "proto/base/status.h"
#include "server/rpc/handle.h"
#include "server/rpc/large_field.h"
#include "server/serving/door.h"

namespace pyramid {

// The service behind those methods; ServerBuilder::RegisterCallbackGenericService takes it. Of the
// services that declare them, WithGenericMethod_… is registered.
class LargeCalls final : public grpc::CallbackGenericService {
 public:
  // Before the server starts. `make` gives a new LargeCall for a context.
  template <typename Make>
  void Add(absl::string_view service, absl::string_view method, Make make) {
    methods_[absl::StrCat("/", service, "/", method)] =
        [make = std::move(make)](grpc::GenericCallbackServerContext& context) {
          auto* call = make(context);
          call->Start();
          return call;
        };
  }

  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override {
    const auto found = methods_.find(context->method());
    return found == methods_.end()
               ? CallbackGenericService::CreateReactor(context)  // UNIMPLEMENTED
               : found->second(*context);
  }

 private:
  using Begin = std::function<grpc::ServerGenericBidiReactor*(grpc::GenericCallbackServerContext&)>;
  absl::flat_hash_map<std::string, Begin> methods_;
};

// One call, from its headers to gRPC's OnDone, which deletes it.
template <typename Request, typename Response>
class LargeCall : public grpc::ServerGenericBidiReactor {
 public:
  // `metrics` must outlive the call. `method` as in the protocol: "Classify". `large`: the path of
  // the message's large field, as FindLargeFields takes it; static.
  LargeCall(grpc::GenericCallbackServerContext& context, Metrics& metrics,
            absl::string_view service, absl::string_view method, std::span<const int> large)
      : context_(context), call_(metrics, service, method), path_(large) {}

  // Once, right after construction.
  void Start() {
    absl::StatusOr<Door::Pass> pass = EnterDoor();
    if (!pass.ok()) return Answer(pass.status());
    pass_ = *std::move(pass);
    StartRead(&bytes_);
  }

 protected:
  virtual absl::StatusOr<Door::Pass> EnterDoor() = 0;
  virtual void Run() = 0;
  virtual void Sent(absl::Duration time) = 0;  // since Answer, of one that isn't refused

  // Once. Nothing of this object may be touched after it.
  void Answer(absl::StatusOr<Response> answer) {
    AddPushback(answer.status(), context_);
    const grpc::Status status = call_.End(answer.status());
    if (!answer.ok()) return Finish(status);
    bool own = false;
    const grpc::Status written =
        grpc::SerializationTraits<Response>::Serialize(*answer, &answer_, &own);
    if (!written.ok()) return Finish(written);
    call_.Sending();
    answered_ = absl::Now();
    StartWriteAndFinish(&answer_, grpc::WriteOptions(), status);
  }

  grpc::GenericCallbackServerContext& context() { return context_; }
  Request& request() { return request_; }
  // Fields that are empty in request() and lie here; until Answer.
  std::vector<LargeField>& large() { return large_; }
  const std::shared_ptr<std::atomic<bool>>& cancelled() const { return cancelled_; }
  absl::Duration received() const { return received_; }  // from the headers to request()

 private:
  void OnReadDone(bool ok) override {
    if (!ok) {
      return Answer(cancelled_->load() ? absl::CancelledError("the caller left")
                                       : absl::InvalidArgumentError("the call has no message"));
    }
    absl::Status parsed = Parse();
    if (!parsed.ok()) return Answer(std::move(parsed));
    call_.Received();
    received_ = call_.age();
    pass_.reset();
    Run();
  }
  absl::Status Parse() {
    RETURN_IF_ERROR(FromGrpc(Unpack(bytes_)));
    if (bytes_.Length() >= kLargeMessage && bytes_.Dump(&slices_).ok()) {
      Pieces message;
      for (const grpc::Slice& slice : slices_) {
        message.Add({reinterpret_cast<const char*>(slice.begin()), slice.size()});
      }
      std::optional<MessageAround> around = FindLargeFields(message, path_);
      if (around.has_value()) {
        large_ = std::move(around->large);
        if (request_.ParseFromString(around->rest)) return absl::OkStatus();
        return absl::InvalidArgumentError(
            absl::StrCat("the message is no ", Request::descriptor()->full_name()));
      }
      slices_.clear();
    }
    return FromGrpc(ReadMessage(bytes_, request_));
  }
  void OnCancel() override { cancelled_->store(true); }
  void OnDone() override {
    if (answered_ != absl::InfinitePast()) Sent(absl::Now() - answered_);
    delete this;
  }

  static constexpr size_t kLargeMessage = 64 << 10;

  grpc::GenericCallbackServerContext& context_;
  RpcCall call_;
  const std::span<const int> path_;
  std::optional<Door::Pass> pass_;  // while the message is read
  grpc::ByteBuffer bytes_;
  std::vector<grpc::Slice> slices_;  // what large_ points into
  std::vector<LargeField> large_;
  grpc::ByteBuffer answer_;
  absl::Duration received_;
  absl::Time answered_ = absl::InfinitePast();
  Request request_;
  const std::shared_ptr<std::atomic<bool>> cancelled_ = std::make_shared<std::atomic<bool>>(false);
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_LARGE_CALLS_H_
