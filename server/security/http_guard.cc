#include "server/security/http_guard.h"

#include <openssl/ssl.h>

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "proto/base/log.h"
#include "server/security/openssl.h"

namespace pyramid {
namespace {

bool UsePair(SSL* ssl, const TlsPem& pem) {
  const std::vector<X509Ptr> chain = CertificatesOf(pem.certificate);
  const KeyPtr key = PrivateKeyOf(pem.private_key);
  if (chain.empty() || key == nullptr) return false;
  if (SSL_use_certificate(ssl, chain.front().get()) != 1) return false;
  if (SSL_use_PrivateKey(ssl, key.get()) != 1) return false;
  SSL_clear_chain_certs(ssl);
  for (size_t i = 1; i < chain.size(); ++i) {
    if (SSL_add1_chain_cert(ssl, chain[i].get()) != 1) return false;
  }
  if (pem.client_ca.empty()) return true;
  X509_STORE* store = X509_STORE_new();
  for (const X509Ptr& authority : CertificatesOf(pem.client_ca)) {
    X509_STORE_add_cert(store, authority.get());
    SSL_add_client_CA(ssl, authority.get());
  }
  SSL_set0_verify_cert_store(ssl, store);
  SSL_set_verify(ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  return true;
}

// As gRPC has it: the first alternative name, else the common name.
std::string ClientNameOf(X509* certificate) {
  std::string found;
  auto* names = static_cast<GENERAL_NAMES*>(
      X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr));
  for (int i = 0; names != nullptr && found.empty() && i < sk_GENERAL_NAME_num(names); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names, i);
    if (name->type != GEN_DNS && name->type != GEN_URI && name->type != GEN_EMAIL) continue;
    found.assign(reinterpret_cast<const char*>(ASN1_STRING_get0_data(name->d.ia5)),
                 static_cast<size_t>(ASN1_STRING_length(name->d.ia5)));
  }
  GENERAL_NAMES_free(names);
  if (!found.empty()) return found;
  char common[256] = "";
  X509_NAME_get_text_by_NID(X509_get_subject_name(certificate), NID_commonName, common,
                            sizeof(common));
  return common;
}

// Of the connection that this thread serves: its handshake ran here too.
thread_local std::string t_client_name;

void NoteClient(const SSL* ssl, int where, int /*result*/) {
  if ((where & SSL_CB_HANDSHAKE_START) != 0) t_client_name.clear();
  if ((where & SSL_CB_HANDSHAKE_DONE) == 0) return;
  const X509Ptr certificate(SSL_get1_peer_certificate(ssl));
  if (certificate != nullptr) t_client_name = ClientNameOf(certificate.get());
}

}  // namespace

std::string HttpGuard::CallerName(const Credentials& credentials) const {
  const auto caller = access_.Identify(credentials);
  return caller.ok() && *caller != nullptr ? (*caller)->name() : t_client_name;
}

HttpGuard::Call HttpGuard::Begin(absl::string_view request_id,
                                 absl::string_view traceparent) const {
  return {.started = absl::Now(),
          .request_id = RequestIdFrom(request_id),
          .trace = ContinueTrace(traceparent),
          .error = ""};
}

absl::Status HttpGuard::Admit(absl::string_view method, absl::string_view path,
                              const Credentials& credentials) const {
  const absl::Status status = access_.Admit(credentials, NeededForHttp(method, path),
                                            absl::StrCat(method, " of this path"));
  if (!status.ok()) refusals_.Add(absl::StrCat(method, " ", path), status);
  return status;
}

void HttpGuard::Log(const Call& call, const End& end) const {
  const bool bad = end.status >= 500 && end.status != 503 && end.status != 504;
  if (!bad && !options_.every_call) return;
  const auto line = bad ? &log::Error : &log::Info;
  line(bad ? "http_failed" : "http",
       {{"method", end.method},
        {"path", end.path},
        {"code", end.status},
        {"ms", absl::StrFormat("%.3f", absl::ToDoubleMilliseconds(absl::Now() - call.started))},
        {"request_id", call.request_id},
        {"trace_id", call.trace.trace_id},
        {"caller", CallerName(end.credentials)},
        {"peer", end.peer},
        {"error", call.error}});
}

void ServeCertificates(SSL_CTX& context, TlsFiles& files) {
  SSL_CTX_set_min_proto_version(&context, TLS1_2_VERSION);
  SSL_CTX_set_options(&context, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION);
  // A resumed session would keep the rights of a certificate that is gone.
  SSL_CTX_set_session_cache_mode(&context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_options(&context, SSL_OP_NO_TICKET);
  SSL_CTX_set_cert_cb(
      &context,
      [](SSL* ssl, void* argument) {
        return UsePair(ssl, *static_cast<TlsFiles*>(argument)->Current()) ? 1 : 0;
      },
      &files);
  SSL_CTX_set_info_callback(&context, NoteClient);
}

}  // namespace pyramid
