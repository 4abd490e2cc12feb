// A connection of the HTTP port, plain or TLS, as the library that serves it reads and writes it.
//
// The library bounds neither a request's head nor the lines between the chunks of a body, and
// nobody the time they take. Here they are bounded: beyond a bound the connection reads as ended.
// What was sent after a request waits for the next one.
//
// The library doesn't see the header Range: it would match it with a std::regex that takes a
// kilobyte of stack for each byte, and hand a client's offsets on as they are.
//
// For the thread that serves the connection.
#ifndef PYRAMID_SERVER_HTTP_STREAM_H_
#define PYRAMID_SERVER_HTTP_STREAM_H_

#include <httplib.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/time/time.h"
#include "server/security/openssl.h"

namespace pyramid {

class HttpStream final : public httplib::Stream {
 public:
  static constexpr int64_t kMaxHead = 64 << 10;  // bytes of a request's head
  static constexpr int64_t kMaxHeadLines = 200;  // a few bytes of a line become a hundred
  static constexpr size_t kMaxChunkLine = 4096;  // bytes

  // Takes the socket over. `tls` null: plain HTTP; it must outlive this.
  HttpStream(int socket, SSL_CTX* tls);
  ~HttpStream() override;  // hangs up
  HttpStream(const HttpStream&) = delete;
  HttpStream& operator=(const HttpStream&) = delete;

  // The handshake. False: it failed.
  bool Open();
  // Until a request's first byte is there. False: none came in that time.
  bool AwaitRequest(absl::Duration time);

  // What is read from here on is a request's head; its body, which may take `time` and what it
  // takes at `slowest` bytes a second beside that.
  void BeginHead();
  void BeginBody(absl::Duration time, double slowest);
  bool head_too_long() const { return head_too_long_; }
  bool body_too_slow() const { return body_too_slow_; }
  // Whether the last bytes that were read end a chunked body. The library also takes one for whole
  // when something else comes where a chunk should end.
  bool EndsChunks() const { return last_ == std::array{'\n', '\r', '\n'}; }

  // The client reads the end, and may go on sending.
  void EndWriting();

  const std::string& peer() const { return peer_; }  // "address:port", as HttpConnections has it

  bool is_readable() const override;
  bool is_writable() const override;
  ssize_t read(char* to, size_t size) override;
  ssize_t write(const char* from, size_t size) override;
  void get_remote_ip_and_port(std::string& ip, int& port) const override;
  void get_local_ip_and_port(std::string& ip, int& port) const override;
  socket_t socket() const override { return socket_; }

 private:
  using SslPtr = std::unique_ptr<SSL, Freer<SSL_free>>;

  ssize_t Fill();
  bool Wait(short events, absl::Duration time) const;
  int Tls(absl::FunctionRef<int()> step);
  void ReadHead(char* data, size_t size);
  void ReadBody(const char* data, size_t size, bool line);

  const int socket_;
  const SslPtr ssl_;   // null: plain
  bool sound_ = true;  // TLS may still be used
  std::string peer_;

  std::array<char, 16384> buffer_;  // the longest TLS record
  size_t begin_ = 0;                // of what hasn't been read of it
  size_t end_ = 0;

  bool in_head_ = true;
  bool over_ = false;  // a bound
  bool head_too_long_ = false;
  bool body_too_slow_ = false;
  int64_t bytes_ = 0;  // of the head or the body
  int64_t lines_ = 0;  // of the head
  size_t line_ = 0;    // bytes of the line that is being read
  bool range_ = true;  // it begins as the header Range, or it is empty
  std::array<char, 3> last_{};
  absl::Time body_until_;
  double slowest_ = 0;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_HTTP_STREAM_H_
