// A connection of a test's own, to write what no client library would.
#ifndef PYRAMID_TESTS_TESTING_CONNECT_H_
#define PYRAMID_TESTS_TESTING_CONNECT_H_

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdint>

namespace pyramid::testing {

// To a port of the loopback interface; the caller closes it.
inline int ConnectTo(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  return fd;
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_CONNECT_H_
