#include "client/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <sstream>

#include "absl/time/clock.h"
#include "tests/client/fake_server.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

TEST(BarTest, FillsWithTheFraction) {
  EXPECT_EQ(Bar(0, 12), "[>         ]");
  EXPECT_EQ(Bar(0.5, 12), "[=====>    ]");
  EXPECT_EQ(Bar(1, 12), "[==========]");
}

TEST(BarTest, ClampsWhatIsNoFraction) {
  EXPECT_EQ(Bar(-1, 5), "[>  ]");
  EXPECT_EQ(Bar(7, 5), "[===]");
  EXPECT_EQ(Bar(NAN, 5), "[>  ]");
  EXPECT_EQ(Bar(0.5, 2), "");
}

v1::Progress HalfWay() {
  v1::Progress progress = testing::MakeJob("j", v1::RUNNING).progress();
  progress.set_seconds_left(123);
  progress.set_learning_rate(0.000912);
  return progress;
}

TEST(JobBarLineTest, ShowsEpochStepLossRateTopOneAndTimeLeft) {
  EXPECT_EQ(JobBarLine(HalfWay(), 110),
            "epoch 2.5/5 [============>           ]  50% step 940/1,880 loss 0.4321 1,234 "
            "images/s top-1 0.8912 left 2m03s");
}

TEST(JobBarLineTest, NeverExceedsTheTerminal) {
  for (int columns = 1; columns < 200; ++columns) {
    EXPECT_LE(static_cast<int>(JobBarLine(HalfWay(), columns).size()), columns);
  }
  EXPECT_THAT(JobBarLine(HalfWay(), 80), Not(HasSubstr("[")));
}

TEST(JobBarLineTest, NamesAPhaseThatIsNotTraining) {
  v1::Progress progress = HalfWay();
  progress.set_phase("validate");
  EXPECT_THAT(JobBarLine(progress, 110), StartsWith("validate epoch"));
}

TEST(JobPlainLineTest, IsOneLineOfWordsAndNumbers) {
  EXPECT_EQ(JobPlainLine(HalfWay()),
            "train epoch 2.50/5 step 940/1880 loss 0.4321 lr 0.000912 images/s 1234 top-1 0.8912 "
            "left 2m03s");
  EXPECT_EQ(JobPlainLine({}), "train epoch 0.00/0 step 0/0");
}

TEST(JobFractionTest, IsNeverOutside0To1) {
  v1::Progress progress;
  EXPECT_EQ(JobFraction(progress), 0);
  progress.set_steps(10);
  progress.set_step(20);
  EXPECT_EQ(JobFraction(progress), 1);
}

TEST(ProgressDisplayTest, PlainLinesComeFirstAtMilestonesEvery5PercentAndEvery30Seconds) {
  std::ostringstream out;
  ProgressDisplay display(out, /*terminal=*/false);
  const absl::Time start = absl::FromUnixSeconds(1000);
  display.Update("bar", "first", 0.00, false, start);
  display.Update("bar", "too soon", 0.02, false, start + absl::Seconds(1));
  display.Update("bar", "milestone", 0.03, true, start + absl::Seconds(2));
  display.Update("bar", "five", 0.09, false, start + absl::Seconds(3));
  display.Update("bar", "late", 0.10, false, start + absl::Seconds(33));
  display.Finish();
  EXPECT_EQ(out.str(), "first\nmilestone\nfive\nlate\n");
}

TEST(ProgressDisplayTest, TerminalRewritesItsLastLine) {
  std::ostringstream out;
  const absl::Time start = absl::FromUnixSeconds(1000);
  {
    ProgressDisplay display(out, /*terminal=*/true);
    display.Update("one", "", 0.0, false, start);
    display.Update("too soon", "", 0.5, false, start + absl::Milliseconds(50));
    display.Line("stays");
    display.Update("two", "", 0.5, false, start + absl::Milliseconds(150));
  }
  EXPECT_EQ(out.str(), "\r\033[Kone\r\033[Kstays\none\r\033[Ktwo\n");
}

TEST(WaitNoticeTest, CountsOnATerminalAndLeavesNothing) {
  std::ostringstream out;
  {
    const WaitNotice notice(out, /*terminal=*/true, "reading b5.pth", absl::Milliseconds(5));
    absl::SleepFor(absl::Milliseconds(200));
  }
  EXPECT_THAT(out.str(), StartsWith("\r\033[Kreading b5.pth ... 0 s"));
  EXPECT_THAT(out.str(), ::testing::EndsWith("\r\033[K"));
}

TEST(WaitNoticeTest, SaysNothingOfShortWaitsAndOffATerminal) {
  std::ostringstream out;
  { const WaitNotice notice(out, /*terminal=*/true, "reading"); }
  {
    const WaitNotice notice(out, /*terminal=*/false, "reading", absl::Milliseconds(1));
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_EQ(out.str(), "");
}

}  // namespace
}  // namespace pyramid
