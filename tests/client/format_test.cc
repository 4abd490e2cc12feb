#include "client/format.h"

#include <gtest/gtest.h>

#include <cmath>

#include "proto/training.pb.h"

namespace pyramid {
namespace {

TEST(FormatTest, CountsHaveThousandsSeparators) {
  EXPECT_EQ(FormatCount(0), "0");
  EXPECT_EQ(FormatCount(999), "999");
  EXPECT_EQ(FormatCount(1000), "1,000");
  EXPECT_EQ(FormatCount(1234567), "1,234,567");
  EXPECT_EQ(FormatCount(-1234), "-1,234");
  EXPECT_EQ(FormatCount(-123), "-123");
}

TEST(FormatTest, RatesKeepThreeDigits) {
  EXPECT_EQ(FormatRate(0.534), "0.53");
  EXPECT_EQ(FormatRate(9.996), "10.0");
  EXPECT_EQ(FormatRate(98.7), "98.7");
  EXPECT_EQ(FormatRate(1234.4), "1,234");
  EXPECT_EQ(FormatRate(NAN), "?");
}

TEST(FormatTest, BytesHaveAUnit) {
  EXPECT_EQ(FormatBytes(999), "999 B");
  EXPECT_EQ(FormatBytes(14'300'000), "14.3 MB");
  EXPECT_EQ(FormatBytes(999'600), "1.0 MB");
  EXPECT_EQ(FormatBytes(345'000'000'000), "345 GB");
}

TEST(FormatTest, SecondsBecomeMinutesHoursDays) {
  EXPECT_EQ(FormatSeconds(0), "0.0 s");
  EXPECT_EQ(FormatSeconds(0.0123), "12 ms");
  EXPECT_EQ(FormatSeconds(0.9996), "1.0 s");
  EXPECT_EQ(FormatSeconds(8.44), "8.4 s");
  EXPECT_EQ(FormatSeconds(59.96), "1m00s");
  EXPECT_EQ(FormatSeconds(123), "2m03s");
  EXPECT_EQ(FormatSeconds(3900), "1h05m");
  EXPECT_EQ(FormatSeconds(3 * 86400 + 4 * 3600), "3d04h");
  EXPECT_EQ(FormatSeconds(-1), "?");
  EXPECT_EQ(FormatSeconds(INFINITY), "?");
}

TEST(FormatTest, UnsetTimeIsEmpty) { EXPECT_EQ(FormatTime({}), ""); }

TEST(TableTest, AlignsColumnsByCodePoints) {
  Table table({"NAME", "N"});
  table.Right(1);
  table.Add({"añb", "1"});
  table.Add({"longer name", "1,234"});
  EXPECT_EQ(table.Text(),
            "NAME             N\n"
            "añb              1\n"
            "longer name  1,234\n");
}

TEST(TableTest, LinesEndWithoutBlanks) {
  Table table;
  table.Add({"a", ""});
  table.Add({"bb", "x"});
  EXPECT_EQ(table.Text(), "a\nbb  x\n");
}

TEST(JsonTest, KeepsFieldNamesAndShowsEveryField) {
  v1::Checkpoint checkpoint;
  checkpoint.set_epochs_done(3);
  const std::string json = ToJson(checkpoint);
  EXPECT_NE(json.find("\"epochs_done\":3"), std::string::npos) << json;
  EXPECT_NE(json.find("\"val_top1\":0"), std::string::npos) << json;
  EXPECT_EQ(json.find('\n'), std::string::npos);
}

}  // namespace
}  // namespace pyramid
