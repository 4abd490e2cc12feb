// Adds partial sums in a fixed order, so that the same input gives the same bits each time.
#include "model/kernels/cuda/lanes.h"

namespace pyramid::kernels::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) SumPartialsKernel(SumPartialsParams p) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  if (i >= p.count) return;
  float sum[4] = {0, 0, 0, 0};
  for (int s = 0; s < p.partials; ++s) {
    float part[4];
    Load4(p.partial + s * p.count + i, part);
    for (int j = 0; j < 4; ++j) sum[j] += part[j];
  }
  Store4(sum, static_cast<T*>(p.out) + i);
}

}  // namespace

int LaunchSumPartials(const SumPartialsParams& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(p.count, int64_t{kThreads} * 4)));
  switch (p.type) {
    case Scalar::kF16:
      return Launch(SumPartialsKernel<F16>, grid, 0, stream, p);
    case Scalar::kBf16:
      return Launch(SumPartialsKernel<Bf16>, grid, 0, stream, p);
    case Scalar::kF32:
      break;
  }
  return Launch(SumPartialsKernel<float>, grid, 0, stream, p);
}

}  // namespace pyramid::kernels::cuda
