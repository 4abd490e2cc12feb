#include "server/serving/batcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "model/thread_limit.h"
#include "server/serving/pushback.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::ElementsAre;
using testing::FakeClassifier;
using testing::FakeClock;
using testing::FakeManifest;
using testing::FakeNetwork;
using ::testing::HasSubstr;
using testing::Sample;
using testing::StatusIs;

class BatcherTest : public ::testing::Test {
 protected:
  void Make(Batcher::Options options = {}) {
    batcher_ = std::make_unique<Batcher>(classifier_, options, metrics_.ForModel("m"), 7, clock_);
  }
  // One picture whose mean is `mean`; the answer's status and first logit are appended to answers_.
  Batcher::Picture Picture(float mean, CancelFlag cancelled = nullptr, int side = 32) {
    Batcher::Picture picture;
    picture.pixels.assign(static_cast<size_t>(side) * static_cast<size_t>(side), mean);
    picture.height = side;
    picture.width = side;
    picture.cancelled = std::move(cancelled);
    picture.done = [this](absl::StatusOr<Batcher::Answer> answer) {
      absl::MutexLock lock(&mutex_);
      codes_.push_back(answer.status().code());
      statuses_.push_back(answer.status());
      logits_.push_back(answer.ok() ? answer->logits[0] : -1000);
    };
    return picture;
  }
  absl::StatusOr<Batcher::Room> Admit(int pictures) {
    return batcher_->Admit({.pictures = pictures, .height = 32, .width = 32});
  }
  void Submit(Batcher::Picture picture, absl::Time deadline = absl::InfiniteFuture(),
              int priority = kDefaultPriority) {
    ASSERT_OK_AND_ASSIGN(Batcher::Room room, batcher_->Admit({.height = picture.height,
                                                              .width = picture.width,
                                                              .priority = priority,
                                                              .deadline = deadline}));
    std::vector<Batcher::Picture> pictures;
    pictures.push_back(std::move(picture));
    batcher_->Submit(room, std::move(pictures));
  }
  // Shuts the network and has it work on one picture.
  void Occupy() {
    network_.Shut();
    Submit(Picture(0));
    ASSERT_TRUE(network_.AwaitBatches(1));
  }
  // That's what the network takes for a picture, so far. Leaves no traces in answers and batches.
  void TeachFiftyMilliseconds() {
    network_.OnForward([this] { clock_.Advance(absl::Milliseconds(50)); });
    Submit(Picture(0));
    ASSERT_TRUE(AwaitAnswers(1));
    network_.OnForward(nullptr);
    network_.Forget();
    absl::MutexLock lock(&mutex_);
    codes_.clear();
    statuses_.clear();
    logits_.clear();
  }
  bool AwaitAnswers(size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto enough = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return codes_.size() >= count; };
    return mutex_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(10));
  }
  std::vector<absl::StatusCode> codes() {
    absl::MutexLock lock(&mutex_);
    return codes_;
  }
  std::vector<float> logits() {
    absl::MutexLock lock(&mutex_);
    return logits_;
  }
  absl::Status status(size_t index) {
    absl::MutexLock lock(&mutex_);
    return statuses_.at(index);
  }

  FakeClock clock_;
  FakeNetwork network_;
  Metrics metrics_;
  FakeClassifier classifier_{network_, FakeManifest()};
  absl::Mutex mutex_;
  std::vector<absl::StatusCode> codes_ ABSL_GUARDED_BY(mutex_);
  std::vector<absl::Status> statuses_ ABSL_GUARDED_BY(mutex_);
  std::vector<float> logits_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<Batcher> batcher_;
};

constexpr absl::StatusCode kOk = absl::StatusCode::kOk;

TEST_F(BatcherTest, AnswersAPictureWithItsLogits) {
  Make();
  Submit(Picture(0.5));
  ASSERT_TRUE(AwaitAnswers(1));
  EXPECT_THAT(logits(), ElementsAre(0.5f));
}

TEST_F(BatcherTest, CutsBatchWhenOldestImageReachesMaxDelay) {
  Make({.max_delay = absl::Milliseconds(4)});
  Submit(Picture(1));
  ASSERT_TRUE(clock_.AwaitWaiting(1));
  clock_.Advance(absl::Milliseconds(3));
  Submit(Picture(2));
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_THAT(network_.batches(), ElementsAre());
  clock_.Advance(absl::Milliseconds(1));
  ASSERT_TRUE(AwaitAnswers(2));
  EXPECT_THAT(network_.batches(), ElementsAre(2));
}

TEST_F(BatcherTest, BatchesWhatGatheredWhileTheLastOneRan) {
  Make();
  Occupy();
  for (int i = 1; i <= 5; ++i) Submit(Picture(static_cast<float>(i)));
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(6));
  EXPECT_THAT(network_.batches(), ElementsAre(1, 5));
  EXPECT_THAT(logits(), ElementsAre(0, 1, 2, 3, 4, 5));
}

TEST_F(BatcherTest, PicturesOfAnotherSizeGetABatchOfTheirOwn) {
  Make();
  Occupy();
  Submit(Picture(1));
  Submit(Picture(2, nullptr, 64));
  Submit(Picture(3));
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(4));
  EXPECT_THAT(network_.batches(), ElementsAre(1, 1, 1, 1));
  EXPECT_THAT(logits(), ElementsAre(0, 1, 2, 3));
}

TEST_F(BatcherTest, QueueIsBoundedInImages) {
  Make({.max_queue = 10});
  Occupy();
  ASSERT_OK_AND_ASSIGN(Batcher::Room room, Admit(8));
  EXPECT_THAT(Admit(3),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       HasSubstr("8 of 10 pictures wait and 3 more came; try again in 100 ms")));
  EXPECT_OK(Admit(2));  // given back at once
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_queue_images{model="m"})"), 8);
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_queue_capacity_images{model="m"})"), 10);
  room = Batcher::Room();
  EXPECT_OK(Admit(10));
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_queue_images{model="m"})"), 0);
  network_.Open();
}

TEST_F(BatcherTest, SubmittedPicturesFillTheQueueUntilTheirBatchStarts) {
  Make({.max_queue = 2});
  Occupy();
  Submit(Picture(1));
  Submit(Picture(2));
  EXPECT_THAT(Admit(1), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("2 of 2")));
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(3));
  EXPECT_OK(Admit(2));
}

TEST_F(BatcherTest, MoreThanTheQueueHoldsCanNeverWork) {
  Make({.max_queue = 10});
  EXPECT_THAT(Admit(11), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 10")));
}

TEST_F(BatcherTest, PushbackFollowsTheMeasuredSpeed) {
  Make({.max_queue = 4});
  network_.OnForward([this] { clock_.Advance(absl::Milliseconds(500)); });
  Submit(Picture(1));
  ASSERT_TRUE(AwaitAnswers(1));
  ASSERT_OK_AND_ASSIGN(Batcher::Room room, Admit(3));
  const absl::Status full = Admit(4).status();
  // Three pictures too many; two together are taken to need the half second that one did.
  EXPECT_EQ(PushbackMillis(full), 750);
}

TEST_F(BatcherTest, AnExpiredPictureNeverReachesTheNetwork) {
  Make();
  Occupy();
  Submit(Picture(1), clock_.Now() + absl::Seconds(1));
  Submit(Picture(2), clock_.Now() + absl::Seconds(3));
  clock_.Advance(absl::Seconds(1));
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(3));
  EXPECT_THAT(codes(), ElementsAre(kOk, absl::StatusCode::kDeadlineExceeded, kOk));
  EXPECT_EQ(network_.pictures(), 2);
  EXPECT_EQ(
      Sample(metrics_, R"(pyramid_serving_rejected_images_total{model="m",reason="expired"})"), 1);
}

TEST_F(BatcherTest, ACancelledPictureNeverReachesTheNetwork) {
  Make();
  Occupy();
  const auto cancelled = std::make_shared<std::atomic<bool>>(false);
  Submit(Picture(1, cancelled));
  Submit(Picture(2));
  *cancelled = true;
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(3));
  EXPECT_THAT(codes(), ElementsAre(kOk, absl::StatusCode::kCancelled, kOk));
  EXPECT_EQ(network_.pictures(), 2);
  EXPECT_EQ(
      Sample(metrics_, R"(pyramid_serving_rejected_images_total{model="m",reason="cancelled"})"),
      1);
}

TEST_F(BatcherTest, ANetworkErrorReachesItsBatchAndNoOther) {
  Make();
  Occupy();
  Submit(Picture(1));
  Submit(Picture(2));
  network_.OnForward([this] { network_.Fail(absl::ResourceExhaustedError("out of memory")); });
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(3));
  network_.OnForward([this] { network_.Fail(absl::OkStatus()); });
  Submit(Picture(3));
  ASSERT_TRUE(AwaitAnswers(4));
  EXPECT_THAT(codes(), ElementsAre(kOk, absl::StatusCode::kResourceExhausted,
                                   absl::StatusCode::kResourceExhausted, kOk));
}

TEST_F(BatcherTest, AWrongNumberOfLogitsIsInternal) {
  classifier_.set_extra_logits(1);
  Make();
  Submit(Picture(1));
  ASSERT_TRUE(AwaitAnswers(1));
  EXPECT_THAT(status(0),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("4 logits for 1 pictures")));
}

TEST_F(BatcherTest, MeasuresQueueAndForward) {
  Make();
  Occupy();
  clock_.Advance(absl::Milliseconds(30));
  Submit(Picture(1));
  clock_.Advance(absl::Milliseconds(10));
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(2));
  batcher_->Drain();
  EXPECT_NEAR(
      Sample(metrics_, R"(pyramid_serving_stage_duration_seconds_sum{model="m",stage="queue"})"),
      0.01, 1e-9);
  EXPECT_NEAR(
      Sample(metrics_, R"(pyramid_serving_stage_duration_seconds_sum{model="m",stage="forward"})"),
      0.04, 1e-9);
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_images_total{model="m",version="7"})"), 2);
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_batches_total{model="m",version="7"})"), 2);
}

TEST_F(BatcherTest, DrainAnswersWhatWasAdmittedAndRefusesMore) {
  Make();
  Occupy();
  Submit(Picture(1));
  auto room = std::make_unique<Batcher::Room>(Admit(1).value());
  absl::Notification drained;
  std::thread drain([&] {
    batcher_->Drain();
    drained.Notify();
  });
  while (Admit(1).ok()) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_THAT(Admit(1), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("out of service")));
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(2));
  EXPECT_FALSE(drained.HasBeenNotified());  // a picture may still come
  std::vector<Batcher::Picture> pictures;
  pictures.push_back(Picture(2));
  batcher_->Submit(*room, std::move(pictures));
  drain.join();
  EXPECT_THAT(codes(), ElementsAre(kOk, kOk, kOk));
}

TEST_F(BatcherTest, HigherPrioritiesAndEarlierDeadlinesGoFirst) {
  Make({.max_batch = 1});
  Occupy();
  Submit(Picture(1));
  Submit(Picture(2), clock_.Now() + absl::Seconds(100));
  Submit(Picture(3), clock_.Now() + absl::Seconds(50));
  Submit(Picture(4), absl::InfiniteFuture(), 1);
  Submit(Picture(5), clock_.Now() + absl::Seconds(1), kLowestPriority);
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(6));
  EXPECT_THAT(logits(), ElementsAre(0, 4, 3, 2, 1, 5));
}

TEST_F(BatcherTest, MeasuredBatchTimesRefuseWhatWouldBeLate) {
  Make();
  TeachFiftyMilliseconds();
  Batcher::Request request{
      .height = 32, .width = 32, .deadline = clock_.Now() + absl::Milliseconds(60)};
  EXPECT_OK(batcher_->Admit(request));
  request.deadline = clock_.Now() + absl::Milliseconds(51);
  const absl::Status late = batcher_->Admit(request).status();
  EXPECT_THAT(late,
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("after the deadline")));
  EXPECT_TRUE(IsPredictedLate(late));
  EXPECT_THAT(PushbackMillis(late), ::testing::Gt(0));
}

TEST_F(BatcherTest, APictureThatCannotBeAnsweredInTimeNeverReachesTheNetwork) {
  Make();
  TeachFiftyMilliseconds();
  Occupy();
  Submit(Picture(1), clock_.Now() + absl::Milliseconds(120));
  clock_.Advance(absl::Milliseconds(75));
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(2));
  EXPECT_THAT(codes(), ElementsAre(kOk, absl::StatusCode::kResourceExhausted));
  EXPECT_TRUE(IsPredictedLate(status(1)));
  EXPECT_EQ(network_.pictures(), 1);
  EXPECT_EQ(Sample(metrics_,
                   R"(pyramid_serving_rejected_images_total{model="m",reason="predicted_late"})"),
            1);
}

TEST_F(BatcherTest, CheckInTimeSaysWhenARoomIsOfNoUseAnyMore) {
  Make();
  TeachFiftyMilliseconds();
  ASSERT_OK_AND_ASSIGN(
      Batcher::Room room,
      batcher_->Admit(
          {.height = 32, .width = 32, .deadline = clock_.Now() + absl::Milliseconds(100)}));
  EXPECT_OK(batcher_->CheckInTime(room));
  clock_.Advance(absl::Milliseconds(51));
  EXPECT_TRUE(IsPredictedLate(batcher_->CheckInTime(room)));
}

TEST_F(BatcherTest, TellsTheWaitItPredicts) {
  Make({.max_batch = 1});
  TeachFiftyMilliseconds();
  Occupy();
  Submit(Picture(1));
  Submit(Picture(2));
  // What is left of the one that runs, and two more.
  EXPECT_NEAR(Sample(metrics_, R"(pyramid_serving_predicted_wait_seconds{model="m"})"), 0.15, 1e-9);
  network_.Open();
  batcher_->Drain();
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_predicted_wait_seconds{model="m"})"), 0);
}

TEST_F(BatcherTest, WhoeverLeavesTheQueueWaitsNoLonger) {
  Make({.max_batch = 1});
  TeachFiftyMilliseconds();
  Occupy();
  const auto predicted = [&] {
    return Sample(metrics_, R"(pyramid_serving_predicted_wait_seconds{model="m"})");
  };
  ASSERT_OK_AND_ASSIGN(Batcher::Room room, Admit(2));
  EXPECT_NEAR(predicted(), 0.15, 1e-9);
  room = Batcher::Room();
  EXPECT_NEAR(predicted(), 0.05, 1e-9);
  Submit(Picture(1), clock_.Now() + absl::Milliseconds(200));
  clock_.Advance(absl::Milliseconds(201));
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(2));
  EXPECT_THAT(codes(), ElementsAre(kOk, absl::StatusCode::kDeadlineExceeded));
  EXPECT_EQ(predicted(), 0);
}

TEST_F(BatcherTest, ABatchDoesNotWaitForOneThatWillNotCome) {
  Make({.decoded_here = true});
  TeachFiftyMilliseconds();
  ASSERT_OK_AND_ASSIGN(Batcher::Room room, Admit(1));
  Submit(Picture(1));
  ASSERT_TRUE(clock_.AwaitWaiting(1));
  EXPECT_THAT(network_.batches(), ElementsAre());
  room = Batcher::Room();        // it couldn't be decoded
  ASSERT_TRUE(AwaitAnswers(1));  // though the clock stands still
}

TEST_F(BatcherTest, ModelsTakeTurnsOnADevice) {
  const auto device = std::make_shared<DeviceTurns>(1);
  FakeNetwork other_network;
  FakeClassifier other_classifier{other_network, FakeManifest()};
  std::atomic<int> running{0};
  std::atomic<int> most{0};
  const auto hook = [&] {
    most = std::max(most.load(), ++running);
    absl::SleepFor(absl::Milliseconds(1));
    --running;
  };
  network_.OnForward(hook);
  other_network.OnForward(hook);
  Make({.max_batch = 1, .device = device});
  Batcher other(other_classifier, {.max_batch = 1, .device = device}, metrics_.ForModel("o"), 1,
                clock_);
  for (int i = 0; i < 20; ++i) {
    Submit(Picture(1));
    ASSERT_OK_AND_ASSIGN(Batcher::Room room, other.Admit({.height = 32, .width = 32}));
    std::vector<Batcher::Picture> pictures;
    pictures.push_back(Picture(2));
    other.Submit(room, std::move(pictures));
  }
  ASSERT_TRUE(AwaitAnswers(40));
  EXPECT_EQ(most.load(), 1);
  // Neither had to wait until the other had nothing left.
  const std::vector<float> order = logits();
  EXPECT_NE(std::find(order.begin(), order.begin() + 20, 1), order.begin() + 20);
  EXPECT_NE(std::find(order.begin(), order.begin() + 20, 2), order.begin() + 20);
}

TEST_F(BatcherTest, TwoInstancesRunTwoBatchesAtATime) {
  network_.Shut();
  Make({.max_batch = 1, .device = std::make_shared<DeviceTurns>(2)});
  for (int i = 0; i < 3; ++i) Submit(Picture(static_cast<float>(i)));
  ASSERT_TRUE(network_.AwaitBatches(2));
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(network_.pictures(), 2);
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(3));
}

TEST_F(BatcherTest, DrainDoesNotWaitForRoomThatWasGivenBack) {
  Make();
  auto room = std::make_unique<Batcher::Room>(Admit(5).value());
  std::thread drain([&] { batcher_->Drain(); });
  room.reset();
  drain.join();
}

// One batch thread waits for its turn, the other one for news.
TEST_F(BatcherTest, DrainEndsAllBatchThreadsThoughOneTookTheLastPicture) {
  const auto device = std::make_shared<DeviceTurns>(2);
  Make({.device = device});
  const int other = device->Join();
  DeviceTurns::Turn first = device->Take(other);
  DeviceTurns::Turn second = device->Take(other);
  Submit(Picture(1));
  std::thread drain([&] { batcher_->Drain(); });
  while (Admit(1).ok()) absl::SleepFor(absl::Milliseconds(1));
  absl::SleepFor(absl::Milliseconds(50));  // both have heard of it
  first.GiveBack(absl::ZeroDuration());
  second.GiveBack(absl::ZeroDuration());
  drain.join();
  EXPECT_THAT(codes(), ElementsAre(kOk));
  device->Leave(other);
}

// No more threads compute than were given, however many passes run.
TEST_F(BatcherTest, PassesSideBySideShareTheThreads) {
  constexpr int kThreads = 4;
  Make({.max_batch = 1, .threads = kThreads, .device = std::make_shared<DeviceTurns>(2)});
  std::vector<int> threads;
  network_.OnForward([&] {
    absl::MutexLock lock(&mutex_);
    threads.push_back(ThreadLimit::Of(64));
  });
  Occupy();
  {  // its pass has begun to be counted
    absl::MutexLock lock(&mutex_);
    const auto seen = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return !threads.empty(); };
    ASSERT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&seen), absl::Seconds(10)));
  }
  Submit(Picture(1));
  ASSERT_TRUE(network_.AwaitBatches(2));
  Submit(Picture(2));
  network_.Open();
  ASSERT_TRUE(AwaitAnswers(3));
  absl::MutexLock lock(&mutex_);
  ASSERT_EQ(threads.size(), 3U);
  EXPECT_EQ(threads[0], kThreads) << "alone";
  EXPECT_EQ(threads[1], kThreads / 2) << "beside the first";
  EXPECT_LE(threads[2], kThreads / 2);
}

TEST_F(BatcherTest, EachPictureIsAnsweredExactlyOnceUnderThreads) {
  constexpr int kThreads = 6;
  constexpr int kRounds = 150;
  Batcher batcher(classifier_, {.max_batch = 5, .max_queue = 64}, metrics_.ForModel("m"), 1,
                  Clock::Real());
  std::vector<std::atomic<int>> answers(kThreads * kRounds * 3);
  std::atomic<int> submitted{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int r = 0; r < kRounds; ++r) {
        Batcher::Request request{.pictures = 3, .height = 32, .width = 32};
        request.priority = 1 + static_cast<int>(random() % 3);
        if (random() % 4 == 0) request.deadline = absl::Now() + absl::Milliseconds(1);
        auto room = batcher.Admit(request);
        if (!room.ok()) {
          absl::SleepFor(absl::Milliseconds(1));
          continue;
        }
        const auto cancelled = std::make_shared<std::atomic<bool>>(random() % 4 == 0);
        std::vector<Batcher::Picture> pictures(3);
        for (size_t i = 0; i < 3; ++i) {
          pictures[i].pixels.assign(32 * 32, 1);
          pictures[i].height = pictures[i].width = 32;
          pictures[i].cancelled = cancelled;
          std::atomic<int>& count = answers[static_cast<size_t>((t * kRounds + r) * 3) + i];
          pictures[i].done = [&count](absl::StatusOr<Batcher::Answer>) { ++count; };
        }
        submitted += 3;
        batcher.Submit(*room, std::move(pictures));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  batcher.Drain();
  int answered = 0;
  for (const std::atomic<int>& count : answers) {
    EXPECT_LE(count.load(), 1);
    answered += count.load();
  }
  EXPECT_EQ(answered, submitted.load());
  EXPECT_GT(answered, 0);
  for (const int batch : network_.batches()) EXPECT_LE(batch, 5);
}

}  // namespace
}  // namespace pyramid
