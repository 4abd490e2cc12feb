#include "server/security/exposure.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

bool IsLoopbackV4(const in_addr& address) { return (ntohl(address.s_addr) >> 24) == 127; }

bool IsLoopbackV6(const in6_addr& address) {
  if (IN6_IS_ADDR_LOOPBACK(&address)) return true;
  return IN6_IS_ADDR_V4MAPPED(&address) && address.s6_addr[12] == 127;
}

}  // namespace

bool IsLoopback(const std::string& host) {
  std::string bare = host;
  if (bare.size() > 2 && bare.front() == '[' && bare.back() == ']') {
    bare = bare.substr(1, bare.size() - 2);
  }
  in_addr v4{};
  if (inet_pton(AF_INET, bare.c_str(), &v4) == 1) return IsLoopbackV4(v4);
  in6_addr v6{};
  if (inet_pton(AF_INET6, bare.c_str(), &v6) == 1) return IsLoopbackV6(v6);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(bare.c_str(), nullptr, &hints, &found) != 0 || found == nullptr) return false;
  const absl::Cleanup free = [&] { freeaddrinfo(found); };
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    const bool loopback =
        entry->ai_family == AF_INET
            ? IsLoopbackV4(reinterpret_cast<const sockaddr_in*>(entry->ai_addr)->sin_addr)
        : entry->ai_family == AF_INET6
            ? IsLoopbackV6(reinterpret_cast<const sockaddr_in6*>(entry->ai_addr)->sin6_addr)
            : false;
    if (!loopback) return false;
  }
  return true;
}

absl::Status CheckExposure(const std::string& host, const Protection& protection) {
  if (protection.keys || protection.tls || protection.allow_insecure || IsLoopback(host)) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      absl::StrCat("other machines can reach host ", host,
                   " and neither keys nor TLS protect it; set security.keys or security.tls_cert, "
                   "or say --insecure if that is meant"));
}

std::string Exposed(const std::string& host, const Protection& protection) {
  if (IsLoopback(host)) return "";
  if (!protection.keys && !protection.client_certificates) {
    return protection.tls ? "whoever connects may do everything"
                          : "whoever connects may do everything, in plain text";
  }
  return protection.tls ? "" : "keys and pictures travel in plain text";
}

}  // namespace pyramid
