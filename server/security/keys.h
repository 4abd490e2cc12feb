// Who may do what: the keys file, as a list of names with the hashes of their keys.
//
//   - name: phones
//     sha256: 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
//     scopes: [infer]                # infer, submit, worker, admin; admin may do everything
//     images_per_second: 200         # optional; more is refused
//     expires: 2027-01-31            # optional; the first day, in UTC, on which it no longer works
#ifndef PYRAMID_SERVER_SECURITY_KEYS_H_
#define PYRAMID_SERVER_SECURITY_KEYS_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/base/clock.h"
#include "server/security/rate_limit.h"

namespace pyramid {

enum class Scope : uint8_t { kInfer, kSubmit, kWorker, kAdmin };
absl::string_view ScopeName(Scope scope);

// A set of scopes.
class Scopes {
 public:
  constexpr Scopes() = default;
  constexpr Scopes(std::initializer_list<Scope> scopes) {
    for (const Scope scope : scopes) bits_ = static_cast<uint8_t>(bits_ | Bit(scope));
  }
  constexpr void Add(Scope scope) { bits_ = static_cast<uint8_t>(bits_ | Bit(scope)); }
  constexpr bool Has(Scope scope) const { return (bits_ & Bit(scope)) != 0; }
  constexpr bool Meets(Scopes other) const { return (bits_ & other.bits_) != 0; }
  constexpr bool empty() const { return bits_ == 0; }
  std::string Text() const;  // "infer, submit"

 private:
  static constexpr uint8_t Bit(Scope scope) {
    return static_cast<uint8_t>(1U << static_cast<unsigned>(scope));
  }
  uint8_t bits_ = 0;
};

// Someone whose key or token is good. Thread-safe.
class Caller {
 public:
  Caller(std::string name, Scopes scopes, double images_per_second, absl::Time expires)
      : name_(std::move(name)),
        scopes_(scopes),
        images_per_second_(images_per_second),
        expires_(expires),
        bucket_(images_per_second) {}

  const std::string& name() const { return name_; }
  Scopes scopes() const { return scopes_; }
  absl::Time expires() const { return expires_; }
  double images_per_second() const { return images_per_second_; }  // 0: no limit

  // Zero if `images` more are within the rate, and counts them; else how long to wait.
  absl::Duration Charge(int images, absl::Time now) const;

 private:
  const std::string name_;
  const Scopes scopes_;
  const double images_per_second_;
  const absl::Time expires_;
  mutable absl::Mutex mutex_;
  mutable TokenBucket bucket_ ABSL_GUARDED_BY(mutex_);
};

// One entry of a keys file.
struct KeyEntry {
  std::string name;
  std::string sha256;  // lower-case hex
  Scopes scopes;
  double images_per_second = 0;  // 0: no limit
  absl::Time expires = absl::InfiniteFuture();
};

// InvalidArgument, naming the entry: not a list, an unknown key, a name or hash that stands twice,
// …
absl::StatusOr<std::vector<KeyEntry>> ParseKeys(absl::string_view yaml);

// The keys file in memory. It may be changed while the server runs: a change counts within a
// second; a file that can't be read or parsed is logged and the old keys stay. Thread-safe.
class KeyRing {
 public:
  // NotFound, PermissionDenied, or as ParseKeys.
  static absl::StatusOr<std::unique_ptr<KeyRing>> Open(const std::filesystem::path& path,
                                                       Clock& clock = Clock::Real());

  // Whose key it is; null: nobody's. Also one that has expired is found.
  std::shared_ptr<const Caller> Find(absl::string_view key);

 private:
  struct Known {
    std::string hash;
    std::shared_ptr<const Caller> caller;
  };
  using ByHash = std::multimap<std::string, Known>;  // by the first half of the hash

  KeyRing(std::filesystem::path path, Clock& clock) : path_(std::move(path)), clock_(clock) {}
  absl::Status Read() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Refresh() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::filesystem::path path_;
  Clock& clock_;
  absl::Mutex mutex_;
  ByHash keys_ ABSL_GUARDED_BY(mutex_);
  std::string stamp_ ABSL_GUARDED_BY(mutex_);
  absl::Time looked_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_KEYS_H_
