// Which class of failure a Status is, for the coordinator's decision to try again, and the exit
// codes of this program.
#ifndef PYRAMID_WORKER_FAILURE_H_
#define PYRAMID_WORKER_FAILURE_H_

#include "absl/status/status.h"
#include "proto/training.pb.h"

namespace pyramid {

inline constexpr int kExitDone = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitNotFound = 3;
inline constexpr int kExitStopped = 10;  // saved and stopped, as asked

// The same error, marked with a class. OK stays OK. Annotate keeps the mark.
absl::Status WithFailure(absl::Status status, v1::FailureClass failure);

// The mark, else what the code suggests: InvalidArgument, NotFound, FailedPrecondition → CONFIG;
// DataLoss → DATA_CORRUPT; ResourceExhausted → OOM_HOST; Aborted → COMM; anything else →
// WORKER_LOST.
v1::FailureClass FailureOf(const absl::Status& status);

int ExitCodeOf(const absl::Status& status);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_FAILURE_H_
