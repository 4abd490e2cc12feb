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

inline constexpr int kMostInstances = 64;  // forward passes at a time

struct ServerConfig {
  std::filesystem::path data = "data";     // jobs, models, database, server.json
  std::string host = "127.0.0.1";          // address to listen on
  int grpc_port = 8001;                    // 0: a free one
  int http_port = 8000;                    // REST, health
  int metrics_port = 8002;                 // Prometheus
  bool reflection = true;                  // grpc.reflection
  std::string metrics_host = "127.0.0.1";  // of the metrics port, which has neither TLS nor keys
  bool log_json = false;
  std::string log_level = "info";  // debug | info | warning | error
  bool access_log = false;         // a line for every call

  struct Serving {
    int max_batch = 32;                               // pictures per forward pass
    absl::Duration max_delay = absl::ZeroDuration();  // how long the oldest picture waits for
                                                      // company while the network is idle
    // The deadline of requests that have none or a later one, from their arrival; 0: none.
    absl::Duration default_timeout = absl::ZeroDuration();
    // The duration that requests are meant to stay within: the histogram of durations gets a bucket
    // bound there; 0: none.
    absl::Duration objective = absl::ZeroDuration();
    int max_queue = 256;                   // pictures accepted, not yet in a batch, per model
    int max_pictures = 64;                 // per request
    int64_t max_message_bytes = 64 << 20;  // per request
    int decode_threads = 2;
    int decode_queue = 512;  // pictures waiting to be decoded, all models
    int instances = 0;  // forward passes at a time on the device, all models together; 0: on a CPU
                        // as many as cores, else 2
    int forward_threads = 0;  // of a pass that is alone, shared by those side by side; 0: all cores
    std::string device = "cpu";
    int64_t max_picture_bytes = 32 << 20;
    int64_t max_picture_pixels = 50'000'000;
    int max_picture_side = 32'768;
    int64_t max_pixels_per_byte = 2000;  // of pictures over a megapixel: a guard against bombs
    bool refuse_non_finite = true;       // tensors with NaN or infinity; else they are answered
  } serving;

  // What a promotion must show, where the request for it doesn't say. 0, false: not asked for.
  struct Promotion {
    double min_top1 = 0;                                // 0..1, of the checkpoint's validation
    absl::Duration max_latency = absl::ZeroDuration();  // median pass of latency_batch pictures
    int latency_batch = 1;
    double min_agreement = 0;  // 0..1, first answers equal to the stable version's; holds from a
                               // model's second version on
    bool require_self_test = false;
    int load_threads = 1;  // of forward passes before a version is in service
  } promotion;

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

  // SIGTERM: how long calls are still taken after health says NOT_SERVING, so that whoever sends
  // them hears of it first; then, how long requests and workers may take.
  absl::Duration drain_delay = absl::Seconds(2);
  absl::Duration drain_timeout = absl::Seconds(30);

  // docs/security.md.
  struct Security {
    std::filesystem::path keys;           // empty: no keys; whoever connects may do everything
    std::filesystem::path tls_cert;       // PEM; empty: plain text
    std::filesystem::path tls_key;        // of tls_cert
    std::filesystem::path tls_client_ca;  // clients must show a certificate of theirs
    std::filesystem::path tls_ca;         // what workers and clients on this machine trust; empty:
                                          // tls_cert itself
    std::filesystem::path worker_cert;    // what workers show to tls_client_ca; empty: tls_cert
    std::filesystem::path worker_key;     // of worker_cert
    bool allow_insecure = false;          // may listen elsewhere than on loopback without TLS or
                                          // keys
  } security;

  // Of the gRPC port; max_http and memory_bytes of the HTTP port too.
  struct Connections {
    absl::Duration min_ping_interval = absl::Seconds(10);  // of a client's pings
    absl::Duration keepalive_time = absl::Seconds(60);     // idle time after which we ping
    absl::Duration keepalive_timeout = absl::Seconds(20);  // without an answer it is dead
    absl::Duration max_age = absl::ZeroDuration();  // clients connect anew, perhaps elsewhere; 0:
                                                    // never
    absl::Duration max_age_grace = absl::Seconds(60);  // for calls in progress then
    int64_t memory_bytes = 1 << 30;  // of what all connections receive and send; of HTTP's bodies
    int max_http = 256;              // HTTP connections that have requests answered at a time
    bool bdp_probe = false;  // windows grow with the connection; else 64 kB, and a larger message
                             // is asked for once its call is let in
  } connections;
};

// Reads YAML. Durations are "250ms", "4s". Sections (`serving`, `promotion`, `training` …) are
// maps.
//   InvalidArgument  not YAML, unknown key ("server.serving.max_bach is not a known key; did you
//   mean max_batch?"), bad value with its limits
absl::StatusOr<ServerConfig> ParseServerConfig(absl::string_view yaml);

// The rules that hold for flags too. InvalidArgument.
absl::Status CheckServerConfig(const ServerConfig& config);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_CONFIG_H_
