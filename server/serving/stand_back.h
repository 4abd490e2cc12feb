// Threads that compute for long beside threads that must react at once.
//
// Linux 6.12 and later give a thread that wakes up the core of one with a longer slice. What can't
// be set is left: then the threads only disturb each other more.
#ifndef PYRAMID_SERVER_SERVING_STAND_BACK_H_
#define PYRAMID_SERVER_SERVING_STAND_BACK_H_

#include "absl/time/time.h"

namespace pyramid {

// The slice of the calling thread and of those that it makes from now on, unless they set their
// own: 0.1 to 100 ms; zero: the kernel's, 1 to 3. Processes that they start have it too.
void SetSlice(absl::Duration slice);

// For the calling thread: it computes. `nice` steps (0..19) make its share of a busy core smaller.
void StandBack(int nice, absl::Duration slice = absl::Milliseconds(3));

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_STAND_BACK_H_
