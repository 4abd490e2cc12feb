// From a SubmitJobRequest to what will run: the resolved recipe and the rules that need this
// server (its folders, its devices). model/recipe has all other rules.
#ifndef PYRAMID_SERVER_TRAINING_JOB_SPEC_H_
#define PYRAMID_SERVER_TRAINING_JOB_SPEC_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/recipe.h"
#include "proto/training.pb.h"

namespace pyramid {

// Worker slots by device kind: {"cpu", 2}, {"cuda", 8}. A kind that isn't there has none.
using DeviceCounts = std::map<std::string, int>;

struct JobSpec {
  std::string name;
  Recipe recipe;
  std::string yaml;  // all keys of the recipe; what the workers get
  std::string hash;  // of name and yaml: the same hash is the same job
  std::vector<std::string> warnings;
};

// Reads recipe and overrides, fills in defaults, makes paths absolute. Needs no disk.
//   InvalidArgument  the recipe (see ParseRecipe); a name other than letters, digits, '.', '_',
//                    '-', at most 64 and not beginning with '.'; a request id over 128 characters
absl::StatusOr<JobSpec> ResolveJob(const v1::SubmitJobRequest& request);

// The rules of this server.
//   InvalidArgument  data_dir or ckpt_path isn't there, no such device, more workers than devices
absl::Status CheckOnServer(const JobSpec& spec, const DeviceCounts& devices);

// The job as it is queued; id and times are the store's and the manager's.
v1::Job MakeJob(const JobSpec& spec, const v1::SubmitJobRequest& request);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_JOB_SPEC_H_
