#include "proto/base/status.h"

#include <memory>

#include "absl/strings/cord.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;

absl::Status Fails() { return absl::NotFoundError("gone"); }
absl::StatusOr<std::unique_ptr<int>> Gives(bool well) {
  if (!well) return absl::DataLossError("torn");
  return std::make_unique<int>(7);
}

TEST(StatusTest, AnnotateKeepsCodeAndPayloads) {
  absl::Status status = absl::ResourceExhaustedError("full");
  status.SetPayload("type/x", absl::Cord("1"));
  const absl::Status annotated = Annotate(Annotate(status, "inner"), "outer");
  EXPECT_THAT(annotated, StatusIs(absl::StatusCode::kResourceExhausted, "outer: inner: full"));
  EXPECT_EQ(annotated.GetPayload("type/x"), absl::Cord("1"));
  EXPECT_OK(Annotate(absl::OkStatus(), "context"));
}

TEST(StatusTest, ReturnIfErrorReturnsTheError) {
  bool reached = false;
  const auto call = [&](const absl::Status& status) -> absl::Status {
    RETURN_IF_ERROR(status);
    reached = true;
    return absl::OkStatus();
  };
  EXPECT_EQ(call(Fails()), Fails());
  EXPECT_FALSE(reached);
  EXPECT_OK(call(absl::OkStatus()));
  EXPECT_TRUE(reached);
}

TEST(StatusTest, AssignOrReturnMovesTheValueOrReturnsTheError) {
  const auto call = [](bool first, bool second) -> absl::StatusOr<int> {
    ASSIGN_OR_RETURN(const std::unique_ptr<int> declared, Gives(first));
    std::unique_ptr<int> assigned;
    ASSIGN_OR_RETURN(assigned, Gives(second));
    return *declared + *assigned;
  };
  ASSERT_OK_AND_ASSIGN(const int sum, call(true, true));
  EXPECT_EQ(sum, 14);
  EXPECT_THAT(call(false, true), StatusIs(absl::StatusCode::kDataLoss, "torn"));
  EXPECT_THAT(call(true, false), StatusIs(absl::StatusCode::kDataLoss, "torn"));
}

}  // namespace
}  // namespace pyramid
