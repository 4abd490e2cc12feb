#include "worker/failure.h"

#include <gtest/gtest.h>

#include "proto/base/status.h"

namespace pyramid {
namespace {

TEST(FailureTest, TheMarkSurvivesAnnotation) {
  const absl::Status status =
      Annotate(WithFailure(absl::ResourceExhaustedError("full"), v1::DISK_FULL), "saving");
  EXPECT_EQ(FailureOf(status), v1::DISK_FULL);
  EXPECT_EQ(status.message(), "saving: full");
}

TEST(FailureTest, UnmarkedErrorsHaveTheClassOfTheirCode) {
  EXPECT_EQ(FailureOf(absl::OkStatus()), v1::FAILURE_CLASS_UNSPECIFIED);
  EXPECT_EQ(FailureOf(absl::InvalidArgumentError("")), v1::CONFIG);
  EXPECT_EQ(FailureOf(absl::NotFoundError("")), v1::CONFIG);
  EXPECT_EQ(FailureOf(absl::DataLossError("")), v1::DATA_CORRUPT);
  EXPECT_EQ(FailureOf(absl::ResourceExhaustedError("")), v1::OOM_HOST);
  EXPECT_EQ(FailureOf(absl::AbortedError("")), v1::COMM);
  EXPECT_EQ(FailureOf(absl::InternalError("")), v1::WORKER_LOST);
}

TEST(FailureTest, ExitCodesAreTheDocumentedOnes) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::InternalError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("")), 2);
  EXPECT_EQ(ExitCodeOf(absl::NotFoundError("")), 3);
}

}  // namespace
}  // namespace pyramid
