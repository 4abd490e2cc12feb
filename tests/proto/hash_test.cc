#include "proto/base/hash.h"

#include "proto/base/file.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::HasSubstr;

// FIPS 180-2, appendix B, and the empty text.
constexpr char kEmpty[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
constexpr char kAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
constexpr char kMillionA[] = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";

TEST(HashTest, GivesThePublishedDigests) {
  EXPECT_EQ(Sha256Hex(""), kEmpty);
  EXPECT_EQ(Sha256Hex("abc"), kAbc);
  EXPECT_EQ(Sha256Hex(std::string(1'000'000, 'a')), kMillionA);
}

TEST(HashTest, PiecesMakeTheSameDigest) {
  Sha256 hash;
  hash.Update("a");
  hash.Update("");
  hash.Update("bc");
  EXPECT_EQ(hash.HexDigest(), kAbc);
}

TEST(HashTest, FilesOfAnySizeAreHashed) {
  testing::TempFolder folder;
  ASSERT_OK(WriteFileSynced(folder / "empty", ""));
  ASSERT_OK_AND_ASSIGN(const std::string empty, Sha256HexOfFile(folder / "empty"));
  EXPECT_EQ(empty, kEmpty);
  const std::string large((1 << 20) + 1, 'a');  // more than one piece
  ASSERT_OK(WriteFileSynced(folder / "large", large));
  ASSERT_OK_AND_ASSIGN(const std::string digest, Sha256HexOfFile(folder / "large"));
  EXPECT_EQ(digest, Sha256Hex(large));
  EXPECT_THAT(Sha256HexOfFile(folder / "none"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  EXPECT_THAT(Sha256HexOfFile(folder.path()),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("can't read")));
}

}  // namespace
}  // namespace pyramid
