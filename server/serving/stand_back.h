// Threads that compute for long beside threads that must react at once.
#ifndef PYRAMID_SERVER_SERVING_STAND_BACK_H_
#define PYRAMID_SERVER_SERVING_STAND_BACK_H_

namespace pyramid {

// The calling thread computes: one that wakes up to read or send may interrupt it at once (a longer
// slice of the scheduler's; Linux 6.12 and later look at it), and `nice` steps (0..19) make its
// share of a busy core smaller. Whatever can't be set is left: then it only disturbs more.
void StandBack(int nice);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_STAND_BACK_H_
