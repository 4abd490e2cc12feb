#include "worker/progress_meter.h"

#include <algorithm>

#include "absl/time/clock.h"
#include "proto/base/time.h"

namespace pyramid {

ProgressMeter::ProgressMeter(int64_t total_steps, int64_t steps_per_epoch, int epochs,
                             int evaluations)
    : total_steps_(total_steps), steps_per_epoch_(steps_per_epoch), evaluations_(evaluations) {
  progress_.set_phase("start");
  progress_.set_steps(total_steps);
  progress_.set_epochs(epochs);
}

void ProgressMeter::Start(double now, int64_t steps_done, int64_t images) {
  step_ = steps_done;
  reported_at_ = now;
  progress_.set_images(images);
}

void ProgressMeter::Step(double loss, int64_t images, double learning_rate, double grad_norm,
                         double seconds) {
  ++step_;
  ++steps_;
  images_ += images;
  loss_ += loss * static_cast<double>(images);
  // The first step after a start is slow: it doesn't count beyond the second.
  step_seconds_ = done_here_ < 2 ? seconds : 0.98 * step_seconds_ + 0.02 * seconds;
  ++done_here_;
  if (grad_norm >= 0) progress_.set_grad_norm(grad_norm);
  progress_.set_learning_rate(learning_rate);
  progress_.set_images(progress_.images() + images);
}

void ProgressMeter::Validated(double top1, double top5, double loss, double seconds) {
  progress_.set_validated(true);
  progress_.set_val_top1(top1);
  progress_.set_val_top5(top5);
  progress_.set_val_loss(loss);
  eval_seconds_ = seconds;
}

double ProgressMeter::ImagesPerSecond(double now) const {
  const double elapsed = now - reported_at_;
  return steps_ > 0 && elapsed > 0 ? static_cast<double>(images_) / elapsed
                                   : progress_.images_per_second();
}

double ProgressMeter::SecondsLeft() const {
  const double left = static_cast<double>(total_steps_ - step_);
  return std::max(0.0, left * step_seconds_ +
                           eval_seconds_ * evaluations_ * left / static_cast<double>(total_steps_));
}

const v1::Progress& ProgressMeter::Report(double now, double data_waited) {
  if (phase() == "start" && steps_ > 0) set_phase("train");
  progress_.set_step(step_);
  progress_.set_epoch(static_cast<double>(step_) / static_cast<double>(steps_per_epoch_));
  if (steps_ > 0) {
    const double steps = static_cast<double>(steps_);
    progress_.set_images_per_second(ImagesPerSecond(now));
    progress_.set_loss(loss_ / std::max(1.0, static_cast<double>(images_)));
    progress_.set_step_seconds((now - reported_at_) / steps);
    progress_.set_data_wait_seconds((data_waited - reported_wait_) / steps);
  }
  progress_.set_seconds_left(phase() == "done" ? 0 : SecondsLeft());
  *progress_.mutable_time() = ToProto(absl::Now());
  reported_at_ = now;
  reported_wait_ = data_waited;
  steps_ = images_ = 0;
  loss_ = 0;
  return progress_;
}

}  // namespace pyramid
