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
  EXPECT_EQ(config.serving.max_delay, defaults.serving.max_delay);
  EXPECT_EQ(config.serving.max_queue, defaults.serving.max_queue);
  EXPECT_EQ(config.serving.max_pictures, defaults.serving.max_pictures);
  EXPECT_EQ(config.serving.max_message_bytes, defaults.serving.max_message_bytes);
  EXPECT_EQ(config.serving.max_picture_bytes, defaults.serving.max_picture_bytes);
  EXPECT_EQ(config.serving.max_picture_pixels, defaults.serving.max_picture_pixels);
  EXPECT_EQ(config.serving.max_picture_side, defaults.serving.max_picture_side);
  EXPECT_EQ(config.serving.max_pixels_per_byte, defaults.serving.max_pixels_per_byte);
  EXPECT_EQ(config.training.lost_after, defaults.training.lost_after);
  EXPECT_EQ(config.training.reattach_window, defaults.training.reattach_window);
  EXPECT_EQ(config.training.worker_program, "");
}

TEST(ServerConfigTest, ReadsSectionsAndDurations) {
  ASSERT_OK_AND_ASSIGN(
      const ServerConfig config,
      ParseServerConfig("grpc_port: 0\nserving:\n  max_delay: 4ms\n  max_pixels_per_byte: 500\n"
                        "training: {cpu_workers: 3}\n"));
  EXPECT_EQ(config.grpc_port, 0);
  EXPECT_EQ(config.serving.max_delay, absl::Milliseconds(4));
  EXPECT_EQ(config.serving.max_pixels_per_byte, 500);
  EXPECT_EQ(config.training.cpu_workers, 3);
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
