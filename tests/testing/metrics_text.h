// What a scrape of the metrics would read.
#ifndef PYRAMID_TESTS_TESTING_METRICS_TEXT_H_
#define PYRAMID_TESTS_TESTING_METRICS_TEXT_H_

#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/metrics.h"

namespace pyramid::testing {

inline std::string MetricsText(const Metrics& metrics) {
  std::ostringstream text;
  prometheus::TextSerializer().Serialize(text, metrics.registry()->Collect());
  return text.str();
}

// The value of one series, written as in the text: Sample(m, R"(pyramid_jobs{state="running"})").
// Labels stand in alphabetical order. NaN: no such series.
inline double Sample(const Metrics& metrics, const std::string& series) {
  const std::string text = absl::StrCat("\n", MetricsText(metrics));
  const size_t at = text.find(absl::StrCat("\n", series, " "));
  if (at == std::string::npos) return std::numeric_limits<double>::quiet_NaN();
  return std::strtod(text.c_str() + at + series.size() + 2, nullptr);
}

inline bool HasSeries(const Metrics& metrics, const std::string& series) {
  return !std::isnan(Sample(metrics, series));
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_METRICS_TEXT_H_
