#include "server/serving/recent_slow.h"

#include <gtest/gtest.h>

namespace pyramid {
namespace {

TEST(RecentSlowTest, IsWhatOneInFiftyExceeds) {
  RecentSlow slow;
  for (int i = 0; i < 15; ++i) slow.Observe(absl::Seconds(1));
  EXPECT_EQ(slow.Get(), absl::ZeroDuration()) << "too few to tell";
  for (int i = 0; i < 257; ++i) slow.Observe(absl::Milliseconds(i));
  // Of the last 256 that it looked at; a second is forgotten.
  EXPECT_GE(slow.Get(), absl::Milliseconds(230));
  EXPECT_LE(slow.Get(), absl::Milliseconds(255));
  for (int i = 0; i < 272; ++i) slow.Observe(absl::Milliseconds(i % 128 == 0 ? 900 : 3));
  EXPECT_EQ(slow.Get(), absl::Milliseconds(3)) << "a hiccup doesn't count";
}

}  // namespace
}  // namespace pyramid
