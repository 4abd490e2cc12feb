#include "client/load_schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace pyramid {

absl::Duration PoissonArrivals::Next() {
  // By hand, because std::exponential_distribution gives other times with another library.
  const double uniform = std::ldexp(static_cast<double>(random_() >> 11), -53);  // [0, 1)
  seconds_ -= std::log1p(-uniform) / per_second_;
  return absl::Seconds(seconds_);
}

double Quantile(std::vector<double>& values, double quantile) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  if (!std::is_sorted(values.begin(), values.end())) std::sort(values.begin(), values.end());
  const auto count = static_cast<double>(values.size());
  const auto rank = static_cast<int64_t>(std::ceil(quantile * count));
  const int64_t last = static_cast<int64_t>(values.size()) - 1;
  return values[static_cast<size_t>(std::clamp<int64_t>(rank - 1, 0, last))];
}

}  // namespace pyramid
