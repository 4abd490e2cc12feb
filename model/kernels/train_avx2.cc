// The training kernels of f32 on AVX2 with FMA.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "model/kernels/train_table.h"

#define TRAIN_LANES 8
#define TRAIN_BF16 0
#include "model/kernels/train_kernels.inc"

namespace pyramid::kernels {

const TrainKernels kAvx2TrainKernels = {
    .name = "avx2",
    .activation_bytes = sizeof(float),
    .linear_grad = LinearGrad,
    .layer_norm = LayerNorm,
    .layer_norm_grad = LayerNormGrad,
    .dwconv_grad_scratch_floats = DwconvGradScratchFloats,
    .dwconv_gelu_grad = DwconvGeluGrad,
    .gelu = GeluForward,
    .gelu_grad = GeluBackward,
    .pool = Pool,
    .pool_grad = PoolGrad,
    .attention_grad_scratch_floats = AttentionGradScratchFloats,
    .attention_grad = AttentionGrad,
    .adamw = AdamW,
    .add_scaled = AddScaled,
};

}  // namespace pyramid::kernels
