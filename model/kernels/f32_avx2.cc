// AVX2 with FMA: 12 of the 16 registers are a block's sums.
#define PYRAMID_LANES 8
#define PYRAMID_BLOCK_ROWS 6
#define PYRAMID_TABLE kAvx2Kernels
#define PYRAMID_NAME "avx2"
#include "model/kernels/f32_kernels.inc"
