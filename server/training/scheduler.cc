#include "server/training/scheduler.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

std::string Workers(int count, const std::string& kind) {
  return absl::StrCat(count, " ", kind, count == 1 ? " worker" : " workers");
}

std::string Ahead(int jobs) {
  return jobs == 0 ? "" : absl::StrCat("; ", jobs, jobs == 1 ? " job ahead" : " jobs ahead");
}

}  // namespace

LaunchPlan Plan(const Snapshot& snapshot, absl::Time now) {
  std::vector<const WaitingJob*> order;
  for (const WaitingJob& job : snapshot.waiting) order.push_back(&job);
  std::sort(order.begin(), order.end(), [](const WaitingJob* a, const WaitingJob* b) {
    // The millionth id is longer.
    return std::make_tuple(-a->priority, a->id.size(), std::cref(a->id)) <
           std::make_tuple(-b->priority, b->id.size(), std::cref(b->id));
  });

  LaunchPlan plan;
  std::map<std::string, DevicePool> pools = snapshot.pools;
  std::map<std::string, int> ahead;  // jobs that wait, by kind of device
  for (const WaitingJob* job : order) {
    DevicePool& pool = pools[job->device];
    int& waiting = ahead[job->device];
    const int free = static_cast<int>(pool.free.size());
    const bool backing_off = job->not_before > now;
    if (waiting == 0 && !backing_off && job->workers <= free) {
      plan.launches.push_back(
          {job->id, std::vector<std::string>(pool.free.begin(), pool.free.begin() + job->workers)});
      pool.free.erase(pool.free.begin(), pool.free.begin() + job->workers);
      continue;
    }
    std::string& reason = plan.reasons[job->id];
    if (backing_off) {
      // A moment, not a countdown: the text stays the same while nothing changes.
      reason =
          absl::StrCat("starts again at ",
                       absl::FormatTime("%H:%M:%S UTC", job->not_before + absl::Milliseconds(999),
                                        absl::UTCTimeZone()),
                       Ahead(waiting));
    } else {
      reason = absl::StrCat("needs ", Workers(job->workers, job->device), ", ", free, " of ",
                            pool.total, " free", Ahead(waiting));
    }
    ++waiting;
  }
  return plan;
}

}  // namespace pyramid
