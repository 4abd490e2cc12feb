#include "client/progress.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/exit_code.h"
#include "client/format.h"

namespace pyramid {
namespace {

constexpr int kNarrowestBar = 8;
constexpr int kWidestBar = 40;

std::string TimeLeft(const v1::Progress& progress) {
  return progress.seconds_left() > 0
             ? absl::StrCat(" left ", FormatSeconds(progress.seconds_left()))
             : "";
}

}  // namespace

std::string Bar(double fraction, int width) {
  if (width < 3) return "";
  if (!(fraction >= 0)) fraction = 0;  // NaN too
  fraction = std::min(fraction, 1.0);
  const int inner = width - 2;
  const int full = static_cast<int>(std::floor(fraction * inner));
  std::string bar = absl::StrCat("[", std::string(static_cast<size_t>(full), '='));
  if (full < inner) {
    absl::StrAppend(&bar, ">", std::string(static_cast<size_t>(inner - full - 1), ' '));
  }
  return bar + "]";
}

double JobFraction(const v1::Progress& progress) {
  if (progress.steps() <= 0) return 0;
  return std::clamp(static_cast<double>(progress.step()) / static_cast<double>(progress.steps()),
                    0.0, 1.0);
}

std::string JobBarLine(const v1::Progress& progress, int columns) {
  const double fraction = JobFraction(progress);
  std::string before;
  if (!progress.phase().empty() && progress.phase() != "train") {
    absl::StrAppend(&before, OneLine(progress.phase()), " ");
  }
  absl::StrAppend(&before, absl::StrFormat("epoch %.1f/%d", progress.epoch(), progress.epochs()));
  std::string after = absl::StrFormat(" %3d%% step %s/%s", static_cast<int>(fraction * 100),
                                      FormatCount(progress.step()), FormatCount(progress.steps()));
  if (progress.loss() != 0) absl::StrAppend(&after, absl::StrFormat(" loss %.4f", progress.loss()));
  if (progress.images_per_second() > 0) {
    absl::StrAppend(&after, " ", FormatRate(progress.images_per_second()), " images/s");
  }
  if (progress.validated()) {
    absl::StrAppend(&after, " top-1 ", FormatFraction(progress.val_top1()));
  }
  absl::StrAppend(&after, TimeLeft(progress));
  const int room = columns - static_cast<int>(before.size()) - static_cast<int>(after.size()) - 2;
  std::string line = before;
  if (room >= kNarrowestBar) {
    absl::StrAppend(&line, " ", Bar(fraction, std::min(room, kWidestBar)));
  }
  line += after;
  if (static_cast<int>(line.size()) > columns)
    line.resize(static_cast<size_t>(std::max(columns, 0)));
  return line;
}

std::string JobPlainLine(const v1::Progress& progress) {
  std::string line =
      absl::StrCat(progress.phase().empty() ? "train" : OneLine(progress.phase()),
                   absl::StrFormat(" epoch %.2f/%d step %d/%d", progress.epoch(), progress.epochs(),
                                   progress.step(), progress.steps()));
  if (progress.loss() != 0) absl::StrAppend(&line, absl::StrFormat(" loss %.4f", progress.loss()));
  if (progress.learning_rate() != 0) {
    absl::StrAppend(&line, absl::StrFormat(" lr %.3g", progress.learning_rate()));
  }
  if (progress.images_per_second() > 0) {
    absl::StrAppend(&line, absl::StrFormat(" images/s %.0f", progress.images_per_second()));
  }
  if (progress.validated()) {
    absl::StrAppend(&line, " top-1 ", FormatFraction(progress.val_top1()));
  }
  return absl::StrCat(line, TimeLeft(progress));
}

void ProgressDisplay::Update(absl::string_view bar, absl::string_view plain, double fraction,
                             bool milestone, absl::Time now) {
  if (terminal_) {
    if (shown_ && !milestone && now - last_time_ < absl::Milliseconds(100)) return;
    bar_ = std::string(bar);
    out_ << absl::StrCat("\r\033[K", bar_) << std::flush;
  } else {
    if (shown_ && !milestone && fraction - last_fraction_ < 0.05 &&
        now - last_time_ < absl::Seconds(30)) {
      return;
    }
    out_ << absl::StrCat(plain, "\n") << std::flush;
  }
  shown_ = true;
  last_fraction_ = fraction;
  last_time_ = now;
}

void ProgressDisplay::Line(absl::string_view text) {
  if (terminal_ && !bar_.empty()) {
    out_ << absl::StrCat("\r\033[K", text, "\n", bar_) << std::flush;
  } else {
    out_ << absl::StrCat(text, "\n") << std::flush;
  }
}

void ProgressDisplay::Finish() {
  if (terminal_ && !bar_.empty()) out_ << "\n" << std::flush;
  bar_.clear();
}

WaitNotice::WaitNotice(std::ostream& out, bool terminal, std::string what, absl::Duration every) {
  if (!terminal) return;
  thread_ = std::thread([this, &out, what = std::move(what), every] {
    const absl::Time start = absl::Now();
    bool shown = false;
    while (!done_.WaitForNotificationWithTimeout(every)) {
      const auto seconds = static_cast<int>(absl::ToInt64Seconds(absl::Now() - start));
      out << absl::StrCat("\r\033[K", what, " ... ", seconds, " s") << std::flush;
      shown = true;
    }
    if (shown) out << "\r\033[K" << std::flush;
  });
}

WaitNotice::~WaitNotice() {
  done_.Notify();
  if (thread_.joinable()) thread_.join();
}

}  // namespace pyramid
