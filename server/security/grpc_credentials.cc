#include "server/security/grpc_credentials.h"

#include <grpc/grpc_security.h>
#include <grpcpp/security/auth_context.h>

#include <string>
#include <utility>

#include "absl/strings/string_view.h"
#include "server/security/refusal_log.h"

namespace pyramid {
namespace {

absl::string_view TextOf(const grpc_slice& slice) {
  return {reinterpret_cast<const char*>(GRPC_SLICE_START_PTR(slice)), GRPC_SLICE_LENGTH(slice)};
}

// What gRPC's core asks on calls and handshakes. Lives as long as the core's credentials: a
// handshake may outlast the server by a moment.
class Doorman {
 public:
  Doorman(const Access& access, std::shared_ptr<TlsFiles> tls)
      : access_(access), tls_(std::move(tls)) {}

  static void Admit(void* self, grpc_auth_context*, const grpc_metadata* metadata, size_t count,
                    grpc_process_auth_metadata_done_cb done, void* call) {
    absl::string_view path;
    Credentials shown;
    int authorizations = 0;
    int api_keys = 0;
    for (size_t i = 0; i < count; ++i) {
      const absl::string_view key = TextOf(metadata[i].key);
      const absl::string_view value = TextOf(metadata[i].value);
      if (key == ":path") path = value;
      if (key == "authorization") {
        shown.authorization = value;
        ++authorizations;
      } else if (key == "x-api-key") {
        shown.api_key = value;
        ++api_keys;
      }
    }
    absl::string_view method = path;
    method.remove_prefix(method.rfind('/') == method.npos ? 0 : method.rfind('/') + 1);
    auto& doorman = *static_cast<Doorman*>(self);
    // Two are none: whoever looks at the call later might look at the other one.
    if (authorizations > 1 || api_keys > 1) shown = {};
    const absl::Status status = doorman.access_.Admit(shown, NeededForRpc(path), method);
    if (!status.ok()) doorman.refusals_.Add(path, status);
    const std::string message(status.message());
    done(call, nullptr, 0, nullptr, 0, static_cast<grpc_status_code>(status.code()),
         status.ok() ? nullptr : message.c_str());
  }

  // At the beginning of each handshake; gRPC asks for one at a time.
  static grpc_ssl_certificate_config_reload_status FetchCertificates(
      void* self, grpc_ssl_server_certificate_config** config) {
    auto& doorman = *static_cast<Doorman*>(self);
    const std::shared_ptr<const TlsPem> pem = doorman.tls_->Current();
    if (pem->version == doorman.version_) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const grpc_ssl_pem_key_cert_pair pair{pem->private_key.c_str(), pem->certificate.c_str()};
    // gRPC wants authorities even where it doesn't ask clients for certificates.
    const std::string& authorities = pem->client_ca.empty() ? pem->certificate : pem->client_ca;
    *config = grpc_ssl_server_certificate_config_create(authorities.c_str(), &pair, 1);
    doorman.version_ = pem->version;
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

 private:
  const Access& access_;
  const std::shared_ptr<TlsFiles> tls_;
  int64_t version_ = 0;  // of the certificates that gRPC has
  RefusalLog refusals_;
};

// C++ credentials over those of gRPC's core, whose metadata processor also works without TLS and
// whose certificates can be fetched anew for each handshake.
class CoreCredentials final : public grpc::ServerCredentials {
 public:
  CoreCredentials(const Access& access, std::shared_ptr<TlsFiles> tls) {
    auto* doorman = new Doorman(access, tls);  // the core deletes it
    if (tls == nullptr) {
      core_ = grpc_insecure_server_credentials_create();
    } else {
      const bool ask = !tls->paths().client_ca.empty();
      core_ = grpc_ssl_server_credentials_create_with_options(
          grpc_ssl_server_credentials_create_options_using_config_fetcher(
              ask ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                  : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
              &Doorman::FetchCertificates, doorman));
    }
    grpc_server_credentials_set_auth_metadata_processor(
        core_, {access.has_keys() ? &Doorman::Admit : nullptr,
                [](void* state) { delete static_cast<Doorman*>(state); }, doorman});
  }
  ~CoreCredentials() override { grpc_server_credentials_release(core_); }

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), core_);
  }

  grpc_server_credentials* core_ = nullptr;
};

absl::string_view Find(const grpc::ServerContextBase& context, const char* key) {
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find(key);
  if (found == metadata.end()) return {};
  return {found->second.data(), found->second.size()};
}

}  // namespace

std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const Access& access,
                                                               std::shared_ptr<TlsFiles> tls) {
  return std::make_shared<CoreCredentials>(access, std::move(tls));
}

Credentials CredentialsOf(const grpc::ServerContextBase& context) {
  return {.authorization = Find(context, "authorization"), .api_key = Find(context, "x-api-key")};
}

std::string CallerName(const grpc::ServerContextBase& context) {
  const absl::string_view of_key = Find(context, kCallerKey);
  if (!of_key.empty()) return std::string(of_key);
  const std::shared_ptr<const grpc::AuthContext> peer = context.auth_context();
  if (peer == nullptr || !peer->IsPeerAuthenticated()) return "";
  const std::vector<grpc::string_ref> names = peer->GetPeerIdentity();
  return names.empty() ? "" : std::string(names[0].data(), names[0].size());
}

}  // namespace pyramid
