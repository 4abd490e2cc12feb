// What every exporter tells of its own process, under the names that Prometheus' client libraries
// use: process_cpu_seconds_total, process_resident_memory_bytes, process_virtual_memory_bytes,
// process_open_fds, process_max_fds, process_threads, process_start_time_seconds. Read from /proc
// at each scrape; what can't be read is left out. Thread-safe.
#ifndef PYRAMID_SERVER_PROCESS_METRICS_H_
#define PYRAMID_SERVER_PROCESS_METRICS_H_

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <vector>

namespace pyramid {

class ProcessMetrics final : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_PROCESS_METRICS_H_
