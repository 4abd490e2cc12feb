// Depthwise 3x3 convolution (stride 1, zero padding 1) with bias, then GELU: hidden rows in,
// activation rows out. Rows come by pointer, so that a ring of rows will do and padding costs no
// copy.
#ifndef PYRAMID_MODEL_KERNELS_DWCONV_GELU_H_
#define PYRAMID_MODEL_KERNELS_DWCONV_GELU_H_

#include <cstdint>

namespace pyramid::kernels {

enum class Gelu { kErf, kTanh };

struct DwconvGeluParams {
  // Output row y reads rows[y], rows[y + 1], rows[y + 2], each [width, c] hidden; `count` + 2
  // pointers. A row outside the picture is a pointer to zeros.
  const void* const* rows;
  const void* weight;  // packed: 9 taps [ky][kx][c] and the bias [c]
  void* out;           // [count, width, c] activations
  int count;
  int width;
  int c;  // a multiple of 32
  Gelu gelu;
};

}  // namespace pyramid::kernels

#endif  // PYRAMID_MODEL_KERNELS_DWCONV_GELU_H_
