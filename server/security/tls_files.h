// The server's certificate, its private key and the authorities whose clients it lets in, as PEM
// files that may be replaced while the server runs.
//
// A connection that begins looks whether a file has changed. A new pair counts once it is whole: a
// certificate without its key, or text that is neither, is logged and the old pair stays.
#ifndef PYRAMID_SERVER_SECURITY_TLS_FILES_H_
#define PYRAMID_SERVER_SECURITY_TLS_FILES_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace pyramid {

struct TlsPem {
  int64_t version = 0;  // grows with each change
  std::string certificate;
  std::string private_key;
  std::string client_ca;  // empty: clients need no certificate
  std::string name;       // a name that the certificate is good for; empty: it bears none
  absl::Time expires;
};

// Thread-safe.
class TlsFiles {
 public:
  struct Paths {
    std::filesystem::path certificate;  // chain, the server's own first
    std::filesystem::path private_key;
    std::filesystem::path client_ca;  // empty: clients need no certificate
  };

  // Reads and checks them.
  //   NotFound, PermissionDenied  a file can't be read
  //   InvalidArgument             it isn't what it should be, or the key isn't the certificate's
  static absl::StatusOr<std::unique_ptr<TlsFiles>> Open(const Paths& paths);

  // The newest good set. Costs three stat calls.
  std::shared_ptr<const TlsPem> Current();

  const Paths& paths() const { return paths_; }

 private:
  explicit TlsFiles(Paths paths) : paths_(std::move(paths)) {}
  std::string Stamp() const;  // changes when a file does

  const Paths paths_;
  absl::Mutex mutex_;
  std::shared_ptr<const TlsPem> current_ ABSL_GUARDED_BY(mutex_);
  std::string stamp_ ABSL_GUARDED_BY(mutex_);  // of what was read last, good or bad
};

// Reads and checks, as Open; without version.
absl::StatusOr<TlsPem> ReadTls(const TlsFiles::Paths& paths);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_TLS_FILES_H_
