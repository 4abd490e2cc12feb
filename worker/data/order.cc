#include "worker/data/order.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "worker/data/random.h"

namespace pyramid {
namespace {

void Shuffle(std::vector<int64_t>& values, CounterRandom random) {
  for (int64_t i = static_cast<int64_t>(values.size()) - 1; i > 0; --i) {
    std::swap(values[i], values[random.Below(i + 1)]);
  }
}

}  // namespace

IndexRange PartOf(int64_t count, int rank, int world) {
  return {count * rank / world, count * (rank + 1) / world};
}

int64_t StepsPerEpoch(int64_t pictures, int64_t global_batch, bool drop_remainder) {
  return drop_remainder ? pictures / global_batch : (pictures + global_batch - 1) / global_batch;
}

std::vector<int64_t> EpochOrder(const OrderOptions& options, int64_t epoch) {
  std::vector<int64_t> order(options.pictures);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (options.num_samples > 0 && options.num_samples < options.pictures) {
    Shuffle(order, CounterRandom(RandomStream::kSubset, options.seed, 0, 0));
    order.resize(options.num_samples);
    std::sort(order.begin(), order.end());
  }
  if (options.shuffle) {
    Shuffle(order, CounterRandom(RandomStream::kOrder, options.seed, epoch, 0));
  }
  return order;
}

}  // namespace pyramid
