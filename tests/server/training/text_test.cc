#include "server/training/text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "proto/training.pb.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::TempFolder;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(CleanLineTest, KeepsGoodTextAndReplacesTheRest) {
  EXPECT_EQ(CleanLine("loss 0.5\t\u00e9 \u20ac \U0001F600"), "loss 0.5\t\u00e9 \u20ac \U0001F600");
  EXPECT_EQ(CleanLine("a\x1b[31mred\x7f"), "a [31mred ");
  EXPECT_EQ(CleanLine("\xff\xc3"), "??");
  EXPECT_EQ(CleanLine("\xc0\x80"), "??");            // too long a form of NUL
  EXPECT_EQ(CleanLine("\xed\xa0\x80"), "???");       // a surrogate
  EXPECT_EQ(CleanLine("\xf4\x90\x80\x80"), "????");  // beyond U+10FFFF
}

TEST(CleanLineTest, CutsBetweenCharacters) {
  EXPECT_EQ(CleanLine("abc", 2), "ab");
  EXPECT_EQ(CleanLine("a\u20ac", 3), "a");
}

TEST(CleanLineTest, WhatComesOutIsATextThatProtobufTakes) {
  v1::LogLine line;
  for (int a = 0; a < 256; ++a) {
    for (int b = 0; b < 256; ++b) {
      line.set_text(CleanLine(std::string({static_cast<char>(a), static_cast<char>(b), 'x'})));
      v1::LogLine back;
      ASSERT_TRUE(back.ParseFromString(line.SerializeAsString())) << a << " " << b;
    }
  }
}

TEST(LastLinesTest, GivesTheEndOfAFile) {
  TempFolder folder;
  std::ofstream out(folder / "log");
  for (int i = 0; i < 10000; ++i) out << "line " << i << "\n\n";
  out.close();
  EXPECT_THAT(LastLines(folder / "log", 3), ElementsAre("line 9997", "line 9998", "line 9999"));
  EXPECT_THAT(LastLines(folder / "none", 3), IsEmpty());
}

}  // namespace
}  // namespace pyramid
