// The way to a server: where it is, a channel that follows it when it moves, and its errors put
// into words.
#ifndef PYRAMID_CLIENT_CONNECTION_H_
#define PYRAMID_CLIENT_CONNECTION_H_

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/environment.h"
#include "proto/base/status.h"
#include "proto/classification.grpc.pb.h"
#include "proto/lifecycle.grpc.pb.h"
#include "proto/training.grpc.pb.h"

namespace pyramid {

struct ServerAddress {
  std::string target;  // "127.0.0.1:8001"
  std::string
      source;  // who said so: "--server", "PYRAMID_SERVER", "data/server.json", "the default"
  std::string server_file;  // the text of the server.json that named it; empty: none did
};

// --server, then PYRAMID_SERVER (either HOST:PORT or a server.json), then data/server.json, then
// 127.0.0.1:8001.
//   InvalidArgument  not HOST:PORT (a usage error if it came from --server); a server.json without
//                    an address
//   NotFound         the server.json that was named isn't there
absl::StatusOr<ServerAddress> ResolveServer(const Environment& environment);

// Thread-safe. Nothing is sent before the first call.
class Connection {
 public:
  // `environment` must outlive the connection. Errors as ResolveServer; NotFound,
  // PermissionDenied, InvalidArgument: a key or a file of TLS can't be read or used.
  static absl::StatusOr<std::unique_ptr<Connection>> Open(const Environment& environment);

  std::shared_ptr<v1::TrainingService::Stub> training() const;
  std::shared_ptr<v1::ClassificationService::Stub> classification() const;
  std::shared_ptr<v1::ModelService::Stub> models() const;
  std::shared_ptr<grpc::Channel> channel() const;
  ServerAddress address() const;

  // Looks again where the server is (it may have restarted on another port). True if it moved.
  bool Refresh();

  // A call's result. Unauthenticated and PermissionDenied say how to give another key. Unavailable
  // says which server can't be reached and how to name another; a deadline that passed without a
  // connection is Unavailable too. Everything else keeps its code and message.
  absl::Status ToStatus(const grpc::Status& status) const;

 private:
  explicit Connection(const Environment& environment) : environment_(environment) {}
  absl::Status Connect(ServerAddress address) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Environment& environment_;
  mutable absl::Mutex mutex_;
  ServerAddress address_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<grpc::Channel> channel_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<v1::TrainingService::Stub> training_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<v1::ClassificationService::Stub> classification_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<v1::ModelService::Stub> models_ ABSL_GUARDED_BY(mutex_);
};

// Most calls answer at once; those that read data or load a network take longer.
inline constexpr absl::Duration kCallTimeout = absl::Seconds(30);
inline constexpr absl::Duration kPromoteTimeout = absl::Minutes(15);

void SetDeadline(grpc::ClientContext& context, absl::Duration timeout);

// Opens the way to the server and makes one call. Errors as Open and ToStatus.
template <typename Stub, typename Request, typename Response>
absl::StatusOr<Response> CallOnce(const Environment& environment,
                                  std::shared_ptr<Stub> (Connection::*stub)() const,
                                  grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                               Response*),
                                  const Request& request, absl::Duration timeout) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Connection> connection, Connection::Open(environment));
  grpc::ClientContext context;
  SetDeadline(context, timeout);
  Response response;
  const grpc::Status status = ((*connection.*stub)().get()->*method)(&context, request, &response);
  if (!status.ok()) return connection->ToStatus(status);
  return response;
}

// CallOnce: CallTraining(environment, &v1::TrainingService::Stub::GetJob, request).
template <typename Request, typename Response>
absl::StatusOr<Response> CallTraining(const Environment& environment,
                                      grpc::Status (v1::TrainingService::Stub::*method)(
                                          grpc::ClientContext*, const Request&, Response*),
                                      const Request& request,
                                      absl::Duration timeout = kCallTimeout) {
  return CallOnce(environment, &Connection::training, method, request, timeout);
}

// The same for ModelService.
template <typename Request, typename Response>
absl::StatusOr<Response> CallModels(
    const Environment& environment,
    grpc::Status (v1::ModelService::Stub::*method)(grpc::ClientContext*, const Request&, Response*),
    const Request& request, absl::Duration timeout = kCallTimeout) {
  return CallOnce(environment, &Connection::models, method, request, timeout);
}

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_CONNECTION_H_
