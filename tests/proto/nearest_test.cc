#include "proto/base/nearest.h"

#include <vector>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

TEST(NearestTest, CountsEdits) {
  EXPECT_EQ(EditDistance("", ""), 0);
  EXPECT_EQ(EditDistance("", "abc"), 3);
  EXPECT_EQ(EditDistance("abc", ""), 3);
  EXPECT_EQ(EditDistance("abc", "abc"), 0);
  EXPECT_EQ(EditDistance("abc", "axc"), 1);
  EXPECT_EQ(EditDistance("abc", "abxc"), 1);
  EXPECT_EQ(EditDistance("abc", "bc"), 1);
  EXPECT_EQ(EditDistance("abc", "acb"), 1);  // neighbours swapped
  EXPECT_EQ(EditDistance("kitten", "sitting"), 3);
  EXPECT_EQ(EditDistance("ca", "abc"), 3);  // a swapped pair isn't edited again
}

TEST(NearestTest, FindsTheNearestWordAndTheFirstOfEquals) {
  const std::vector<std::string> known = {"batch_size", "lr", "min_lr", "loss"};
  EXPECT_EQ(Nearest("bach_size", known), "batch_size");
  EXPECT_EQ(Nearest("minlr", known), "min_lr");
  EXPECT_EQ(Nearest("x", std::vector<std::string>{"a", "b"}), "a");
  EXPECT_EQ(Nearest("x", {}), "");
}

}  // namespace
}  // namespace pyramid
