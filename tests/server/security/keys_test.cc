#include "server/security/keys.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "proto/base/key.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using testing::StatusIs;

std::string Entry(const std::string& name, const std::string& key, const std::string& rest) {
  return absl::StrCat("- {name: ", name, ", sha256: \"", KeyHash(key), "\", ", rest, "}\n");
}

TEST(NewKeyTest, HasAPrefixAndDiffersEachTime) {
  ASSERT_OK_AND_ASSIGN(const std::string one, NewKey());
  ASSERT_OK_AND_ASSIGN(const std::string other, NewKey());
  EXPECT_NE(one, other);
  EXPECT_THAT(one, MatchesRegex("pyr_[A-Za-z0-9_-]{43}"));
  EXPECT_THAT(KeyHash(one), MatchesRegex("[0-9a-f]{64}"));
}

TEST(SameSecretTest, ComparesWholeTexts) {
  EXPECT_TRUE(SameSecret("abc", "abc"));
  EXPECT_FALSE(SameSecret("abc", "abd"));
  EXPECT_FALSE(SameSecret("abc", "abcd"));
  EXPECT_FALSE(SameSecret("", "a"));
}

TEST(HmacTest, IsRfc4231sSecondCase) {
  EXPECT_EQ(HmacHex("Jefe", "what do ya want for nothing?"),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

TEST(ParseKeysTest, ReadsEveryField) {
  ASSERT_OK_AND_ASSIGN(
      const std::vector<KeyEntry> keys,
      ParseKeys(absl::StrCat("- name: phones\n  sha256: ", KeyHash("a"),
                             "\n  scopes: [infer, submit]\n  images_per_second: 2.5\n"
                             "  expires: 2027-01-31\n",
                             Entry("root", "b", "scopes: [admin]"))));
  ASSERT_EQ(keys.size(), 2u);
  EXPECT_EQ(keys[0].name, "phones");
  EXPECT_EQ(keys[0].sha256, KeyHash("a"));
  EXPECT_EQ(keys[0].scopes.Text(), "infer, submit");
  EXPECT_EQ(keys[0].images_per_second, 2.5);
  EXPECT_EQ(absl::FormatTime("%Y-%m-%d %H:%M", keys[0].expires, absl::UTCTimeZone()),
            "2027-01-31 00:00");
  EXPECT_EQ(keys[1].scopes.Text(), "admin");
  EXPECT_EQ(keys[1].expires, absl::InfiniteFuture());
  EXPECT_OK(ParseKeys(""));
}

TEST(ParseKeysTest, ErrorsNameTheEntry) {
  const std::string hash = KeyHash("a");
  const auto refused = [](const std::string& yaml, const std::string& text) {
    EXPECT_THAT(ParseKeys(yaml), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text)))
        << yaml;
  };
  refused("name: x", "not a list of keys");
  refused("- x", "key 1 is not a map");
  refused("[1, 2", "not YAML");
  refused(absl::StrCat("- {name: x, sha256: ", hash, ", scopes: [infer], scope: 1}"),
          "key 1.scope is not a known key; did you mean scopes?");
  refused(absl::StrCat("- {name: x, sha256: ", hash, ", scopes: [infre]}"),
          "key 1.scopes has \"infre\"; use infer, submit, worker, admin");
  refused(absl::StrCat("- {name: x, sha256: ", hash, ", scopes: infer}"), "is not a list");
  refused(absl::StrCat("- {name: x, sha256: ", hash, "}"), "key 1 (x) has no scopes");
  refused(absl::StrCat("- {name: x, sha256: ", hash, ", scopes: []}"), "key 1 (x) has no scopes");
  refused("- {name: x, scopes: [infer]}", "key 1 (x) has no sha256");
  refused("- {name: x, sha256: abc, scopes: [infer]}", "key 1.sha256 is not 64 hex digits");
  refused(absl::StrCat("- {sha256: ", hash, ", scopes: [infer]}"), "key 1.name is \"\"");
  refused(absl::StrCat("- {name: a b, sha256: ", hash, ", scopes: [infer]}"), "without blanks");
  refused(absl::StrCat("- {name: x, sha256: ", hash, ", scopes: [infer], images_per_second: 0}"),
          "images_per_second is 0; use a number over 0");
  refused(absl::StrCat("- {name: x, sha256: ", hash, ", scopes: [infer], expires: soon}"),
          "use a day like 2027-01-31");
  refused(Entry("x", "a", "scopes: [infer]") + Entry("x", "b", "scopes: [infer]"),
          "the name x stands twice");
  refused(Entry("x", "a", "scopes: [infer]") + Entry("y", "a", "scopes: [infer]"),
          "the sha256 of y stands twice");
  refused(absl::StrCat("- {name: x, name: y, sha256: ", hash, ", scopes: [infer]}"),
          "name stands twice");
}

class KeyRingTest : public ::testing::Test {
 protected:
  void Write(const std::string& yaml) { ASSERT_OK(WriteFileAtomically(path_, yaml)); }

  testing::TempFolder folder_;
  const std::filesystem::path path_ = folder_ / "keys.yaml";
  testing::FakeClock clock_;
};

TEST_F(KeyRingTest, FindsWhoseKeyItIs) {
  Write(Entry("one", "k1", "scopes: [infer]") + Entry("two", "k2", "scopes: [submit]"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<KeyRing> ring, KeyRing::Open(path_, clock_));
  ASSERT_NE(ring->Find("k1"), nullptr);
  EXPECT_EQ(ring->Find("k1")->name(), "one");
  EXPECT_EQ(ring->Find("k2")->name(), "two");
  EXPECT_EQ(ring->Find("k3"), nullptr);
  EXPECT_EQ(ring->Find(KeyHash("k1")), nullptr) << "the hash is no key";
  EXPECT_EQ(ring->Find(""), nullptr);
}

TEST_F(KeyRingTest, AMissingOrBrokenFileIsAnError) {
  EXPECT_THAT(KeyRing::Open(path_, clock_),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("keys.yaml")));
  Write("- {name: x}");
  EXPECT_THAT(KeyRing::Open(path_, clock_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("keys.yaml: key 1")));
}

TEST_F(KeyRingTest, AChangedFileCountsWithinASecond) {
  Write(Entry("one", "k1", "scopes: [infer]"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<KeyRing> ring, KeyRing::Open(path_, clock_));
  Write(Entry("two", "k2", "scopes: [infer]"));
  clock_.Advance(absl::Milliseconds(1100));
  EXPECT_EQ(ring->Find("k1"), nullptr) << "taken back";
  EXPECT_NE(ring->Find("k2"), nullptr);
}

TEST_F(KeyRingTest, ABrokenChangeKeepsTheOldKeys) {
  Write(Entry("one", "k1", "scopes: [infer]"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<KeyRing> ring, KeyRing::Open(path_, clock_));
  Write("- {name: ");
  clock_.Advance(absl::Seconds(2));
  EXPECT_NE(ring->Find("k1"), nullptr);
  std::filesystem::remove(path_);
  clock_.Advance(absl::Seconds(2));
  EXPECT_NE(ring->Find("k1"), nullptr);
}

TEST_F(KeyRingTest, AReloadGivesNoFreshRate) {
  Write(Entry("one", "k1", "scopes: [infer], images_per_second: 4"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<KeyRing> ring, KeyRing::Open(path_, clock_));
  EXPECT_EQ(ring->Find("k1")->Charge(4, clock_.Now()), absl::ZeroDuration());
  Write(Entry("one", "k1", "scopes: [infer], images_per_second: 4") +
        Entry("two", "k2", "scopes: [infer]"));
  clock_.Advance(absl::Milliseconds(1250));
  ASSERT_NE(ring->Find("k2"), nullptr);
  EXPECT_EQ(ring->Find("k1")->Charge(4, clock_.Now()), absl::ZeroDuration());
  EXPECT_GT(ring->Find("k1")->Charge(1, clock_.Now()), absl::ZeroDuration());
}

}  // namespace
}  // namespace pyramid
