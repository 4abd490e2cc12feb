// EXPECT_OK(status), ASSERT_OK(status), EXPECT_THAT(status, StatusIs(code, HasSubstr("…"))),
// ASSERT_OK_AND_ASSIGN(auto x, f()).
#ifndef PYRAMID_TESTS_TESTING_STATUS_MATCHERS_H_
#define PYRAMID_TESTS_TESTING_STATUS_MATCHERS_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/base/status.h"

namespace pyramid::testing {

inline const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& value) {
  return value.status();
}

MATCHER_P2(StatusIs, code, message, "") {
  const absl::Status& status = StatusOf(arg);
  *result_listener << status;
  return status.code() == code && ::testing::Matches(::testing::Matcher<std::string>(message))(
                                      std::string(status.message()));
}
MATCHER(IsOk, "is OK") {
  *result_listener << StatusOf(arg);
  return StatusOf(arg).ok();
}

}  // namespace pyramid::testing

#define EXPECT_OK(expression) EXPECT_THAT(expression, ::pyramid::testing::IsOk())
#define ASSERT_OK(expression) ASSERT_THAT(expression, ::pyramid::testing::IsOk())
#define ASSERT_OK_AND_ASSIGN(target, expression) \
  PYRAMID_ASSERT_OK_AND_ASSIGN(PYRAMID_CONCAT(_status_or_, __LINE__), target, expression)
#define PYRAMID_ASSERT_OK_AND_ASSIGN(temporary, target, expression) \
  auto temporary = (expression);                                    \
  ASSERT_TRUE(temporary.ok()) << temporary.status();                \
  target = *std::move(temporary)

#endif  // PYRAMID_TESTS_TESTING_STATUS_MATCHERS_H_
