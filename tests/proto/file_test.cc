#include "proto/base/file.h"

#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::HasSubstr;

std::string Slurp(const fs::path& path) {
  auto bytes = ReadFile(path);
  EXPECT_OK(bytes);
  return bytes.ok() ? *bytes : "";
}

TEST(FileTest, ReadsBackWhatItWrote) {
  TempFolder folder;
  const std::string bytes("a\0b\n", 4);
  ASSERT_OK(WriteFileAtomically(folder / "f", bytes));
  EXPECT_EQ(Slurp(folder / "f"), bytes);
  ASSERT_OK(WriteFileAtomically(folder / "f", ""));
  EXPECT_EQ(Slurp(folder / "f"), "");
  const std::string large(3'000'000, 'x');
  ASSERT_OK(WriteFileSynced(folder / "f", large));
  EXPECT_EQ(Slurp(folder / "f"), large);
  EXPECT_FALSE(fs::exists(folder / "f.tmp"));
}

TEST(FileTest, ReadsFilesWithoutASize) {
  EXPECT_THAT(Slurp("/proc/self/status"), HasSubstr("Pid:"));
}

TEST(FileTest, KeepsToTheLargestSize) {
  TempFolder folder;
  ASSERT_OK(WriteFileSynced(folder / "f", "12345"));
  EXPECT_OK(ReadFile(folder / "f", 5));
  EXPECT_THAT(ReadFile(folder / "f", 4), StatusIs(absl::StatusCode::kInvalidArgument,
                                                  HasSubstr("has 5 bytes; at most 4 are read")));
}

TEST(FileTest, EveryErrorNamesThePathAndTheReason) {
  TempFolder folder;
  EXPECT_THAT(ReadFile(folder / "none"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none: No such file")));
  EXPECT_THAT(ReadFile(folder.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is a folder")));
  EXPECT_THAT(WriteFileSynced(folder / "no/folder", "x"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no/folder")));
  EXPECT_THAT(WriteFileAtomically(folder / "no/folder", "x"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no/folder.tmp")));
  EXPECT_THAT(SyncFolder(folder / "none"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  EXPECT_THAT(RenameSynced(folder / "none", folder / "to"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("to")));
  ASSERT_OK(WriteFileSynced(folder / "file", "x"));
  EXPECT_THAT(MakeFolders(folder / "file/below"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("file/below")));
  EXPECT_THAT(ReadFile(folder / "file/below"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("Not a directory")));
}

TEST(FileTest, ErrnosHaveTheirCodes) {
  EXPECT_EQ(ErrnoStatus(ENOENT, "w", "p").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ErrnoStatus(EACCES, "w", "p").code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(ErrnoStatus(EROFS, "w", "p").code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(ErrnoStatus(EEXIST, "w", "p").code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(ErrnoStatus(ENOSPC, "w", "p").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrnoStatus(EDQUOT, "w", "p").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrnoStatus(EIO, "w", "p").code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ErrnoStatus(EIO, "can't read", "/a/b").message(),
            "can't read /a/b: Input/output error");
}

TEST(FileTest, MakesFoldersAndRenames) {
  TempFolder folder;
  ASSERT_OK(MakeFolders(folder / "a/b/c"));
  ASSERT_OK(MakeFolders(folder / "a/b/c"));
  ASSERT_OK(RenameSynced(folder / "a/b/c", folder / "a/d"));
  EXPECT_TRUE(fs::is_directory(folder / "a/d"));
  EXPECT_FALSE(fs::exists(folder / "a/b/c"));
}

TEST(FileTest, AFailedReplacementLeavesTheOldFile) {
  TempFolder folder;
  fs::create_directories(folder / "target/occupied");
  EXPECT_FALSE(WriteFileAtomically(folder / "target", "x").ok());
  EXPECT_TRUE(fs::is_directory(folder / "target/occupied"));
  EXPECT_FALSE(fs::exists(folder / "target.tmp"));
}

TEST(FileTest, AFullDiskIsResourceExhaustedAndLeavesTheOldFile) {
  TempFolder folder;
  const fs::path disk = folder / "disk";
  fs::create_directory(disk);
  if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=64k") != 0) {
    GTEST_SKIP() << "this user can't mount a tmpfs: " << std::strerror(errno);
  }
  const absl::Cleanup unmount = [&] { umount2(disk.c_str(), MNT_DETACH); };
  ASSERT_OK(WriteFileAtomically(disk / "f", "old"));
  EXPECT_THAT(WriteFileAtomically(disk / "f", std::string(200'000, 'x')),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("No space left")));
  EXPECT_EQ(Slurp(disk / "f"), "old");
  EXPECT_FALSE(fs::exists(disk / "f.tmp"));
}

}  // namespace
}  // namespace pyramid
