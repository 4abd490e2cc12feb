// A real Prometheus scrapes a real server, and promtool finds nothing to complain about.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/integration/cluster.h"

namespace pyramid {
namespace {

using testing::Cluster;
using ::testing::HasSubstr;
using testing::HttpGet;
using testing::Process;

TEST(PrometheusTest, ScrapesTheServer) {
  Cluster cluster;
  cluster.Start();
  ASSERT_FALSE(HasFailure());
  std::ofstream(cluster.folder() / "metrics.txt") << HttpGet(cluster.metrics_address(), "/metrics");
  const auto promtool = testing::Run(
      {"sh", "-c",
       absl::StrCat("promtool check metrics < ", (cluster.folder() / "metrics.txt").string())},
      cluster.folder() / "promtool");
  EXPECT_EQ(promtool.exit_code, 0) << promtool.out << promtool.err;

  std::ofstream(cluster.folder() / "prometheus.yml")
      << "global: {scrape_interval: 1s, scrape_timeout: 1s}\nscrape_configs:\n- job_name: "
         "pyramid\n  static_configs:\n  - targets: ['"
      << cluster.metrics_address() << "']\n";
  // Prometheus can't report a port it picked itself, so one that was free a moment ago is given to
  // it.
  const std::string address = absl::StrCat("127.0.0.1:", 20000 + getpid() % 20000);
  Process prometheus(
      {"prometheus", absl::StrCat("--config.file=", (cluster.folder() / "prometheus.yml").string()),
       absl::StrCat("--storage.tsdb.path=", (cluster.folder() / "tsdb").string()),
       absl::StrCat("--web.listen-address=", address)},
      cluster.folder() / "prometheus");
  std::string answer;
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  while (absl::Now() < deadline) {
    answer = HttpGet(address,
                     "/api/v1/"
                     "query?query=up%7Bjob%3D%22pyramid%22%7D%20%2B%20on%28instance%29%20group_"
                     "left%20pyramid_jobs%7Bstate%3D%22queued%22%7D");
    if (answer.find("\"1\"") != std::string::npos) break;
    absl::SleepFor(absl::Milliseconds(300));
  }
  EXPECT_THAT(answer, HasSubstr("\"1\"")) << prometheus.Err();
}

}  // namespace
}  // namespace pyramid
