// A worker's line to the coordinator: unary calls from a thread of its own, each safe to repeat.
//
// A lost coordinator never stops the training: reports are repeated, the address is read anew from
// server.json, checkpoints that weren't acknowledged and the newest progress are kept. Torch-free;
// gRPC stays in the .cc.
#ifndef PYRAMID_WORKER_COORDINATOR_CLIENT_H_
#define PYRAMID_WORKER_COORDINATOR_CLIENT_H_

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "proto/worker.pb.h"

namespace pyramid {

// Thread-safe.
class CoordinatorClient {
 public:
  struct Options {
    v1::WorkerId worker;
    std::filesystem::path server_file;  // server.json
    std::string device;                 // as opened
    // Shown to the server, beside what server.json says of TLS. FromEnvironment fills it.
    std::string key;
    std::filesystem::path tls_ca;
    std::filesystem::path tls_cert;
    std::filesystem::path tls_key;
    absl::Duration interval = absl::Seconds(1);  // between reports
    absl::Duration call_timeout = absl::Seconds(5);
    absl::Duration finish_patience = absl::Seconds(60);
    // Called once, on the reporting thread, when the coordinator says that a newer attempt has
    // begun. A worker exits here at once.
    std::function<void(const std::string& why)> on_stale;
  };

  // The key and the files that the environment names: PYRAMID_WORKER_TOKEN, which the server gives
  // to the workers it starts, else PYRAMID_KEY; PYRAMID_TLS_CA, PYRAMID_TLS_CERT, PYRAMID_TLS_KEY.
  static void FromEnvironment(Options& options);

  // Starts the thread; it registers first, and goes on trying while the coordinator can't be
  // reached.
  static std::unique_ptr<CoordinatorClient> Start(Options options);
  virtual ~CoordinatorClient() = default;

  virtual void SetProgress(const v1::Progress& progress) = 0;  // the newest wins
  virtual void AddCheckpoint(const v1::Checkpoint& checkpoint) = 0;
  virtual void AddLine(absl::string_view line) = 0;  // the newest 1000 are kept
  virtual bool StopAsked() const = 0;                // stays true
  virtual bool SaveAsked() const = 0;                // until SaveDone
  virtual void SaveDone() = 0;

  // Ends the reports and sends the last call, repeated until it is answered or patience ends:
  // Unavailable. `request`'s worker, progress and unacknowledged checkpoints are filled in.
  // FailedPrecondition: a newer attempt has begun. Blocks.
  virtual absl::Status Finish(v1::FinishRequest request) = 0;
};

// "host:port" of the gRPC service in a server.json. NotFound, or InvalidArgument.
absl::StatusOr<std::string> ServerAddressFrom(const std::filesystem::path& server_file);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_COORDINATOR_CLIENT_H_
