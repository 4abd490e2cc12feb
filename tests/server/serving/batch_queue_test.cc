#include "server/serving/batch_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "server/serving/pushback.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::StatusIs;

constexpr absl::StatusCode kExhausted = absl::StatusCode::kResourceExhausted;

constexpr absl::Time kStart = absl::UnixEpoch();

absl::Time At(int milliseconds) { return kStart + absl::Milliseconds(milliseconds); }

// The policy. Pictures: arrival in ms, deadline in ms (-1: none), size, cancelled.
struct Waiter {
  int arrival = 0;
  int deadline = -1;
  int height = 32;
  int width = 32;
  bool cancelled = false;
  int most = INT_MAX;
  bool trial = false;
  int priority = kDefaultPriority;
};

// Batches that take 10 ms and 2 ms a picture of 32x32.
BatchTimes TenAndTwo(absl::Time now) {
  BatchTimes times;
  times.Observe(32 * 32, 1, absl::Milliseconds(12), now);
  times.Observe(32 * 32, 32, absl::Milliseconds(74), now);
  return times;
}

struct CutCase {
  const char* name;
  std::vector<Waiter> queue;
  int now = 0;
  int max_batch = 3;
  int max_delay = 0;
  bool draining = false;
  bool timed = false;    // TenAndTwo
  std::string verdicts;  // R runs, W waits, E expired, C cancelled, L late
  int look_again = -1;   // -1: never
};

class CutBatchTest : public ::testing::TestWithParam<CutCase> {};

TEST_P(CutBatchTest, GivesEachPictureItsVerdict) {
  const CutCase& c = GetParam();
  std::vector<WaitingPicture> queue;
  for (const Waiter& w : c.queue) {
    queue.push_back({w.height, w.width, At(w.arrival),
                     w.deadline < 0 ? absl::InfiniteFuture() : At(w.deadline), w.priority, w.most,
                     w.trial, w.cancelled});
  }
  BatchQueue::Options options;
  options.max_batch = c.max_batch;
  options.max_delay = absl::Milliseconds(c.max_delay);
  const BatchTimes times = c.timed ? TenAndTwo(At(0)) : BatchTimes();
  const BatchCut cut = CutBatch(
      queue, At(c.now), options, [&](int64_t pixels) { return times.For(pixels); }, c.draining);
  std::string verdicts;
  for (const Verdict verdict : cut.verdicts) verdicts += "WRECL"[static_cast<int>(verdict)];
  EXPECT_EQ(verdicts, c.verdicts);
  EXPECT_EQ(cut.look_again, c.look_again < 0 ? absl::InfiniteFuture() : At(c.look_again));
}

INSTANTIATE_TEST_SUITE_P(
    Policy, CutBatchTest,
    ::testing::Values(
        CutCase{.name = "NothingWaits", .queue = {}, .verdicts = ""},
        CutCase{.name = "ALonelyPictureRunsAtOnce", .queue = {{}}, .verdicts = "R"},
        CutCase{.name = "WhatGatheredRunsTogether", .queue = {{}, {}, {}}, .verdicts = "RRR"},
        CutCase{.name = "CutAtMaxBatch", .queue = {{}, {}, {}, {}}, .verdicts = "RRRW"},
        CutCase{.name = "CutWhereTheHeightChanges",
                .queue = {{}, {.height = 64}, {}},
                .verdicts = "RWW"},
        CutCase{
            .name = "CutWhereTheWidthChanges", .queue = {{}, {}, {.width = 64}}, .verdicts = "RRW"},
        CutCase{.name = "CutWherePixelsExceedThreeUsualPictures",
                .queue = {{.height = 300, .width = 300},
                          {.height = 300, .width = 300},
                          {.height = 300, .width = 300}},
                .verdicts = "RWW"},
        CutCase{.name = "AHugePictureRunsAlone",
                .queue = {{.height = 1024, .width = 1024}, {.height = 1024, .width = 1024}},
                .verdicts = "RW"},
        CutCase{.name = "WaitsForCompanyUntilTheOldestReachesMaxDelay",
                .queue = {{.arrival = 1}, {.arrival = 3}},
                .now = 4,
                .max_delay = 5,
                .verdicts = "WW",
                .look_again = 6},
        CutCase{.name = "RunsWhenTheOldestReachesMaxDelay",
                .queue = {{.arrival = 1}, {.arrival = 3}},
                .now = 6,
                .max_delay = 5,
                .verdicts = "RR"},
        CutCase{.name = "AFullBatchWaitsForNobody",
                .queue = {{}, {}, {}},
                .max_delay = 5,
                .verdicts = "RRR"},
        CutCase{.name = "ABatchThatCannotGrowWaitsForNobody",
                .queue = {{}, {.height = 64}},
                .max_delay = 5,
                .verdicts = "RW"},
        CutCase{.name = "DrainingWaitsForNobody",
                .queue = {{}},
                .max_delay = 5,
                .draining = true,
                .verdicts = "R"},
        CutCase{.name = "ADeadlineWithinTheDelayIsNotWaitedFor",
                .queue = {{}, {.deadline = 4}},
                .max_delay = 5,
                .verdicts = "RR"},
        CutCase{.name = "ExpiredAtItsDeadline",
                .queue = {{.deadline = 5}, {.deadline = 6}},
                .now = 5,
                .verdicts = "ER"},
        CutCase{.name = "TheExpiredTakeNoPlaceInTheBatch",
                .queue = {{}, {.deadline = 1}, {}, {}},
                .now = 2,
                .verdicts = "RERR"},
        CutCase{.name = "TheExpiredBehindTheBatchGoToo",
                .queue = {{}, {}, {}, {.deadline = 1}, {}},
                .now = 2,
                .verdicts = "RRREW"},
        CutCase{.name = "CancelledOnesAreTakenOut",
                .queue = {{.cancelled = true}, {}, {.cancelled = true}},
                .verdicts = "CRC"},
        CutCase{.name = "ExpiredComesBeforeCancelled",
                .queue = {{.deadline = 1, .cancelled = true}},
                .now = 1,
                .verdicts = "E"},
        CutCase{.name = "TheExpiredGoWhileOthersWaitForCompany",
                .queue = {{.arrival = 0, .deadline = 2}, {.arrival = 1}},
                .now = 3,
                .max_delay = 5,
                .verdicts = "EW",
                .look_again = 6},
        // 12 ms for one, 14 for two, 16 for three; 13.04, 15.2, 17.4 at most.
        CutCase{.name = "WhatCantBeAnsweredInTimeIsTakenOut",
                .queue = {{.deadline = 13}, {.deadline = 14}, {}},
                .max_batch = 1,
                .timed = true,
                .verdicts = "LRW"},
        CutCase{.name = "ATrialRunsAgainstTheTimes",
                .queue = {{.deadline = 11, .trial = true}},
                .timed = true,
                .verdicts = "R"},
        CutCase{.name = "ABatchIsNoLongerThanOneOfItsPicturesHas",
                .queue = {{.deadline = 16}, {}, {}},
                .timed = true,
                .verdicts = "RRW"},
        CutCase{.name = "APictureWithLessTimeDoesntJoinALongerBatch",
                .queue = {{}, {}, {.deadline = 16}},
                .timed = true,
                .verdicts = "RRW"},
        CutCase{.name = "OneThatJustMakesItRunsAlone",
                .queue = {{.deadline = 14}, {}},
                .timed = true,
                .verdicts = "RW"},
        CutCase{.name = "WhoWouldHalveTheWorkIsGivenUp",
                .queue = {{.deadline = 14}, {.deadline = 40}, {.deadline = 40}, {.deadline = 40}},
                .timed = true,
                .verdicts = "LRRR"},
        CutCase{.name = "NobodyIsGivenUpForALowerPriority",
                .queue = {{.deadline = 14},
                          {.deadline = 40, .priority = 6},
                          {.deadline = 40, .priority = 6},
                          {.deadline = 40, .priority = 6}},
                .timed = true,
                .verdicts = "RWWW"},
        CutCase{.name = "NobodyIsGivenUpForThoseWithoutDeadline",
                .queue = {{.deadline = 14}, {}, {}, {}},
                .timed = true,
                .verdicts = "RWWW"},
        CutCase{.name = "NoPictureIsInALargerBatchThanItAllows",
                .queue = {{}, {.most = 2}, {}},
                .verdicts = "RRW"},
        CutCase{.name = "OneThatWantsASmallerBatchWaitsForItsOwn",
                .queue = {{}, {}, {.most = 2}},
                .verdicts = "RRW"},
        CutCase{.name = "TheDelayEndsWhereTheDeadlineNeedsTheNetwork",
                .queue = {{.deadline = 20}},
                .max_delay = 5,
                .timed = true,
                .verdicts = "R"}),
    [](const auto& test) { return std::string(test.param.name); });

// The queue itself, by what it answers.
class BatchQueueTest : public ::testing::Test {
 protected:
  BatchQueueTest() { Make({}); }
  void Make(BatchQueue::Options options) { queue_ = std::make_unique<BatchQueue>(options); }
  // Batches take 10 ms and 2 ms a picture.
  void TeachTenAndTwo() {
    queue_->times().Observe(32 * 32, 1, absl::Milliseconds(12), now_);
    queue_->times().Observe(32 * 32, 32, absl::Milliseconds(74), now_);
  }
  // `deadline` in ms from now; 0: none.
  static BatchQueue::Request Ask(int pictures, int deadline = 0, int priority = kDefaultPriority,
                                 int until_ready = 0) {
    return {.pictures = pictures,
            .height = 32,
            .width = 32,
            .priority = priority,
            .deadline = deadline == 0 ? absl::InfiniteFuture() : At(deadline),
            .until_ready = absl::Milliseconds(until_ready)};
  }
  absl::Status Admit(const BatchQueue::Request& request) {
    return queue_->Admit(request, device_, now_).status();
  }
  // Admitted and ready; its pixels say who it is.
  void Add(float name, const BatchQueue::Request& request) {
    const auto ticket = queue_->Admit(request, device_, now_);
    ASSERT_OK(ticket);
    std::vector<BatchQueue::Picture> pictures(static_cast<size_t>(request.pictures));
    for (BatchQueue::Picture& picture : pictures) {
      picture.pixels = {name};
      picture.height = picture.width = 32;
    }
    queue_->Submit(*ticket, std::move(pictures), now_);
  }
  std::vector<int> NextBatch() {
    std::vector<int> names;
    for (const BatchQueue::Waiting& waiting : queue_->Next(now_, false, true).batch) {
      names.push_back(static_cast<int>(waiting.picture.pixels[0]));
    }
    return names;
  }

  absl::Time now_ = kStart;
  DeviceOutlook device_;
  std::unique_ptr<BatchQueue> queue_;
};

TEST_F(BatchQueueTest, GoesByPriorityThenDeadlineThenArrival) {
  Make({.max_batch = 1});
  Add(1, Ask(1));
  Add(2, Ask(1));
  Add(3, Ask(1, 500));
  Add(4, Ask(1, 400));
  Add(5, Ask(1, 0, 1));
  Add(6, Ask(1, 100, 6));
  std::vector<int> order;
  for (int i = 0; i < 6; ++i) order.push_back(NextBatch().at(0));
  EXPECT_THAT(order, ElementsAre(5, 4, 3, 1, 2, 6));
}

TEST_F(BatchQueueTest, ABatchWaitsForTheDevice) {
  Add(1, Ask(1));
  BatchQueue::Cut cut = queue_->Next(now_, false, /*with_device=*/false);
  EXPECT_TRUE(cut.wants_device);
  EXPECT_EQ(cut.pictures(), 0);
  EXPECT_EQ(queue_->waiting(), 1);
  EXPECT_THAT(NextBatch(), ElementsAre(1));
  EXPECT_EQ(queue_->waiting(), 0);
}

TEST_F(BatchQueueTest, WhatIsOnlyAdmittedIsInNoBatch) {
  ASSERT_OK_AND_ASSIGN(const auto ticket, queue_->Admit(Ask(3), device_, now_));
  EXPECT_FALSE(queue_->Next(now_, true, true).wants_device);
  EXPECT_EQ(queue_->waiting(), 3);
  queue_->GiveBack(ticket, 3);
  EXPECT_EQ(queue_->waiting(), 0);
}

TEST_F(BatchQueueTest, NothingIsRefusedForItsDeadlineWhileNothingIsMeasured) {
  EXPECT_OK(Admit(Ask(64, 1)));
}

TEST_F(BatchQueueTest, AnswersThatWouldComeTooLateAreRefusedAtOnce) {
  TeachTenAndTwo();
  // 12 ms, 13.04 at most, and 0.92 of what is left are promised.
  const absl::Status late = Admit(Ask(1, 13));
  EXPECT_THAT(late, StatusIs(kExhausted, HasSubstr("the answer would come after the deadline: 0 "
                                                   "pictures wait, and 13ms are left")));
  EXPECT_TRUE(IsPredictedLate(late));
  EXPECT_EQ(PushbackMillis(late), 10);
  EXPECT_FALSE(Admit(Ask(1, 14)).ok());
  EXPECT_OK(Admit(Ask(1, 15)));
}

TEST_F(BatchQueueTest, TheWaitForTheBatchesBeforeCounts) {
  Make({.max_batch = 4});
  TeachTenAndTwo();
  Add(1, Ask(8, 0, 1));  // two batches of 18 ms
  // and a third one of at most 19.6
  EXPECT_TRUE(IsPredictedLate(Admit(Ask(1, 60))));
  EXPECT_OK(Admit(Ask(1, 61)));
}

TEST_F(BatchQueueTest, ThePassThatRunsAndOtherModelsTurnsCount) {
  Make({.max_batch = 4});
  TeachTenAndTwo();
  device_ = {.busy = true, .free_in = absl::Milliseconds(18)};
  EXPECT_TRUE(IsPredictedLate(Admit(Ask(1, 30))));
  EXPECT_OK(Admit(Ask(1, 40)));
  Add(1, Ask(3, 0, 1));
  device_.rivals = 1;  // takes a turn for each of ours
  // 18 + 2 * 18, and at most 19.6 for the second batch.
  EXPECT_TRUE(IsPredictedLate(Admit(Ask(1, 79))));
  EXPECT_OK(Admit(Ask(1, 81)));
  EXPECT_EQ(queue_->PredictedWait(device_), absl::Milliseconds(18 + 2 * 18));
}

TEST_F(BatchQueueTest, TheTimeUntilItIsDecodedCounts) {
  TeachTenAndTwo();
  EXPECT_TRUE(IsPredictedLate(Admit(Ask(1, 100, kDefaultPriority, 85))));
  EXPECT_OK(Admit(Ask(1, 100, kDefaultPriority, 75)));
}

TEST_F(BatchQueueTest, DecodingGoesOnWhileOthersRun) {
  Make({.max_batch = 4});
  TeachTenAndTwo();
  Add(1, Ask(8, 0, 1));
  // Two batches of 18 ms and at most 13 for its own; the 36 ms of decoding are over by then.
  EXPECT_OK(Admit(Ask(1, 54, kDefaultPriority, 36)));
  EXPECT_FALSE(Admit(Ask(1, 54, kDefaultPriority, 37)).ok());
}

TEST_F(BatchQueueTest, WhatIsStillDecodedBeforeItIsWorkedOnAfterwards) {
  Make({.max_batch = 4});
  TeachTenAndTwo();
  ASSERT_OK(Admit(Ask(8, 0, 1)));  // not submitted
  // 36 ms of decoding, two batches of 18, its own of at most 19.6.
  EXPECT_FALSE(Admit(Ask(1, 99, kDefaultPriority, 36)).ok());
  EXPECT_OK(Admit(Ask(1, 100, kDefaultPriority, 36)));
}

TEST_F(BatchQueueTest, LaterDeadlinesAreNoWait) {
  Make({.max_batch = 4});
  TeachTenAndTwo();
  Add(1, Ask(100));
  EXPECT_OK(Admit(Ask(1, 20)));
  EXPECT_FALSE(Admit(Ask(1, 20, kLowestPriority)).ok()) << "behind those of a higher priority";
}

TEST_F(BatchQueueTest, NobodyIsAdmittedAtTheCostOfOneWhoWas) {
  Make({.max_batch = 1});
  TeachTenAndTwo();
  Add(1, Ask(1, 500));
  Add(2, Ask(1, 40));
  ASSERT_OK(Admit(Ask(1, 60)));
  ASSERT_OK(Admit(Ask(1, 30)));  // the one with 40 is answered after 25 then, that with 60 after 37
  ASSERT_OK(Admit(Ask(1, 29)));  // 30: 25, 40: 37, 60: 49
  const absl::Status late = Admit(Ask(1, 28));  // 29: 25, but 30: 37
  EXPECT_THAT(late, StatusIs(kExhausted, HasSubstr("one that waits would become late")));
  EXPECT_TRUE(IsPredictedLate(late));
  EXPECT_GT(PushbackMillis(late), 0);
  EXPECT_OK(Admit(Ask(1, 28, 1))) << "a higher priority may";
}

TEST_F(BatchQueueTest, ABatchTakesAtMostHalfOfTheTimeItsPicturesCameWith) {
  TeachTenAndTwo();
  for (int i = 0; i < 26; ++i) Add(static_cast<float>(i), Ask(1, 100));
  // At most 46 of 92 ms: 16 pictures. The others are promised the next batch.
  EXPECT_FALSE(Admit(Ask(1, 100)).ok());
  EXPECT_EQ(NextBatch().size(), 16u);
  EXPECT_EQ(NextBatch().size(), 10u);
}

TEST_F(BatchQueueTest, ARequestsOwnPicturesMayTakeLonger) {
  TeachTenAndTwo();
  Add(1, Ask(32, 100));  // at most 80 ms in one batch
  EXPECT_EQ(NextBatch().size(), 32u);
}

TEST_F(BatchQueueTest, WithoutDeadlineBatchesAreFull) {
  TeachTenAndTwo();
  Add(1, Ask(60));
  EXPECT_EQ(NextBatch().size(), 32u);
}

TEST_F(BatchQueueTest, OneTrialATimeThoughNoneEndsWithABatch) {
  TeachTenAndTwo();
  now_ += absl::Milliseconds(101);
  ASSERT_OK_AND_ASSIGN(const auto ticket, queue_->Admit(Ask(1, 106), device_, now_));
  queue_->GiveBack(ticket, 1);  // its deadline passed before it was decoded
  now_ += absl::Milliseconds(99);
  EXPECT_FALSE(Admit(Ask(1, 205)).ok());
  now_ += absl::Milliseconds(2);
  EXPECT_OK(Admit(Ask(1, 207)));
}

TEST_F(BatchQueueTest, TrialsThatTakeLongAreRarer) {
  queue_->times().Observe(32 * 32, 1, absl::Milliseconds(110), now_);
  queue_->times().Observe(32 * 32, 32, absl::Milliseconds(420), now_);
  now_ += absl::Milliseconds(478);  // one is said to take up to 119.6 ms
  EXPECT_FALSE(Admit(Ask(1, 500)).ok());
  now_ += absl::Milliseconds(1);
  EXPECT_OK(queue_->Check(Ask(1, 500), device_, now_));
  EXPECT_FALSE(queue_->Check(Ask(32, 500), device_, now_).ok()) << "456 ms: a second";
  now_ += absl::Milliseconds(522);
  EXPECT_OK(Admit(Ask(32, 1100)));
}

TEST_F(BatchQueueTest, CheckAnswersAsAdmitAndTakesNothing) {
  Make({.max_queue = 2});
  TeachTenAndTwo();
  for (int i = 0; i < 3; ++i) EXPECT_OK(queue_->Check(Ask(2), device_, now_));
  EXPECT_THAT(queue_->Check(Ask(1, 13), device_, now_), StatusIs(kExhausted, HasSubstr("")));
  Add(1, Ask(2));
  EXPECT_THAT(queue_->Check(Ask(1), device_, now_), StatusIs(kExhausted, HasSubstr("")));
  now_ += absl::Milliseconds(101);
  EXPECT_THAT(NextBatch(), ElementsAre(1, 1));
  for (int i = 0; i < 2; ++i) EXPECT_OK(queue_->Check(Ask(1, 106), device_, now_)) << "a trial";
  EXPECT_OK(Admit(Ask(1, 106)));
}

TEST_F(BatchQueueTest, ABatchIsAloneWhileNothingElseWaits) {
  Make({.max_batch = 2});
  Add(1, Ask(2));
  EXPECT_FALSE(queue_->Next(now_, false, true, /*alone=*/false).alone);
  Add(2, Ask(2));
  EXPECT_TRUE(queue_->Next(now_, false, true, /*alone=*/true).alone);
  Add(3, Ask(3));
  EXPECT_FALSE(queue_->Next(now_, false, true, /*alone=*/true).alone) << "one is left";
  EXPECT_TRUE(queue_->Next(now_, false, true, /*alone=*/true).alone);
  Add(4, Ask(1));
  EXPECT_OK(Admit(Ask(1)));
  EXPECT_FALSE(queue_->Next(now_, false, true, /*alone=*/true).alone) << "one is being decoded";
}

TEST_F(BatchQueueTest, PassesThatAreAloneHaveTheirOwnTimes) {
  Make({.threads = 2});
  queue_->times(/*alone=*/true).Observe(32 * 32, 1, absl::Milliseconds(10), now_);
  // Nothing is known of passes side by side: twice as long at worst. One may try.
  ASSERT_OK_AND_ASSIGN(const auto trial, queue_->Admit(Ask(1, 20), device_, now_));
  queue_->GiveBack(trial, 1);
  EXPECT_FALSE(Admit(Ask(1, 20)).ok());
  EXPECT_OK(queue_->Check(Ask(1, 30), device_, now_));
  device_.alone = true;
  EXPECT_OK(queue_->Check(Ask(1, 15), device_, now_));
  queue_->times().Observe(32 * 32, 1, absl::Milliseconds(13), now_);
  EXPECT_OK(queue_->Check(Ask(1, 15), device_, now_));
  device_.alone = false;
  EXPECT_FALSE(queue_->Check(Ask(1, 15), device_, now_).ok());
  EXPECT_OK(queue_->Check(Ask(1, 20), device_, now_));
}

// They are guessed from those alone: sixteen times as long, 160 ms, 174 at most. So many threads
// were stuck at a request at a time.
TEST_F(BatchQueueTest, SteadyPassesAloneKeepNobodyFromTryingBesideThem) {
  Make({.threads = 16});
  const auto run_alone = [&] {
    queue_->times(/*alone=*/true).Observe(32 * 32, 1, absl::Milliseconds(10), now_);
  };
  const auto left = [&](int milliseconds) {
    return Ask(1, static_cast<int>(absl::ToInt64Milliseconds(now_ - kStart)) + milliseconds);
  };
  run_alone();
  device_.running = 1;
  device_.instances = 16;
  Add(1, left(50));
  EXPECT_FALSE(Admit(left(50)).ok()) << "one at a time";
  // When its turn came, it was alone as well: nothing has been learned.
  EXPECT_THAT(NextBatch(), ElementsAre(1));
  for (int i = 0; i < 69; ++i) {
    now_ += absl::Milliseconds(10);
    run_alone();
    EXPECT_FALSE(queue_->Check(left(50), device_, now_).ok()) << i;
  }
  now_ += absl::Milliseconds(10);  // four times 174
  run_alone();
  Add(2, left(50));
  EXPECT_THAT(NextBatch(), ElementsAre(2));
  queue_->times().Observe(32 * 32, 1, absl::Milliseconds(13), now_);
  EXPECT_OK(queue_->Check(left(20), device_, now_));
  EXPECT_FALSE(queue_->Check(left(14), device_, now_).ok());
}

TEST_F(BatchQueueTest, TheSecondOfAPairMayTryAndTheFirstIsNotGivenUpForAGuess) {
  Make({.threads = 16});
  queue_->times(/*alone=*/true).Observe(32 * 32, 1, absl::Milliseconds(10), now_);
  device_.alone = true;
  Add(1, Ask(1, 50));
  ASSERT_OK(Admit(Ask(1, 50))) << "the first one waits, as always when they come";
  EXPECT_FALSE(Admit(Ask(1, 50)).ok());
  const BatchQueue::Cut cut = queue_->Next(now_, false, true, /*alone=*/true);
  EXPECT_FALSE(cut.alone);
  EXPECT_EQ(cut.batch.size(), 1u);
  EXPECT_EQ(cut.late.size(), 0u) << "160 ms are only a guess";
}

TEST_F(BatchQueueTest, EachPictureSizeHasItsOwnTrials) {
  const auto large = [&](int deadline) {
    BatchQueue::Request request = Ask(1, deadline);
    request.height = request.width = 512;
    return request;
  };
  TeachTenAndTwo();
  queue_->times().Observe(512 * 512, 1, absl::Milliseconds(400), now_);  // the first pass is slow
  for (int i = 1; i <= 9; ++i) {
    now_ = At(i * 101);
    Add(1, Ask(1, i * 101 + 5));  // a trial
    EXPECT_THAT(NextBatch(), ElementsAre(1));
    queue_->times().Observe(32 * 32, 1, absl::Milliseconds(12), now_);
    EXPECT_FALSE(queue_->Check(large(i * 101 + 100), device_, now_).ok()) << i;
  }
  now_ = At(1001);
  const auto ticket = queue_->Admit(large(1101), device_, now_);
  ASSERT_OK(ticket);
  queue_->GiveBack(*ticket, 1);
  EXPECT_FALSE(Admit(large(1101)).ok());
  now_ = At(1010);  // the small ones' last was 101 ms ago
  EXPECT_OK(Admit(Ask(1, 1015))) << "the large one's trial was none of theirs";
}

TEST_F(BatchQueueTest, WhatIsBeingDecodedIsWaitedForAMoment) {
  Make({.decoded_here = true});
  TeachTenAndTwo();
  Add(1, Ask(1));
  ASSERT_OK_AND_ASSIGN(const auto ticket, queue_->Admit(Ask(1), device_, now_));
  BatchQueue::Cut cut = queue_->Next(now_, false, true);
  EXPECT_EQ(cut.pictures(), 0);
  EXPECT_EQ(cut.look_again, now_ + absl::Milliseconds(24)) << "twice the pass of one";
  std::vector<BatchQueue::Picture> pictures(1);
  pictures[0].pixels = {2};
  pictures[0].height = pictures[0].width = 32;
  queue_->Submit(ticket, std::move(pictures), now_);
  EXPECT_THAT(NextBatch(), ElementsAre(1, 2));

  Add(3, Ask(1));
  ASSERT_OK(Admit(Ask(1)));
  now_ += absl::Milliseconds(24);
  EXPECT_THAT(NextBatch(), ElementsAre(3)) << "and no longer";
  Add(4, Ask(1, 24 + 30));
  EXPECT_THAT(NextBatch(), ElementsAre(4)) << "its deadline is near";
}

TEST_F(BatchQueueTest, DecodingElsewhereIsNotWaitedFor) {
  TeachTenAndTwo();
  Add(1, Ask(1));
  ASSERT_OK(Admit(Ask(1)));
  EXPECT_THAT(NextBatch(), ElementsAre(1));
}

TEST_F(BatchQueueTest, OneMayTryWhenTheTimesAreOld) {
  TeachTenAndTwo();
  EXPECT_FALSE(Admit(Ask(1, 5)).ok());
  now_ += absl::Milliseconds(1001);
  device_.busy = true;
  EXPECT_FALSE(Admit(Ask(1, 1006)).ok()) << "a pass of its own will tell";
  device_.rivals = 1;  // others may have the device for ever
  device_.free_in = absl::Milliseconds(5);
  EXPECT_FALSE(Admit(Ask(1, 1006)).ok()) << "it would get the device too late anyway";
  device_.free_in = absl::Milliseconds(4);
  Add(7, Ask(1, 1006));
  EXPECT_FALSE(Admit(Ask(1, 1006)).ok()) << "one at a time";
  EXPECT_THAT(NextBatch(), ElementsAre(7));
}

TEST_F(BatchQueueTest, WhatWasAdmittedMayTurnOutTooLate) {
  TeachTenAndTwo();
  ASSERT_OK_AND_ASSIGN(const auto ticket, queue_->Admit(Ask(1, 100), device_, now_));
  EXPECT_FALSE(queue_->TooLate(ticket, At(86)));
  EXPECT_TRUE(queue_->TooLate(ticket, At(87)));
}

// A server under an open-loop load, on paper: Poisson arrivals, each with the same time to live,
// and batches whose times vary.
struct Load {
  double fixed = 1;          // ms of a batch
  double per_picture = 2.5;  // ms
  double time_to_live = 100;
  double load = 1;  // of what full batches could carry
  double noise = 0.1;
  double decode = 0;  // ms until a picture is ready, beside the network
  double late_allowed = 0.005;
  double wanted = 0.85;  // answers in time at 1x, of what full batches could carry
};

struct Outcome {
  double in_time = 0;  // answers a second
  double late = 0;     // of the answers
  double fill = 0;     // pictures a batch
  int refused = 0;
  int dropped = 0;  // after they had been admitted
};

Outcome Simulate(const Load& load) {
  std::mt19937 random(42);
  std::exponential_distribution<double> gap(load.load / (load.per_picture + load.fixed / 32));
  std::normal_distribution<double> noise(0, load.noise);
  constexpr double kEnd = 10'000;  // ms
  const auto at = [](double ms) { return kStart + absl::Milliseconds(1) * ms; };

  BatchQueue queue({});
  Outcome outcome;
  int answers = 0, in_time = 0, batches = 0, pictures = 0;
  double arrival = gap(random), free_at = 0, expected = 0;
  std::vector<std::pair<double, BatchQueue::Ticket>> decoding;  // by when they are ready
  // A picture's pixels are its deadline: nothing here looks at them.
  for (double now = 0; now < kEnd;) {
    // The next thing that happens.
    double next = std::min(arrival, kEnd);
    if (free_at > now) next = std::min(next, free_at);
    if (!decoding.empty()) next = std::min(next, decoding.front().first);
    now = next;
    if (now >= arrival) {
      arrival = now + gap(random);
      const bool busy = free_at > now;
      const DeviceOutlook device{
          .busy = busy,
          .free_in = absl::Milliseconds(1) * (busy ? std::max(0., expected - now) : 0)};
      const auto ticket = queue.Admit({.deadline = at(now + load.time_to_live),
                                       .until_ready = absl::Milliseconds(1) * load.decode},
                                      device, at(now));
      if (ticket.ok()) {
        decoding.emplace_back(now + load.decode, *ticket);
      } else {
        ++outcome.refused;
      }
    }
    while (!decoding.empty() && decoding.front().first <= now) {
      std::vector<BatchQueue::Picture> picture(1);
      picture[0].height = picture[0].width = 224;
      picture[0].pixels = {static_cast<float>(
          absl::ToDoubleMilliseconds(decoding.front().second->first.deadline - kStart))};
      queue.Submit(decoding.front().second, std::move(picture), at(now));
      decoding.erase(decoding.begin());
    }
    if (free_at <= now) {
      const BatchQueue::Cut cut = queue.Next(at(now), false, true);
      outcome.dropped += static_cast<int>(cut.expired.size() + cut.late.size());
      if (!cut.batch.empty()) {
        const int count = static_cast<int>(cut.batch.size());
        const double took = (load.fixed + load.per_picture * count) * std::exp(noise(random));
        expected =
            now + absl::ToDoubleMilliseconds(queue.times().For(int64_t{224} * 224).Of(count));
        free_at = now + took;
        queue.times().Observe(int64_t{224} * 224, count, absl::Milliseconds(1) * took, at(free_at));
        ++batches;
        pictures += count;
        for (const BatchQueue::Waiting& waiting : cut.batch) {
          ++answers;
          in_time += free_at <= static_cast<double>(waiting.picture.pixels[0]) + 1e-2;
        }
      }
    }
  }
  outcome.in_time = in_time / kEnd * 1000;
  outcome.late = 1 - static_cast<double>(in_time) / answers;
  outcome.fill = static_cast<double>(pictures) / batches;
  return outcome;
}

class OverloadTest : public ::testing::TestWithParam<std::pair<const char*, Load>> {};

TEST_P(OverloadTest, GoodputStaysFlat) {
  Load load = GetParam().second;
  const Outcome once = Simulate(load);
  const double capacity = 1000 / (load.per_picture + load.fixed / 32);
  EXPECT_GE(once.in_time, load.wanted * capacity);
  for (const double factor : {1.0, 2.0, 5.0}) {
    load.load = factor;
    const Outcome outcome = Simulate(load);
    SCOPED_TRACE(factor);
    std::printf("%gx: %.0f/s of %.0f in time, %.2f%% late, %d dropped, %.1f a batch\n", factor,
                outcome.in_time, capacity, 100 * outcome.late, outcome.dropped, outcome.fill);
    EXPECT_GE(outcome.in_time, 0.95 * once.in_time);
    EXPECT_LE(outcome.late, load.late_allowed);
    EXPECT_LE(outcome.dropped, 0.02 * outcome.in_time * 10);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Loads, OverloadTest,
    ::testing::Values(std::pair{"HundredMs", Load{}},
                      std::pair{"TenTimesABatchOfOne", Load{.time_to_live = 35}},
                      std::pair{"ASecond", Load{.time_to_live = 1000}},
                      std::pair{"WithDecoding", Load{.decode = 20}},
                      std::pair{"CostlyBatches", Load{.fixed = 10, .per_picture = 0.3}},
                      std::pair{"CostlyBatchesAndLittleTime",
                                // Half of the time is enough for 22 pictures.
                                Load{.fixed = 10,
                                     .per_picture = 0.3,
                                     .time_to_live = 40,
                                     .late_allowed = 0.01,
                                     .wanted = 0.65}},
                      std::pair{"SteadyTimes", Load{.noise = 0.02}},
                      std::pair{"UnsteadyTimes", Load{.noise = 0.3, .late_allowed = 0.015}}),
    [](const auto& test) { return std::string(test.param.first); });

}  // namespace
}  // namespace pyramid
