// Who is connected to the HTTP port. The library that serves it keeps a thread for each connection,
// lets it wait for a request as long as bytes trickle in, and tells nobody which socket is whose:
// here are the rules of who may stay, and sockets are looked up by their addresses.
//
// A connection has a place from its first request on, while there is one; one that waits for its
// next request gives its place to one that has a request. Thread-safe.
#ifndef PYRAMID_SERVER_HTTP_CONNECTIONS_H_
#define PYRAMID_SERVER_HTTP_CONNECTIONS_H_

#include <sys/socket.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace pyramid {

class HttpConnections {
 public:
  // `places`: connections that have requests answered.
  explicit HttpConnections(int places) : free_(places) {}

  // Our port, once it is known.
  void Listen(int port) { port_ = port; }

  // By a connection's thread, before and after everything else of it.
  void Open();
  void Close();

  // By it, from a request's head to the end of its answer. `peer` is the client's "address:port".
  // False: there is no place for it; all are answering others. EndRequest is called nevertheless.
  bool BeginRequest(const std::string& peer);
  void EndRequest();

  // By it, while it answers: whether the client has hung up.
  bool HungUp() const;

  // By it, after the last answer: reads on from its socket and throws away, until the client hangs
  // up, is silent for a second or has had ten. One that is still sending wouldn't see the answer if
  // the connection broke. No request is being answered from here on.
  void Linger(int socket);

  // Hangs up on those that have had `longest` for a request and haven't sent one. Looks once a
  // second at most.
  void CloseSilent(absl::Duration longest);

  // False: requests are still being answered at that time.
  bool AwaitAnswered(absl::Time until);
  // Hangs up on everybody: those who wait read the end, requests on their way are cut off, and
  // answers are lost.
  void CutOff() const;
  // Those who wait read the end. Answers in progress are sent.
  void EndReading() const;

 private:
  struct Socket;
  struct Connection {
    std::string peer;  // once it has sent a request
    bool answering = false;
    bool placed = false;
    absl::Time since;                // that it waits for a request
    std::shared_ptr<Socket> socket;  // once MySocket was asked
  };

  static std::vector<std::unique_ptr<Socket>> SocketsAt(int port);
  static std::unique_ptr<Socket> SocketOf(int port, const std::string& peer);
  const Socket* MySocket() const;  // of this thread's connection; null: the library has closed it
  void ShutAll(int how) const;     // as shutdown(2)

  bool TakeLongestIdle() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  int port_ = 0;
  absl::Mutex mutex_;
  absl::flat_hash_set<Connection*> connections_ ABSL_GUARDED_BY(mutex_);
  int free_ ABSL_GUARDED_BY(mutex_);
  int answering_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time looked_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  std::map<std::string, absl::Time> strangers_ ABSL_GUARDED_BY(mutex_);  // peers that have sent
                                                                         // no request; seen since
  static thread_local Connection t_mine;  // the one that this thread serves
};

// The address and port of one end of a socket: getsockname, getpeername. False: it has none.
bool AddressOf(int fd, int (*end)(int, sockaddr*, socklen_t*), std::string& host, int& port);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_HTTP_CONNECTIONS_H_
