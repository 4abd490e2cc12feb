// AVX-512: 24 of the 32 registers are a block's sums.
#define PYRAMID_LANES 16
#define PYRAMID_BLOCK_ROWS 12
#define PYRAMID_TABLE kAvx512Kernels
#define PYRAMID_NAME "avx512"
#include "model/kernels/f32_kernels.inc"
