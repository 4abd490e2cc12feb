// What a run's network begins with: fresh weights, or someone's (recipe.ckpt_path, pretrained).
// Whose weights they are decides the network's numerics and the family of its pixels. Torch-free.
#ifndef PYRAMID_WORKER_START_H_
#define PYRAMID_WORKER_START_H_

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/recipe.h"
#include "model/weights.h"
#include "proto/model.pb.h"

namespace pyramid {

struct Start {
  v1::NetworkConfig network;         // with the weights' numerics, else those of recipe.compat
  std::string origin = "pyramid";    // of the checkpoints to come
  std::filesystem::path path;        // of the weights
  std::unique_ptr<Weights> weights;  // null: fresh ones, or those of a checkpoint of this run
  std::vector<std::string> lines;    // for the log
};

// recipe.ckpt_path or recipe.pretrained.
bool StartsFromWeights(const Recipe& recipe);

// Opens the weights that the recipe names for a network with so many classes: another class count
// leaves their classifier out, another channel count adapts the first convolution.
//   NotFound, DataLoss  as OpenWeights and FindPretrained
//   InvalidArgument     as OpenWeights; another variant; resume_opt and a file
absl::StatusOr<Start> OpenStart(const Recipe& recipe, int classes);

// The network a run trains. With checkpoints of the run in `checkpoints` it is theirs and the
// recipe's weights aren't opened: they may be gone. Errors as OpenStart.
absl::StatusOr<Start> FindStart(const Recipe& recipe, int classes,
                                const std::filesystem::path& checkpoints);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_START_H_
