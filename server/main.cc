// pyramid-server: the coordinator. Flags, signals; everything else is in server/server.h.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "server/config.h"
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
                 "HTTP port for /healthz and /readyz (default: 8000)")
      ->check(CLI::Range(0, 65535));
  app.add_option("--metrics-port,--metrics_port", flags.metrics_port,
                 "Prometheus port (default: 8002)")
      ->check(CLI::Range(0, 65535));
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
