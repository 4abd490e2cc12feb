// When a load test sends, and the quantiles of what it measured. Pure.
#ifndef PYRAMID_CLIENT_LOAD_SCHEDULE_H_
#define PYRAMID_CLIENT_LOAD_SCHEDULE_H_

#include <cstdint>
#include <random>
#include <vector>

#include "absl/time/time.h"

namespace pyramid {

// A Poisson process: clients that know nothing of each other, nor of how the server is doing. The
// same seed gives the same times.
class PoissonArrivals {
 public:
  PoissonArrivals(double per_second, uint64_t seed) : per_second_(per_second), random_(seed) {}

  // Since the beginning; never smaller than the one before.
  absl::Duration Next();

 private:
  const double per_second_;
  std::mt19937_64 random_;
  double seconds_ = 0;
};

// The smallest of `values` that a share of `quantile` (0..1) of them doesn't exceed; NaN if there
// are none. Sorts.
double Quantile(std::vector<double>& values, double quantile);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_LOAD_SCHEDULE_H_
