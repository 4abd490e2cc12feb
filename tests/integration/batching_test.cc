// Batches through the real server and the real network.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "tests/integration/cluster.h"
#include "tests/testing/formula.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/weight_file.h"

namespace pyramid {
namespace {

using testing::Cluster;
using testing::FormulaImage;

constexpr int kSide = 64;
constexpr int kPictures = 32;
constexpr size_t kValues = size_t{3} * kSide * kSide;

// A server with pvt_v2_b0 in formula weights, in service as "formula".
class BatchingTest : public ::testing::TestWithParam<std::string> {
 protected:
  void Start(const std::string& dtype) {
    ASSERT_OK(testing::WriteFormulaFile(cluster_.folder() / "weights.safetensors"));
    const auto model = cluster_.data() / "models" / "formula";
    std::filesystem::create_directories(model);
    const testing::RunResult converted =
        testing::Process(
            {testing::Program("pyramid"), "convert",
             (cluster_.folder() / "weights.safetensors").string(), (model / "1").string()},
            cluster_.folder() / "convert")
            .Wait(absl::Seconds(60));
    ASSERT_EQ(converted.exit_code, 0) << converted.err;
    ASSERT_OK(WriteFileAtomically(
        model / "state.json",
        absl::StrCat(R"({"format_version": 1, "name": "formula", "aliases": {"stable": 1}, )",
                     R"("dtypes": {"1": ")", dtype, R"("}})")));
    cluster_.Start();
    values_ = FormulaImage(kPictures, 3, kSide, kSide);
  }
  void AddPicture(v1::ClassifyRequest& request, int index, float scale = 1) {
    v1::ImageTensor& tensor = *request.add_pictures()->mutable_tensor();
    tensor.set_channels(3);
    tensor.set_height(kSide);
    tensor.set_width(kSide);
    const float* first = values_.data() + static_cast<size_t>(index) * kValues;
    tensor.mutable_values()->Assign(first, first + kValues);
    for (float& value : *tensor.mutable_values()) value *= scale;
  }
  grpc::Status Classify(v1::ClassifyRequest request, v1::ClassifyResponse& response,
                        absl::Duration timeout = absl::Seconds(30), int64_t* pushback = nullptr) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    request.set_model("formula");
    request.set_top_k(10);
    grpc::Status status = cluster_.classification().Classify(&context, request, &response);
    const auto& trailing = context.GetServerTrailingMetadata();
    const auto found = trailing.find("grpc-retry-pushback-ms");
    if (pushback != nullptr && found != trailing.end()) {
      EXPECT_TRUE(absl::SimpleAtoi(absl::string_view(found->second.data(), found->second.size()),
                                   pushback));
    }
    return status;
  }
  // By class.
  static std::vector<double> Probabilities(const v1::PictureResult& result) {
    std::vector<double> probabilities(10, -1);
    for (const v1::Prediction& prediction : result.predictions()) {
      probabilities.at(static_cast<size_t>(prediction.index())) =
          static_cast<double>(prediction.probability());
    }
    return probabilities;
  }
  double Metric(const std::string& series) {
    const std::string text = testing::HttpGet(cluster_.metrics_address(), "/metrics");
    const size_t at = text.find(absl::StrCat("\n", series, " "));
    return at == std::string::npos ? NAN
                                   : std::strtod(text.c_str() + at + series.size() + 2, nullptr);
  }

  Cluster cluster_;
  std::vector<float> values_;
};

TEST_P(BatchingTest, APictureAloneAndAmong32GetsTheSameAnswer) {
  ASSERT_NO_FATAL_FAILURE(Start(GetParam()));
  v1::ClassifyRequest all;
  for (int i = 0; i < kPictures; ++i) AddPicture(all, i);
  v1::ClassifyResponse together;
  const grpc::Status status = Classify(all, together);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(together.results_size(), kPictures);
  ASSERT_EQ(Metric(R"(pyramid_serving_batch_size_images_bucket{model="formula",le="16"})"), 0);
  ASSERT_EQ(Metric(R"(pyramid_serving_batch_size_images_bucket{model="formula",le="32"})"), 1);

  const double allowed = GetParam() == "bf16" ? 1e-3 : 1e-5;
  double largest = 0;
  for (int i = 0; i < kPictures; ++i) {
    v1::ClassifyRequest one;
    AddPicture(one, i);
    v1::ClassifyResponse alone;
    ASSERT_TRUE(Classify(one, alone).ok());
    EXPECT_EQ(alone.results(0).predictions(0).index(), together.results(i).predictions(0).index());
    const std::vector<double> a = Probabilities(alone.results(0));
    const std::vector<double> b = Probabilities(together.results(i));
    for (size_t c = 0; c < a.size(); ++c) largest = std::max(largest, std::abs(a[c] - b[c]));
  }
  EXPECT_LE(largest, allowed);
  RecordProperty("largest_difference", absl::StrCat(largest));
  EXPECT_TRUE(absl::StrContains(cluster_.ServerLog(), GetParam() == "bf16" ? "bf16" : "fp32"));
}

// One whose numbers overflow in the network, one that can't be decoded, and good ones, all at once
// and again and again.
TEST_P(BatchingTest, BadRequestsLeaveTheirBatchMatesAlone) {
  ASSERT_NO_FATAL_FAILURE(Start(GetParam()));
  v1::ClassifyRequest good;
  AddPicture(good, 0);
  v1::ClassifyResponse expected;
  ASSERT_TRUE(Classify(good, expected).ok());
  const std::vector<double> right = Probabilities(expected.results(0));

  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&, t] {
      for (int i = 0; i < 25; ++i) {
        v1::ClassifyRequest request;
        if (t == 0) AddPicture(request, 1, 1e36f);
        if (t == 1) request.add_pictures()->set_encoded("not a picture");
        if (t >= 2) request = good;
        v1::ClassifyResponse response;
        const grpc::Status status = Classify(request, response);
        if (t < 2) continue;  // answered one way or another
        if (!status.ok() || response.results(0).code() != 0) {
          ++wrong;
          continue;
        }
        const std::vector<double> got = Probabilities(response.results(0));
        for (size_t c = 0; c < got.size(); ++c) wrong += std::abs(got[c] - right[c]) > 1e-3;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, BatchingTest, ::testing::Values("fp32", "bf16"),
                         [](const auto& test) { return test.param; });

// Twenty callers with a fraction of the time they would need, who come back when they are told to:
// nobody gets a late answer, some are answered, and the next lone caller is served.
TEST_F(BatchingTest, OverloadIsRefusedAtOnceAndLeavesNothingBehind) {
  ASSERT_NO_FATAL_FAILURE(Start("bf16"));
  v1::ClassifyRequest request;
  for (int i = 0; i < kPictures; ++i) AddPicture(request, i);
  v1::ClassifyResponse response;
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(Classify(request, response).ok());
  const absl::Time started = absl::Now();
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(Classify(request, response).ok());
  const absl::Duration one = (absl::Now() - started) / 5;

  std::atomic<int> answered{0}, refused{0}, expired{0}, other{0};
  std::vector<std::thread> callers;
  const absl::Time until = absl::Now() + absl::Seconds(3);
  for (int t = 0; t < 20; ++t) {
    callers.emplace_back([&] {
      while (absl::Now() < until) {
        v1::ClassifyResponse ignored;
        int64_t pushback = 0;
        switch (Classify(request, ignored, 4 * one, &pushback).error_code()) {
          case grpc::StatusCode::OK:
            ++answered;
            break;
          case grpc::StatusCode::RESOURCE_EXHAUSTED:
            ++refused;
            absl::SleepFor(absl::Milliseconds(pushback));
            break;
          case grpc::StatusCode::DEADLINE_EXCEEDED:
            ++expired;
            break;
          default:
            ++other;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(other.load(), 0);
  EXPECT_GT(answered.load(), 0) << refused << " refused, " << expired << " expired, " << one
                                << " alone";
  EXPECT_GT(refused.load(), 0);
  RecordProperty("answered", answered);
  RecordProperty("refused", refused);
  RecordProperty("expired", expired);
  v1::ClassifyResponse after;
  EXPECT_TRUE(Classify(request, after, absl::Seconds(5)).ok());
  EXPECT_EQ(Metric(R"(pyramid_serving_queue_images{model="formula"})"), 0);
  double rejected = 0;
  for (const char* reason : {"predicted_late", "queue_full", "expired", "cancelled"}) {
    const double images = Metric(absl::StrCat(
        R"(pyramid_serving_rejected_images_total{model="formula",reason=")", reason, R"("})"));
    RecordProperty(reason, absl::StrCat(images));
    rejected += images;
  }
  EXPECT_GT(rejected, 0);
}

}  // namespace
}  // namespace pyramid
