// How far a job or a validation has come: one rewritten line on a terminal, plain lines elsewhere.
#ifndef PYRAMID_CLIENT_PROGRESS_H_
#define PYRAMID_CLIENT_PROGRESS_H_

#include <ostream>
#include <string>
#include <thread>

#include "absl/strings/string_view.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "proto/training.pb.h"

namespace pyramid {

// "[=======>      ]", `width` characters in all; `fraction` is clamped to 0..1.
std::string Bar(double fraction, int width);

// "epoch 2.4/5 [=====>    ]  48% step 901/1,880 loss 0.4321 1,234 images/s top-1 0.8912 left
// 2m03s". The bar takes what room `columns` leaves, the line never exceeds it.
std::string JobBarLine(const v1::Progress& progress, int columns);

// "train epoch 2.40/5 step 901/1880 loss 0.4321 lr 0.000912 images/s 1234 top-1 0.8912 left 2m03s".
std::string JobPlainLine(const v1::Progress& progress);

// 0..1.
double JobFraction(const v1::Progress& progress);

// Shows lines as they come. Not thread-safe.
class ProgressDisplay {
 public:
  // `out` must outlive the display.
  ProgressDisplay(std::ostream& out, bool terminal) : out_(out), terminal_(terminal) {}
  ~ProgressDisplay() { Finish(); }

  // Terminal: replaces the last line by `bar`, at most ten times a second. Elsewhere: prints
  // `plain` if it is the first, if `milestone`, if `fraction` grew by 5 %, or after 30 s.
  void Update(absl::string_view bar, absl::string_view plain, double fraction, bool milestone,
              absl::Time now);

  // A line that stays, above the bar.
  void Line(absl::string_view text);

  // Ends the rewritten line.
  void Finish();

 private:
  std::ostream& out_;
  const bool terminal_;
  std::string bar_;  // now on the terminal's last line
  bool shown_ = false;
  double last_fraction_ = 0;
  absl::Time last_time_;
};

// Says on a terminal that something takes its time, "<what> ... 3 s", from the second second on;
// gone with the object. Says nothing elsewhere.
class WaitNotice {
 public:
  // `out` must outlive it, and belongs to it meanwhile.
  WaitNotice(std::ostream& out, bool terminal, std::string what,
             absl::Duration every = absl::Seconds(1));
  ~WaitNotice();
  WaitNotice(const WaitNotice&) = delete;
  WaitNotice& operator=(const WaitNotice&) = delete;

 private:
  absl::Notification done_;
  std::thread thread_;
};

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_PROGRESS_H_
