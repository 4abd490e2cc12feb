#include "server/training/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace pyramid {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

const absl::Time kNow = absl::FromUnixSeconds(1000);

DevicePool Cpus(int total, int free) {
  return {.total = total, .free = std::vector<std::string>(free, "cpu")};
}

std::vector<std::string> Ids(const LaunchPlan& plan) {
  std::vector<std::string> ids;
  for (const PlannedLaunch& launch : plan.launches) ids.push_back(launch.id);
  return ids;
}

struct Row {
  std::string name;
  int total, free;
  std::vector<WaitingJob> waiting;
  std::vector<std::string> launched;
  std::map<std::string, std::string> reasons;
};

TEST(SchedulerTest, Table) {
  const std::vector<Row> rows = {
      {"nothing waits", 2, 2, {}, {}, {}},
      {"first come first served",
       2,
       2,
       {{"j-000002", 0, "cpu", 1}, {"j-000001", 0, "cpu", 1}, {"j-000003", 0, "cpu", 1}},
       {"j-000001", "j-000002"},
       {{"j-000003", "needs 1 cpu worker, 0 of 2 free"}}},
      {"all workers or none",
       2,
       1,
       {{"j-000001", 0, "cpu", 2}},
       {},
       {{"j-000001", "needs 2 cpu workers, 1 of 2 free"}}},
      {"a small job doesn't overtake a large one",
       2,
       1,
       {{"j-000001", 0, "cpu", 2}, {"j-000002", 0, "cpu", 1}, {"j-000003", 0, "cpu", 1}},
       {},
       {{"j-000001", "needs 2 cpu workers, 1 of 2 free"},
        {"j-000002", "needs 1 cpu worker, 1 of 2 free; 1 job ahead"},
        {"j-000003", "needs 1 cpu worker, 1 of 2 free; 2 jobs ahead"}}},
      {"higher priority goes first",
       2,
       2,
       {{"j-000001", 0, "cpu", 2}, {"j-000002", 5, "cpu", 2}},
       {"j-000002"},
       {{"j-000001", "needs 2 cpu workers, 0 of 2 free"}}},
      {"a job that backs off keeps its place",
       2,
       2,
       {{"j-000001", 0, "cpu", 2, kNow + absl::Milliseconds(1500)}, {"j-000002", 0, "cpu", 1}},
       {},
       {{"j-000001", "starts again at 00:16:42 UTC"},
        {"j-000002", "needs 1 cpu worker, 2 of 2 free; 1 job ahead"}}},
      {"a back-off that is over", 2, 2, {{"j-000001", 0, "cpu", 2, kNow}}, {"j-000001"}, {}},
      {"the millionth job comes after the last of six digits",
       1,
       1,
       {{"j-1000000", 0, "cpu", 1}, {"j-999999", 0, "cpu", 1}},
       {"j-999999"},
       {{"j-1000000", "needs 1 cpu worker, 0 of 1 free"}}},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    const LaunchPlan plan =
        Plan({.pools = {{"cpu", Cpus(row.total, row.free)}}, .waiting = row.waiting}, kNow);
    EXPECT_EQ(Ids(plan), row.launched);
    EXPECT_EQ(plan.reasons, row.reasons);
  }
}

TEST(SchedulerTest, KindsOfDevicesDontHoldEachOtherBack) {
  Snapshot snapshot;
  snapshot.pools["cpu"] = Cpus(2, 0);
  snapshot.pools["cuda"] = {.total = 3, .free = {"cuda:1", "cuda:2"}};
  snapshot.waiting = {{"j-000001", 0, "cpu", 2}, {"j-000002", 0, "cuda", 2}};
  const LaunchPlan plan = Plan(snapshot, kNow);
  ASSERT_THAT(Ids(plan), ElementsAre("j-000002"));
  EXPECT_THAT(plan.launches[0].devices, ElementsAre("cuda:1", "cuda:2"));
  EXPECT_THAT(plan.reasons,
              UnorderedElementsAre(Pair("j-000001", "needs 2 cpu workers, 0 of 2 free")));
}

TEST(SchedulerTest, AKindThatIsGoneIsSaidWithNumbers) {
  const LaunchPlan plan = Plan({.waiting = {{"j-000001", 0, "npu", 4}}}, kNow);
  EXPECT_THAT(plan.launches, IsEmpty());
  EXPECT_EQ(plan.reasons.at("j-000001"), "needs 4 npu workers, 0 of 0 free");
}

}  // namespace
}  // namespace pyramid
