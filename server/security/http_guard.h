// What happens to every HTTP request, whoever handles it: as call_log.h for gRPC, and the keys.
#ifndef PYRAMID_SERVER_SECURITY_HTTP_GUARD_H_
#define PYRAMID_SERVER_SECURITY_HTTP_GUARD_H_

#include <openssl/types.h>

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/security/access.h"
#include "server/security/public_text.h"
#include "server/security/refusal_log.h"
#include "server/security/tls_files.h"
#include "server/security/trace.h"

namespace pyramid {

// Thread-safe.
class HttpGuard {
 public:
  struct Options {
    bool every_call = false;  // a log line for every request, not only for those that failed in us
  };
  // One request in progress.
  struct Call {
    absl::Time started;
    std::string request_id;  // for header x-request-id of the response
    TraceContext trace;      // for header traceparent
    std::string error;       // the text of an answer from 500 on, as it was
  };
  struct End {
    absl::string_view method;
    absl::string_view path;
    int status = 0;    // HTTP's
    std::string peer;  // its address
    Credentials credentials;
  };

  // Both must outlive it.
  HttpGuard(const Options& options, const PublicText& text, const Access& access)
      : options_(options), text_(text), access_(access) {}

  // With the request's headers of these names.
  Call Begin(absl::string_view request_id, absl::string_view traceparent) const;
  // As Access::Admit, before the body is read. A refusal goes to the log.
  absl::Status Admit(absl::string_view method, absl::string_view path,
                     const Credentials& credentials) const;
  // The body of an answer from 400 on, as a client may read it.
  std::string Public(absl::string_view body) const { return text_.ForPictures(body); }
  // Of the key, or else of the certificate that the client showed; empty: neither. By the thread
  // that serves the connection.
  std::string CallerName(const Credentials& credentials) const;
  // Writes the log line, if there is one.
  void Log(const Call& call, const End& end) const;

 private:
  const Options options_;
  const PublicText& text_;
  const Access& access_;
  mutable RefusalLog refusals_;
};

// Makes a context of OpenSSL's serve what is in `files`, which must outlive it, as it is at each
// handshake. TLS 1.2 and later. A connection's handshake is to run on the thread that serves it.
void ServeCertificates(SSL_CTX& context, TlsFiles& files);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_HTTP_GUARD_H_
