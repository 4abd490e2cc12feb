// The gRPC port's credentials: plain or TLS, with keys looked at before a call's message is read.
#ifndef PYRAMID_SERVER_SECURITY_GRPC_CREDENTIALS_H_
#define PYRAMID_SERVER_SECURITY_GRPC_CREDENTIALS_H_

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_context.h>

#include <memory>

#include "server/security/access.h"
#include "server/security/public_text.h"
#include "server/security/tls_files.h"

namespace pyramid {

// `tls` null: plain text. With authorities for clients in it, a client without a certificate of
// theirs can't connect. `access` is asked about every call if it has keys, and must outlive the
// server that is built with the result.
std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const Access& access,
                                                               std::shared_ptr<TlsFiles> tls);

// What a call brings; points into its context.
Credentials CredentialsOf(const grpc::ServerContextBase& context);

// Where the call log notes whose key a call came with, beside its metadata. No client can send it.
inline constexpr char kCallerKey[] = ":caller";

// Whose call it is, for the record: the key's name, else that of the client's certificate, else
// empty.
std::string CallerName(const grpc::ServerContextBase& context);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_GRPC_CREDENTIALS_H_
