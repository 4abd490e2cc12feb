// Which waiting job starts now, on which devices, and why the others wait. Pure: a function of a
// snapshot.
//
// Strict order: higher priority first, then first come first served. All workers of a job start
// together or none. A job that can't start holds back those behind it that need the same kind of
// device, so that a large job isn't starved by small ones.
#ifndef PYRAMID_SERVER_TRAINING_SCHEDULER_H_
#define PYRAMID_SERVER_TRAINING_SCHEDULER_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace pyramid {

struct WaitingJob {
  std::string id;  // ids grow with the order of arrival
  int priority = 0;
  std::string device;  // kind
  int workers = 1;
  absl::Time not_before = absl::InfinitePast();  // backing off until then
};

// Devices by kind; a device is its name: "cuda:0". CPU slots are all "cpu".
struct DevicePool {
  int total = 0;
  std::vector<std::string> free;
};

struct Snapshot {
  std::map<std::string, DevicePool> pools;
  std::vector<WaitingJob> waiting;  // in any order
};

struct PlannedLaunch {
  std::string id;
  std::vector<std::string> devices;  // by rank
};

struct LaunchPlan {
  std::vector<PlannedLaunch> launches;
  std::map<std::string, std::string> reasons;  // of those that wait, by id; with numbers
};

LaunchPlan Plan(const Snapshot& snapshot, absl::Time now);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_SCHEDULER_H_
