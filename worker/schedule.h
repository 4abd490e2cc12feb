// The learning rate: a pure function of the recipe and the optimizer step.
#ifndef PYRAMID_WORKER_SCHEDULE_H_
#define PYRAMID_WORKER_SCHEDULE_H_

#include <cstdint>

#include "model/recipe.h"

namespace pyramid {

// MindCV's cosine_decay with warm-up, and constant (mindcv/scheduler/dynamic_lr.py). `step` counts
// from 0. With e = step / steps_per_epoch, whole epochs if lr_epoch_stair: e < W: lr * (f + (1-f) *
// e / W); then, with t = e - W: min_lr + (lr - min_lr) / 2 * (1 + cos(pi * t / D)), num_cycles
// times with the peak multiplied by cycle_decay; then min_lr. MindCV advances once per micro-batch
// under gradient accumulation; this advances once per optimizer step.
double LearningRate(const Recipe& recipe, int64_t step, int64_t steps_per_epoch);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_SCHEDULE_H_
