#include "proto/base/log.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;

// What `write` puts on standard error.
std::string Written(const std::function<void()>& write) {
  ::testing::internal::CaptureStderr();
  write();
  return ::testing::internal::GetCapturedStderr();
}

class LogTest : public ::testing::Test {
 protected:
  ~LogTest() override { log::Configure(log::Level::kInfo); }
};

TEST_F(LogTest, WritesEventAndFieldsOnOneLine) {
  log::Configure(log::Level::kInfo);
  const std::string line = Written([] {
    log::Info("saved", {{"job", "j-1"}, {"step", 12}, {"loss", 0.5}, {"ok", true}});
  });
  EXPECT_THAT(line,
              MatchesRegex("[0-9-]+T[0-9:.]+ I saved job=j-1 step=12 loss=0.5 ok=(1|true)\n"));
}

TEST_F(LogTest, QuotesWhatWouldBreakTheLine) {
  log::Configure(log::Level::kInfo);
  const std::string line = Written([] {
    log::Warning("odd", {{"a", "x y"}, {"b", ""}, {"c", "1\n2\x1b[31m\"\\"}});
  });
  EXPECT_THAT(line, HasSubstr(R"( W odd a="x y" b="" c="1\n2\u001b[31m\"\\")"));
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1);
}

TEST_F(LogTest, DropsLinesBelowItsLevel) {
  log::Configure(log::Level::kWarning);
  EXPECT_EQ(Written([] { log::Info("quiet"); }), "");
  EXPECT_THAT(Written([] { log::Warning("loud"); }), HasSubstr("loud"));
  log::Configure(log::Level::kDebug);
  EXPECT_THAT(Written([] { log::Debug("detail"); }), HasSubstr(" D detail"));
  log::Configure(log::Level::kOff);
  EXPECT_EQ(Written([] { log::Error("nothing"); }), "");
}

TEST_F(LogTest, JsonLinesAreJson) {
  log::Configure(log::Level::kInfo, /*json=*/true);
  const std::string line = Written([] {
    log::Error("broken", {{"why", "a \"b\"\n\\ {}"}, {"n", 3}, {"rate", 0.25}, {"ok", false}});
  });
  const auto tree = nlohmann::json::parse(line, nullptr, false);
  ASSERT_FALSE(tree.is_discarded()) << line;
  EXPECT_EQ(tree["level"], "error");
  EXPECT_EQ(tree["event"], "broken");
  EXPECT_EQ(tree["why"], "a \"b\"\n\\ {}");
  EXPECT_EQ(tree["n"], 3);
  EXPECT_EQ(tree["rate"], 0.25);
  EXPECT_EQ(tree["ok"], false);
}

TEST_F(LogTest, JsonHoldsWhateverBytesCome) {
  log::Configure(log::Level::kInfo, /*json=*/true);
  const std::string line = Written([] {
    log::Info("odd", {{"utf8", "é…😀"},
                      {"not", "a\xff\xc3(\xed\xa0\x80z"},
                      {"cut", "a\xe2\x80"},
                      {"c1",
                       "\xc2\x9b"
                       "31m"},
                      {"nan", std::numeric_limits<double>::quiet_NaN()}});
  });
  const auto tree = nlohmann::json::parse(line, nullptr, false);
  ASSERT_FALSE(tree.is_discarded()) << line;
  EXPECT_EQ(tree["utf8"], "é…😀");
  EXPECT_EQ(tree["not"], "a\ufffd\ufffd(\ufffd\ufffd\ufffdz");
  EXPECT_EQ(tree["cut"], "a\ufffd\ufffd");
  EXPECT_EQ(tree["nan"], "nan");
  EXPECT_THAT(line, HasSubstr(R"(\u009b31m)")) << "no control sequence for a terminal";
}

}  // namespace
}  // namespace pyramid
