#include "worker/placement.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

absl::StatusOr<int> NumberFrom(const Environment& environment, const char* name, int fallback) {
  const char* text = environment(name);
  if (text == nullptr) return fallback;
  int value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("environment: ", name, " is \"", text, "\"; expected a number"));
  }
  return value;
}

struct Names {
  const char* source;
  const char* rank;
  const char* world;
  const char* local_rank;
  const char* local_world;
  const char* key;  // a variable that names the launch
};

constexpr Names kLaunchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"},
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE"},
    {"pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_ID"},
    {"srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE",
     "SLURM_STEP_ID"},
};

// What distinguishes this launch from others in the same folder: the launcher's own id, else the
// parent both ranks have in common.
std::string KeyOf(const Names& names, const Environment& environment) {
  std::string key = absl::StrCat(names.source, "-");
  if (const char* job = environment("SLURM_JOB_ID"); job != nullptr)
    absl::StrAppend(&key, job, ".");
  const char* id = environment(names.key);
  absl::StrAppend(&key, id != nullptr && std::strcmp(names.source, "pmi") != 0
                            ? std::string(id)
                            : absl::StrCat(getppid()));
  std::replace_if(
      key.begin(), key.end(),
      [](char c) { return !isalnum(static_cast<unsigned char>(c)) && c != '-' && c != '.'; }, '_');
  return key;
}

}  // namespace

absl::StatusOr<Placement> PlacementFrom(const Environment& environment) {
  for (const Names& names : kLaunchers) {
    if (environment(names.rank) == nullptr || environment(names.world) == nullptr) continue;
    Placement placement{.source = names.source};
    ASSIGN_OR_RETURN(placement.rank, NumberFrom(environment, names.rank, 0));
    ASSIGN_OR_RETURN(placement.world, NumberFrom(environment, names.world, 1));
    ASSIGN_OR_RETURN(placement.local_rank,
                     NumberFrom(environment, names.local_rank, placement.rank));
    placement.local_world = placement.world;
    if (std::strcmp(names.source, "srun") == 0) {
      // "2(x2),1": tasks on each node.
      const char* nodes = environment("SLURM_NNODES");
      int count = 1;
      if (nodes != nullptr && absl::SimpleAtoi(nodes, &count) && count > 1) {
        placement.local_world = std::max(1, placement.world / count);
      }
    } else {
      ASSIGN_OR_RETURN(placement.local_world,
                       NumberFrom(environment, names.local_world, placement.world));
    }
    if (placement.world < 1 || placement.rank >= placement.world) {
      return absl::InvalidArgumentError(absl::StrCat("environment: ", names.rank, " is ",
                                                     placement.rank, " but ", names.world, " is ",
                                                     placement.world));
    }
    if (const char* key = environment("PYRAMID_MEETING_KEY"); key != nullptr) {
      placement.source = "local launcher";
      placement.meeting_key = key;
      return placement;
    }
    const char* host = environment("MASTER_ADDR");
    const char* port = environment("MASTER_PORT");
    if (host != nullptr && port != nullptr) {
      placement.master_host = host;
      ASSIGN_OR_RETURN(placement.master_port, NumberFrom(environment, "MASTER_PORT", 0));
    } else if (placement.local_world < placement.world) {
      return absl::InvalidArgumentError(absl::StrCat(
          placement.world, " ranks with ", placement.local_world,
          " on this machine: several machines need MASTER_ADDR and MASTER_PORT of rank 0"));
    }
    placement.meeting_key = KeyOf(names, environment);
    return placement;
  }
  return Placement{};
}

int ComputeThreads(int local_world) {
  cpu_set_t set;
  const int mine = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  const int all = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  // mpirun binds each rank to a core of its own: that share is already cut.
  if (mine < all) return std::max(1, mine);
  return std::max(1, all / std::max(1, local_world));
}

}  // namespace pyramid
