#include "worker/schedule.h"

#include <cmath>
#include <numbers>

namespace pyramid {

double LearningRate(const Recipe& r, int64_t step, int64_t steps_per_epoch) {
  double epoch = static_cast<double>(step) / static_cast<double>(steps_per_epoch);
  if (r.lr_epoch_stair) epoch = static_cast<double>(step / steps_per_epoch);
  if (epoch < r.warmup_epochs) {
    return r.lr * (r.warmup_factor + (1 - r.warmup_factor) * epoch / r.warmup_epochs);
  }
  if (r.scheduler == "constant") return r.lr;
  const double since_warmup = epoch - r.warmup_epochs;
  const double cycle = std::floor(since_warmup / r.decay_epochs);
  if (cycle >= r.num_cycles) return r.min_lr;
  const double peak = r.lr * std::pow(r.cycle_decay, cycle);
  const double part = since_warmup / r.decay_epochs - cycle;
  return r.min_lr + 0.5 * (peak - r.min_lr) * (1 + std::cos(std::numbers::pi * part));
}

}  // namespace pyramid
