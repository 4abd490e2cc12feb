#include "worker/coordinator_client.h"

#include <grpcpp/grpcpp.h>
#include <pthread.h>
#include <unistd.h>

#include <cstdlib>
#include <deque>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "proto/base/channel.h"
#include "proto/base/file.h"
#include "proto/base/grpc_status.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "proto/worker.grpc.pb.h"

namespace pyramid {
namespace {

constexpr size_t kMaxLines = 1000;

class CoordinatorClientImpl final : public CoordinatorClient {
 public:
  explicit CoordinatorClientImpl(Options options) : options_(std::move(options)) {
    thread_ = std::thread([this] {
      pthread_setname_np(pthread_self(), "reporter");
      Run();
    });
  }

  ~CoordinatorClientImpl() override { StopThread(); }

  void SetProgress(const v1::Progress& progress) override {
    absl::MutexLock lock(&mutex_);
    progress_ = progress;
    has_progress_ = true;
  }

  void AddCheckpoint(const v1::Checkpoint& checkpoint) override {
    absl::MutexLock lock(&mutex_);
    checkpoints_.push_back(checkpoint);
  }

  void AddLine(absl::string_view line) override {
    absl::MutexLock lock(&mutex_);
    lines_.emplace_back(line);
    if (lines_.size() > kMaxLines) lines_.pop_front();
  }

  bool StopAsked() const override {
    absl::MutexLock lock(&mutex_);
    return stop_asked_;
  }
  bool SaveAsked() const override {
    absl::MutexLock lock(&mutex_);
    return save_asked_;
  }
  void SaveDone() override {
    absl::MutexLock lock(&mutex_);
    if (save_asked_) ++saves_done_;
    save_asked_ = false;
  }

  absl::Status Finish(v1::FinishRequest request) override {
    StopThread();
    const absl::Time give_up = absl::Now() + options_.finish_patience;
    while (true) {
      absl::Status status = SendReport();  // the last lines and checkpoints
      if (status.ok()) {
        *request.mutable_worker() = options_.worker;
        {
          absl::MutexLock lock(&mutex_);
          if (has_progress_ || in_flight_.has_progress()) *request.mutable_progress() = progress_;
        }
        v1::FinishResponse response;
        status = Call("Finish", [&](v1::WorkerService::Stub& stub, grpc::ClientContext* context) {
          return stub.Finish(context, request, &response);
        });
      }
      if (status.ok() || absl::IsFailedPrecondition(status)) return status;
      if (absl::Now() + options_.interval > give_up) return status;
      absl::SleepFor(options_.interval);
    }
  }

 private:
  void StopThread() {
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
    }
    if (thread_.joinable()) thread_.join();
  }

  void Run() {
    bool reached = true;
    while (true) {
      const absl::Status status = registered_ ? SendReport() : Register();
      if (absl::IsFailedPrecondition(status)) {
        if (options_.on_stale) options_.on_stale(std::string(status.message()));
        return;
      }
      if (status.ok() != reached) {
        reached = status.ok();
        if (reached)
          log::Info("coordinator_back", {{"address", address_}});
        else
          log::Warning("coordinator_lost", {{"address", address_}, {"why", status.message()}});
      }
      absl::MutexLock lock(&mutex_);
      const auto stopping = [](bool* flag) { return *flag; };
      if (mutex_.AwaitWithTimeout(absl::Condition(+stopping, &stopping_), options_.interval))
        return;
    }
  }

  absl::Status Register() {
    v1::RegisterRequest request;
    *request.mutable_worker() = options_.worker;
    request.set_pid(getpid());
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    request.set_host(host);
    request.set_device(options_.device);
    v1::RegisterResponse response;
    RETURN_IF_ERROR(
        Call("Register", [&](v1::WorkerService::Stub& stub, grpc::ClientContext* context) {
          return stub.Register(context, request, &response);
        }));
    registered_ = true;
    Obey(response.directive(), 0);
    return absl::OkStatus();
  }

  // Sends what is unanswered once more, else what is new.
  absl::Status SendReport() {
    {
      absl::MutexLock lock(&mutex_);
      if (!in_flight_.has_worker()) {
        *in_flight_.mutable_worker() = options_.worker;
        in_flight_.set_sequence(++sequence_);
        if (std::exchange(has_progress_, false)) *in_flight_.mutable_progress() = progress_;
        for (v1::Checkpoint& checkpoint : std::exchange(checkpoints_, {}))
          *in_flight_.add_new_checkpoints() = std::move(checkpoint);
        for (std::string& line : std::exchange(lines_, {}))
          *in_flight_.add_log_lines() = std::move(line);
        in_flight_.set_saves_done(saves_done_);
      }
    }
    v1::ReportResponse response;
    RETURN_IF_ERROR(
        Call("Report", [&](v1::WorkerService::Stub& stub, grpc::ClientContext* context) {
          return stub.Report(context, in_flight_, &response);
        }));
    Obey(response.directive(), in_flight_.saves_done());
    in_flight_.Clear();
    return absl::OkStatus();
  }

  // A SAVE that was asked for before the coordinator heard of the last one carried out is that last
  // one.
  void Obey(v1::Directive directive, int64_t saves_reported) {
    absl::MutexLock lock(&mutex_);
    if (directive == v1::STOP) stop_asked_ = true;
    if (directive == v1::SAVE && saves_reported == saves_done_) save_asked_ = true;
  }

  // One call to the address that server.json names now.
  template <typename Function>
  absl::Status Call(absl::string_view name, Function&& function) {
    if (stub_ == nullptr) {
      ASSIGN_OR_RETURN(address_, ServerAddressFrom(options_.server_file));
      ChannelSecurity security{.key = options_.key,
                               .ca = options_.tls_ca,
                               .cert = options_.tls_cert,
                               .private_key = options_.tls_key};
      if (const auto text = ReadFile(options_.server_file, 1 << 20); text.ok()) {
        FillFromServerFile(*text, security);
      }
      grpc::ChannelArguments arguments;
      arguments.SetInt("grpc.enable_http_proxy", 0);
      arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200);
      ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> channel,
                       OpenChannel(address_, security, arguments));
      stub_ = v1::WorkerService::NewStub(channel);
    }
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + options_.call_timeout));
    const absl::Status status = FromGrpc(function(*stub_, &context));
    if (!status.ok()) stub_ = nullptr;  // the address may have changed
    return Annotate(status, name);
  }

  const Options options_;
  mutable absl::Mutex mutex_;
  v1::Progress progress_ ABSL_GUARDED_BY(mutex_);
  bool has_progress_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<v1::Checkpoint> checkpoints_ ABSL_GUARDED_BY(mutex_);
  std::deque<std::string> lines_ ABSL_GUARDED_BY(mutex_);
  bool stop_asked_ ABSL_GUARDED_BY(mutex_) = false;
  bool save_asked_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t saves_done_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t sequence_ ABSL_GUARDED_BY(mutex_) = 0;

  // The reporting thread's until it is joined, then Finish's caller's.
  bool registered_ = false;
  std::string address_;
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  v1::ReportRequest in_flight_;

  std::thread thread_;
};

}  // namespace

void CoordinatorClient::FromEnvironment(Options& options) {
  const auto variable = [](const char* name) -> std::string {
    const char* value = std::getenv(name);
    return value == nullptr ? "" : value;
  };
  options.key = variable("PYRAMID_WORKER_TOKEN");
  if (options.key.empty()) options.key = variable("PYRAMID_KEY");
  options.tls_ca = variable("PYRAMID_TLS_CA");
  options.tls_cert = variable("PYRAMID_TLS_CERT");
  options.tls_key = variable("PYRAMID_TLS_KEY");
}

std::unique_ptr<CoordinatorClient> CoordinatorClient::Start(Options options) {
  return std::make_unique<CoordinatorClientImpl>(std::move(options));
}

absl::StatusOr<std::string> ServerAddressFrom(const std::filesystem::path& server_file) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(server_file, 1 << 20));
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("grpc") || !json["grpc"].is_string()) {
    return absl::InvalidArgumentError(absl::StrCat(server_file.string(), " has no text \"grpc\""));
  }
  return json["grpc"].get<std::string>();
}

}  // namespace pyramid
