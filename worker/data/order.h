// Which pictures an optimizer step sees, and which of them are this rank's: pure functions of
// (seed, epoch, step), so the number of workers only decides who computes a picture, never which
// pictures a step holds.
#ifndef PYRAMID_WORKER_DATA_ORDER_H_
#define PYRAMID_WORKER_DATA_ORDER_H_

#include <cstdint>
#include <vector>

namespace pyramid {

struct IndexRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

// Part `rank` of `count` things cut into `world` contiguous parts whose sizes differ by at most
// one.
IndexRange PartOf(int64_t count, int rank, int world);

// Steps of one pass. `drop_remainder`: a last batch that isn't full is left out.
int64_t StepsPerEpoch(int64_t pictures, int64_t global_batch, bool drop_remainder);

struct OrderOptions {
  uint64_t seed = 0;
  int64_t pictures = 0;     // in the dataset
  int64_t num_samples = 0;  // used of them, a seeded choice that is the same in every epoch; 0: all
  bool shuffle = true;
};

// Dataset indices of one pass in the order in which they are seen. Step s takes entries [s*G,
// (s+1)*G).
std::vector<int64_t> EpochOrder(const OrderOptions& options, int64_t epoch);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_DATA_ORDER_H_
