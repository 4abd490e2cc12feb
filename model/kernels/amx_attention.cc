// Attention of bf16 on AMX tiles.
#define PYRAMID_TILES 1
#include "model/kernels/bf16_attention.inc"
