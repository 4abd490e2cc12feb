#include "server/training/checkpoints_on_disk.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::pyramid::testing::TempFolder;
using ::testing::ElementsAre;

TEST(CheckpointsOnDiskTest, ThoseWhoseFoldersAreGoneAreDropped) {
  TempFolder folder;
  v1::Job job;
  for (const char* id : {"a", "b", "c"}) {
    v1::Checkpoint& checkpoint = *job.add_checkpoints();
    checkpoint.set_id(id);
    checkpoint.set_path((folder / id).string());
  }
  std::filesystem::create_directory(folder / "b");
  EXPECT_THAT(RemovedCheckpoints(job), ElementsAre("a", "c"));
  DropCheckpoints(job, RemovedCheckpoints(job));
  ASSERT_EQ(job.checkpoints_size(), 1);
  EXPECT_EQ(job.checkpoints(0).id(), "b");
}

}  // namespace
}  // namespace pyramid
