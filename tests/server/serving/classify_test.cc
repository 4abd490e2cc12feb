#include "server/serving/classify.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "proto/base/answer_mix.h"
#include "proto/base/time.h"
#include "server/serving/pushback.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/images.h"
#include "tests/testing/metrics_text.h"
#include "tests/testing/png.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using ::testing::AnyOf;
using ::testing::ElementsAre;
using testing::FakeNetwork;
using testing::GoldenImage;
using testing::GreyPng;
using ::testing::Gt;
using ::testing::HasSubstr;
using testing::Sample;
using testing::StatusIs;

constexpr int kInvalid = static_cast<int>(absl::StatusCode::kInvalidArgument);

class ClassifyTest : public ::testing::Test {
 protected:
  void SetUp() override { Make({}); }
  void TearDown() override {
    network_.Open();
    pipeline_ = nullptr;
    registry_ = nullptr;
  }

  void Make(ClassifyPipeline::Options options, Batcher::Options batching = {}) {
    pipeline_ = nullptr;
    registry_ = nullptr;
    metrics_ = std::make_unique<Metrics>();
    ModelRegistry::Options registry_options;
    registry_options.folder = folder_ / "models";
    registry_options.batching = batching;
    registry_ = std::make_unique<ModelRegistry>(registry_options, testing::FakeLoader(network_),
                                                testing::PassingSelfTest, *metrics_, clock_);
    ASSERT_OK(registry_->Start());
    if (registry_->List().empty()) Promote(0);
    pipeline_ = std::make_unique<ClassifyPipeline>(options, *registry_, *metrics_, clock_);
    network_.Forget();  // the warm-up
  }
  void Promote(int bias, v1::Manifest manifest = testing::FakeManifest(),
               const std::string& name = "fashion") {
    const auto folder = folder_ / absl::StrCat("checkpoint-", ++checkpoints_);
    ASSERT_OK(testing::WriteFakeCheckpoint(folder, bias, std::move(manifest)));
    ASSERT_OK(registry_->Promote(folder, name, ""));
  }

  static v1::ClassifyRequest Request(const std::vector<std::string>& files) {
    v1::ClassifyRequest request;
    request.set_model("fashion");
    for (const std::string& file : files) request.add_pictures()->set_encoded(file);
    return request;
  }
  static v1::ClassifyRequest TensorRequest(int channels, int height, int width, int values,
                                           float value = 0.25f) {
    v1::ClassifyRequest request;
    v1::ImageTensor& tensor = *request.add_pictures()->mutable_tensor();
    tensor.set_channels(channels);
    tensor.set_height(height);
    tensor.set_width(width);
    for (int i = 0; i < values; ++i) tensor.add_values(value);
    return request;
  }

  // A request in progress.
  struct Pending {
    v1::ClassifyRequest request;
    std::shared_ptr<std::atomic<bool>> cancelled = std::make_shared<std::atomic<bool>>(false);
    absl::Notification answered;
    std::atomic<int> answers{0};
    absl::StatusOr<v1::ClassifyResponse> result;
    ~Pending() { answered.WaitForNotification(); }
  };
  std::unique_ptr<Pending> Send(v1::ClassifyRequest request,
                                absl::Time deadline = absl::InfiniteFuture()) {
    auto pending = std::make_unique<Pending>();
    pending->request = std::move(request);
    pipeline_->Classify(pending->request, deadline, pending->cancelled,
                        [raw = pending.get()](absl::StatusOr<v1::ClassifyResponse> result) {
                          raw->result = std::move(result);
                          if (++raw->answers == 1) raw->answered.Notify();
                        });
    return pending;
  }
  absl::StatusOr<v1::ClassifyResponse> Classify(v1::ClassifyRequest request,
                                                absl::Time deadline = absl::InfiniteFuture()) {
    const auto pending = Send(std::move(request), deadline);
    EXPECT_TRUE(pending->answered.WaitForNotificationWithTimeout(absl::Seconds(20)));
    EXPECT_EQ(pending->answers.load(), 1);
    return pending->result;
  }
  // Shuts the network and has it work on one picture.
  std::unique_ptr<Pending> Occupy() {
    network_.Shut();
    const int before = static_cast<int>(network_.batches().size());
    auto pending = Send(Request({GreyPng(32, 0)}));
    EXPECT_TRUE(network_.AwaitBatches(before + 1));
    return pending;
  }
  double Rejected(const std::string& reason) {
    return Sample(*metrics_,
                  absl::StrCat(R"(pyramid_serving_rejected_images_total{model="fashion",reason=")",
                               reason, R"("})"));
  }
  double Requests(const std::string& code, int version = 1) {
    return Sample(*metrics_, absl::StrCat(R"(pyramid_serving_requests_total{code=")", code,
                                          R"(",model="fashion",version=")", version, R"("})"));
  }

  testing::TempFolder folder_;
  testing::FakeClock clock_;
  FakeNetwork network_;
  int checkpoints_ = 0;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<ModelRegistry> registry_;
  std::unique_ptr<ClassifyPipeline> pipeline_;
};

TEST_F(ClassifyTest, AnswersEachPictureInOrderWithLabelsAndProbabilities) {
  v1::ClassifyRequest request = Request({GreyPng(40, 51), GreyPng(32, 255)});
  request.set_request_id("r-1");
  request.set_return_logits(true);
  ASSERT_OK_AND_ASSIGN(const auto response, Classify(request));
  EXPECT_EQ(response.model(), "fashion");
  EXPECT_EQ(response.version(), 1);
  EXPECT_EQ(response.digest(), registry_->List()[0].digest());
  EXPECT_EQ(response.request_id(), "r-1");
  ASSERT_EQ(response.results_size(), 2);
  // The fake's logits: mean, mean - 1, mean - 2.
  EXPECT_NEAR(response.results(0).logits(0), 51 / 255.0, 1e-6);
  EXPECT_NEAR(response.results(1).logits(0), 1, 1e-6);
  EXPECT_NEAR(response.results(1).logits(2), -1, 1e-6);
  const double sum = 1 + std::exp(-1) + std::exp(-2);
  const v1::PictureResult& result = response.results(0);
  EXPECT_EQ(result.code(), 0);
  ASSERT_EQ(result.predictions_size(), 3);
  EXPECT_EQ(result.predictions(0).label(), "ankle boot");
  EXPECT_EQ(result.predictions(0).index(), 0);
  EXPECT_NEAR(result.predictions(0).probability(), 1 / sum, 1e-6);
  EXPECT_EQ(result.predictions(2).label(), "coat");
  EXPECT_NEAR(result.predictions(2).probability(), std::exp(-2) / sum, 1e-6);
  EXPECT_THAT(network_.batches(), ElementsAre(2));
}

TEST_F(ClassifyTest, LogitsComeOnlyWhenAskedFor) {
  ASSERT_OK_AND_ASSIGN(const auto response, Classify(Request({GreyPng(32, 1)})));
  EXPECT_EQ(response.results(0).logits_size(), 0);
}

TEST_F(ClassifyTest, TopKBoundsThePredictions) {
  v1::ClassifyRequest request = Request({GreyPng(32, 1)});
  request.set_top_k(2);
  EXPECT_EQ(Classify(request)->results(0).predictions_size(), 2);
  request.set_top_k(1000);
  EXPECT_EQ(Classify(request)->results(0).predictions_size(), 3);
  request.set_top_k(-1);
  EXPECT_THAT(Classify(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("top_k is -1")));
}

TEST_F(ClassifyTest, APictureThatCantBeDecodedCarriesItsOwnErrorAndTheOthersAreAnswered) {
  ASSERT_OK_AND_ASSIGN(
      const auto response,
      Classify(Request({GreyPng(32, 10), GoldenImage("empty.jpg"), GoldenImage("truncated.jpg"),
                        GoldenImage("not_an_image.jpg"), GoldenImage("claims_65535.png"),
                        GreyPng(32, 20)})));
  ASSERT_EQ(response.results_size(), 6);
  for (const int good : {0, 5}) {
    EXPECT_EQ(response.results(good).code(), 0);
    EXPECT_EQ(response.results(good).predictions_size(), 3);
  }
  for (const int bad : {1, 2, 3, 4}) {
    EXPECT_EQ(response.results(bad).code(), kInvalid) << bad;
    EXPECT_NE(response.results(bad).message(), "") << bad;
    EXPECT_EQ(response.results(bad).predictions_size(), 0) << bad;
  }
  EXPECT_EQ(network_.pictures(), 2);
  EXPECT_EQ(Rejected("decode"), 4);
  EXPECT_EQ(Requests("OK"), 1);
}

TEST_F(ClassifyTest, OnlyBadPicturesAreStillAnAnswer) {
  ASSERT_OK_AND_ASSIGN(const auto response, Classify(Request({"", "text"})));
  EXPECT_EQ(response.results(0).code(), kInvalid);
  EXPECT_EQ(response.results(1).code(), kInvalid);
  EXPECT_EQ(network_.pictures(), 0);
  EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_queue_images{model="fashion"})"), 0);
}

TEST_F(ClassifyTest, DecodeLimitsAreTheOptions) {
  Make({.decode = {.max_pixels = 100}});
  ASSERT_OK_AND_ASSIGN(const auto response, Classify(Request({GreyPng(32, 1)})));
  EXPECT_EQ(response.results(0).code(), kInvalid);
}

TEST_F(ClassifyTest, NoPictureIsRefused) {
  EXPECT_THAT(Classify(Request({})),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("pictures is empty")));
  EXPECT_EQ(Requests("InvalidArgument", 0), 1);
}

TEST_F(ClassifyTest, MorePicturesThanTheLimitAreRefusedNamingIt) {
  const std::string picture = GreyPng(32, 1);
  EXPECT_THAT(Classify(Request(std::vector<std::string>(10'000, picture))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("10000 entries; at most 64")));
  EXPECT_OK(Classify(Request(std::vector<std::string>(64, picture))));
  EXPECT_THAT(Classify(Request(std::vector<std::string>(65, picture))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 64")));
  EXPECT_EQ(Rejected("invalid"), 10'065);
}

TEST_F(ClassifyTest, APictureWithoutContentIsRefusedByIndex) {
  v1::ClassifyRequest request = Request({GreyPng(32, 1)});
  request.add_pictures();
  EXPECT_THAT(Classify(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("pictures[1]")));
}

TEST_F(ClassifyTest, AnUnknownModelOrVersionIsNotFound) {
  v1::ClassifyRequest request = Request({GreyPng(32, 1)});
  request.set_version(7);
  EXPECT_THAT(Classify(request),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no version 7 of fashion")));
  request.set_model("nosuch");
  EXPECT_THAT(Classify(request),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("there is fashion")));
  EXPECT_EQ(Requests("NotFound", 0), 1);  // an unknown name makes no series
  EXPECT_FALSE(absl::StrContains(testing::MetricsText(*metrics_), "nosuch"));
}

TEST_F(ClassifyTest, AnOlderVersionIsLoadedAndAnswers) {
  Promote(10);
  v1::ClassifyRequest request = Request({GreyPng(32, 0)});
  request.set_return_logits(true);
  ASSERT_OK_AND_ASSIGN(const auto newest, Classify(request));
  EXPECT_EQ(newest.version(), 2);
  EXPECT_EQ(newest.results(0).logits(0), 10);
  request.set_version(1);
  ASSERT_OK_AND_ASSIGN(const auto older, Classify(request));
  EXPECT_EQ(older.version(), 1);
  EXPECT_EQ(older.results(0).logits(0), 0);
}

TEST_F(ClassifyTest, ADamagedOlderVersionIsDataLoss) {
  Promote(10);
  std::ofstream(folder_ / "models" / "fashion" / "1" / std::string(kWeightsFile), std::ios::app)
      << "x";
  v1::ClassifyRequest request = Request({GreyPng(32, 0)});
  request.set_version(1);
  EXPECT_THAT(Classify(request), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("version 1")));
}

TEST_F(ClassifyTest, AModelWithoutLabelsGivesTheIndexAsText) {
  v1::Manifest manifest = testing::FakeManifest();
  manifest.clear_labels();
  Promote(0, manifest);
  EXPECT_EQ(Classify(Request({GreyPng(32, 0)}))->results(0).predictions(1).label(), "1");
}

TEST_F(ClassifyTest, ATensorSkipsDecodingAndNeedNotHaveTheSizeOfTraining) {
  v1::ClassifyRequest request = TensorRequest(1, 40, 29, 40 * 29);
  request.set_return_logits(true);
  ASSERT_OK_AND_ASSIGN(const auto response, Classify(request));
  EXPECT_NEAR(response.results(0).logits(0), 0.25, 1e-6);
}

TEST_F(ClassifyTest, TensorsOfTheWrongShapeAreRefusedByIndex) {
  const std::pair<v1::ClassifyRequest, const char*> cases[] = {
      {TensorRequest(3, 32, 32, 3 * 32 * 32), "tensor.channels is 3; the model takes 1"},
      {TensorRequest(1, 28, 32, 28 * 32), "at least 29"},
      {TensorRequest(1, 32, 28, 28 * 32), "at least 29"},
      {TensorRequest(1, -32, -32, 32 * 32), "at least 29"},
      {TensorRequest(1, 32, 32, 1023), "tensor.values has 1023 numbers; 1x32x32 is 1024"},
      {TensorRequest(1, 2048, 2048, 1), "at most 1048576 pixels"},
      {TensorRequest(1, std::numeric_limits<int>::max(), std::numeric_limits<int>::max(), 1),
       "pixels"},
  };
  for (const auto& [request, message] : cases) {
    EXPECT_THAT(Classify(request),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
    EXPECT_THAT(Classify(request),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("pictures[0]")));
  }
  EXPECT_EQ(network_.pictures(), 0);
}

TEST_F(ClassifyTest, ATensorWithANumberThatIsntFiniteCarriesItsOwnError) {
  v1::ClassifyRequest request = TensorRequest(1, 32, 32, 1024);
  request.mutable_pictures(0)->mutable_tensor()->set_values(
      17, std::numeric_limits<float>::quiet_NaN());
  *request.add_pictures() = TensorRequest(1, 32, 32, 1024).pictures(0);
  ASSERT_OK_AND_ASSIGN(const auto response, Classify(request));
  EXPECT_EQ(response.results(0).code(), kInvalid);
  EXPECT_THAT(response.results(0).message(), HasSubstr("values[17]"));
  EXPECT_EQ(response.results(1).code(), 0);
}

TEST_F(ClassifyTest, AnExpiredDeadlineIsAnsweredWithoutDecoding) {
  EXPECT_THAT(Classify(Request({GreyPng(32, 1)}), clock_.Now()),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("deadline")));
  EXPECT_EQ(
      Sample(*metrics_,
             R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage="decode"})"),
      0);
  EXPECT_EQ(Rejected("expired"), 1);
  EXPECT_EQ(network_.pictures(), 0);
}

TEST_F(ClassifyTest, ADeadlineThatPassesInTheQueueCostsNoForward) {
  auto first = Occupy();
  auto second = Send(Request({GreyPng(32, 1), GreyPng(32, 2)}), clock_.Now() + absl::Seconds(1));
  while (Sample(*metrics_,
                R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage="decode"})") <
         3) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  clock_.Advance(absl::Seconds(2));
  network_.Open();
  second->answered.WaitForNotification();
  EXPECT_THAT(second->result, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("deadline")));
  EXPECT_EQ(network_.pictures(), 1);
  EXPECT_EQ(Rejected("expired"), 2);
  EXPECT_EQ(Requests("DeadlineExceeded"), 1);
}

TEST_F(ClassifyTest, ACallerWhoLeftBeforeCostsNothing) {
  auto first = Occupy();
  auto second = Send(Request({GreyPng(32, 1)}));
  *second->cancelled = true;
  network_.Open();
  second->answered.WaitForNotification();
  EXPECT_THAT(second->result, StatusIs(absl::StatusCode::kCancelled, HasSubstr("left")));
  EXPECT_EQ(network_.pictures(), 1);
  EXPECT_EQ(Rejected("cancelled"), 1);
}

TEST_F(ClassifyTest, PriorityGoesBeforeArrival) {
  Make({}, {.max_batch = 1});
  auto first = Occupy();
  v1::ClassifyRequest request = Request({GreyPng(32, 1)});
  auto second = Send(request);
  request.set_priority(kLowestPriority);
  auto third = Send(request);
  request.set_priority(1);
  auto fourth = Send(request);
  while (Sample(*metrics_,
                R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage="decode"})") <
         4) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  // A pass a second: the queue times tell the order.
  network_.OnForward([this] { clock_.Advance(absl::Seconds(1)); });
  network_.Open();
  std::vector<absl::Duration> queue;
  for (const auto* pending : {fourth.get(), second.get(), third.get()}) {
    pending->answered.WaitForNotification();
    ASSERT_OK(pending->result);
    queue.push_back(FromProto(pending->result->timings().queue()));
  }
  EXPECT_THAT(queue, ElementsAre(absl::ZeroDuration(), absl::Seconds(1), absl::Seconds(2)));
}

TEST_F(ClassifyTest, APriorityThatIsNoneIsRefused) {
  v1::ClassifyRequest request = Request({GreyPng(32, 1)});
  request.set_priority(kLowestPriority + 1);
  EXPECT_THAT(Classify(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("priority is 11; use 1")));
}

TEST_F(ClassifyTest, WhatWouldBeLateIsRefusedWithPushbackBeforeDecoding) {
  network_.OnForward([this] { clock_.Advance(absl::Milliseconds(50)); });
  ASSERT_OK(Classify(Request({GreyPng(32, 1)})));
  network_.Forget();
  const absl::Status late =
      Classify(Request({GreyPng(32, 1)}), clock_.Now() + absl::Milliseconds(51)).status();
  EXPECT_THAT(late, StatusIs(absl::StatusCode::kResourceExhausted,
                             HasSubstr("the answer would come after the deadline")));
  EXPECT_THAT(PushbackMillis(late), Gt(0));
  EXPECT_EQ(Rejected("predicted_late"), 1);
  EXPECT_EQ(Rejected("queue_full"), 0);
  EXPECT_EQ(network_.pictures(), 0);
  EXPECT_EQ(
      Sample(*metrics_,
             R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage="decode"})"),
      1);
  EXPECT_OK(Classify(Request({GreyPng(32, 1)}), clock_.Now() + absl::Milliseconds(60)));
}

TEST_F(ClassifyTest, EachPictureFoundLateBeforeItsDecodingIsCounted) {
  Make({.decode_threads = 1});
  network_.OnForward([this] { clock_.Advance(absl::Milliseconds(50)); });
  ASSERT_OK(Classify(Request({GreyPng(32, 1)})));
  // The only decode thread answers a request, and is held up there.
  absl::Notification held, go_on;
  const v1::ClassifyRequest bad = Request({"text"});
  pipeline_->Classify(bad, absl::InfiniteFuture(), nullptr, [&](auto) {
    held.Notify();
    go_on.WaitForNotification();
  });
  held.WaitForNotification();
  auto late =
      Send(Request(std::vector<std::string>(8, GreyPng(32, 1))), clock_.Now() + absl::Seconds(1));
  clock_.Advance(absl::Milliseconds(960));
  go_on.Notify();
  late->answered.WaitForNotification();
  EXPECT_THAT(late->result,
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("after the deadline")));
  EXPECT_EQ(Rejected("predicted_late"), 8);
  EXPECT_EQ(network_.pictures(), 1);
}

TEST_F(ClassifyTest, LargeFilesAreExpectedFromTheThreadsTheyMayHave) {
  const std::string file = testing::Png(8000, 5000, 8, 0, std::string(size_t{8001} * 5000, '\0'),
                                        false, testing::Chunk("tEXt", std::string(2 << 20, 'x')));
  Make({.decode_threads = 2});
  network_.OnForward([this] { clock_.Advance(absl::Milliseconds(50)); });
  auto first = Send(Request({file}));
  while (!first->answered.HasBeenNotified()) {
    clock_.Advance(absl::Milliseconds(100));
    absl::SleepFor(absl::Milliseconds(1));
  }
  first->answered.WaitForNotification();  // of the two only this is an order that TSan sees
  ASSERT_OK(first->result);
  const absl::Duration each = FromProto(first->result->timings().decode());
  ASSERT_GT(each, absl::ZeroDuration());
  // Two of them are decoded one after the other: the other thread is for smaller ones.
  EXPECT_TRUE(IsPredictedLate(Classify(Request({file, file}), clock_.Now() + 2 * each).status()));
  EXPECT_EQ(Rejected("predicted_late"), 2);
}

TEST_F(ClassifyTest, AnAnswerThatCameAfterTheDeadlineIsNone) {
  network_.OnForward([this] { clock_.Advance(absl::Seconds(2)); });
  EXPECT_THAT(Classify(Request({GreyPng(32, 1)}), clock_.Now() + absl::Seconds(1)),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("1s after the deadline")));
  EXPECT_EQ(Requests("DeadlineExceeded"), 1);
  EXPECT_EQ(Rejected("expired"), 0) << "it reached the network";
}

TEST_F(ClassifyTest, ABadRequestNeverFailsItsBatchMates) {
  auto first = Occupy();
  auto good = Send(Request({GreyPng(32, 51)}));
  auto undecodable = Send(Request({GoldenImage("truncated.jpg")}));
  auto half = Send(Request({GreyPng(32, 1), "text"}));
  auto wrong_shape = Send(TensorRequest(3, 32, 32, 3 * 32 * 32));
  v1::ClassifyRequest strange = TensorRequest(1, 32, 32, 1024);
  strange.mutable_pictures(0)->mutable_tensor()->set_values(5,
                                                            std::numeric_limits<float>::infinity());
  auto infinite = Send(strange);
  auto cancelled = Send(Request({GreyPng(32, 2)}));
  *cancelled->cancelled = true;
  auto other = Send(Request({GreyPng(32, 255)}));
  while (Sample(*metrics_,
                R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage="decode"})") <
         7) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  network_.Forget();
  network_.Open();
  for (auto* pending : {good.get(), half.get(), other.get()}) {
    pending->answered.WaitForNotification();
    ASSERT_OK(pending->result);
    EXPECT_EQ(pending->result->results(0).predictions(0).label(), "ankle boot");
  }
  EXPECT_EQ(half->result->results(1).code(), kInvalid);
  undecodable->answered.WaitForNotification();
  EXPECT_EQ(undecodable->result->results(0).code(), kInvalid);
  infinite->answered.WaitForNotification();
  EXPECT_EQ(infinite->result->results(0).code(), kInvalid);
  wrong_shape->answered.WaitForNotification();
  EXPECT_THAT(wrong_shape->result,
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("tensor")));
  EXPECT_THAT(network_.batches(), ElementsAre(4)) << "good, half, infinite, other";
}

TEST_F(ClassifyTest, NonFiniteTensorsAreAnsweredIfTheServerIsToldTo) {
  Make({.refuse_non_finite = false});
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    v1::ClassifyRequest request = TensorRequest(1, 32, 32, 1024);
    request.mutable_pictures(0)->mutable_tensor()->set_values(7, bad);
    request.set_return_logits(true);
    auto pending = Send(std::move(request));
    pending->answered.WaitForNotification();
    ASSERT_OK(pending->result.status());
    const v1::PictureResult& result = pending->result->results(0);
    EXPECT_EQ(result.code(), 0);
    ASSERT_EQ(result.logits_size(), 3);
    EXPECT_FALSE(std::isfinite(result.logits(0)));
    EXPECT_EQ(result.predictions_size(), 3);
  }
}

// They take a second together, one after the other; the small one overtakes them, and the network
// waits for neither.
TEST_F(ClassifyTest, A40MegapixelPictureHoldsNobodyUp) {
  const std::string file = testing::Png(8000, 5000, 8, 0, std::string(size_t{8001} * 5000, '\0'),
                                        false, testing::Chunk("tEXt", std::string(2 << 20, 'x')));
  Make({.max_pictures = 4, .decode_threads = 2});
  auto slow = Send(Request({file}));
  auto slow_too = Send(Request({file}));
  ASSERT_OK(Classify(Request({GreyPng(32, 1)})));
  EXPECT_FALSE(slow_too->answered.HasBeenNotified());
  slow_too->answered.WaitForNotification();
  ASSERT_OK(slow_too->result);
  EXPECT_EQ(slow_too->result->results(0).code(), 0) << slow_too->result->results(0).message();
  slow->answered.WaitForNotification();
  EXPECT_THAT(network_.batches(), ElementsAre(1, 1, 1));
}

TEST_F(ClassifyTest, AFullQueueIsRefusedWithPushbackBeforeDecoding) {
  Make({.max_pictures = 4}, {.max_batch = 1, .max_queue = 4});
  auto first = Occupy();
  auto second = Send(Request(std::vector<std::string>(3, GreyPng(32, 1))));
  const absl::Status full = Classify(Request({GreyPng(32, 1), GreyPng(32, 1)})).status();
  EXPECT_THAT(full, StatusIs(absl::StatusCode::kResourceExhausted,
                             HasSubstr("3 of 4 pictures wait and 2 more")));
  EXPECT_THAT(PushbackMillis(full), Gt(0));
  EXPECT_EQ(Rejected("queue_full"), 2);
  network_.Open();
  second->answered.WaitForNotification();
  EXPECT_OK(second->result);
  EXPECT_OK(Classify(Request({GreyPng(32, 1), GreyPng(32, 1)})));
}

TEST_F(ClassifyTest, AFullDecodeQueueIsRefusedWithPushbackAndGivesItsRoomBack) {
  Make({.decode_threads = 1, .decode_queue = 2});
  const absl::Status full = Classify(Request(std::vector<std::string>(3, GreyPng(32, 1)))).status();
  EXPECT_THAT(full,
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("decode queue is full")));
  EXPECT_THAT(PushbackMillis(full), Gt(0));
  EXPECT_EQ(Sample(*metrics_, R"(pyramid_serving_queue_images{model="fashion"})"), 0);
  EXPECT_EQ(Rejected("queue_full"), 3);
  EXPECT_OK(Classify(Request(std::vector<std::string>(2, GreyPng(32, 1)))));
}

TEST_F(ClassifyTest, ALargeRequestIsCutIntoFullBatches) {
  Make({}, {.max_batch = 4});
  ASSERT_OK_AND_ASSIGN(const auto response,
                       Classify(Request(std::vector<std::string>(10, GreyPng(32, 9)))));
  EXPECT_EQ(response.results_size(), 10);
  EXPECT_EQ(network_.pictures(), 10);
  EXPECT_EQ(network_.batches()[0], 4);
}

TEST_F(ClassifyTest, ANumberThatOverflowsFailsTheRequestNamingThePicture) {
  v1::Manifest manifest = testing::FakeManifest();
  manifest.mutable_preprocessing()->set_std(0, 1e-39F);
  Promote(0, manifest);
  EXPECT_OK(Classify(Request({GreyPng(32, 0)})));
  EXPECT_THAT(Classify(Request({GreyPng(32, 0), GreyPng(32, 255)})),
              StatusIs(absl::StatusCode::kInternal,
                       HasSubstr("pictures[1]: the network's logit of class 0 isn't finite")));
}

TEST_F(ClassifyTest, ANetworkErrorFailsTheRequest) {
  network_.Fail(absl::InternalError("the network failed"));
  EXPECT_THAT(Classify(Request({GreyPng(32, 1)})),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("the network failed")));
  EXPECT_EQ(Requests("Internal"), 1);
}

TEST_F(ClassifyTest, DrainingAnswersWhatIsInProgressAndRefusesMore) {
  auto first = Occupy();
  EXPECT_FALSE(pipeline_->Drain(clock_.Now()));
  EXPECT_THAT(Classify(Request({GreyPng(32, 1)})),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("shutting down")));
  EXPECT_EQ(Rejected("draining"), 1);
  network_.Open();
  EXPECT_TRUE(pipeline_->Drain(absl::InfiniteFuture()));
  EXPECT_OK(first->result);
  EXPECT_EQ(Sample(*metrics_, "pyramid_serving_inflight_requests"), 0);
}

class DoorOfClassifyTest : public ClassifyTest {
 protected:
  // The last 32 requests were alike, and the next one of their kind finds stable's queue full.
  void SetUp() override {
    Make({}, {.max_queue = 4});
    for (int i = 0; i < 32; ++i) ASSERT_OK(Classify(Request({GreyPng(32, 1)})));
    stable_ = registry_->Get("fashion", 1).value();
    room_ = stable_->batcher().Admit({.pictures = 4, .height = 32, .width = 32}).value();
  }
  void TearDown() override {
    room_ = Batcher::Room();
    stable_ = nullptr;
    ClassifyTest::TearDown();
  }
  // Of 16 that come at once.
  int RefusedAtTheDoor(absl::Time deadline = absl::InfiniteFuture()) {
    int refused = 0;
    for (int i = 0; i < 16; ++i) refused += pipeline_->EnterDoor(deadline).ok() ? 0 : 1;
    return refused;
  }

  std::shared_ptr<const ModelVersion> stable_;
  Batcher::Room room_;
};

TEST_F(DoorOfClassifyTest, WhatWouldBeRefusedIsRefusedUnreadAndCounted) {
  EXPECT_THAT(pipeline_->EnterDoor(absl::InfiniteFuture()).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("4 of 4 pictures wait")));
  EXPECT_EQ(RefusedAtTheDoor(), 15);
  EXPECT_EQ(Rejected("queue_full"), 16);
  EXPECT_EQ(Requests("ResourceExhausted"), 16);
}

TEST_F(DoorOfClassifyTest, WhoHasNoTimeLeftIsToldSo) {
  EXPECT_EQ(RefusedAtTheDoor(clock_.Now()), 0);
  EXPECT_THAT(Classify(Request({GreyPng(32, 1)}), clock_.Now()),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("deadline")));
  EXPECT_EQ(Rejected("queue_full"), 0);
}

TEST_F(DoorOfClassifyTest, DrainingIsNotAFullQueue) {
  ASSERT_TRUE(pipeline_->Drain(absl::InfiniteFuture()));
  EXPECT_EQ(RefusedAtTheDoor(), 0);
  EXPECT_THAT(Classify(Request({GreyPng(32, 1)})),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("shutting down")));
  EXPECT_EQ(Rejected("queue_full"), 0);
}

TEST_F(DoorOfClassifyTest, NobodyIsRefusedForStablesQueueWhileAnotherAliasSharesItsTraffic) {
  const auto folder = folder_ / "canary";
  ASSERT_OK(testing::WriteFakeCheckpoint(folder, 7));
  ASSERT_OK(registry_->Promote(folder, "fashion", {.alias = "canary", .traffic_percent = 50}));
  EXPECT_EQ(RefusedAtTheDoor(), 0);
  EXPECT_EQ(Rejected("queue_full"), 0);
  ASSERT_OK(registry_->SetTraffic("fashion", "canary", 0, ""));
  EXPECT_GT(RefusedAtTheDoor(), 0);
}

TEST_F(ClassifyTest, TimingsAndHistogramsSayWhereTheTimeWent) {
  network_.OnForward([this] { clock_.Advance(absl::Milliseconds(30)); });
  ASSERT_OK_AND_ASSIGN(const auto response, Classify(Request({GreyPng(32, 1)})));
  EXPECT_EQ(FromProto(response.timings().forward()), absl::Milliseconds(30));
  EXPECT_EQ(FromProto(response.timings().queue()), absl::ZeroDuration());
  EXPECT_EQ(FromProto(response.timings().total()), absl::Milliseconds(30));
  for (const char* stage : {"decode", "preprocess", "queue", "forward", "rank"}) {
    EXPECT_EQ(Sample(*metrics_,
                     absl::StrCat(
                         R"(pyramid_serving_stage_duration_seconds_count{model="fashion",stage=")",
                         stage, R"("})")),
              1)
        << stage;
  }
  EXPECT_NEAR(Sample(*metrics_, R"(pyramid_serving_request_duration_seconds_sum{model="fashion"})"),
              0.03, 1e-9);
}

TEST_F(ClassifyTest, DecodingAndPreprocessingAreStagesOfTheirOwn) {
  pipeline_ = nullptr;
  pipeline_ = std::make_unique<ClassifyPipeline>(ClassifyPipeline::Options{}, *registry_, *metrics_,
                                                 Clock::Real());
  ASSERT_OK(Classify(Request({GoldenImage("scene.jpg")})));
  ASSERT_OK(Classify(TensorRequest(1, 32, 32, 1024)));
  const auto stage = [&](const char* what, const char* name) {
    return Sample(*metrics_, absl::StrCat("pyramid_serving_stage_duration_seconds_", what,
                                          R"({model="fashion",stage=")", name, R"("})"));
  };
  EXPECT_GT(stage("sum", "decode"), 0);
  EXPECT_GT(stage("sum", "preprocess"), 0);
  EXPECT_EQ(stage("count", "preprocess"), 1);  // a tensor comes preprocessed
}

TEST_F(ClassifyTest, ReadingARequestIsAStage) {
  pipeline_->Received("fashion", absl::Milliseconds(3));
  pipeline_->Received("nobody", absl::Milliseconds(3));
  EXPECT_NEAR(
      Sample(*metrics_,
             R"(pyramid_serving_stage_duration_seconds_sum{model="fashion",stage="receive"})"),
      0.003, 1e-9);
}

TEST_F(ClassifyTest, ADefaultTimeoutIsTheDeadlineOfRequestsWithoutOneOrWithALaterOne) {
  Make({.default_timeout = absl::Milliseconds(100)});
  auto first = Occupy();
  auto without = Send(Request({GreyPng(32, 1)}));
  auto later = Send(Request({GreyPng(32, 2)}), clock_.Now() + absl::Hours(1));
  clock_.Advance(absl::Milliseconds(101));
  network_.Open();
  without->answered.WaitForNotification();
  later->answered.WaitForNotification();
  EXPECT_THAT(without->result,
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("deadline")));
  EXPECT_THAT(later->result, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("deadline")));
  EXPECT_EQ(network_.pictures(), 1);  // neither reached the network
}

TEST_F(ClassifyTest, ADefaultTimeoutMakesNoDeadlineLater) {
  Make({.default_timeout = absl::Hours(1)});
  auto first = Occupy();
  auto soon = Send(Request({GreyPng(32, 1)}), clock_.Now() + absl::Milliseconds(100));
  clock_.Advance(absl::Milliseconds(101));
  network_.Open();
  soon->answered.WaitForNotification();
  EXPECT_THAT(soon->result, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("deadline")));
}

TEST_F(ClassifyTest, AnswersUnlikeTheValidationsShowInTheDriftIndex) {
  v1::Manifest manifest = testing::FakeManifest();
  v1::AnswerMix& answers = *manifest.mutable_training()->mutable_val_answers();
  for (const int count : {100, 100, 800}) answers.add_classes(count);
  for (size_t i = 0; i < kConfidenceBuckets; ++i) answers.add_confidence(i == 12 ? 1000 : 0);
  Promote(7, manifest, "drifting");
  const auto drift = [&](const char* kind) {
    return Sample(*metrics_, absl::StrCat(R"(pyramid_serving_drift_index{kind=")", kind,
                                          R"(",model="drifting",version="1"})"));
  };
  EXPECT_TRUE(std::isnan(drift("classes")));
  // The fake always answers class 0 with a probability of 0.67.
  v1::ClassifyRequest request = Request(std::vector<std::string>(50, GreyPng(32, 0)));
  request.set_model("drifting");
  for (int i = 0; i < 2; ++i) ASSERT_OK(Classify(request));
  EXPECT_TRUE(std::isnan(drift("classes"))) << "a hundred pictures tell nothing";
  for (int i = 0; i < 4; ++i) ASSERT_OK(Classify(request));
  EXPECT_GT(drift("classes"), 1);
  EXPECT_GT(drift("confidence"), 1);
  EXPECT_FALSE(testing::HasSeries(
      *metrics_, R"(pyramid_serving_drift_index{kind="classes",model="fashion",version="1"})"))
      << "a checkpoint without its validation's answers";
}

TEST_F(ClassifyTest, RequestsDuringPromotionsSeeOldOrNewAndNeverAnError) {
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t) {
    callers.emplace_back([&] {
      v1::ClassifyRequest request = Request({GreyPng(32, 0), GreyPng(32, 0)});
      request.set_return_logits(true);
      while (!stop) {
        const auto response = Classify(request);
        // Version n has bias n - 1.
        if (!response.ok() ||
            response->results(1).logits(0) != static_cast<float>(response->version() - 1))
          ++wrong;
      }
    });
  }
  for (int bias = 1; bias <= 8; ++bias) Promote(bias);
  stop = true;
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(RankTest, OrdersByLogitThenIndexWithProbabilitiesThatSumToOne) {
  const std::vector<float> logits{1, 3, -2, 3};
  ASSERT_OK_AND_ASSIGN(const auto ranked, Rank(logits, {}, 4));
  std::vector<int> order;
  double sum = 0;
  for (const v1::Prediction& prediction : ranked) {
    order.push_back(prediction.index());
    sum += prediction.probability();
  }
  EXPECT_THAT(order, ElementsAre(1, 3, 0, 2));
  EXPECT_NEAR(sum, 1, 1e-6);
}

// As plainly as it can be written, in double.
TEST(RankTest, IsAsExactAsDoublesAndTakesTheBestOfMany) {
  std::mt19937 random(3);
  std::normal_distribution<float> logit(0, 4);
  std::vector<float> logits(1000);
  for (float& one : logits) one = std::round(8 * logit(random)) / 8;  // some are equal
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  double sum = 0;
  for (const float one : logits) sum += std::exp(double{one});
  for (const int top_k : {1, 5, 999, 1000, 2000}) {
    ASSERT_OK_AND_ASSIGN(const auto ranked, Rank(logits, {}, top_k));
    ASSERT_EQ(ranked.size(), static_cast<size_t>(std::min(top_k, 1000)));
    for (size_t i = 0; i < ranked.size(); ++i) {
      ASSERT_EQ(ranked[i].index(), order[i]) << i << " of " << top_k;
      const double expected = std::exp(double{logits[static_cast<size_t>(order[i])]}) / sum;
      ASSERT_NEAR(ranked[i].probability(), expected, 1e-7 + 1e-6 * expected);
    }
  }
}

TEST(RankTest, HugeLogitsDontOverflow) {
  const std::vector<float> logits{3e38f, -3e38f};
  ASSERT_OK_AND_ASSIGN(const auto ranked, Rank(logits, {}, 1));
  EXPECT_EQ(ranked[0].probability(), 1);
}

TEST(RankTest, ALogitThatIsntFiniteIsInternal) {
  for (const float bad :
       {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN()}) {
    const std::vector<float> logits{0, bad, bad};
    EXPECT_THAT(Rank(logits, {}, 1), StatusIs(absl::StatusCode::kInternal, HasSubstr("class 1")));
  }
}

}  // namespace
}  // namespace pyramid
