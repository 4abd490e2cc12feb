#include "server/server.h"

#include <fcntl.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <prometheus/exposer.h>
#include <prometheus/registry.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "model/checkpoint.h"
#include "model/classifier.h"
#include "model/device.h"
#include "proto/base/clock.h"
#include "proto/base/cores.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "server/health.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/process_metrics.h"
#include "server/rpc/classification_service.h"
#include "server/rpc/inference_service.h"
#include "server/rpc/large_calls.h"
#include "server/rpc/model_service.h"
#include "server/rpc/open_inference.h"
#include "server/rpc/rate_gate.h"
#include "server/rpc/rest_v2.h"
#include "server/rpc/training_service.h"
#include "server/rpc/worker_service.h"
#include "server/security/access.h"
#include "server/security/call_log.h"
#include "server/security/exposure.h"
#include "server/security/grpc_credentials.h"
#include "server/security/http_guard.h"
#include "server/security/public_text.h"
#include "server/security/tls_files.h"
#include "server/serving/classify.h"
#include "server/serving/model_registry.h"
#include "server/serving/stand_back.h"
#include "server/training/job_manager.h"
#include "server/training/local_launcher.h"

namespace pyramid {
namespace {

// Held as long as the server lives; the kernel lets go of it when the process ends, however it
// ends.
class FolderLock {
 public:
  static absl::StatusOr<std::unique_ptr<FolderLock>> Take(const std::filesystem::path& folder) {
    const std::filesystem::path path = folder / "lock";
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return ErrnoStatus(errno, "can't open", path);
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
      close(fd);
      return absl::UnavailableError(absl::StrCat("another pyramid-server uses the data folder ",
                                                 folder.string(),
                                                 "; stop it or choose another folder with --data"));
    }
    return std::unique_ptr<FolderLock>(new FolderLock(fd));
  }
  ~FolderLock() { close(fd_); }

 private:
  explicit FolderLock(int fd) : fd_(fd) {}
  const int fd_;
};

// Worker slots by kind of device: what the configuration says, else what is there.
DeviceCounts CountDevices(const ServerConfig::Training& training, int cores) {
  DeviceCounts counts;
  counts["cpu"] = training.cpu_workers > 0 ? training.cpu_workers : cores;
  for (const DeviceKind& kind : ProbeDevices()) {
    if (kind.kind == "cpu") continue;
    const int configured = kind.kind == "cuda" ? training.cuda_devices : training.npu_devices;
    counts[kind.kind] = configured >= 0 ? std::min(configured, kind.count) : kind.count;
  }
  return counts;
}

// The finished checkpoints of a job, from their manifests; a damaged one isn't a checkpoint.
std::vector<v1::Checkpoint> FindCheckpoints(const std::filesystem::path& job_folder) {
  std::vector<v1::Checkpoint> found;
  for (const std::filesystem::path& folder : ListCheckpoints(job_folder / "checkpoints")) {
    const absl::StatusOr<v1::Manifest> manifest = ReadManifest(folder);
    if (!manifest.ok()) {
      log::Warning("checkpoint_unreadable",
                   {{"path", folder.string()}, {"error", manifest.status().message()}});
      continue;
    }
    v1::Checkpoint& checkpoint = found.emplace_back();
    checkpoint.set_id(folder.filename().string());
    checkpoint.set_step(manifest->training().step());
    checkpoint.set_epochs_done(manifest->training().epochs_done());
    checkpoint.set_path(folder.string());
    checkpoint.set_digest(manifest->digest());
    for (const v1::FileEntry& file : manifest->files())
      checkpoint.set_bytes(checkpoint.bytes() + file.bytes());
    checkpoint.set_validated(manifest->training().validated());
    checkpoint.set_val_top1(manifest->training().val_top1());
    *checkpoint.mutable_created() = manifest->created();
  }
  return found;
}

std::filesystem::path WorkerProgram(const ServerConfig& config) {
  if (!config.training.worker_program.empty()) return config.training.worker_program;
  std::error_code ignored;
  return std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path() / "pyramid-worker";
}

std::filesystem::path Absolute(const std::filesystem::path& path) {
  std::error_code error;
  return path.empty() ? path : std::filesystem::absolute(path, error);
}

// What the workers of an attempt show the server: a token of their own, and where clients need a
// certificate, one.
std::vector<std::string> WorkerEnvironment(const ServerConfig& config, const Access& access,
                                           const std::string& job_id, int64_t epoch) {
  std::vector<std::string> variables;
  if (const std::string token = access.WorkerToken(job_id, epoch); !token.empty()) {
    variables.push_back(absl::StrCat("PYRAMID_WORKER_TOKEN=", token));
  }
  const ServerConfig::Security& security = config.security;
  if (!security.tls_client_ca.empty()) {
    const bool own = !security.worker_cert.empty();
    variables.push_back(absl::StrCat(
        "PYRAMID_TLS_CERT=", Absolute(own ? security.worker_cert : security.tls_cert).string()));
    variables.push_back(absl::StrCat(
        "PYRAMID_TLS_KEY=", Absolute(own ? security.worker_key : security.tls_key).string()));
  }
  return variables;
}

Protection ProtectionOf(const ServerConfig& config) {
  return {.keys = !config.security.keys.empty(),
          .tls = !config.security.tls_cert.empty(),
          .client_certificates = !config.security.tls_client_ca.empty(),
          .allow_insecure = config.security.allow_insecure};
}

// The headers that credentials point into.
struct HeaderCredentials {
  explicit HeaderCredentials(const RestRequest& request)
      : authorization(request.header("authorization")), api_key(request.header("x-api-key")) {}
  Credentials view() const { return {.authorization = authorization, .api_key = api_key}; }
  std::string authorization;
  std::string api_key;
};

// Of "/v2/models/NAME/…"; empty for other paths.
absl::string_view ModelInPath(absl::string_view path) {
  if (!absl::ConsumePrefix(&path, "/v2/models/")) return "";
  return path.substr(0, path.find('/'));
}

JobManager::Options ManagerOptions(const ServerConfig& config, const Access& access) {
  JobManager::Options options;
  options.data = config.data;
  options.cores = std::max(1u, std::thread::hardware_concurrency());
  options.devices = CountDevices(config.training, options.cores);
  options.worker_program = WorkerProgram(config);
  options.limits.start_timeout = config.training.start_timeout;
  options.limits.lost_after = config.training.lost_after;
  options.limits.stop_grace = config.training.stop_grace;
  options.reattach_window = config.training.reattach_window;
  options.find_checkpoints = FindCheckpoints;
  options.worker_environment = [&config, &access](const std::string& job_id, int64_t epoch) {
    return WorkerEnvironment(config, access, job_id, epoch);
  };
  return options;
}

int ForwardThreads(const ServerConfig::Serving& serving) {
  return serving.forward_threads > 0 ? serving.forward_threads : UsableCores();
}

// As many as cores: a pass that is alone uses all of them, passes side by side share them. A device
// with memory of its own computes one batch while the answers of another are fetched.
int Instances(const ServerConfig::Serving& serving) {
  if (serving.instances > 0) return serving.instances;
  return serving.device == "cpu" ? std::min(UsableCores(), kMostInstances) : 2;
}

ModelRegistry::Options RegistryOptions(const ServerConfig& config) {
  ModelRegistry::Options options;
  options.folder = config.data / "models";
  options.device = config.serving.device;
  options.forward_threads = ForwardThreads(config.serving);
  options.load_threads = config.promotion.load_threads;
  options.gates = {.min_top1 = config.promotion.min_top1,
                   .max_latency = config.promotion.max_latency,
                   .latency_batch = config.promotion.latency_batch,
                   .min_agreement = config.promotion.min_agreement,
                   .require_self_test = config.promotion.require_self_test};
  options.batching.max_batch = config.serving.max_batch;
  options.batching.max_delay = config.serving.max_delay;
  options.batching.max_queue = config.serving.max_queue;
  options.batching.device = std::make_shared<DeviceTurns>(Instances(config.serving));
  options.batching.decoded_here = options.device == "cpu";
  options.batching.threads = options.device == "cpu" ? options.forward_threads : 1;
  return options;
}

ClassifyPipeline::Options PipelineOptions(const ServerConfig& config) {
  ClassifyPipeline::Options options;
  options.max_pictures = config.serving.max_pictures;
  options.decode_threads = config.serving.decode_threads;
  options.decode_queue = config.serving.decode_queue;
  options.decode.max_bytes = config.serving.max_picture_bytes;
  options.decode.max_pixels = config.serving.max_picture_pixels;
  options.decode.max_side = config.serving.max_picture_side;
  options.decode.max_pixels_per_byte = config.serving.max_pixels_per_byte;
  options.refuse_non_finite = config.serving.refuse_non_finite;
  options.default_timeout = config.serving.default_timeout;
  return options;
}

void SetConnections(const ServerConfig::Connections& connections, grpc::ServerBuilder& builder) {
  const auto set = [&](const char* name, absl::Duration duration) {
    builder.AddChannelArgument(name, static_cast<int>(absl::ToInt64Milliseconds(duration)));
  };
  // Clients may ping this often, also while nothing is in flight.
  set(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, connections.min_ping_interval);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  set(GRPC_ARG_KEEPALIVE_TIME_MS, connections.keepalive_time);
  set(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, connections.keepalive_timeout);
  if (connections.max_age > absl::ZeroDuration()) {
    set(GRPC_ARG_MAX_CONNECTION_AGE_MS, connections.max_age);
    set(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, connections.max_age_grace);
  }
  builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, connections.bdp_probe ? 1 : 0);
  builder.SetResourceQuota(
      grpc::ResourceQuota("server").Resize(static_cast<size_t>(connections.memory_bytes)));
}

// The reflection library adds itself to every server of a program that it is linked into.
class WithoutReflection final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments* /*arguments*/) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->erase(std::remove_if(plugins->begin(), plugins->end(),
                                  [](const auto& plugin) {
                                    return plugin->name() == "proto_server_reflection";
                                  }),
                   plugins->end());
  }
};

constexpr absl::Duration kLastCalls = absl::Milliseconds(300);

// "[::1]" for an IPv6 address.
std::string HostForUrl(const std::string& host) {
  return absl::StrContains(host, ':') && host.front() != '[' ? absl::StrCat("[", host, "]") : host;
}

}  // namespace

// In the order in which they are made; destroyed in reverse.
struct Server::Parts {
  explicit Parts(const ServerConfig& server_config)
      : config(server_config), metrics(server_config.serving.objective), text(server_config.data) {}

  const ServerConfig config;
  std::unique_ptr<FolderLock> lock;
  Metrics metrics;
  const std::shared_ptr<ProcessMetrics> process = std::make_shared<ProcessMetrics>();
  const PublicText text;
  std::unique_ptr<Access> access;
  std::shared_ptr<TlsFiles> tls;  // null: plain text
  std::unique_ptr<CallLog> calls;
  std::unique_ptr<HttpGuard> guard;
  std::unique_ptr<ModelRegistry> registry;
  std::unique_ptr<RateGate> rates;
  std::unique_ptr<ClassifyPipeline> pipeline;
  LocalLauncher launcher;
  std::unique_ptr<JobManager> manager;
  std::unique_ptr<ClassificationService> classification;
  std::unique_ptr<OpenInference> open_inference;
  std::unique_ptr<InferenceService> inference;
  std::unique_ptr<RestV2> rest;
  LargeCalls large_calls;
  std::unique_ptr<ModelService> models;
  std::unique_ptr<TrainingService> training;
  std::unique_ptr<WorkerService> worker;
  std::unique_ptr<grpc::Server> grpc;
  std::unique_ptr<HealthFeed> health;
  std::string grpc_address;
  std::atomic<bool> ready{false};
  std::unique_ptr<HttpServer> http;
  std::unique_ptr<prometheus::Exposer> exposer;
  std::string metrics_address;

  // Takes work: it has started, isn't ending, and not all of its models have failed.
  bool Ready() const { return ready.load() && registry->Answers(); }
  absl::Status Guard();
  absl::Status Listen();
  absl::Status ListenGrpc();
  void TellHealth();
  absl::Status ListenHttp();
  absl::Status ListenMetrics();
  absl::Status Announce();
  absl::StatusOr<v1::PromoteCheckpointResponse> Promote(
      const std::filesystem::path& checkpoint, const v1::PromoteCheckpointRequest& request);
};

// Where the two lines meet: a job's checkpoint goes into service.
absl::StatusOr<v1::PromoteCheckpointResponse> Server::Parts::Promote(
    const std::filesystem::path& checkpoint, const v1::PromoteCheckpointRequest& request) {
  ASSIGN_OR_RETURN(const ModelRegistry::Promoted promoted,
                   registry->Promote(checkpoint, request.model(), PromotionOf(request)));
  return ResponseOf(request, promoted);
}

// Keys and certificates, before anything listens.
absl::Status Server::Parts::Guard() {
  const Protection protection = ProtectionOf(config);
  RETURN_IF_ERROR(CheckExposure(config.host, protection));
  if (const std::string open = Exposed(config.host, protection); !open.empty()) {
    log::Warning("exposed", {{"host", config.host}, {"what", open}});
  }
  if (!IsLoopback(config.metrics_host)) {
    log::Warning("exposed", {{"host", config.metrics_host},
                             {"what", "whoever connects may read the metrics, in plain text"}});
  }
  ASSIGN_OR_RETURN(access, Access::Create({.keys = config.security.keys,
                                           .worker_secret = config.data / "worker.secret"},
                                          metrics));
  if (!config.security.tls_cert.empty()) {
    ASSIGN_OR_RETURN(tls, TlsFiles::Open({.certificate = config.security.tls_cert,
                                          .private_key = config.security.tls_key,
                                          .client_ca = config.security.tls_client_ca}));
  }
  calls =
      std::make_unique<CallLog>(CallLog::Options{.every_call = config.access_log}, text, *access);
  guard = std::make_unique<HttpGuard>(HttpGuard::Options{.every_call = config.access_log}, text,
                                      *access);
  return absl::OkStatus();
}

// Threads of ports read and send; a job's workers, which come from this process too, don't.
absl::Status Server::Parts::Listen() {
  const TurnTaking ports;
  RETURN_IF_ERROR(ListenGrpc());
  RETURN_IF_ERROR(ListenHttp());
  RETURN_IF_ERROR(ListenMetrics());
  return Announce();
}

absl::Status Server::Parts::ListenGrpc() {
  grpc::EnableDefaultHealthCheckService(true);
  if (config.reflection) grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  if (!config.reflection) builder.SetOption(std::make_unique<WithoutReflection>());
  // With SO_REUSEPORT two servers would share a port unnoticed.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.SetMaxReceiveMessageSize(static_cast<int>(config.serving.max_message_bytes));
  // gRPC unpacks compressed messages without a bound; read_request.h has one.
  builder.AddChannelArgument(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  SetConnections(config.connections, builder);
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> interceptors;
  interceptors.push_back(calls->Factory());
  builder.experimental().SetInterceptorCreators(std::move(interceptors));
  int port = 0;
  builder.AddListeningPort(absl::StrCat(HostForUrl(config.host), ":", config.grpc_port),
                           MakeServerCredentials(*access, tls), &port);
  classification->AddTo(large_calls);
  inference->AddTo(large_calls);
  builder.RegisterCallbackGenericService(&large_calls);
  builder.RegisterService(classification.get());
  builder.RegisterService(inference.get());
  builder.RegisterService(models.get());
  builder.RegisterService(training.get());
  builder.RegisterService(worker.get());
  grpc = builder.BuildAndStart();
  if (grpc == nullptr || port == 0) {
    return absl::UnavailableError(
        absl::StrCat("can't listen on ", config.host, ":", config.grpc_port,
                     " for gRPC: the port is in use or the address isn't this machine's; "
                     "choose another with --grpc-port"));
  }
  grpc_address = absl::StrCat(HostForUrl(config.host), ":", port);
  grpc->GetHealthCheckService()->SetServingStatus(false);  // until the start is done
  return absl::OkStatus();
}

void Server::Parts::TellHealth() {
  health = std::make_unique<HealthFeed>(
      *grpc->GetHealthCheckService(),
      std::vector<std::string>{v1::ClassificationService::service_full_name(),
                               inference::GRPCInferenceService::service_full_name(),
                               v1::ModelService::service_full_name(),
                               v1::TrainingService::service_full_name(),
                               v1::WorkerService::service_full_name()},
      [this] {
        std::map<std::string, bool> names = registry->Readiness();
        names[""] = Ready();
        return names;
      });
}

absl::Status Server::Parts::ListenHttp() {
  HttpServer::Options options;
  options.host = config.host;
  options.port = config.http_port;
  options.max_body_bytes = config.serving.max_message_bytes;
  options.max_all_bodies_bytes = config.connections.memory_bytes;
  options.max_connections = config.connections.max_http;
  options.ready = [this] { return Ready(); };
  options.ended = [this](HttpKind kind, int status) { metrics.CountHttp(kind, status); };
  options.admit = [this](const RestRequest& request) {
    return guard->Admit(request.method, request.path, HeaderCredentials(request).view());
  };
  options.guard = guard.get();
  options.tls = tls.get();
  options.answer = [this](RestRequest& request) {
    const HeaderCredentials credentials(request);
    request.actor = guard->CallerName(credentials.view());
    request.charge = [this, &credentials,
                      model = ModelInPath(request.path)](int pictures) -> absl::Status {
      return rates->Pass(credentials.view(), model, pictures);
    };
    return rest->Answer(request);
  };
  ASSIGN_OR_RETURN(http, HttpServer::Start(std::move(options)));
  return absl::OkStatus();
}

absl::Status Server::Parts::ListenMetrics() {
  const std::string host = HostForUrl(config.metrics_host);
  const std::string wanted = absl::StrCat(host, ":", config.metrics_port);
  try {
    exposer = std::make_unique<prometheus::Exposer>(wanted, 2);
    exposer->RegisterCollectable(metrics.registry());
    exposer->RegisterCollectable(process);
    metrics_address = absl::StrCat(host, ":", exposer->GetListeningPorts().at(0));
  } catch (const std::exception&) {
    return absl::UnavailableError(
        absl::StrCat("can't listen on ", wanted,
                     " for metrics: the port is in use or the address isn't this machine's; "
                     "choose another with --metrics-port"));
  }
  return absl::OkStatus();
}

// Workers and clients find us by this file.
absl::Status Server::Parts::Announce() {
  nlohmann::json json = {{"grpc", grpc_address},
                         {"http", absl::StrCat(HostForUrl(config.host), ":", http->port())},
                         {"metrics", metrics_address},
                         {"pid", getpid()}};
  if (tls != nullptr) {
    const std::filesystem::path& trusted =
        config.security.tls_ca.empty() ? config.security.tls_cert : config.security.tls_ca;
    json["tls"] = {{"ca", Absolute(trusted).string()}, {"name", tls->Current()->name}};
  }
  return WriteFileAtomically(config.data / "server.json", json.dump(2) + "\n");
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerConfig& config) {
  RETURN_IF_ERROR(MakeFolders(config.data));
  ServerConfig absolute = config;
  std::error_code error;
  absolute.data = std::filesystem::canonical(config.data, error);
  if (error) return ErrnoStatus(error.value(), "can't use the data folder", config.data);

  auto parts = std::make_unique<Parts>(absolute);
  Parts& p = *parts;
  ASSIGN_OR_RETURN(p.lock, FolderLock::Take(absolute.data));

  RETURN_IF_ERROR(p.Guard());

  // Serving.
  p.registry = std::make_unique<ModelRegistry>(RegistryOptions(absolute), LoadClassifier,
                                               RunSelfTest, p.metrics);
  RETURN_IF_ERROR(p.registry->Start());
  p.pipeline =
      std::make_unique<ClassifyPipeline>(PipelineOptions(absolute), *p.registry, p.metrics);
  p.rates = std::make_unique<RateGate>(*p.access, *p.registry);
  p.classification = std::make_unique<ClassificationService>(
      *p.pipeline, *p.registry, p.metrics, absolute.serving.max_message_bytes, p.rates.get());
  p.models = std::make_unique<ModelService>(*p.registry, p.metrics);
  p.open_inference = std::make_unique<OpenInference>(
      OpenInference::Options{
          .server_version = PYRAMID_VERSION,
          .device = absolute.serving.device,
          .max_message_bytes = absolute.serving.max_message_bytes,
          .batching = RegistryOptions(absolute).batching,
          .ready = [&p] { return p.Ready(); },
          .public_text = [&p](absl::string_view text) { return p.text.ForPictures(text); }},
      *p.pipeline, *p.registry);
  p.inference = std::make_unique<InferenceService>(*p.open_inference, p.metrics, p.rates.get());
  p.rest = std::make_unique<RestV2>(*p.open_inference);

  // Training.
  ASSIGN_OR_RETURN(p.manager,
                   JobManager::Create(ManagerOptions(p.config, *p.access), p.launcher, p.metrics));
  p.training = std::make_unique<TrainingService>(
      *p.manager,
      [&p](const std::filesystem::path& checkpoint, const v1::PromoteCheckpointRequest& request) {
        return p.Promote(checkpoint, request);
      },
      p.metrics);
  p.worker = std::make_unique<WorkerService>(*p.manager, p.metrics, p.access.get());

  RETURN_IF_ERROR(p.Listen());
  p.manager->Start();
  p.ready = true;
  p.TellHealth();
  log::Info("serving", {{"grpc", p.grpc_address},
                        {"http_port", p.http->port()},
                        {"metrics", p.metrics_address},
                        {"data", absolute.data.string()},
                        {"devices", DescribeDevices()}});
  return std::unique_ptr<Server>(new Server(std::move(parts)));
}

Server::Server(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

Server::~Server() {
  if (parts_->grpc != nullptr) parts_->grpc->Shutdown(std::chrono::system_clock::now());
}

// In this order: health says NOT_SERVING and calls are still taken for a while, so that whoever
// sends them hears of it first; new calls are refused while those that were taken are answered; the
// ports close. Workers save from the beginning.
void Server::Drain() {
  Parts& p = *parts_;
  const absl::Duration delay = p.config.drain_delay;
  const absl::Time until = absl::Now() + delay + p.config.drain_timeout;
  p.ready = false;
  p.health->Stop();
  std::thread requests([&p, delay, until] {
    absl::SleepFor(delay);
    p.registry->StopChanges();
    if (!p.pipeline->Drain(until))
      log::Warning("drain_timeout", {{"what", "classification requests"}});
  });
  p.manager->Drain(p.config.drain_timeout);  // its workers' calls are served meanwhile
  requests.join();
  // A client that has just got its answer may have sent the next call: it hears that we end. What
  // reaches gRPC after Shutdown is only CANCELLED.
  absl::SleepFor(kLastCalls);
  // What was accepted has been answered. The moment is for the last bytes on their way: a graceful
  // end waits for every idle client to acknowledge it, and one that isn't polling its channel never
  // does.
  p.grpc->Shutdown(absl::ToChronoTime(absl::Now() + absl::Milliseconds(500)));
  p.http->Shutdown(until);
  p.http = nullptr;
  log::Info("drained", {{"calls_begun", p.calls->begun()}, {"calls_ended", p.calls->ended()}});
}

const std::string& Server::grpc_address() const { return parts_->grpc_address; }

}  // namespace pyramid
