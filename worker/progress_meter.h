// From single steps to what a Progress says: means since the last report, speed, time left. Time is
// an argument.
#ifndef PYRAMID_WORKER_PROGRESS_METER_H_
#define PYRAMID_WORKER_PROGRESS_METER_H_

#include <cstdint>
#include <string>

#include "proto/training.pb.h"

namespace pyramid {

class ProgressMeter {
 public:
  // `evaluations`: how many validations a whole run has.
  ProgressMeter(int64_t total_steps, int64_t steps_per_epoch, int epochs, int evaluations);

  // Begins to measure at step `steps_done`, after `images` were trained.
  void Start(double now, int64_t steps_done, int64_t images);

  // One step more. `seconds`: how long it took. `grad_norm` < 0: not measured.
  void Step(double loss, int64_t images, double learning_rate, double grad_norm, double seconds);

  void Validated(double top1, double top5, double loss, double seconds);

  void set_phase(const std::string& phase) { progress_.set_phase(phase); }
  const std::string& phase() const { return progress_.phase(); }

  double seconds_since_report(double now) const { return now - reported_at_; }
  double ImagesPerSecond(double now) const;  // since the last report
  double SecondsLeft() const;

  // The state so far; the means begin anew. `data_waited`: seconds waited for data since the start
  // of the process.
  const v1::Progress& Report(double now, double data_waited);

  const v1::Progress& last() const { return progress_; }

 private:
  const int64_t total_steps_;
  const int64_t steps_per_epoch_;
  const int evaluations_;
  v1::Progress progress_;
  int64_t done_here_ = 0;  // steps since Start
  int64_t step_ = 0;
  double step_seconds_ = 0;  // decaying mean over about 50 steps
  double eval_seconds_ = 0;  // of the last validation
  double reported_at_ = 0;
  double reported_wait_ = 0;
  int64_t steps_ = 0, images_ = 0;  // since the last report
  double loss_ = 0;
};

}  // namespace pyramid

#endif  // PYRAMID_WORKER_PROGRESS_METER_H_
