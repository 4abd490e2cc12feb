#include "server/process_metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <system_error>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace pyramid {
namespace {

// Columns of /proc/self/stat, counted from the state, which follows the name in parentheses; the
// name may hold blanks. See proc(5).
constexpr size_t kUserTicks = 11;
constexpr size_t kSystemTicks = 12;
constexpr size_t kThreads = 17;
constexpr size_t kStartTicks = 19;
constexpr size_t kVirtualBytes = 20;
constexpr size_t kResidentPages = 21;

std::string ReadAll(const char* path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Seconds since 1970 at which the machine started; 0: unknown.
double BootSeconds() {
  double boot = 0;
  for (const absl::string_view line : absl::StrSplit(ReadAll("/proc/stat"), '\n')) {
    if (line.substr(0, 6) == "btime " && absl::SimpleAtod(line.substr(6), &boot)) break;
  }
  return boot;
}

double OpenFiles() {
  std::error_code error;
  double count = 0;
  for (std::filesystem::directory_iterator it("/proc/self/fd", error), end; !error && it != end;
       it.increment(error)) {
    ++count;
  }
  return count;
}

void Add(std::vector<prometheus::MetricFamily>& families, const char* name, const char* help,
         prometheus::MetricType type, double value) {
  prometheus::MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  prometheus::ClientMetric metric;
  if (type == prometheus::MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  family.metric.push_back(std::move(metric));
  families.push_back(std::move(family));
}

}  // namespace

std::vector<prometheus::MetricFamily> ProcessMetrics::Collect() const {
  using prometheus::MetricType;
  std::vector<prometheus::MetricFamily> families;
  const std::string stat = ReadAll("/proc/self/stat");
  const std::vector<std::string> columns =
      absl::StrSplit(absl::string_view(stat).substr(stat.rfind(')') + 1), ' ', absl::SkipEmpty());
  const auto column = [&columns](size_t index) {
    double value = 0;
    return index < columns.size() && absl::SimpleAtod(columns[index], &value) ? value : 0;
  };
  if (columns.size() > kResidentPages) {
    const auto ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
    Add(families, "process_cpu_seconds_total", "Processor time of the process, user and system.",
        MetricType::Counter, (column(kUserTicks) + column(kSystemTicks)) / ticks);
    Add(families, "process_resident_memory_bytes", "Resident memory.", MetricType::Gauge,
        column(kResidentPages) * static_cast<double>(sysconf(_SC_PAGESIZE)));
    Add(families, "process_virtual_memory_bytes", "Virtual memory.", MetricType::Gauge,
        column(kVirtualBytes));
    Add(families, "process_threads", "Threads of the process.", MetricType::Gauge,
        column(kThreads));
    if (const double boot = BootSeconds(); boot > 0) {
      Add(families, "process_start_time_seconds", "Start of the process, seconds since 1970-01-01.",
          MetricType::Gauge, boot + column(kStartTicks) / ticks);
    }
  }
  if (const double open = OpenFiles(); open > 0) {
    Add(families, "process_open_fds", "Open file descriptors.", MetricType::Gauge, open);
  }
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    Add(families, "process_max_fds", "File descriptors that may be open.", MetricType::Gauge,
        static_cast<double>(limit.rlim_cur));
  }
  return families;
}

}  // namespace pyramid
