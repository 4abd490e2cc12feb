#include "proto/base/grpc_status.h"

#include <set>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

TEST(GrpcStatusTest, EveryCodeGoesThereAndBack) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "words");
    const grpc::Status grpc_status = ToGrpc(status);
    EXPECT_EQ(static_cast<int>(grpc_status.error_code()), code);
    EXPECT_EQ(grpc_status.error_message(), "words");
    EXPECT_EQ(FromGrpc(grpc_status), status);
  }
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  EXPECT_OK(FromGrpc(grpc::Status::OK));
}

TEST(GrpcStatusTest, CodesHaveTheSameNamesInBothLibraries) {
  EXPECT_EQ(static_cast<int>(grpc::StatusCode::DATA_LOSS),
            static_cast<int>(absl::StatusCode::kDataLoss));
  EXPECT_EQ(static_cast<int>(grpc::StatusCode::NOT_FOUND),
            static_cast<int>(absl::StatusCode::kNotFound));
  EXPECT_EQ(static_cast<int>(grpc::StatusCode::UNAUTHENTICATED),
            static_cast<int>(absl::StatusCode::kUnauthenticated));
  EXPECT_EQ(GrpcCodeName(absl::StatusCode::kOk), "OK");
  EXPECT_EQ(GrpcCodeName(absl::StatusCode::kCancelled),
            "Canceled");  // as go-grpc-prometheus writes it
  EXPECT_EQ(GrpcCodeName(absl::StatusCode::kDeadlineExceeded), "DeadlineExceeded");
  std::set<absl::string_view> names;
  for (int code = 0; code <= 16; ++code)
    names.insert(GrpcCodeName(static_cast<absl::StatusCode>(code)));
  EXPECT_EQ(names.size(), 17u);
}

}  // namespace
}  // namespace pyramid
