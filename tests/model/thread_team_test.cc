#include "model/thread_team.h"

#include <gmock/gmock.h>

#include <atomic>
#include <thread>
#include <vector>

namespace pyramid {
namespace {

TEST(ShareTest, CoversEverythingOnceAtMultiplesOfTheGrain) {
  for (const int64_t n : {0, 1, 31, 32, 33, 49, 196, 3136}) {
    for (const int64_t grain : {1, 16, 32}) {
      for (const int size : {1, 2, 3, 7, 64}) {
        int64_t next = 0;
        for (int rank = 0; rank < size; ++rank) {
          const Share share = ShareOf(n, grain, rank, size);
          EXPECT_EQ(share.begin, next);
          EXPECT_LE(share.begin, share.end);
          if (share.end < n) EXPECT_EQ(share.end % grain, 0);
          next = share.end;
        }
        EXPECT_EQ(next, n) << n << " by " << grain << " on " << size;
      }
    }
  }
}

TEST(ThreadTeamTest, EveryRankRunsOnce) {
  for (int round = 0; round < 50; ++round) {
    std::vector<std::atomic<int>> ran(4);
    RunOnTeam(4, [&](int rank, int size) {
      EXPECT_EQ(size, 4);
      ran[static_cast<size_t>(rank)].fetch_add(1);
    });
    for (const auto& count : ran) EXPECT_EQ(count.load(), 1);
  }
}

TEST(ThreadTeamTest, SyncSeparatesRounds) {
  constexpr int kSize = 3, kRounds = 2000;
  TeamBarrier barrier;
  barrier.Reset(kSize);
  std::vector<int> values(kSize, 0);  // each thread writes its own, reads the others' after Sync
  std::atomic<int> wrong{0};
  RunOnTeam(kSize, [&](int rank, int size) {
    const TeamMember team(rank, size, &barrier);
    for (int round = 1; round <= kRounds; ++round) {
      values[static_cast<size_t>(rank)] = round;
      team.Sync();
      for (const int value : values) wrong += value != round;
      team.Sync();
    }
  });
  EXPECT_EQ(wrong.load(), 0);
}

TEST(ThreadTeamTest, ASecondCallerRunsAlone) {
  std::atomic<bool> inside{false}, done{false};
  std::thread first([&] {
    RunOnTeam(2, [&](int rank, int) {
      if (rank == 0) inside = true;
      while (!done) std::this_thread::yield();
    });
  });
  while (!inside) std::this_thread::yield();
  std::vector<int> sizes;
  RunOnTeam(2, [&](int, int size) { sizes.push_back(size); });
  done = true;
  first.join();
  EXPECT_THAT(sizes, ::testing::ElementsAre(1));
}

}  // namespace
}  // namespace pyramid
