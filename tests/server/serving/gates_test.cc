#include "server/serving/gates.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "tests/testing/fake_classifier.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

v1::Manifest Validated(double top1) {
  v1::Manifest manifest;
  manifest.mutable_training()->set_validated(true);
  manifest.mutable_training()->set_val_top1(top1);
  return manifest;
}

TEST(GatesTest, WhatIsntAskedForPassesAndIsReported) {
  const v1::GateResult gate = Top1Gate(Validated(0.7125), {});
  EXPECT_TRUE(gate.passed());
  EXPECT_FALSE(gate.asked());
  EXPECT_TRUE(gate.available());
  EXPECT_DOUBLE_EQ(gate.value(), 0.7125);
  EXPECT_EQ(gate.text(), "top-1: 0.7125");
  EXPECT_OK(CheckGate(gate));
}

TEST(GatesTest, TooLowATop1NamesGateValueAndLimit) {
  const v1::GateResult gate = Top1Gate(Validated(0.7125), {.min_top1 = 0.9});
  EXPECT_FALSE(gate.passed());
  EXPECT_THAT(CheckGate(gate), StatusIs(absl::StatusCode::kFailedPrecondition,
                                        HasSubstr("gate top-1: 0.7125, wanted ≥ 0.9")));
  EXPECT_TRUE(Top1Gate(Validated(0.9), {.min_top1 = 0.9}).passed());
  EXPECT_FALSE(
      Top1Gate(Validated(std::numeric_limits<double>::quiet_NaN()), {.min_top1 = 0.9}).passed());
}

TEST(GatesTest, WhatCantBeMeasuredPassesOnlyIfNotAskedFor) {
  EXPECT_TRUE(Top1Gate(v1::Manifest(), {}).passed());
  EXPECT_TRUE(Top1Gate(v1::Manifest(), {.min_top1 = 0.0}).passed());
  EXPECT_THAT(CheckGate(Top1Gate(v1::Manifest(), {.min_top1 = 0.1})),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("top-1: not available (the checkpoint isn't validated), wanted")));
  EXPECT_TRUE(SelfTestGate({}, {}).passed());
  EXPECT_THAT(
      CheckGate(SelfTestGate({}, {.require_self_test = true})),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("self-test: not available")));
  const Agreement none{.with = "the checkpoint has no self-test"};
  EXPECT_TRUE(AgreementGate(none, {}).passed());
  EXPECT_THAT(CheckGate(AgreementGate(none, {.min_agreement = 0.9})),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("agreement: not available (the checkpoint has no self-test)")));
}

TEST(GatesTest, ASelfTestIsReportedWithErrorAndTolerance) {
  const v1::GateResult gate =
      SelfTestGate({.available = true, .pictures = 16, .max_error = 2e-5, .tolerance = 1e-4}, {});
  EXPECT_TRUE(gate.passed());
  EXPECT_DOUBLE_EQ(gate.value(), 2e-5);
  EXPECT_DOUBLE_EQ(gate.limit(), 1e-4);
  EXPECT_EQ(gate.text(), "self-test: max error 2e-05, wanted ≤ 0.0001");
}

TEST(GatesTest, TooSlowNamesBatchAndBothTimes) {
  const v1::GateResult gate =
      LatencyGate(absl::Milliseconds(31), 8, {.max_latency = absl::Milliseconds(25)});
  EXPECT_THAT(CheckGate(gate),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("gate latency: 31 ms at batch 8, wanted ≤ 25 ms")));
  EXPECT_DOUBLE_EQ(gate.value(), 0.031);
  EXPECT_DOUBLE_EQ(gate.limit(), 0.025);
  EXPECT_TRUE(
      LatencyGate(absl::Milliseconds(25), 8, {.max_latency = absl::Milliseconds(25)}).passed());
}

TEST(GatesTest, TooLittleAgreementNamesTheOtherVersion) {
  const Agreement agreement{.available = true, .with = "version 3", .pictures = 16, .share = 0.875};
  EXPECT_THAT(CheckGate(AgreementGate(agreement, {.min_agreement = 0.9})),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("agreement: 0.8750 of 16 pictures with version 3, wanted ≥ 0.9")));
  EXPECT_TRUE(AgreementGate(agreement, {.min_agreement = 0.875}).passed());
}

// Else a server that asks for agreement by default could never take a first version.
TEST(GatesTest, ADefaultAgreementHoldsFromTheSecondVersionOn) {
  const Agreement first{.with = "nothing is stable yet", .first = true};
  const GateLimits by_default = MergeLimits({}, {.min_agreement = 0.9});
  EXPECT_TRUE(AgreementGate(first, by_default).passed());
  EXPECT_FALSE(AgreementGate({.with = "other classes"}, by_default).passed());
  EXPECT_FALSE(AgreementGate(first, MergeLimits({.min_agreement = 0.9}, {})).passed());
}

TEST(GatesTest, ARequestWinsOverDefaultsAndZeroAsksForNothing) {
  const GateLimits defaults{.min_top1 = 0.8,
                            .max_latency = absl::Milliseconds(50),
                            .latency_batch = 4,
                            .min_agreement = 0.9,
                            .require_self_test = true};
  const GateLimits same = MergeLimits({}, defaults);
  EXPECT_EQ(same.min_top1, 0.8);
  EXPECT_EQ(same.max_latency, absl::Milliseconds(50));
  EXPECT_EQ(same.latency_batch, 4);
  EXPECT_EQ(same.min_agreement, 0.9);
  EXPECT_EQ(same.require_self_test, true);
  const GateLimits other = MergeLimits({.min_top1 = 0.0,
                                        .max_latency = absl::ZeroDuration(),
                                        .latency_batch = 1,
                                        .min_agreement = 0.5,
                                        .require_self_test = false},
                                       defaults);
  EXPECT_TRUE(Top1Gate(Validated(0.1), other).passed());
  EXPECT_FALSE(LatencyGate(absl::Seconds(9), 1, other).asked());
  EXPECT_EQ(other.latency_batch, 1);
  EXPECT_EQ(other.min_agreement, 0.5);
  EXPECT_TRUE(SelfTestGate({}, other).passed());
}

TEST(GatesTest, LimitsThatMakeNoSenseAreRefused) {
  EXPECT_OK(CheckLimits({}, 32));
  EXPECT_OK(CheckLimits({.min_top1 = 1.0, .latency_batch = 32, .min_agreement = 0.0}, 32));
  const auto refused = [](const char* name) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(name));
  };
  EXPECT_THAT(CheckLimits({.min_top1 = 90.0}, 32), refused("min_top1 is 90"));
  EXPECT_THAT(CheckLimits({.min_top1 = std::numeric_limits<double>::quiet_NaN()}, 32),
              refused("min_top1"));
  EXPECT_THAT(CheckLimits({.min_agreement = -0.1}, 32), refused("min_agreement is -0.1"));
  EXPECT_THAT(CheckLimits({.max_latency = absl::Milliseconds(-1)}, 32), refused("max_latency"));
  EXPECT_THAT(CheckLimits({.latency_batch = 33}, 32), refused("latency_batch is 33; use 1..32"));
  EXPECT_THAT(CheckLimits({.latency_batch = -1}, 32), refused("latency_batch is -1"));
}

TEST(GatesTest, CountsPicturesWithTheSameFirstAnswer) {
  const std::vector<float> a{3, 1, 2, /**/ 1, 3, 2, /**/ 1, 1, 0, /**/ 0, 0, 9};
  const std::vector<float> b{9, 8, 7, /**/ 3, 1, 2, /**/ 2, 2, 1, /**/ 0, 9, 0};
  EXPECT_DOUBLE_EQ(ShareOfSameAnswers(a, b, 3), 0.5);
  EXPECT_DOUBLE_EQ(ShareOfSameAnswers(a, a, 3), 1);
  EXPECT_DOUBLE_EQ(ShareOfSameAnswers({}, {}, 3), 0);
  EXPECT_DOUBLE_EQ(ShareOfSameAnswers(a, std::vector<float>(3), 3), 0);
}

TEST(GatesTest, OtherClassesOrPixelsCantBeCompared) {
  const v1::Manifest manifest = testing::FakeManifest();
  EXPECT_EQ(WhyNotComparable(manifest, manifest), "");
  v1::Manifest other = manifest;
  other.mutable_network()->set_num_classes(4);
  EXPECT_THAT(WhyNotComparable(manifest, other), HasSubstr("other classes"));
  other = manifest;
  other.set_labels(0, "sandal");
  EXPECT_THAT(WhyNotComparable(manifest, other), HasSubstr("other classes"));
  other = manifest;
  other.mutable_preprocessing()->set_mean(0, 0.5);
  EXPECT_THAT(WhyNotComparable(manifest, other), HasSubstr("preprocessing differs"));
}

}  // namespace
}  // namespace pyramid
