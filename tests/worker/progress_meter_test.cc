#include "worker/progress_meter.h"

#include <gtest/gtest.h>

namespace pyramid {
namespace {

TEST(ProgressMeterTest, MeansAreSinceTheLastReport) {
  ProgressMeter meter(100, 10, 10, 10);
  meter.Start(50, 0, 0);
  meter.Step(4, 8, 0.1, 2.5, 0.5);
  meter.Step(2, 8, 0.2, -1, 0.5);
  EXPECT_DOUBLE_EQ(meter.ImagesPerSecond(51), 16);
  const v1::Progress first = meter.Report(51, 0.2);
  EXPECT_EQ(first.phase(), "train");
  EXPECT_EQ(first.step(), 2);
  EXPECT_EQ(first.images(), 16);
  EXPECT_DOUBLE_EQ(first.epoch(), 0.2);
  EXPECT_DOUBLE_EQ(first.loss(), 3);
  EXPECT_DOUBLE_EQ(first.step_seconds(), 0.5);
  EXPECT_DOUBLE_EQ(first.images_per_second(), 16);
  EXPECT_DOUBLE_EQ(first.data_wait_seconds(), 0.1);
  EXPECT_DOUBLE_EQ(first.learning_rate(), 0.2);
  EXPECT_DOUBLE_EQ(first.grad_norm(), 2.5);
  meter.Step(1, 8, 0.3, -1, 0.5);
  EXPECT_DOUBLE_EQ(meter.Report(53, 0.2).loss(), 1);
}

TEST(ProgressMeterTest, AReportWithoutStepsKeepsTheLastMeans) {
  ProgressMeter meter(100, 10, 10, 10);
  meter.Start(0, 0, 0);
  meter.Step(4, 8, 0.1, -1, 1);
  meter.Report(1, 0);
  const v1::Progress again = meter.Report(5, 0);
  EXPECT_DOUBLE_EQ(again.loss(), 4);
  EXPECT_DOUBLE_EQ(again.images_per_second(), 8);
}

TEST(ProgressMeterTest, TimeLeftCountsStepsAndValidations) {
  ProgressMeter meter(100, 10, 10, 10);
  meter.Start(0, 48, 1000);
  meter.Step(1, 8, 0.1, -1, 9);  // a slow first step
  meter.Step(1, 8, 0.1, -1, 0.5);
  EXPECT_DOUBLE_EQ(meter.SecondsLeft(), 25);
  meter.Validated(0.5, 0.9, 1.0, 4);
  EXPECT_DOUBLE_EQ(meter.SecondsLeft(), 25 + 20);
  EXPECT_EQ(meter.Report(10, 0).images(), 1016);
  meter.set_phase("done");
  const v1::Progress done = meter.Report(11, 0);
  EXPECT_EQ(done.seconds_left(), 0);
  EXPECT_TRUE(done.validated());
  EXPECT_DOUBLE_EQ(done.val_top1(), 0.5);
}

}  // namespace
}  // namespace pyramid
