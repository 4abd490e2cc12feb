#include "proto/base/time.h"

#include "proto/base/clock.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

TEST(TimeTest, TimesGoThereAndBack) {
  for (const absl::Time time : {absl::UnixEpoch(), absl::FromUnixNanos(1'700'000'000'123'456'789),
                                absl::FromUnixNanos(-1), absl::FromUnixNanos(-1'500'000'000)}) {
    const google::protobuf::Timestamp proto = ToProto(time);
    EXPECT_EQ(FromProto(proto), time);
    // timestamp.proto: nanos count forward also before 1970.
    EXPECT_GE(proto.nanos(), 0);
    EXPECT_LT(proto.nanos(), 1'000'000'000);
  }
  EXPECT_EQ(ToProto(absl::FromUnixNanos(-1)).seconds(), -1);
  EXPECT_EQ(ToProto(absl::FromUnixNanos(-1)).nanos(), 999'999'999);
}

TEST(TimeTest, DurationsGoThereAndBack) {
  for (const absl::Duration duration :
       {absl::ZeroDuration(), absl::Nanoseconds(1), absl::Seconds(-1.5),
        absl::Hours(100'000) + absl::Nanoseconds(3)}) {
    const google::protobuf::Duration proto = ToProto(duration);
    EXPECT_EQ(FromProto(proto), duration);
    // duration.proto: seconds and nanos have the same sign.
    EXPECT_TRUE(proto.seconds() == 0 || proto.nanos() == 0 ||
                (proto.seconds() < 0) == (proto.nanos() < 0));
  }
}

TEST(ClockTest, TheRealClockTellsTimeAndWaits) {
  Clock& clock = Clock::Real();
  const absl::Time before = absl::Now();
  const absl::Time now = clock.Now();
  EXPECT_GE(now, before);
  EXPECT_LE(now, absl::Now());

  absl::Mutex mutex;
  bool ready = true;
  absl::MutexLock lock(&mutex);
  EXPECT_TRUE(clock.AwaitUntil(mutex, absl::Condition(&ready), now));
  ready = false;
  EXPECT_FALSE(
      clock.AwaitUntil(mutex, absl::Condition(&ready), absl::Now() + absl::Milliseconds(5)));
  EXPECT_GE(absl::Now() - now, absl::Milliseconds(5));
}

}  // namespace
}  // namespace pyramid
