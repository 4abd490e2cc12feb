// What a file of weights says of itself beside its tensors, when pyramid wrote it: origin,
// numerics, preprocessing and labels. Names begin with "pyramid."; the texts are ASCII.
#ifndef PYRAMID_MODEL_WEIGHT_NOTES_H_
#define PYRAMID_MODEL_WEIGHT_NOTES_H_

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "proto/model.pb.h"

namespace pyramid {

using WeightNotes = std::vector<std::pair<std::string, std::string>>;

// ImageNet's own names are left out: every 1000-class file gets them. So are labels of more than
// 1000 bytes.
WeightNotes WeightNotesOf(const v1::Manifest& manifest);

// Sets what `notes` say in `manifest` and leaves the rest alone. DataLoss: one of pyramid's own
// that can't be read.
absl::Status ReadWeightNotes(std::span<const std::pair<std::string, std::string>> notes,
                             v1::Manifest& manifest);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_WEIGHT_NOTES_H_
