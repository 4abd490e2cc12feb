// How fast this machine answers: the loaded classifier alone.
#ifndef PYRAMID_WORKER_BENCH_MODEL_H_
#define PYRAMID_WORKER_BENCH_MODEL_H_

#include "absl/status/statusor.h"
#include "worker/bench_train.h"

namespace pyramid {

// Fresh weights as a checkpoint in a temporary folder, loaded as the server loads it. Two calls
// don't count.
absl::StatusOr<BenchResult> BenchModel(const BenchOptions& options);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_BENCH_MODEL_H_
