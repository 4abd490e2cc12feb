// Patches of maps as rows of a matrix, so that a convolution is a linear layer: copies only, any
// element size. Maps are [height, width, c] (tokens), planes [c][height][width] with their zeros
// around them.
#ifndef PYRAMID_MODEL_KERNELS_PATCHES_H_
#define PYRAMID_MODEL_KERNELS_PATCHES_H_

#include <algorithm>
#include <cstdint>

namespace pyramid::kernels {

// One side of a window that moves over a map.
struct WindowSide {
  int64_t before = 0;   // zeros in front of the first element
  int64_t outputs = 0;  // positions
};

// Patch embeddings: ceil(side / stride) positions. `same`: MindSpore's padding, the odd zero
// behind; else kernel / 2 on both sides.
inline WindowSide PatchSide(int64_t side, int64_t kernel, int64_t stride, bool same) {
  const int64_t outputs = (side + stride - 1) / stride;
  if (!same) return {kernel / 2, outputs};
  return {std::max<int64_t>((outputs - 1) * stride + kernel - side, 0) / 2, outputs};
}

// Spatial reductions, kernel = stride: what fills no window is left out, or with `same` filled up
// with zeros.
inline WindowSide ReductionSide(int64_t side, int64_t stride, bool same) {
  if (!same) return {0, side / stride};
  const int64_t outputs = (side + stride - 1) / stride;
  return {(outputs * stride - side) / 2, outputs};
}

struct MapWindows {
  int64_t height = 0, width = 0;
  int64_t token_bytes = 0;  // of one map element's channels
  int64_t kernel = 0, stride = 0;
  WindowSide top, left;

  int64_t outputs() const { return top.outputs * left.outputs; }
  int64_t patch_bytes() const { return kernel * kernel * token_bytes; }
};

// Patches [first, first + rows) of a map into rows of patch_bytes: [ky][kx][c].
void GatherPatches(const MapWindows& w, const char* map, int64_t first, int64_t rows, char* out);

// The opposite for gradients: adds the patches of all windows to `map` [height, width, c] f32.
void ScatterPatches(const MapWindows& w, const float* patches, float* map);

struct PlaneWindows {
  int64_t planes = 0;
  int64_t plane_height = 0, plane_width = 0;  // with the zeros; 8 elements more are readable
  int64_t element_bytes = 0;                  // 2 or 4
  int64_t outputs_wide = 0;                   // positions in a row
  int64_t patch_elements = 0;                 // of a row of the result, ≥ planes * 49
};

// 7x7 patches every 4 of planes: [plane][ky][kx], zeros up to patch_elements.
void GatherPlanePatches(const PlaneWindows& w, const char* planes, int64_t first, int64_t rows,
                        char* out);

}  // namespace pyramid::kernels

#endif  // PYRAMID_MODEL_KERNELS_PATCHES_H_
