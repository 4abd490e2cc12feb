#include "model/exception_guard.h"

#include <torch/torch.h>

#include <new>
#include <stdexcept>
#include <string>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::IsOk;
using ::pyramid::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr auto kInternal = absl::StatusCode::kInternal;

template <typename Thrown>
absl::Status Throwing(const Thrown& thrown, absl::StatusCode code = kInternal) {
  return Guard("decode", code, [&]() -> absl::Status { throw thrown; });
}

TEST(ExceptionGuardTest, PassesResultsThrough) {
  EXPECT_OK(Guard("work", kInternal, [] { return absl::OkStatus(); }));
  auto value = Guard("work", kInternal, []() -> absl::StatusOr<int> { return 7; });
  ASSERT_OK(value);
  EXPECT_EQ(*value, 7);
  EXPECT_THAT(Guard("work", kInternal, [] { return absl::NotFoundError("gone"); }),
              StatusIs(absl::StatusCode::kNotFound, "gone"));
}

TEST(ExceptionGuardTest, GivesTheCallersCodeAndTheMessage) {
  EXPECT_THAT(Throwing(std::runtime_error("bad marker"), absl::StatusCode::kInvalidArgument),
              StatusIs(absl::StatusCode::kInvalidArgument, "decode: bad marker"));
}

TEST(ExceptionGuardTest, NamesTheTypeWhenThereIsNoMessage) {
  EXPECT_THAT(Throwing(std::runtime_error("")), StatusIs(kInternal, "decode: std::runtime_error"));
}

TEST(ExceptionGuardTest, CatchesWhatIsNoException) {
  EXPECT_THAT(Throwing(42), StatusIs(kInternal, HasSubstr("decode: an exception")));
}

TEST(ExceptionGuardTest, LeavesLibTorchsBacktraceOut) {
  const absl::Status status = Guard("forward", kInternal, []() -> absl::Status {
    TORCH_CHECK(false, "Pictures are too small.");
  });
  EXPECT_THAT(status, StatusIs(kInternal, "forward: Pictures are too small."));
  const absl::Status shapes = Guard("forward", kInternal, []() -> absl::Status {
    torch::mm(torch::ones({2, 3}), torch::ones({2, 3}));
    return absl::OkStatus();
  });
  EXPECT_THAT(shapes,
              StatusIs(kInternal, AllOf(HasSubstr("mat1 and mat2"), Not(HasSubstr("raised from")),
                                        Not(HasSubstr("frame #")))));
}

TEST(ExceptionGuardTest, CallsOutOfMemoryResourceExhausted) {
  EXPECT_THAT(Throwing(std::bad_alloc()),
              StatusIs(absl::StatusCode::kResourceExhausted, "decode: out of memory"));
  // By type, whatever the text is: what a GPU's allocator throws.
  const absl::Status by_type = Guard("forward", kInternal, []() -> absl::Status {
    throw c10::OutOfMemoryError({"f", "file.cc", 1}, "CUDA: 2 GiB asked for");
  });
  EXPECT_THAT(by_type, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("2 GiB")));
}

TEST(ExceptionGuardTest, CallsLibTorchsFailedCpuAllocationResourceExhausted) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "AddressSanitizer ends the process at an allocation of this size";
#endif
  const absl::Status status = Guard("forward", kInternal, []() -> absl::Status {
    torch::empty({int64_t{1} << 56});
    return absl::OkStatus();
  });
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("memory")));
}

}  // namespace
}  // namespace pyramid
