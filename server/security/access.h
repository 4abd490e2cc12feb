// Whether a call may go on: whose key it brings, and whether that key has the scope which the
// method needs. One table for gRPC and HTTP; what isn't in it needs scope admin.
#ifndef PYRAMID_SERVER_SECURITY_ACCESS_H_
#define PYRAMID_SERVER_SECURITY_ACCESS_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/base/clock.h"
#include "server/metrics.h"
#include "server/security/keys.h"

namespace pyramid {

// What a caller shows, as sent: metadata or headers. Only one of them is looked at: the first that
// isn't empty.
struct Credentials {
  absl::string_view authorization;  // "Bearer KEY"
  absl::string_view api_key;        // x-api-key: KEY
};

// The scopes of which a caller needs one. Empty: everybody may (health, reflection).
//   path    "/pyramid.v1.TrainingService/SubmitJob"
Scopes NeededForRpc(absl::string_view path);
//   method  "GET", "POST"
Scopes NeededForHttp(absl::string_view method, absl::string_view path);
// Whether a gRPC method stands in the table itself.
bool IsInRpcTable(absl::string_view path);

// Thread-safe.
class Access {
 public:
  struct Options {
    std::filesystem::path keys;           // empty: no keys; everybody may do everything
    std::filesystem::path worker_secret;  // made if it isn't there, and for us alone to read
  };
  // `metrics` and `clock` must outlive it. Errors of KeyRing::Open; PermissionDenied,
  // ResourceExhausted: the secret can't be written.
  static absl::StatusOr<std::unique_ptr<Access>> Create(const Options& options, Metrics& metrics,
                                                        Clock& clock = Clock::Real());

  bool has_keys() const { return ring_ != nullptr; }

  // Null without keys.
  //   Unauthenticated  no key, an unknown one, one that has expired
  absl::StatusOr<std::shared_ptr<const Caller>> Identify(const Credentials& credentials) const;

  // Identify, and whether the caller has one of the scopes. Refusals are counted. `what` is named
  // in the message.
  //   Unauthenticated   as Identify
  //   PermissionDenied  the key is good, but not for this
  absl::Status Admit(const Credentials& credentials, Scopes needed, absl::string_view what) const;

  // Takes `images` from the rate of the caller's key.
  //   ResourceExhausted  over it; PushbackMillis says when to come back
  //   Unauthenticated    as Identify
  absl::Status Charge(const Credentials& credentials, int images) const;

  // A token for the workers of one attempt, for environment PYRAMID_WORKER_TOKEN. It survives a
  // restart of this server. Empty without keys.
  std::string WorkerToken(absl::string_view job_id, int64_t epoch) const;

  // Whether what the caller shows is good for this attempt: its token, or a key with scope worker
  // or admin.
  //   Unauthenticated   as Identify
  //   PermissionDenied  it is another attempt's, or a key for something else
  absl::Status CheckWorker(const Credentials& credentials, absl::string_view job_id,
                           int64_t epoch) const;

 private:
  Access(Metrics& metrics, Clock& clock) : metrics_(metrics), clock_(clock) {}
  std::shared_ptr<const Caller> WorkerOf(absl::string_view token) const;

  Metrics& metrics_;
  Clock& clock_;
  std::unique_ptr<KeyRing> ring_;
  std::string secret_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_ACCESS_H_
