// How fast this machine trains: whole steps on made-up pictures.
#ifndef PYRAMID_WORKER_BENCH_TRAIN_H_
#define PYRAMID_WORKER_BENCH_TRAIN_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/placement.h"

namespace pyramid {

struct BenchOptions {
  std::string variant = "pvt_v2_b0";
  int batch = 32;  // of all workers together
  int size = 224;  // side, pixels
  int classes = 1000;
  std::string dtype = "fp32";
  int threads = 0;  // of all workers together; 0: the machine's cores
  int workers = 1;
  std::string mode = "G";  // G: fused and packed, F: plain
  double seconds = 20;
  bool profile = false;
  bool json = false;
};

struct BenchResult {
  std::vector<double> step_seconds;  // of each step that counted
  double peak_rss_mb = 0;            // all workers together
  std::string path;                  // what computed
  std::string profile;               // a table, if asked for
};

// One rank: forward, loss, backward with all-reduce, AdamW, as peers.py train does it (label
// smoothing 0.1, drop path 0.1, weight decay 0.05). Two steps don't count. Ranks stop together.
absl::StatusOr<BenchResult> BenchTrain(const BenchOptions& options, const Placement& placement);

double PeakRssMb();  // of this process so far

}  // namespace pyramid

#endif  // PYRAMID_WORKER_BENCH_TRAIN_H_
