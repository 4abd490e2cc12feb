// The operators for the CPU, on emulated lanes.
#include "model/kernels/cuda/torch_ops.h"
#include "tests/model/kernels/cuda/test_device.h"

namespace pyramid {
namespace kernels::cuda {

void* CurrentStream(const at::Tensor&) { return nullptr; }
const char* ErrorText(int) { return "an emulated launch failed"; }

}  // namespace kernels::cuda

torch::Device TestDevice() { return torch::kCPU; }

}  // namespace pyramid

TORCH_LIBRARY(pyramid, m) { pyramid::kernels::cuda::DefineOps(m); }
TORCH_LIBRARY_IMPL(pyramid, CPU, m) { pyramid::kernels::cuda::ImplementOps(m); }
TORCH_LIBRARY_IMPL(pyramid, AutogradCPU, m) { pyramid::kernels::cuda::ImplementGradients(m); }
