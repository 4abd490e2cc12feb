// pyramid-server: the coordinator. Flags, signals; everything else is in server/server.h.
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "server/config.h"
#include "server/grpc_log.h"
#include "server/server.h"

namespace pyramid {
namespace {

struct Flags {
  std::string config;
  std::string data;
  std::string host;
  int grpc_port = -1;
  int http_port = -1;
  int metrics_port = -1;
  std::string keys;
  std::string tls_cert;
  std::string tls_key;
  std::string tls_client_ca;
  std::string drain_delay;
  bool insecure = false;
};

absl::StatusOr<ServerConfig> ReadConfig(const Flags& flags) {
  ServerConfig config;
  if (!flags.config.empty()) {
    ASSIGN_OR_RETURN(const std::string yaml, ReadFile(flags.config, 1 << 20));
    absl::StatusOr<ServerConfig> parsed = ParseServerConfig(yaml);
    if (!parsed.ok()) return Annotate(parsed.status(), flags.config);
    config = *std::move(parsed);
  }
  if (!flags.data.empty()) config.data = flags.data;
  if (!flags.host.empty()) config.host = flags.host;
  if (flags.grpc_port >= 0) config.grpc_port = flags.grpc_port;
  if (flags.http_port >= 0) config.http_port = flags.http_port;
  if (flags.metrics_port >= 0) config.metrics_port = flags.metrics_port;
  if (!flags.keys.empty()) config.security.keys = flags.keys;
  if (!flags.tls_cert.empty()) config.security.tls_cert = flags.tls_cert;
  if (!flags.tls_key.empty()) config.security.tls_key = flags.tls_key;
  if (!flags.tls_client_ca.empty()) config.security.tls_client_ca = flags.tls_client_ca;
  if (!flags.drain_delay.empty() && !absl::ParseDuration(flags.drain_delay, &config.drain_delay)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--drain-delay is ", flags.drain_delay, "; use a duration like 2s"));
  }
  if (flags.insecure) config.security.allow_insecure = true;
  RETURN_IF_ERROR(CheckServerConfig(config));
  return config;
}

void ConfigureLog(const ServerConfig& config) {
  log::Level level = log::Level::kInfo;
  if (config.log_level == "debug") level = log::Level::kDebug;
  if (config.log_level == "warning") level = log::Level::kWarning;
  if (config.log_level == "error") level = log::Level::kError;
  log::Configure(level, config.log_json);
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "pyramid-server: %s\n", std::string(status.message()).c_str());
  return 1;
}

// Models come and go in a process whose threads do too. With an arena a thread, each keeps the
// largest block that ever passed through it (a hundred reloads: +40 %), and glibc raises the size
// from which blocks go straight back to the system to that of the weights.
void KeepMemoryFlat() {
  mallopt(M_ARENA_MAX, 2);
  mallopt(M_MMAP_THRESHOLD, 4 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app{
      "The coordinator: keeps training jobs, schedules workers, serves trained checkpoints.",
      "pyramid-server"};
  app.set_version_flag("--version", "pyramid " PYRAMID_VERSION);
  app.add_option("--config,-c", flags.config,
                 "server.yaml; without it the defaults of configs/server.yaml hold");
  app.add_option("--data", flags.data, "folder for jobs, models and the database (default: data)");
  app.add_option("--host", flags.host, "address to listen on (default: 127.0.0.1)");
  app.add_option("--grpc-port,--grpc_port", flags.grpc_port,
                 "gRPC port; 0 picks a free one (default: 8001)")
      ->check(CLI::Range(0, 65535));
  app.add_option("--http-port,--http_port", flags.http_port,
                 "HTTP port: REST, /healthz, /readyz (default: 8000)")
      ->check(CLI::Range(0, 65535));
  app.add_option("--metrics-port,--metrics_port", flags.metrics_port,
                 "Prometheus port (default: 8002)")
      ->check(CLI::Range(0, 65535));
  app.add_option("--keys", flags.keys, "file of keys; `pyramid key new` makes one");
  app.add_option("--tls-cert,--tls_cert", flags.tls_cert,
                 "certificate, PEM; gRPC and HTTP use TLS");
  app.add_option("--tls-key,--tls_key", flags.tls_key, "its private key, PEM");
  app.add_option("--tls-client-ca,--tls_client_ca", flags.tls_client_ca,
                 "clients must show a certificate that one in this file signed");
  app.add_option("--drain-delay,--drain_delay", flags.drain_delay,
                 "SIGTERM: how long calls are still taken (default: 2s)");
  app.add_flag("--insecure", flags.insecure,
               "listen elsewhere than on loopback without TLS or keys");
  app.footer(
      "Addresses in use are in <data>/server.json. SIGTERM drains: workers save, requests finish, "
      "exit 0; a second one ends at once.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  absl::StatusOr<ServerConfig> config = ReadConfig(flags);
  if (!config.ok()) return Fail(config.status());
  ConfigureLog(*config);
  LogWhatGrpcSays();
  KeepMemoryFlat();
  // Debian's Abseil looks for cycles of locks; under load that is 2 % of the server's time.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);

  // Every thread inherits the blocked signals; this one waits for them. A client or worker that
  // goes away mustn't end us.
  signal(SIGPIPE, SIG_IGN);
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(*config);
  if (!server.ok()) return Fail(server.status());

  int caught = 0;
  sigwait(&signals, &caught);
  log::Info("draining", {{"signal", caught}});
  std::thread([&signals] {
    int again = 0;
    sigwait(&signals, &again);
    log::Warning("ended_at_once", {{"signal", again}});
    _exit(1);
  }).detach();
  (*server)->Drain();
  server->reset();
  log::Info("stopped");
  // The thread above waits for ever; leaving main would destroy what it uses.
  std::fflush(nullptr);
  _exit(0);
}

}  // namespace
}  // namespace pyramid

int main(int argc, char** argv) { return pyramid::Main(argc, argv); }
