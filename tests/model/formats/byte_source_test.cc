#include "model/formats/byte_source.h"

#include <sys/stat.h>
#include <unistd.h>

#include "proto/base/file.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::_;
using ::testing::HasSubstr;

TEST(ByteSourceTest, FilesAndMemoryReadTheSame) {
  const testing::TempFolder folder;
  ASSERT_OK(WriteFileSynced(folder / "f", "0123456789"));
  ASSERT_OK_AND_ASSIGN(const auto file, OpenByteSource(folder / "f"));
  for (const auto& source : {file, MakeMemorySource("0123456789")}) {
    EXPECT_EQ(source->size(), 10);
    std::string out(4, ' ');
    ASSERT_OK(source->Read(3, std::span<char>(out)));
    EXPECT_EQ(out, "3456");
    EXPECT_OK(source->Read(10, {}));
    for (const int64_t offset : {int64_t{7}, int64_t{10}, int64_t{11}, int64_t{-1}, INT64_MAX}) {
      EXPECT_THAT(source->Read(offset, std::span<char>(out)),
                  StatusIs(absl::StatusCode::kDataLoss, _));
    }
  }
}

TEST(ByteSourceTest, OpensRegularFilesOnly) {
  const testing::TempFolder folder;
  EXPECT_THAT(OpenByteSource(folder / "none"), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(OpenByteSource(folder.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is a folder")));
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(OpenByteSource(folder / "pipe"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("regular file")));
}

TEST(ByteSourceTest, AFileThatMayNotBeReadIsPermissionDenied) {
  const testing::TempFolder folder;
  ASSERT_OK(WriteFileSynced(folder / "secret", "x"));
  ASSERT_EQ(chmod((folder / "secret").c_str(), 0), 0);
  const bool root = geteuid() == 0;  // who may read everything
  if (root) {
    ASSERT_EQ(seteuid(65534), 0);
  }
  const auto opened = OpenByteSource(folder / "secret");
  if (root) {
    ASSERT_EQ(seteuid(0), 0);
  }
  EXPECT_THAT(opened, StatusIs(absl::StatusCode::kPermissionDenied, _));
}

TEST(BufferedReaderTest, WalksItsPart) {
  std::string bytes(200'000, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 7);
  const auto source = MakeMemorySource(bytes);
  BufferedReader reader(*source, 10, 199'990);
  ASSERT_OK_AND_ASSIGN(const uint8_t first, reader.Byte());
  EXPECT_EQ(first, static_cast<uint8_t>(70));
  ASSERT_OK_AND_ASSIGN(const std::string part, reader.Text(70'000));  // more than its buffer
  EXPECT_EQ(part, bytes.substr(11, 70'000));
  ASSERT_OK(reader.Skip(9));
  EXPECT_EQ(reader.offset(), 70'020);
  ASSERT_OK_AND_ASSIGN(const std::string rest, reader.Text(reader.remaining()));
  EXPECT_EQ(rest, bytes.substr(70'020, 129'970));
  EXPECT_THAT(reader.Byte(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("0 are left")));
  EXPECT_THAT(reader.Skip(1), StatusIs(absl::StatusCode::kDataLoss, _));
  EXPECT_THAT(reader.Skip(-1), StatusIs(absl::StatusCode::kDataLoss, _));
  EXPECT_THAT(reader.Text(1), StatusIs(absl::StatusCode::kDataLoss, _));
}

TEST(BufferedReaderTest, ReadsNumbersAndLines) {
  const auto source = MakeMemorySource(std::string("\1\2\0\0one\ntoo long\n", 17));
  BufferedReader reader(*source, 0, 100);
  ASSERT_OK_AND_ASSIGN(const uint64_t number, reader.LittleEndian(4));
  EXPECT_EQ(number, 513u);
  ASSERT_OK_AND_ASSIGN(const std::string line, reader.Line(10));
  EXPECT_EQ(line, "one");
  EXPECT_THAT(reader.Line(5), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("more than 5")));
  BufferedReader open_end(*source, 8, 12);
  EXPECT_THAT(open_end.Line(100), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("truncated")));
}

}  // namespace
}  // namespace pyramid
