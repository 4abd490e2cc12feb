// Resampling of 8-bit pictures: Pillow's antialiased kernels (Resample.c of Pillow 10) and OpenCV's
// plain ones (resize.cpp of OpenCV 4), bilinear and bicubic, for the outputs that are asked for.
// Used by model/preprocess; everybody else calls that.
#ifndef PYRAMID_MODEL_RESAMPLE_H_
#define PYRAMID_MODEL_RESAMPLE_H_

#include <cstddef>
#include <cstdint>

#include "model/preprocess.h"
#include "model/resample_loops.h"

namespace pyramid::resample {

// A part of a picture; samples never leave it, as if it had been cut out.
struct Window {
  const uint8_t* pixels = nullptr;
  const uint8_t* end = nullptr;  // of the whole picture's bytes
  size_t stride = 0;             // bytes from row to row
  int width = 0;
  int height = 0;
  int channels = 0;  // 1 or 3
};
Window WholeOf(const RgbImage& image);

// Outputs [begin, begin + count) of an axis that resizes [start, start + length) to `size` outputs.
struct Span {
  double start = 0;
  double length = 0;
  int64_t size = 0;
  int64_t begin = 0;
  int count = 0;
};

// The fastest loops this machine can run.
const Loops& BestLoops();

// across.count x down.count. `antialias`: as Pillow, whose bytes these are; else as OpenCV, whose
// these are within one level (its vectorised cubic pass rounds in float).
RgbImage Resample(const Window& in, const Span& across, const Span& down, Kernel kernel,
                  bool antialias, const Loops& loops = BestLoops());

}  // namespace pyramid::resample

#endif  // PYRAMID_MODEL_RESAMPLE_H_
