#include "worker/collective.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

TEST(CollectiveTest, OneRankNeedsNobody) {
  ASSERT_OK_AND_ASSIGN(const auto alone, Collective::Join({}));
  torch::Tensor value = torch::ones({3});
  alone->SumNow(value);
  EXPECT_EQ(value.sum().item<float>(), 3);
  EXPECT_EQ(alone->world(), 1);
}

// Ranks as threads of one process: what they exchange goes over loopback sockets all the same.
TEST(CollectiveTest, RanksMeetSumAndAverageGradients) {
  testing::TempFolder folder;
  torch::manual_seed(0);
  const torch::Tensor w0 = torch::randn({4, 3});
  std::vector<torch::Tensor> gradients(2), weights(2), sums(2);
  const auto run = [&](int rank) {
    auto joined = Collective::Join({.rank = rank,
                                    .world = 2,
                                    .meeting_file = folder / "meet",
                                    .prefix = "t",
                                    .timeout = absl::Seconds(20)});
    ASSERT_OK(joined.status());
    Collective& collective = **joined;
    sums[rank] = torch::full({2}, rank + 1.0);
    collective.StartSum(sums[rank]);
    collective.WaitSum();
    // Only rank 0 begins with the right weights.
    torch::Tensor w = (rank == 0 ? w0.clone() : torch::zeros({4, 3})).requires_grad_();
    collective.AttachParameters({w}, 1 << 20);
    for (int micro = 0; micro < 2; ++micro) {
      collective.BeforeForward();
      if (micro == 1) collective.BeforeLastBackward();
      (w * (rank + 1.0 + micro)).sum().backward();
    }
    weights[rank] = w.detach().clone();
    gradients[rank] = w.grad().clone();
  };
  std::thread other(run, 1);
  run(0);
  other.join();
  EXPECT_EQ(sums[0][0].item<double>(), 3);
  EXPECT_EQ(sums[1][1].item<double>(), 3);
  EXPECT_TRUE(torch::equal(weights[1], w0));
  // Rank 0: 1 + 2, rank 1: 2 + 3; averaged: 4.
  EXPECT_TRUE(torch::allclose(gradients[0], torch::full({4, 3}, 4.0)));
  EXPECT_TRUE(torch::equal(gradients[0], gradients[1]));
}

TEST(CollectiveTest, ARankThatNeverComesIsAborted) {
  testing::TempFolder folder;
  EXPECT_THAT(Collective::Join({.rank = 1,
                                .world = 2,
                                .meeting_file = folder / "meet",
                                .timeout = absl::Milliseconds(300)}),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("rank 0 hasn't published")));
  EXPECT_THAT(Collective::Join({.rank = 0,
                                .world = 2,
                                .meeting_file = folder / "meet",
                                .timeout = absl::Milliseconds(300)}),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("joining the other ranks")));
}

TEST(CollectiveTest, SmallNetworksHaveSeveralBuckets) {
  EXPECT_EQ(BucketBytes(15 << 20), 3 << 20);
  EXPECT_EQ(BucketBytes(100 << 20), 25 << 20);
}

}  // namespace
}  // namespace pyramid
