// server.yaml: what an operator sets. Defaults are here; flags of pyramid-server win over the file.
// An unknown key is an error that names the nearest known one.
#ifndef PYRAMID_SERVER_CONFIG_H_
#define PYRAMID_SERVER_CONFIG_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace pyramid {

struct ServerConfig {
  std::filesystem::path data = "data";  // jobs, models, database, server.json
  std::string host = "127.0.0.1";       // address to listen on
  int grpc_port = 8001;                 // 0: a free one
  int http_port = 8000;                 // health
  int metrics_port = 8002;              // Prometheus
  bool reflection = true;               // grpc.reflection
  bool log_json = false;
  std::string log_level = "info";  // debug | info | warning | error

  struct Serving {
    int max_batch = 32;                               // pictures per forward pass
    absl::Duration max_delay = absl::ZeroDuration();  // how long the oldest picture waits for
                                                      // company while the network is idle
    int max_queue = 256;                   // pictures accepted, not yet in a batch, per model
    int max_pictures = 64;                 // per request
    int64_t max_message_bytes = 64 << 20;  // per request
    int decode_threads = 2;
    int decode_queue = 512;   // pictures waiting to be decoded, all models
    int forward_threads = 0;  // inside a forward pass; 0: as many as the machine has cores
    std::string device = "cpu";
    int64_t max_picture_bytes = 32 << 20;
    int64_t max_picture_pixels = 50'000'000;
    int max_picture_side = 32'768;
    int64_t max_pixels_per_byte = 2000;  // of pictures over a megapixel: a guard against bombs
  } serving;

  struct Training {
    int cpu_workers =
        0;  // worker processes that may run on the CPU at once; 0: as many as the machine has cores
    int cuda_devices = -1;  // -1: as many as there are
    int npu_devices = -1;
    absl::Duration lost_after =
        absl::Seconds(60);  // silence after which a worker that isn't our child counts as lost
    absl::Duration reattach_window =
        absl::Seconds(20);  // after a restart: how long running workers have to report
    absl::Duration stop_grace =
        absl::Seconds(30);  // between asking a worker to save and stop, and killing it
    absl::Duration start_timeout = absl::Seconds(120);  // from launch to the first report
    std::string worker_program;                         // empty: pyramid-worker beside this program
  } training;

  absl::Duration drain_timeout =
      absl::Seconds(30);  // SIGTERM: how long requests and workers may take
};

// Reads YAML. Durations are "250ms", "4s". Sections `serving` and `training` are maps.
//   InvalidArgument  not YAML, unknown key ("server.serving.max_bach is not a known key; did you
//   mean max_batch?"), bad value with its limits
absl::StatusOr<ServerConfig> ParseServerConfig(absl::string_view yaml);

// The rules that hold for flags too. InvalidArgument.
absl::Status CheckServerConfig(const ServerConfig& config);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_CONFIG_H_
