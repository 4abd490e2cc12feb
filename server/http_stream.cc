#include "server/http_stream.h"

#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "server/http_connections.h"

namespace pyramid {
namespace {

constexpr absl::Duration kLongestWait = absl::Seconds(5);  // for one read, for one write

}  // namespace

HttpStream::HttpStream(int socket, SSL_CTX* tls)
    : socket_(socket), ssl_(tls == nullptr ? nullptr : SSL_new(tls)), sound_(ssl_ != nullptr) {
  fcntl(socket_, F_SETFL, fcntl(socket_, F_GETFL) | O_NONBLOCK);
  if (tls != nullptr && (ssl_ == nullptr || SSL_set_fd(ssl_.get(), socket_) != 1)) sound_ = false;
  std::string host;
  int port = 0;
  if (AddressOf(socket_, getpeername, host, port)) peer_ = absl::StrCat(host, ":", port);
}

HttpStream::~HttpStream() {
  EndWriting();
  shutdown(socket_, SHUT_RDWR);
  close(socket_);
}

// True: poll again what `events` were waited for.
bool HttpStream::Wait(short events, absl::Duration time) const {
  const absl::Time until = absl::Now() + time;
  pollfd look{.fd = socket_, .events = events, .revents = 0};
  while (true) {
    const absl::Duration left = std::max(until - absl::Now(), absl::ZeroDuration());
    const int64_t millis = absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1)));
    const int found = poll(&look, 1, static_cast<int>(millis));
    if (found >= 0 || errno != EINTR) return found > 0;
  }
}

// Repeats one of OpenSSL's steps until it is done. As recv(2): 0 at the end, -1 if it fails.
int HttpStream::Tls(absl::FunctionRef<int()> step) {
  while (true) {
    ERR_clear_error();
    const int done = step();
    if (done > 0) return done;
    switch (SSL_get_error(ssl_.get(), done)) {
      case SSL_ERROR_WANT_READ:
        if (!Wait(POLLIN, kLongestWait)) return -1;
        break;
      case SSL_ERROR_WANT_WRITE:
        if (!Wait(POLLOUT, kLongestWait)) return -1;
        break;
      case SSL_ERROR_ZERO_RETURN:
        return 0;
      default:
        sound_ = false;
        return -1;
    }
  }
}

bool HttpStream::Open() {
  if (ssl_ == nullptr) return true;
  if (sound_ && Tls([this] { return SSL_accept(ssl_.get()); }) == 1) return true;
  sound_ = false;
  return false;
}

bool HttpStream::AwaitRequest(absl::Duration time) {
  return begin_ < end_ || (ssl_ != nullptr && SSL_pending(ssl_.get()) > 0) || Wait(POLLIN, time);
}

void HttpStream::BeginHead() {
  in_head_ = true;
  bytes_ = 0;
  lines_ = 0;
  line_ = 0;
  range_ = true;
}

void HttpStream::BeginBody(absl::Duration time, double slowest) {
  in_head_ = false;
  bytes_ = 0;
  line_ = 0;
  last_ = {};
  body_until_ = absl::Now() + time;
  slowest_ = slowest;
}

void HttpStream::EndWriting() {
  if (ssl_ != nullptr && sound_) {
    ERR_clear_error();
    SSL_shutdown(ssl_.get());
    sound_ = false;
  }
  shutdown(socket_, SHUT_WR);
}

bool HttpStream::is_readable() const { return begin_ < end_ || Wait(POLLIN, kLongestWait); }

bool HttpStream::is_writable() const { return Wait(POLLOUT, kLongestWait); }

// As recv(2).
ssize_t HttpStream::Fill() {
  ssize_t got = 0;
  if (ssl_ != nullptr) {
    if (!sound_) return -1;
    got = Tls(
        [this] { return SSL_read(ssl_.get(), buffer_.data(), static_cast<int>(buffer_.size())); });
  } else {
    while ((got = recv(socket_, buffer_.data(), buffer_.size(), 0)) < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN || !Wait(POLLIN, kLongestWait)) return -1;
    }
  }
  begin_ = 0;
  end_ = static_cast<size_t>(std::max<ssize_t>(got, 0));
  return got;
}

ssize_t HttpStream::read(char* to, size_t size) {
  if (over_) return 0;
  if (begin_ == end_) {
    if (!in_head_ &&
        absl::Now() > body_until_ + absl::Seconds(static_cast<double>(bytes_) / slowest_)) {
      over_ = body_too_slow_ = true;
      return 0;
    }
    const ssize_t got = Fill();
    if (got <= 0) return got;
  }
  const size_t taken = std::min(size, end_ - begin_);
  memcpy(to, buffer_.data() + begin_, taken);
  begin_ += taken;
  bytes_ += static_cast<int64_t>(taken);
  if (in_head_) {
    ReadHead(to, taken);
  } else {
    ReadBody(to, taken, size == 1);  // the library reads lines byte by byte
  }
  return over_ ? 0 : static_cast<ssize_t>(taken);
}

void HttpStream::ReadHead(char* data, size_t size) {
  constexpr absl::string_view kRange = "range:";
  for (size_t i = 0; i < size; ++i) {
    range_ = range_ && line_ < kRange.size() && absl::ascii_tolower(data[i]) == kRange[line_];
    ++line_;
    if (range_ && line_ == kRange.size()) data[i] = ';';  // without its colon it is no header
    if (data[i] != '\n') continue;
    ++lines_;
    line_ = 0;
    range_ = true;
  }
  over_ = head_too_long_ = bytes_ > kMaxHead || lines_ > kMaxHeadLines;
}

void HttpStream::ReadBody(const char* data, size_t size, bool line) {
  line_ = line && *data != '\n' ? line_ + 1 : 0;
  over_ = line_ > kMaxChunkLine;
  for (size_t i = size - std::min(size, last_.size()); i < size; ++i) {
    last_ = {last_[1], last_[2], data[i]};
  }
}

ssize_t HttpStream::write(const char* from, size_t size) {
  if (ssl_ != nullptr) {
    const int part = static_cast<int>(std::min<size_t>(size, INT_MAX));
    return sound_ ? Tls([&] { return SSL_write(ssl_.get(), from, part); }) : -1;
  }
  while (true) {
    const ssize_t sent = send(socket_, from, size, MSG_NOSIGNAL);
    if (sent >= 0) return sent;
    if (errno == EINTR) continue;
    if (errno != EAGAIN || !Wait(POLLOUT, kLongestWait)) return -1;
  }
}

void HttpStream::get_remote_ip_and_port(std::string& ip, int& port) const {
  AddressOf(socket_, getpeername, ip, port);
}

void HttpStream::get_local_ip_and_port(std::string& ip, int& port) const {
  AddressOf(socket_, getsockname, ip, port);
}

}  // namespace pyramid
