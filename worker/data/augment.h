// What training does to a picture before the network sees it. Each picture's randomness is a
// function of (seed, epoch, position in the epoch's order).
#ifndef PYRAMID_WORKER_DATA_AUGMENT_H_
#define PYRAMID_WORKER_DATA_AUGMENT_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/preprocess.h"
#include "model/recipe.h"

namespace pyramid {

// Immutable, so thread-safe.
class Augmenter {
 public:
  explicit Augmenter(const Recipe& recipe);

  // Pad with a random shift, or random resized crop; flips; colour jitter (3 channels);
  // normalisation; random erasing: MindCV's order (transforms_factory.py). `out` has in_channels *
  // image_resize² floats.
  //   InvalidArgument  the picture doesn't fit image_pad
  absl::Status Apply(const RgbImage& image, int64_t epoch, int64_t position, float* out) const;

 private:
  Recipe recipe_;
  v1::Preprocessing preprocessing_;  // mean and std
};

}  // namespace pyramid

#endif  // PYRAMID_WORKER_DATA_AUGMENT_H_
