#include "server/http_connections.h"

#include <dirent.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <memory>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace pyramid {
namespace {

constexpr absl::Duration kLookInterval = absl::Seconds(1);
constexpr absl::Duration kLingerSilence = absl::Seconds(1);
constexpr absl::Duration kLongestLinger = absl::Seconds(10);

}  // namespace

bool AddressOf(int fd, int (*end)(int, sockaddr*, socklen_t*), std::string& host, int& port) {
  sockaddr_storage address{};
  socklen_t length = sizeof(address);
  if (end(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) return false;
  if (address.ss_family != AF_INET && address.ss_family != AF_INET6) return false;
  char name[NI_MAXHOST];
  char service[NI_MAXSERV];
  if (getnameinfo(reinterpret_cast<sockaddr*>(&address), length, name, sizeof(name), service,
                  sizeof(service), NI_NUMERICHOST | NI_NUMERICSERV) != 0 ||
      !absl::SimpleAtoi(service, &port)) {
    return false;
  }
  host = name;
  return true;
}

// A descriptor of our own for a connection's socket: the library may close its own at any time.
struct HttpConnections::Socket {
  explicit Socket(int a_fd) : fd(a_fd) {}
  ~Socket() { close(fd); }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;

  const int fd;
  std::string peer;
};

// Connections whose own port is ours.
std::vector<std::unique_ptr<HttpConnections::Socket>> HttpConnections::SocketsAt(int port) {
  std::vector<std::unique_ptr<Socket>> found;
  DIR* const all = opendir("/proc/self/fd");
  if (all == nullptr) return found;
  const absl::Cleanup closer = [all] { closedir(all); };
  for (const dirent* entry = readdir(all); entry != nullptr; entry = readdir(all)) {
    int fd = -1;
    int local = -1;
    int remote = -1;
    std::string host;
    if (!absl::SimpleAtoi(entry->d_name, &fd)) continue;
    if (!AddressOf(fd, getsockname, host, local) || local != port) continue;
    const int own = dup(fd);
    if (own < 0) continue;
    auto socket = std::make_unique<Socket>(own);  // from here on nobody else's
    if (!AddressOf(own, getsockname, host, local) || local != port) continue;
    if (!AddressOf(own, getpeername, host, remote)) continue;
    socket->peer = absl::StrCat(host, ":", remote);
    found.push_back(std::move(socket));
  }
  return found;
}

std::unique_ptr<HttpConnections::Socket> HttpConnections::SocketOf(int port,
                                                                   const std::string& peer) {
  for (std::unique_ptr<Socket>& socket : SocketsAt(port)) {
    if (socket->peer == peer) return std::move(socket);
  }
  return nullptr;
}

thread_local HttpConnections::Connection HttpConnections::t_mine;

void HttpConnections::Open() {
  absl::MutexLock lock(&mutex_);
  t_mine = {.since = absl::Now()};
  connections_.insert(&t_mine);
}

void HttpConnections::Close() {
  absl::MutexLock lock(&mutex_);
  connections_.erase(&t_mine);
  if (t_mine.answering) --answering_;
  if (t_mine.placed) ++free_;
  t_mine.socket = nullptr;
}

bool HttpConnections::BeginRequest(const std::string& peer) {
  absl::MutexLock lock(&mutex_);
  if (!std::exchange(t_mine.answering, true)) ++answering_;
  t_mine.peer = peer;
  if (t_mine.placed) return true;
  if (free_ == 0 && !TakeLongestIdle()) return false;
  --free_;
  t_mine.placed = true;
  return true;
}

void HttpConnections::EndRequest() {
  absl::MutexLock lock(&mutex_);
  if (std::exchange(t_mine.answering, false)) --answering_;
  t_mine.since = absl::Now();
}

// Its request may be on its way: then it has a place to find like everybody else.
bool HttpConnections::TakeLongestIdle() {
  Connection* longest = nullptr;
  for (Connection* one : connections_) {
    if (!one->placed || one->answering) continue;
    if (longest == nullptr || one->since < longest->since) longest = one;
  }
  if (longest == nullptr) return false;
  longest->placed = false;
  ++free_;
  const auto socket = SocketOf(port_, longest->peer);
  if (socket != nullptr) shutdown(socket->fd, SHUT_RD);
  return true;
}

const HttpConnections::Socket* HttpConnections::MySocket() const {
  if (t_mine.socket == nullptr) t_mine.socket = SocketOf(port_, t_mine.peer);
  return t_mine.socket.get();
}

bool HttpConnections::HungUp() const {
  const Socket* const socket = MySocket();
  if (socket == nullptr) return true;
  pollfd look{.fd = socket->fd, .events = POLLRDHUP, .revents = 0};
  return poll(&look, 1, 0) > 0 && (look.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

void HttpConnections::Linger(int socket) {
  EndRequest();
  const absl::Time until = absl::Now() + kLongestLinger;
  char thrown_away[16384];
  while (absl::Now() < until) {
    pollfd look{.fd = socket, .events = POLLIN, .revents = 0};
    if (poll(&look, 1, static_cast<int>(absl::ToInt64Milliseconds(kLingerSilence))) <= 0) return;
    if (recv(socket, thrown_away, sizeof(thrown_away), MSG_DONTWAIT) <= 0) return;
  }
}

void HttpConnections::CloseSilent(absl::Duration longest) {
  absl::MutexLock lock(&mutex_);
  const absl::Time now = absl::Now();
  if (now - looked_ < kLookInterval) return;
  looked_ = now;
  std::map<std::string, Connection*> known;
  for (Connection* one : connections_) known.emplace(one->peer, one);
  std::map<std::string, absl::Time> strangers;
  for (const std::unique_ptr<Socket>& socket : SocketsAt(port_)) {
    absl::Time since = now;
    const auto found = known.find(socket->peer);
    if (found != known.end()) {
      if (found->second->answering) continue;
      since = found->second->since;
    } else {
      const auto seen = strangers_.find(socket->peer);
      if (seen != strangers_.end()) since = seen->second;
      strangers.emplace(socket->peer, since);
    }
    if (now - since > longest) shutdown(socket->fd, SHUT_RD);
  }
  strangers_ = std::move(strangers);
}

bool HttpConnections::AwaitAnswered(absl::Time until) {
  absl::MutexLock lock(&mutex_);
  const auto none = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return answering_ == 0; };
  return mutex_.AwaitWithDeadline(absl::Condition(&none), until);
}

void HttpConnections::ShutAll(int how) const {
  for (const auto& socket : SocketsAt(port_)) shutdown(socket->fd, how);
}

void HttpConnections::CutOff() const { ShutAll(SHUT_RDWR); }

void HttpConnections::EndReading() const { ShutAll(SHUT_RD); }

}  // namespace pyramid
