// Which rank of how many this process is, and where the ranks meet: from the coordinator's
// arguments, else from the environment of whoever launched it.
#ifndef PYRAMID_WORKER_PLACEMENT_H_
#define PYRAMID_WORKER_PLACEMENT_H_

#include <filesystem>
#include <functional>
#include <string>

#include "absl/status/statusor.h"

namespace pyramid {

struct Placement {
  std::string source =
      "none";  // "coordinator" | "local launcher" | "torchrun" | "mpirun" | "srun" | "pmi" | "none"
  int rank = 0;
  int world = 1;
  int local_rank = 0;
  int local_world = 1;  // ranks on this machine
  // Where the ranks meet. A file in which rank 0 publishes "host:port" (its name is `meeting_key`,
  // its folder the job's), or an address given from outside.
  std::string meeting_key;  // unique to the launch
  std::string master_host;  // non-empty: rank 0 listens on master_host:master_port
  int master_port = 0;
};

// Null: not set.
using Environment = std::function<const char*(const char* name)>;

// Looks for our local launcher, torchrun, Open MPI, PMI and Slurm, in this order; none of them:
// rank 0 of 1.
//   InvalidArgument  a variable that isn't a number, rank ≥ world, ranks on several machines
//   without MASTER_ADDR
absl::StatusOr<Placement> PlacementFrom(const Environment& environment);

// Cores that this process may use, shared evenly among the ranks of this machine (a launcher may
// have bound each rank to its own).
int ComputeThreads(int local_world);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_PLACEMENT_H_
