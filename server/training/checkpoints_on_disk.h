// A worker removes old checkpoints by itself (keep_checkpoint_max); which of a job's are gone?
#ifndef PYRAMID_SERVER_TRAINING_CHECKPOINTS_ON_DISK_H_
#define PYRAMID_SERVER_TRAINING_CHECKPOINTS_ON_DISK_H_

#include <set>
#include <string>

#include "proto/training.pb.h"

namespace pyramid {

// Ids of the job's checkpoints whose folders are gone. One that can't be looked at counts as there.
std::set<std::string> RemovedCheckpoints(const v1::Job& job);

void DropCheckpoints(v1::Job& job, const std::set<std::string>& ids);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_TRAINING_CHECKPOINTS_ON_DISK_H_
