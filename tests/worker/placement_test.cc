#include "worker/placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

absl::StatusOr<Placement> From(const std::map<std::string, std::string>& variables) {
  return PlacementFrom([&](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

TEST(PlacementTest, WithoutALauncherItIsRankZeroOfOne) {
  ASSERT_OK_AND_ASSIGN(const Placement placement, From({}));
  EXPECT_EQ(placement.source, "none");
  EXPECT_EQ(placement.rank, 0);
  EXPECT_EQ(placement.world, 1);
}

TEST(PlacementTest, ReadsMpirunsVariables) {
  ASSERT_OK_AND_ASSIGN(const Placement placement, From({{"OMPI_COMM_WORLD_RANK", "3"},
                                                        {"OMPI_COMM_WORLD_SIZE", "4"},
                                                        {"OMPI_COMM_WORLD_LOCAL_RANK", "3"},
                                                        {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                                                        {"PMIX_NAMESPACE", "1234/5"}}));
  EXPECT_EQ(placement.source, "mpirun");
  EXPECT_EQ(placement.rank, 3);
  EXPECT_EQ(placement.world, 4);
  EXPECT_EQ(placement.local_world, 4);
  EXPECT_EQ(placement.meeting_key, "mpirun-1234_5");
}

TEST(PlacementTest, ReadsTorchrunsVariables) {
  ASSERT_OK_AND_ASSIGN(const Placement placement, From({{"RANK", "1"},
                                                        {"WORLD_SIZE", "2"},
                                                        {"LOCAL_RANK", "0"},
                                                        {"LOCAL_WORLD_SIZE", "1"},
                                                        {"MASTER_ADDR", "node0"},
                                                        {"MASTER_PORT", "29500"}}));
  EXPECT_EQ(placement.source, "torchrun");
  EXPECT_EQ(placement.master_host, "node0");
  EXPECT_EQ(placement.master_port, 29500);
  EXPECT_EQ(placement.local_world, 1);
}

TEST(PlacementTest, ReadsSrunsVariables) {
  ASSERT_OK_AND_ASSIGN(const Placement placement, From({{"SLURM_PROCID", "1"},
                                                        {"SLURM_NTASKS", "2"},
                                                        {"SLURM_LOCALID", "1"},
                                                        {"SLURM_JOB_ID", "77"},
                                                        {"SLURM_STEP_ID", "0"}}));
  EXPECT_EQ(placement.source, "srun");
  EXPECT_EQ(placement.rank, 1);
  EXPECT_EQ(placement.meeting_key, "srun-77.0");
}

TEST(PlacementTest, OurOwnLauncherNamesTheMeeting) {
  ASSERT_OK_AND_ASSIGN(
      const Placement placement,
      From({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"PYRAMID_MEETING_KEY", "local-1-2"}}));
  EXPECT_EQ(placement.source, "local launcher");
  EXPECT_EQ(placement.meeting_key, "local-1-2");
}

TEST(PlacementTest, NonsenseIsInvalidAndNamed) {
  EXPECT_THAT(From({{"RANK", "one"}, {"WORLD_SIZE", "2"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("RANK is \"one\"")));
  EXPECT_THAT(From({{"RANK", "2"}, {"WORLD_SIZE", "2"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("WORLD_SIZE is 2")));
}

TEST(PlacementTest, SeveralMachinesNeedAnAddress) {
  EXPECT_THAT(From({{"OMPI_COMM_WORLD_RANK", "0"},
                    {"OMPI_COMM_WORLD_SIZE", "4"},
                    {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("MASTER_ADDR")));
}

TEST(PlacementTest, ThreadsAreAtLeastOne) { EXPECT_EQ(ComputeThreads(100000), 1); }

}  // namespace
}  // namespace pyramid
