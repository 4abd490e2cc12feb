// Work on a version that isn't in service yet, without taking the cores from those that are.
#ifndef PYRAMID_SERVER_SERVING_LOADING_H_
#define PYRAMID_SERVER_SERVING_LOADING_H_

#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "model/classifier.h"
#include "proto/base/clock.h"
#include "server/serving/device_turns.h"

namespace pyramid {

// Runs `work` on a thread of its own and waits for it. Its forward passes use at most `threads`
// threads; passes of `device`, unless null, take no more threads than they have cores meanwhile.
//
// For `aside` it has what nobody else wants (where StandAside may, and with one thread), then a
// small share of a busy machine: fifteen steps nicer.
void RunBesideServing(int threads, DeviceTurns* device, absl::FunctionRef<void()> work,
                      absl::Duration aside = absl::Seconds(3));

// Sizes of batches to warm up with, ascending. On the CPU a batch is worked off in groups, so that
// nothing depends on its exact size: powers of two and the largest. Other devices record a pass for
// each size: all of them.
std::vector<int> WarmUpSizes(int largest, absl::string_view device);

// Lets each of these batches pass once, of pictures of the preprocessing's size. What Forward
// returns, with the batch's size.
absl::Status WarmUp(Classifier& classifier, const std::vector<int>& sizes);

// The median of 3 to 20 forward passes of `batch` pictures, at most 2 s of them: on the calling
// thread, with all the threads that answers are computed with. While others use them it is longer.
// What Forward returns.
absl::StatusOr<absl::Duration> MeasureLatency(Classifier& classifier, int batch, Clock& clock);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_LOADING_H_
