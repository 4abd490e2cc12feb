// The kernels as LibTorch operators of the library `pyramid`, with their gradients:
//
//   attention(Tensor q, Tensor kv, int heads, float scale) -> Tensor
//   dwconv_gelu(Tensor x, Tensor weight, Tensor bias, int height, int width, bool tanh) -> Tensor
//   layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor
//
// model/device_ops.h is the way to call them. Who includes this file decides for which device: the
// plug-in for CUDA, a test for the CPU with emulated lanes.
#ifndef PYRAMID_MODEL_KERNELS_CUDA_TORCH_OPS_H_
#define PYRAMID_MODEL_KERNELS_CUDA_TORCH_OPS_H_

#include <torch/library.h>

namespace pyramid::kernels::cuda {

// For TORCH_LIBRARY(pyramid, m).
void DefineOps(torch::Library& m);
// For TORCH_LIBRARY_IMPL(pyramid, <device>, m) and TORCH_LIBRARY_IMPL(pyramid, Autograd<device>,
// m).
void ImplementOps(torch::Library& m);
void ImplementGradients(torch::Library& m);

// Where kernels on `tensor`'s device are queued (a cudaStream_t). Defined by who includes this.
void* CurrentStream(const at::Tensor& tensor);
// The text of a cudaError_t. Likewise.
const char* ErrorText(int status);

}  // namespace pyramid::kernels::cuda

#endif  // PYRAMID_MODEL_KERNELS_CUDA_TORCH_OPS_H_
