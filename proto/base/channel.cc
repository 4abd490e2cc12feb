#include "proto/base/channel.h"

#include <grpcpp/support/client_interceptor.h>

#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

using grpc::experimental::ClientInterceptorFactoryInterface;
using grpc::experimental::ClientRpcInfo;
using grpc::experimental::InterceptionHookPoints;
using grpc::experimental::Interceptor;
using grpc::experimental::InterceptorBatchMethods;

constexpr int64_t kMostPem = 1 << 20;

// gRPC's call credentials need TLS; a header needs nothing.
class KeyOnEveryCall final : public Interceptor {
 public:
  explicit KeyOnEveryCall(const std::string& header) : header_(header) {}
  void Intercept(InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", header_);
    }
    methods->Proceed();
  }

 private:
  const std::string& header_;
};

class KeyFactory final : public ClientInterceptorFactoryInterface {
 public:
  explicit KeyFactory(absl::string_view key) : header_(absl::StrCat("Bearer ", key)) {}
  Interceptor* CreateClientInterceptor(ClientRpcInfo*) override {
    return new KeyOnEveryCall(header_);  // gRPC deletes it
  }

 private:
  const std::string header_;
};

absl::Status CheckKey(absl::string_view key) {
  for (const char c : key) {
    if (c <= ' ' || c > '~') {
      return absl::InvalidArgumentError(
          "the key holds a blank or a character that no header can carry; use it as `pyramid key "
          "new` printed it");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> Credentials(
    const ChannelSecurity& security) {
  if (!security.UsesTls()) return grpc::InsecureChannelCredentials();
  if (security.cert.empty() != security.private_key.empty()) {
    return absl::InvalidArgumentError(
        "a client certificate and its private key belong together; name both or neither");
  }
  grpc::SslCredentialsOptions options;
  if (!security.ca.empty()) {
    ASSIGN_OR_RETURN(options.pem_root_certs, ReadFile(security.ca, kMostPem));
  }
  if (!security.cert.empty()) {
    ASSIGN_OR_RETURN(options.pem_cert_chain, ReadFile(security.cert, kMostPem));
    ASSIGN_OR_RETURN(options.pem_private_key, ReadFile(security.private_key, kMostPem));
  }
  return grpc::SslCredentials(options);
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(absl::string_view target,
                                                           const ChannelSecurity& security,
                                                           grpc::ChannelArguments arguments) {
  RETURN_IF_ERROR(CheckKey(security.key));
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ChannelCredentials> credentials,
                   Credentials(security));
  if (security.UsesTls() && !security.name.empty()) {
    arguments.SetSslTargetNameOverride(security.name);
  }
  std::vector<std::unique_ptr<ClientInterceptorFactoryInterface>> interceptors;
  if (!security.key.empty()) interceptors.push_back(std::make_unique<KeyFactory>(security.key));
  return grpc::experimental::CreateCustomChannelWithInterceptors(
      std::string(target), credentials, arguments, std::move(interceptors));
}

void FillFromServerFile(absl::string_view text, ChannelSecurity& security) {
  const nlohmann::json json =
      nlohmann::json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("tls") || !json["tls"].is_object()) return;
  security.tls = true;
  const nlohmann::json& tls = json["tls"];
  if (security.ca.empty() && tls.contains("ca") && tls["ca"].is_string()) {
    security.ca = tls["ca"].get<std::string>();
  }
  if (security.name.empty() && tls.contains("name") && tls["name"].is_string()) {
    security.name = tls["name"].get<std::string>();
  }
}

}  // namespace pyramid
