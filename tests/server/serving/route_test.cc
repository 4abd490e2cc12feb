#include "server/serving/route.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

v1::ModelState Sharing(double percent, const std::string& name = "fashion") {
  v1::ModelState state;
  state.set_name(name);
  state.set_traffic_alias("canary");
  state.set_traffic_percent(percent);
  return state;
}

int CountIn(const v1::ModelState& state, int keys) {
  int in = 0;
  for (int i = 0; i < keys; ++i) {
    in += GoesToTrafficAlias(state, RouteKeyOf(absl::StrCat("request-", i))) ? 1 : 0;
  }
  return in;
}

TEST(RouteTest, ReadsNameVersionAndAlias) {
  const auto plain = ParseModelReference("fashion");
  ASSERT_OK(plain);
  EXPECT_EQ(plain->name, "fashion");
  EXPECT_EQ(plain->version, 0);
  EXPECT_EQ(plain->alias, "");
  EXPECT_EQ(ParseModelReference("fashion", 7)->version, 7);
  EXPECT_EQ(ParseModelReference("fashion:12")->version, 12);
  EXPECT_EQ(ParseModelReference("fashion:12", 12)->version, 12);
  EXPECT_EQ(ParseModelReference("fashion@canary")->alias, "canary");
  EXPECT_EQ(ParseModelReference("fashion@canary")->name, "fashion");
  EXPECT_EQ(ParseModelReference("")->name, "");
  EXPECT_EQ(ModelNameOf("fashion@canary"), "fashion");
  EXPECT_EQ(ModelNameOf("fashion:3"), "fashion");
  EXPECT_EQ(ModelNameOf("fashion"), "fashion");
}

TEST(RouteTest, ContradictionsAndGarbageAreRefused) {
  for (const char* text : {"fashion:", "fashion:0", "fashion:-1", "fashion:x", "fashion:1@canary",
                           "fashion@", "@canary", ":3", "fashion:99999999999999999999"}) {
    EXPECT_THAT(ParseModelReference(text),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("NAME@ALIAS")))
        << text;
  }
  EXPECT_THAT(ParseModelReference("fashion:3", 4),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("version is 4")));
  EXPECT_THAT(ParseModelReference("fashion@canary", 4),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("version is 4")));
}

TEST(RouteTest, AShareIsKeptToWithinChance) {
  constexpr int kKeys = 20'000;
  for (const double percent : {0.5, 1.0, 10.0, 33.3, 50.0, 90.0}) {
    const double share = 100.0 * CountIn(Sharing(percent), kKeys) / kKeys;
    // Five standard deviations.
    EXPECT_NEAR(share, percent, 5 * std::sqrt(percent * (100 - percent) / kKeys)) << percent;
  }
  EXPECT_EQ(CountIn(Sharing(0), 1000), 0);
  EXPECT_EQ(CountIn(Sharing(100), 1000), 1000);
}

TEST(RouteTest, WhoIsInStaysInAtALargerShare) {
  for (int i = 0; i < 2000; ++i) {
    const uint64_t key = RouteKeyOf(absl::StrCat("k", i));
    if (GoesToTrafficAlias(Sharing(5), key)) {
      EXPECT_TRUE(GoesToTrafficAlias(Sharing(20), key));
    }
  }
}

TEST(RouteTest, ModelsDrawAnew) {
  int both = 0;
  for (int i = 0; i < 10'000; ++i) {
    const uint64_t key = RouteKeyOf(absl::StrCat("k", i));
    both += GoesToTrafficAlias(Sharing(10, "a"), key) && GoesToTrafficAlias(Sharing(10, "b"), key);
  }
  EXPECT_NEAR(both, 100, 50);  // a tenth of a tenth, not a tenth
}

TEST(RouteTest, WithoutAnAliasNobodyLeaves) {
  v1::ModelState state = Sharing(50);
  state.clear_traffic_alias();
  EXPECT_EQ(CountIn(state, 1000), 0);
}

TEST(RouteTest, TheKeyIsTheStickyKeyThenTheRequestIdThenThePicture) {
  v1::ClassifyRequest request;
  const std::string picture(4000, 'p');
  const uint64_t by_picture = RouteKeyOf(request, absl::string_view(picture));
  request.set_request_id("r-1");
  const uint64_t by_id = RouteKeyOf(request, absl::string_view(picture));
  EXPECT_EQ(by_id, RouteKeyOf(absl::string_view("r-1")));
  EXPECT_NE(by_id, by_picture);
  request.set_sticky_key("user-7");
  EXPECT_EQ(RouteKeyOf(request, absl::string_view(picture)),
            RouteKeyOf(absl::string_view("user-7")));
}

// Retries of one picture go the same way, other pictures theirs.
TEST(RouteTest, PicturesDifferBySizeAndMiddle) {
  const v1::ClassifyRequest request;
  const std::string picture(4000, 'p');
  std::string other = picture;
  other[2000] = 'q';
  EXPECT_EQ(RouteKeyOf(request, absl::string_view(picture)),
            RouteKeyOf(request, absl::string_view(std::string(picture))));
  EXPECT_NE(RouteKeyOf(request, absl::string_view(picture)),
            RouteKeyOf(request, absl::string_view(other)));
  EXPECT_NE(RouteKeyOf(request, absl::string_view(picture)),
            RouteKeyOf(request, absl::string_view(picture + "p")));
  EXPECT_EQ(RouteKeyOf(request, Pieces()), RouteKeyOf(request, Pieces()));
}

// Another process, another build: the same version. The number is FNV-1a's of "r-1".
TEST(RouteTest, KeysDontDependOnTheProcess) {
  EXPECT_EQ(RouteKeyOf(absl::string_view("")), 0xcbf29ce484222325u);
  EXPECT_EQ(RouteKeyOf(absl::string_view("a")), 0xaf63dc4c8601ec8cu);
}

}  // namespace
}  // namespace pyramid
