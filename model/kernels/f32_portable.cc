// Any machine with vectors of four floats: SSE2, NEON.
#define PYRAMID_LANES 4
#define PYRAMID_BLOCK_ROWS 4
#define PYRAMID_TABLE kPortableKernels
#define PYRAMID_NAME "portable"
#include "model/kernels/f32_kernels.inc"
