#include "server/server.h"

#include <fcntl.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <prometheus/exposer.h>
#include <prometheus/registry.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "model/classifier.h"
#include "model/device.h"
#include "proto/base/clock.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/rpc/classification_service.h"
#include "server/rpc/training_service.h"
#include "server/rpc/worker_service.h"
#include "server/serving/classify.h"
#include "server/serving/model_registry.h"
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

JobManager::Options ManagerOptions(const ServerConfig& config) {
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
  return options;
}

ModelRegistry::Options RegistryOptions(const ServerConfig& config) {
  ModelRegistry::Options options;
  options.folder = config.data / "models";
  options.device = config.serving.device;
  options.forward_threads = config.serving.forward_threads;
  options.batching.max_batch = config.serving.max_batch;
  options.batching.max_delay = config.serving.max_delay;
  options.batching.max_queue = config.serving.max_queue;
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
  return options;
}

// "[::1]" for an IPv6 address.
std::string HostForUrl(const std::string& host) {
  return absl::StrContains(host, ':') && host.front() != '[' ? absl::StrCat("[", host, "]") : host;
}

}  // namespace

// In the order in which they are made; destroyed in reverse.
struct Server::Parts {
  explicit Parts(const ServerConfig& server_config) : config(server_config) {}

  const ServerConfig config;
  std::unique_ptr<FolderLock> lock;
  Metrics metrics;
  std::unique_ptr<ModelRegistry> registry;
  std::unique_ptr<ClassifyPipeline> pipeline;
  LocalLauncher launcher;
  std::unique_ptr<JobManager> manager;
  std::unique_ptr<ClassificationService> classification;
  std::unique_ptr<TrainingService> training;
  std::unique_ptr<WorkerService> worker;
  std::unique_ptr<grpc::Server> grpc;
  std::string grpc_address;
  std::atomic<bool> ready{false};
  std::unique_ptr<HttpServer> http;
  std::unique_ptr<prometheus::Exposer> exposer;
  std::string metrics_address;

  absl::Status ListenGrpc();
  absl::Status ListenMetrics();
  absl::Status Announce();
  absl::StatusOr<v1::PromoteCheckpointResponse> Promote(
      const std::filesystem::path& checkpoint, const v1::PromoteCheckpointRequest& request);
};

// Where the two lines meet: a job's checkpoint goes into service.
absl::StatusOr<v1::PromoteCheckpointResponse> Server::Parts::Promote(
    const std::filesystem::path& checkpoint, const v1::PromoteCheckpointRequest& request) {
  ASSIGN_OR_RETURN(const ModelRegistry::Promoted promoted,
                   registry->Promote(checkpoint, request.model(), request.dtype()));
  v1::PromoteCheckpointResponse response;
  response.set_model(request.model());
  response.set_version(promoted.version);
  response.set_digest(promoted.digest);
  response.set_existed(promoted.existed);
  for (const std::string& gate : promoted.gates) response.add_gates(gate);
  return response;
}

absl::Status Server::Parts::ListenGrpc() {
  grpc::EnableDefaultHealthCheckService(true);
  if (config.reflection) grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  // With SO_REUSEPORT two servers would share a port unnoticed.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.SetMaxReceiveMessageSize(static_cast<int>(config.serving.max_message_bytes));
  // Clients may ping every 10 s, also while nothing is in flight.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  int port = 0;
  builder.AddListeningPort(absl::StrCat(HostForUrl(config.host), ":", config.grpc_port),
                           grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(classification.get());
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
  grpc::HealthCheckServiceInterface* health = grpc->GetHealthCheckService();
  health->SetServingStatus("pyramid.v1.ClassificationService", true);
  health->SetServingStatus("pyramid.v1.TrainingService", true);
  return absl::OkStatus();
}

absl::Status Server::Parts::ListenMetrics() {
  const std::string wanted = absl::StrCat(HostForUrl(config.host), ":", config.metrics_port);
  try {
    exposer = std::make_unique<prometheus::Exposer>(wanted, 2);
    exposer->RegisterCollectable(metrics.registry());
    metrics_address =
        absl::StrCat(HostForUrl(config.host), ":", exposer->GetListeningPorts().at(0));
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
  const nlohmann::json json = {{"grpc", grpc_address},
                               {"http", absl::StrCat(HostForUrl(config.host), ":", http->port())},
                               {"metrics", metrics_address},
                               {"pid", getpid()}};
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

  // Serving.
  p.registry = std::make_unique<ModelRegistry>(RegistryOptions(absolute), LoadClassifier,
                                               RunSelfTest, p.metrics);
  RETURN_IF_ERROR(p.registry->Start());
  p.pipeline =
      std::make_unique<ClassifyPipeline>(PipelineOptions(absolute), *p.registry, p.metrics);
  p.classification = std::make_unique<ClassificationService>(*p.pipeline, *p.registry, p.metrics,
                                                             absolute.serving.max_message_bytes);

  // Training.
  ASSIGN_OR_RETURN(p.manager, JobManager::Create(ManagerOptions(absolute), p.launcher, p.metrics));
  p.training = std::make_unique<TrainingService>(
      *p.manager,
      [&p](const std::filesystem::path& checkpoint, const v1::PromoteCheckpointRequest& request) {
        return p.Promote(checkpoint, request);
      },
      p.metrics);
  p.worker = std::make_unique<WorkerService>(*p.manager, p.metrics);

  // Ports.
  RETURN_IF_ERROR(p.ListenGrpc());
  ASSIGN_OR_RETURN(p.http, HttpServer::Start(absolute.host, absolute.http_port,
                                             [&p] { return p.ready.load(); }));
  RETURN_IF_ERROR(p.ListenMetrics());
  RETURN_IF_ERROR(p.Announce());
  p.manager->Start();
  p.ready = true;
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

void Server::Drain() {
  Parts& p = *parts_;
  const absl::Time until = absl::Now() + p.config.drain_timeout;
  p.ready = false;
  p.grpc->GetHealthCheckService()->SetServingStatus(false);
  // Side by side: accepted requests finish while workers save. Their calls are served until both
  // are done.
  std::thread requests([&p, until] {
    if (!p.pipeline->Drain(until))
      log::Warning("drain_timeout", {{"what", "classification requests"}});
  });
  p.manager->Drain(p.config.drain_timeout);
  requests.join();
  // What was accepted has been answered. The moment is for the last bytes on their way: a graceful
  // end waits for every idle client to acknowledge it, and one that isn't polling its channel never
  // does.
  p.grpc->Shutdown(absl::ToChronoTime(absl::Now() + absl::Milliseconds(500)));
}

const std::string& Server::grpc_address() const { return parts_->grpc_address; }

}  // namespace pyramid
