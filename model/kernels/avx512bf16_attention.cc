// Attention of bf16 on AVX512-BF16's dot products of pairs, for machines without AMX tiles.
#define PYRAMID_TILES 0
#include "model/kernels/bf16_attention.inc"
