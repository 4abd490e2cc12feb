#include "server/config.h"

#include <gtest/gtest.h>

#include "proto/base/file.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::HasSubstr;

TEST(ServerConfigTest, EmptyTextGivesTheDefaults) {
  ASSERT_OK_AND_ASSIGN(const ServerConfig config, ParseServerConfig(""));
  EXPECT_EQ(config.grpc_port, 8001);
  EXPECT_EQ(config.serving.max_batch, 32);
}

TEST(ServerConfigTest, ShippedFileStatesTheDefaults) {
  ASSERT_OK_AND_ASSIGN(const std::string yaml, ReadFile(PYRAMID_SOURCE_DIR "/configs/server.yaml"));
  ASSERT_OK_AND_ASSIGN(const ServerConfig config, ParseServerConfig(yaml));
  const ServerConfig defaults;
  EXPECT_EQ(config.data, defaults.data);
  EXPECT_EQ(config.host, defaults.host);
  EXPECT_EQ(config.grpc_port, defaults.grpc_port);
  EXPECT_EQ(config.http_port, defaults.http_port);
  EXPECT_EQ(config.metrics_port, defaults.metrics_port);
  EXPECT_EQ(config.drain_timeout, defaults.drain_timeout);
  EXPECT_EQ(config.drain_delay, defaults.drain_delay);
  EXPECT_EQ(config.metrics_host, defaults.metrics_host);
  EXPECT_EQ(config.access_log, defaults.access_log);
  EXPECT_EQ(config.security.keys, defaults.security.keys);
  EXPECT_EQ(config.security.tls_cert, defaults.security.tls_cert);
  EXPECT_EQ(config.security.allow_insecure, defaults.security.allow_insecure);
  EXPECT_EQ(config.connections.min_ping_interval, defaults.connections.min_ping_interval);
  EXPECT_EQ(config.connections.keepalive_time, defaults.connections.keepalive_time);
  EXPECT_EQ(config.connections.max_age, defaults.connections.max_age);
  EXPECT_EQ(config.connections.memory_bytes, defaults.connections.memory_bytes);
  EXPECT_EQ(config.connections.bdp_probe, defaults.connections.bdp_probe);
  EXPECT_EQ(config.serving.max_delay, defaults.serving.max_delay);
  EXPECT_EQ(config.serving.max_queue, defaults.serving.max_queue);
  EXPECT_EQ(config.serving.default_timeout, defaults.serving.default_timeout);
  EXPECT_EQ(config.serving.objective, defaults.serving.objective);
  EXPECT_EQ(config.serving.instances, defaults.serving.instances);
  EXPECT_EQ(config.serving.forward_threads, defaults.serving.forward_threads);
  EXPECT_EQ(config.serving.max_pictures, defaults.serving.max_pictures);
  EXPECT_EQ(config.serving.max_message_bytes, defaults.serving.max_message_bytes);
  EXPECT_EQ(config.serving.max_picture_bytes, defaults.serving.max_picture_bytes);
  EXPECT_EQ(config.serving.max_picture_pixels, defaults.serving.max_picture_pixels);
  EXPECT_EQ(config.serving.max_picture_side, defaults.serving.max_picture_side);
  EXPECT_EQ(config.serving.max_pixels_per_byte, defaults.serving.max_pixels_per_byte);
  EXPECT_EQ(config.serving.refuse_non_finite, defaults.serving.refuse_non_finite);
  EXPECT_EQ(config.training.lost_after, defaults.training.lost_after);
  EXPECT_EQ(config.training.reattach_window, defaults.training.reattach_window);
  EXPECT_EQ(config.training.worker_program, "");
}

TEST(ServerConfigTest, ReadsSectionsAndDurations) {
  ASSERT_OK_AND_ASSIGN(
      const ServerConfig config,
      ParseServerConfig("grpc_port: 0\nserving:\n  max_delay: 4ms\n  max_pixels_per_byte: 500\n"
                        "  default_timeout: 2s\n  objective: 80ms\n"
                        "training: {cpu_workers: 3}\n"));
  EXPECT_EQ(config.grpc_port, 0);
  EXPECT_EQ(config.serving.max_delay, absl::Milliseconds(4));
  EXPECT_EQ(config.serving.max_pixels_per_byte, 500);
  EXPECT_EQ(config.serving.default_timeout, absl::Seconds(2));
  EXPECT_EQ(config.serving.objective, absl::Milliseconds(80));
  EXPECT_EQ(config.training.cpu_workers, 3);
}

TEST(ServerConfigTest, SecurityAndConnectionsHaveSectionsOfTheirOwn) {
  ASSERT_OK_AND_ASSIGN(
      const ServerConfig config,
      ParseServerConfig("drain_delay: 500ms\nmetrics_host: 10.0.0.1\naccess_log: true\n"
                        "security:\n  keys: k.yaml\n  tls_cert: c.pem\n  tls_key: c.key\n"
                        "  tls_client_ca: ca.pem\n  allow_insecure: true\n"
                        "connections: {min_ping_interval: 30s, max_age: 1h, memory_bytes: "
                        "536870912, bdp_probe: true}"
                        "\n"));
  EXPECT_EQ(config.drain_delay, absl::Milliseconds(500));
  EXPECT_EQ(config.metrics_host, "10.0.0.1");
  EXPECT_TRUE(config.access_log);
  EXPECT_EQ(config.security.keys, "k.yaml");
  EXPECT_EQ(config.security.tls_client_ca, "ca.pem");
  EXPECT_TRUE(config.security.allow_insecure);
  EXPECT_EQ(config.connections.min_ping_interval, absl::Seconds(30));
  EXPECT_EQ(config.connections.max_age, absl::Hours(1));
  EXPECT_EQ(config.connections.memory_bytes, 1 << 29);
  EXPECT_TRUE(config.connections.bdp_probe);
}

TEST(ServerConfigTest, FilesOfTlsBelongTogether) {
  EXPECT_THAT(ParseServerConfig("security: {tls_cert: a}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("belong together")));
  EXPECT_THAT(ParseServerConfig("security: {tls_client_ca: a}"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("server.security.tls_client_ca needs TLS")));
  EXPECT_THAT(
      ParseServerConfig("security: {tls_cert: a, tls_key: b, worker_key: c}"),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("one of worker_cert and worker_key")));
  EXPECT_THAT(ParseServerConfig("connections: {memory_bytes: 1000}"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("server.connections.memory_bytes is 1000; use 268435456..")));
  EXPECT_THAT(
      ParseServerConfig("metrics_host: \"\""),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("server.metrics_host is empty")));
}

TEST(ServerConfigTest, UnknownKeyNamesTheNearest) {
  EXPECT_THAT(
      ParseServerConfig("serving: {max_bach: 3}"),
      StatusIs(absl::StatusCode::kInvalidArgument,
               HasSubstr("server.serving.max_bach is not a known key; did you mean max_batch?")));
  EXPECT_THAT(ParseServerConfig("servin: {max_batch: 3}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean serving?")));
}

TEST(ServerConfigTest, BadValuesNameFieldValueAndLimit) {
  EXPECT_THAT(ParseServerConfig("serving: {max_batch: 0}"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("server.serving.max_batch is 0; use 1..1024")));
  EXPECT_THAT(ParseServerConfig("serving: {instances: 65}"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("server.serving.instances is 65; use 0..64")));
  EXPECT_THAT(ParseServerConfig("serving: {max_picture_side: 65536}"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("server.serving.max_picture_side is 65536; use 1..65535")));
  EXPECT_THAT(ParseServerConfig("serving: {max_pixels_per_byte: 0}"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("server.serving.max_pixels_per_byte is 0; use 1..1073741824")));
  EXPECT_THAT(ParseServerConfig("grpc_port: 70000"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("server.grpc_port is 70000; use 0..65535")));
  EXPECT_THAT(ParseServerConfig("serving: {max_delay: soon}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("use a duration like 250ms")));
  EXPECT_THAT(
      ParseServerConfig("serving: {max_pictures: 300}"),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("use at most max_queue, 256")));
  EXPECT_THAT(
      ParseServerConfig("serving: {decode_queue: 63}"),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("use at most decode_queue, 63")));
  EXPECT_THAT(ParseServerConfig("grpc_port: 1\ngrpc_port: 2"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("stands twice")));
  EXPECT_THAT(ParseServerConfig("serving: 3"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not a map")));
  EXPECT_THAT(ParseServerConfig("[1, 2"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not YAML")));
}

}  // namespace
}  // namespace pyramid
