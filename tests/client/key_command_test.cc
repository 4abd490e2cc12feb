#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "client/exit_code.h"
#include "proto/base/key.h"
#include "tests/client/client_fixture.h"

namespace pyramid {
namespace {

using testing::CommandResult;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

class KeyCommandTest : public testing::ClientFixture {};

TEST_F(KeyCommandTest, PrintsTheKeyAndTheServersLine) {
  const CommandResult result = Pyramid({"key", "new", "phones"});
  EXPECT_EQ(result.code, kDone);
  EXPECT_THAT(result.out, MatchesRegex("pyr_[A-Za-z0-9_-]{43}\n"));
  const std::string key(absl::StripAsciiWhitespace(result.out));
  EXPECT_THAT(result.err, HasSubstr(absl::StrCat("- {name: phones, sha256: \"", KeyHash(key),
                                                 "\", scopes: [infer]}\n")));
}

TEST_F(KeyCommandTest, JsonHasBoth) {
  const CommandResult result =
      Pyramid({"key", "new", "lab", "--scopes", "submit,infer", "--images-per-second", "2.5",
               "--expires", "2027-01-31", "--json"});
  EXPECT_EQ(result.code, kDone);
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json.at("entry"),
            absl::StrCat("- {name: lab, sha256: \"", KeyHash(json.at("key").get<std::string>()),
                         "\", scopes: [submit, infer], images_per_second: 2.5, expires: "
                         "2027-01-31}"));
}

TEST_F(KeyCommandTest, BadWordsAreWrongUsage) {
  EXPECT_EQ(Pyramid({"key"}).code, kWrongUsage);
  EXPECT_EQ(Pyramid({"key", "new"}).code, kWrongUsage);
  EXPECT_EQ(Pyramid({"key", "new", "a b"}).code, kWrongUsage);
  EXPECT_EQ(Pyramid({"key", "new", "x", "--scopes", "everything"}).code, kWrongUsage);
  EXPECT_EQ(Pyramid({"key", "new", "x", "--images-per-second", "0"}).code, kWrongUsage);
  EXPECT_EQ(Pyramid({"key", "new", "x", "--expires", "soon"}).code, kWrongUsage);
}

}  // namespace
}  // namespace pyramid
