#include "model/kernels/patches.h"

#include <cstring>

namespace pyramid::kernels {

void GatherPatches(const MapWindows& w, const char* map, int64_t first, int64_t rows, char* out) {
  const int64_t token = w.token_bytes;
  for (int64_t r = first; r < first + rows; ++r) {
    const int64_t y = r / w.left.outputs * w.stride - w.top.before;
    const int64_t x = r % w.left.outputs * w.stride - w.left.before;
    const int64_t begin = std::max<int64_t>(x, 0), end = std::min(x + w.kernel, w.width);
    for (int64_t ky = 0; ky < w.kernel; ++ky, out += w.kernel * token) {
      if (y + ky < 0 || y + ky >= w.height) {
        std::memset(out, 0, static_cast<size_t>(w.kernel * token));
        continue;
      }
      if (begin > x) std::memset(out, 0, static_cast<size_t>((begin - x) * token));
      std::memcpy(out + (begin - x) * token, map + ((y + ky) * w.width + begin) * token,
                  static_cast<size_t>((end - begin) * token));
      if (end < x + w.kernel) {
        std::memset(out + (end - x) * token, 0, static_cast<size_t>((x + w.kernel - end) * token));
      }
    }
  }
}

void ScatterPatches(const MapWindows& w, const float* patches, float* map) {
  const int64_t c = w.token_bytes / static_cast<int64_t>(sizeof(float));
  for (int64_t r = 0; r < w.outputs(); ++r) {
    const int64_t y = r / w.left.outputs * w.stride - w.top.before;
    const int64_t x = r % w.left.outputs * w.stride - w.left.before;
    const int64_t begin = std::max<int64_t>(x, 0), end = std::min(x + w.kernel, w.width);
    for (int64_t ky = 0; ky < w.kernel; ++ky, patches += w.kernel * c) {
      if (y + ky < 0 || y + ky >= w.height) continue;
      float* to = map + ((y + ky) * w.width + begin) * c;
      const float* from = patches + (begin - x) * c;
      for (int64_t i = 0; i < (end - begin) * c; ++i) to[i] += from[i];
    }
  }
}

void GatherPlanePatches(const PlaneWindows& w, const char* planes, int64_t first, int64_t rows,
                        char* out) {
  const int64_t element = w.element_bytes;
  const int64_t rest = w.patch_elements - w.planes * 49;
  for (int64_t r = first; r < first + rows; ++r) {
    const int64_t y = r / w.outputs_wide * 4, x = r % w.outputs_wide * 4;
    for (int64_t p = 0; p < w.planes; ++p) {
      const char* from = planes + ((p * w.plane_height + y) * w.plane_width + x) * element;
      // Seven elements, copied as eight: the next seven overwrite the eighth.
      const bool last = rest == 0 && p + 1 == w.planes;
      for (int ky = 0; ky < 7; ++ky, out += 7 * element, from += w.plane_width * element) {
        if (last && ky == 6) {
          std::memcpy(out, from, static_cast<size_t>(7 * element));
        } else if (element == 2) {
          std::memcpy(out, from, 16);
        } else {
          std::memcpy(out, from, 32);
        }
      }
    }
    std::memset(out, 0, static_cast<size_t>(rest * element));
    out += rest * element;
  }
}

}  // namespace pyramid::kernels
