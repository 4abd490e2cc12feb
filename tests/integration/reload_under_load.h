// A server whose model is replaced again and again while clients ask: what they got, and what
// became of its memory.
#ifndef PYRAMID_TESTS_INTEGRATION_RELOAD_UNDER_LOAD_H_
#define PYRAMID_TESTS_INTEGRATION_RELOAD_UNDER_LOAD_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tests/integration/cluster.h"

namespace pyramid::testing {

// Trains a small job of two epochs to its end; its id. Checkpoints after each epoch; its recipe is
// <folder>/recipe.yaml.
std::string TrainTwoCheckpoints(Cluster& cluster);

struct ReloadReport {
  int64_t answers = 0;
  std::vector<std::string> errors;        // of clients and of reloads
  std::map<int64_t, int64_t> by_version;  // answers
  double steady_p99_ms = 0;               // without reloads
  double reload_p99_ms = 0;               // while they went on
  double seconds_per_reload = 0;
  std::vector<double> memory_mb;  // resident, after each reload
  double growth = 0;              // Growth(memory_mb)
};

// Of memory after each reload, past the first five, by the Theil-Sen line (the median slope of all
// pairs): a single look is one per cent off either way, by what is allocated at that moment. 0 if
// there are too few.
double Growth(const std::vector<double>& memory_mb);

// `reloads` times in turn: the other checkpoint is promoted as "bars", or the version in service is
// loaded anew. Two clients ask without a pause between their requests.
ReloadReport ReloadUnderLoad(Cluster& cluster, const v1::Job& job, int reloads);

// `rounds` times: the model "bars", a checkpoint of the job, is unloaded, loaded and asked.
ReloadReport UnloadAndLoad(Cluster& cluster, const v1::Job& job, int rounds);

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_INTEGRATION_RELOAD_UNDER_LOAD_H_
