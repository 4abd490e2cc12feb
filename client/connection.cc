#include "client/connection.h"

#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "client/exit_code.h"
#include "proto/base/channel.h"
#include "proto/base/file.h"
#include "proto/base/grpc_status.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr absl::string_view kDefaultTarget = "127.0.0.1:8001";
constexpr absl::string_view kAddressFile = "data/server.json";

absl::Status BadAddress(absl::string_view source, absl::string_view text) {
  const std::string message =
      absl::StrCat(source, " is \"", text, "\"; use HOST:PORT or the path of a server.json");
  return source == "--server" ? UsageError(message) : absl::InvalidArgumentError(message);
}

bool IsTarget(absl::string_view text) {
  if (absl::StartsWith(text, "unix:")) return text.size() > 5;
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos || colon == 0) return false;
  const absl::string_view host = text.substr(0, colon);
  // An IPv6 address stands in brackets.
  if (absl::StrContains(host, ':') && host.front() != '[') return false;
  if (host.find_first_of(" /") != absl::string_view::npos) return false;
  int port = 0;
  return absl::SimpleAtoi(text.substr(colon + 1), &port) && port >= 1 && port <= 65535;
}

absl::StatusOr<ServerAddress> ReadAddressFile(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, 1 << 20));
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("grpc") || !json["grpc"].is_string()) {
    return absl::InvalidArgumentError(absl::StrCat(
        path.string(), " holds no address \"grpc\"; pyramid-server writes it when it starts"));
  }
  std::string target = json["grpc"].get<std::string>();
  if (!IsTarget(target)) return BadAddress(absl::StrCat("grpc in ", path.string()), target);
  return ServerAddress{.target = std::move(target), .source = "", .server_file = text};
}

// Flags win over variables, both over what server.json says of TLS.
absl::StatusOr<ChannelSecurity> SecurityFor(const Environment& environment,
                                            absl::string_view server_file) {
  const auto choose = [](const std::string& flag, const std::string& variable) {
    return flag.empty() ? variable : flag;
  };
  const Environment::Security& flags = environment.flags;
  const Environment::Security& variables = environment.variables;
  const auto path = [&](const std::string& text) {
    return text.empty() ? std::filesystem::path() : environment.folder / text;
  };
  ChannelSecurity security{
      .key = choose(flags.key, variables.key),
      .tls = flags.tls,
      .ca = path(choose(flags.tls_ca, variables.tls_ca)),
      .cert = path(choose(flags.tls_cert, variables.tls_cert)),
      .private_key = path(choose(flags.tls_key, variables.tls_key)),
      .name = flags.tls_name,
  };
  if (absl::StartsWith(security.key, "@")) {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(path(security.key.substr(1)), 1 << 16));
    security.key = std::string(absl::StripAsciiWhitespace(text));
  }
  FillFromServerFile(server_file, security);
  return security;
}

absl::StatusOr<ServerAddress> FromText(const Environment& environment, const std::string& text,
                                       const std::string& source) {
  std::error_code ignored;
  const std::filesystem::path path = environment.folder / text;
  if (absl::EndsWith(text, ".json") || std::filesystem::is_regular_file(path, ignored)) {
    absl::StatusOr<ServerAddress> target = ReadAddressFile(path);
    if (absl::IsNotFound(target.status())) {
      return absl::UnavailableError(absl::StrCat(
          "no server: ", source, " names ", text,
          ", which isn't there; pyramid-server writes it when it starts, into its data folder"));
    }
    if (!target.ok()) return Annotate(target.status(), source);
    target->source = absl::StrCat(source, ", ", text);
    return target;
  }
  if (!IsTarget(text)) return BadAddress(source, text);
  return ServerAddress{.target = text, .source = source, .server_file = ""};
}

// gRPC tells its whole way; the last part is the reason.
std::string Reason(const std::string& message) {
  const size_t colon = message.rfind(": ");
  return colon == std::string::npos ? message : message.substr(colon + 2);
}

}  // namespace

absl::StatusOr<ServerAddress> ResolveServer(const Environment& environment) {
  if (!environment.server_flag.empty()) {
    return FromText(environment, environment.server_flag, "--server");
  }
  if (!environment.server_variable.empty()) {
    return FromText(environment, environment.server_variable, "PYRAMID_SERVER");
  }
  absl::StatusOr<ServerAddress> target =
      ReadAddressFile(environment.folder / std::string(kAddressFile));
  if (target.ok()) target->source = std::string(kAddressFile);
  if (target.ok() || !absl::IsNotFound(target.status())) return target;
  return ServerAddress{
      .target = std::string(kDefaultTarget), .source = "the default", .server_file = ""};
}

absl::StatusOr<std::unique_ptr<Connection>> Connection::Open(const Environment& environment) {
  ASSIGN_OR_RETURN(ServerAddress address, ResolveServer(environment));
  std::unique_ptr<Connection> connection(new Connection(environment));
  absl::MutexLock lock(&connection->mutex_);
  RETURN_IF_ERROR(connection->Connect(std::move(address)));
  return connection;
}

absl::Status Connection::Connect(ServerAddress address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(64 << 20);  // 10,000 classes' logits of 256 pictures and more
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000);  // also the limit of one attempt
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  // A machine that vanished is noticed. gRPC servers refuse more than one ping in five minutes.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 360'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  ASSIGN_OR_RETURN(const ChannelSecurity security, SecurityFor(environment_, address.server_file));
  ASSIGN_OR_RETURN(channel_, OpenChannel(address.target, security, arguments));
  training_ = v1::TrainingService::NewStub(channel_);
  classification_ = v1::ClassificationService::NewStub(channel_);
  models_ = v1::ModelService::NewStub(channel_);
  address_ = std::move(address);
  return absl::OkStatus();
}

std::shared_ptr<v1::TrainingService::Stub> Connection::training() const {
  absl::MutexLock lock(&mutex_);
  return training_;
}

std::shared_ptr<v1::ClassificationService::Stub> Connection::classification() const {
  absl::MutexLock lock(&mutex_);
  return classification_;
}

std::shared_ptr<v1::ModelService::Stub> Connection::models() const {
  absl::MutexLock lock(&mutex_);
  return models_;
}

std::shared_ptr<grpc::Channel> Connection::channel() const {
  absl::MutexLock lock(&mutex_);
  return channel_;
}

ServerAddress Connection::address() const {
  absl::MutexLock lock(&mutex_);
  return address_;
}

bool Connection::Refresh() {
  absl::StatusOr<ServerAddress> address = ResolveServer(environment_);
  // While the server is down its file may be missing: stay with what was known.
  if (!address.ok()) return false;
  absl::MutexLock lock(&mutex_);
  if (address->target == address_.target || address->source != address_.source) return false;
  return Connect(*std::move(address)).ok();
}

absl::Status Connection::ToStatus(const grpc::Status& status) const {
  if (status.ok()) return absl::OkStatus();
  absl::MutexLock lock(&mutex_);
  const bool connected = channel_->GetState(/*try_to_connect=*/false) == GRPC_CHANNEL_READY;
  const bool unavailable = status.error_code() == grpc::StatusCode::UNAVAILABLE;
  if (!connected && (unavailable || status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED)) {
    // What a server says that expects TLS, or another certificate.
    const bool closed = absl::StrContains(status.error_message(), "Socket closed");
    return absl::UnavailableError(absl::StrCat(
        "no server at ", address_.target, " (from ", address_.source,
        "): ", Reason(status.error_message()),
        closed ? "; if it speaks TLS, use --tls or --tls-ca, and --tls-cert if it asks for one"
               : "",
        "; start pyramid-server, or name another with --server HOST:PORT or PYRAMID_SERVER"));
  }
  if (unavailable) {
    return absl::UnavailableError(absl::StrCat("the server at ", address_.target,
                                               " takes no requests now: ", status.error_message()));
  }
  if (status.error_code() == grpc::StatusCode::UNAUTHENTICATED) {
    return absl::UnauthenticatedError(absl::StrCat("the server at ", address_.target,
                                                   " needs a key: ", status.error_message(),
                                                   "; give one with --key or PYRAMID_KEY"));
  }
  if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED) {
    return absl::UnimplementedError(
        absl::StrCat("the server at ", address_.target,
                     " doesn't know this call; is it pyramid-server, and of this version?"));
  }
  return FromGrpc(status);
}

void SetDeadline(grpc::ClientContext& context, absl::Duration timeout) {
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
}

}  // namespace pyramid
