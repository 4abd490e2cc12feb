// Wires the coordinator together: store, job manager, registry, pipeline, RPC services, ports. The
// only place where serving and training meet: a promoted checkpoint goes from one to the other
// here.
#ifndef PYRAMID_SERVER_SERVER_H_
#define PYRAMID_SERVER_SERVER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/config.h"

namespace pyramid {

class Server {
 public:
  // Locks the data folder, opens the store, loads the models in service, listens, writes
  // <data>/server.json, goes on with the jobs.
  //   Unavailable         a port is in use; another server holds the data folder
  //   FailedPrecondition  the data folder is a newer version's
  //   PermissionDenied, ResourceExhausted  the data folder can't be written
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerConfig& config);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Not serving any more to new requests; workers save and stop, accepted requests finish. At most
  // config.drain_timeout. Call once.
  void Drain();

  const std::string& grpc_address() const;

 private:
  struct Parts;
  explicit Server(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVER_H_
