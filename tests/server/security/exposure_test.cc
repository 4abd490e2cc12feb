#include "server/security/exposure.h"

#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

TEST(IsLoopbackTest, ThisMachineAlone) {
  for (const char* host :
       {"127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"}) {
    EXPECT_TRUE(IsLoopback(host)) << host;
  }
  for (const char* host : {"0.0.0.0", "::", "[::]", "10.0.0.1", "192.168.1.4", "fe80::1",
                           "::ffff:10.0.0.1", "no such host", "128.0.0.1"}) {
    EXPECT_FALSE(IsLoopback(host)) << host;
  }
}

TEST(ExposureTest, AnOpenAddressNeedsProtectionOrAFlag) {
  EXPECT_OK(CheckExposure("127.0.0.1", {}));
  EXPECT_THAT(CheckExposure("0.0.0.0", {}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("other machines can reach host 0.0.0.0")));
  EXPECT_OK(CheckExposure("0.0.0.0", {.keys = true}));
  EXPECT_OK(CheckExposure("0.0.0.0", {.tls = true}));
  EXPECT_OK(CheckExposure("0.0.0.0", {.allow_insecure = true}));
}

TEST(ExposureTest, WhatStaysOpenIsSaid) {
  EXPECT_EQ(Exposed("127.0.0.1", {}), "");
  EXPECT_EQ(Exposed("0.0.0.0", {.keys = true, .tls = true}), "");
  EXPECT_EQ(Exposed("0.0.0.0", {.tls = true, .client_certificates = true}), "");
  EXPECT_THAT(Exposed("0.0.0.0", {.keys = true}), HasSubstr("plain text"));
  EXPECT_THAT(Exposed("0.0.0.0", {.tls = true}), HasSubstr("may do everything"));
}

}  // namespace
}  // namespace pyramid
