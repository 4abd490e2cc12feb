// LayerNorm, forward and backward. Rows up to 64 channels share a warp; a row's elements stay in
// registers between the sums and the result.
#include "model/kernels/cuda/lanes.h"

namespace pyramid::kernels::cuda {
namespace {

template <int kRowLanes>
__device__ inline float SumOfRow(float x) {
#pragma unroll
  for (int mask = 1; mask < kRowLanes; mask *= 2) x += ShuffleXor(x, mask);
  return x;
}

// kGroups: groups of channels a lane can have.
template <typename In, typename Out, int kRowLanes, int kGroups>
__global__ void __launch_bounds__(kThreads) LayerNormKernel(LayerNormParams p) {
  const int place = threadIdx.x % kRowLanes;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kRowLanes) + threadIdx.x / kRowLanes;
  const bool mine = row < p.rows;  // the others take part in the exchange
  const In* in = static_cast<const In*>(p.in) + row * p.c;
  float x[kGroups][4];
  float sum = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int c = NormChannel(g, kRowLanes, place);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[g][i] = 0;
    if (mine && c < p.c) Load4(in + c, x[g]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += x[g][i];
  }
  const float mean = SumOfRow<kRowLanes>(sum) / p.c;
  float squares = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (NormChannel(g, kRowLanes, place) >= p.c) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[g][i] -= mean;
      squares += x[g][i] * x[g][i];
    }
  }
  const float rstd = 1 / sqrtf(SumOfRow<kRowLanes>(squares) / p.c + p.eps);
  if (!mine) return;
  Out* out = static_cast<Out*>(p.out) + row * p.c;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int c = NormChannel(g, kRowLanes, place);
    if (c >= p.c) continue;
    float gamma[4], y[4];
    Load4(p.gamma + c, gamma);
    Load4(p.beta + c, y);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += x[g][i] * rstd * gamma[i];
    Store4(y, out + c);
  }
  if (place == 0) {
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

// Each block takes every gridDim.x-th group of rows and leaves its sums for gamma and beta.
template <typename In, typename Out, int kRowLanes, int kGroups>
__global__ void __launch_bounds__(kThreads) LayerNormBackwardKernel(LayerNormBackwardParams p) {
  constexpr int kRows = kThreads / kRowLanes;
  const LayerNormParams& f = p.forward;
  const int place = threadIdx.x % kRowLanes, slot = threadIdx.x / kRowLanes;
  float gamma[kGroups][4], d_gamma[kGroups][4], d_beta[kGroups][4];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int c = NormChannel(g, kRowLanes, place);
#pragma unroll
    for (int i = 0; i < 4; ++i) gamma[g][i] = d_gamma[g][i] = d_beta[g][i] = 0;
    if (c < f.c) Load4(f.gamma + c, gamma[g]);
  }
  for (int64_t first = int64_t{blockIdx.x} * kRows; first < f.rows;
       first += int64_t{gridDim.x} * kRows) {
    const int64_t row = first + slot;
    const bool mine = row < f.rows;
    const float mean = mine ? f.mean[row] : 0, rstd = mine ? f.rstd[row] : 0;
    float x[kGroups][4], dy[kGroups][4];  // normalised; gradient
    float sum = 0, product = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int c = NormChannel(g, kRowLanes, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[g][i] = mean, dy[g][i] = 0;
      if (mine && c < f.c) {
        Load4(static_cast<const In*>(f.in) + row * f.c + c, x[g]);
        Load4(static_cast<const Out*>(p.d_out) + row * f.c + c, dy[g]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[g][i] = (x[g][i] - mean) * rstd;
        d_gamma[g][i] += dy[g][i] * x[g][i];
        d_beta[g][i] += dy[g][i];
        dy[g][i] *= gamma[g][i];
        sum += dy[g][i];
        product += dy[g][i] * x[g][i];
      }
    }
    sum = SumOfRow<kRowLanes>(sum) / f.c;
    product = SumOfRow<kRowLanes>(product) / f.c;
    if (!mine) continue;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int c = NormChannel(g, kRowLanes, place);
      if (c >= f.c) continue;
      float dx[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) dx[i] = rstd * (dy[g][i] - sum - x[g][i] * product);
      Store4(dx, static_cast<In*>(p.d_in) + row * f.c + c);
    }
  }

  float* sums = reinterpret_cast<float*>(SharedMemory());  // [kRows][2][c]
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int c = NormChannel(g, kRowLanes, place);
    if (c >= f.c) continue;
    Store4(d_gamma[g], sums + (slot * 2 + 0) * f.c + c);
    Store4(d_beta[g], sums + (slot * 2 + 1) * f.c + c);
  }
  SyncBlock();
  for (int i = threadIdx.x; i < 2 * f.c; i += kThreads) {
    float sum = 0;
    for (int s = 0; s < kRows; ++s) sum += sums[s * 2 * f.c + i];
    p.partial[int64_t{blockIdx.x} * 2 * f.c + i] = sum;
  }
}

template <typename In, typename Out, int kRowLanes, int kGroups>
int LaunchBoth(const LayerNormBackwardParams& p, bool backward, void* stream) {
  const LayerNormParams& f = p.forward;
  if (!backward) {
    const dim3 grid(static_cast<unsigned>(CeilDiv(f.rows, RowsPerBlock(f.c))));
    return Launch(LayerNormKernel<In, Out, kRowLanes, kGroups>, grid, 0, stream, f);
  }
  const int partials = LayerNormPartials(f.rows, f.c);
  if (const int status = Launch(LayerNormBackwardKernel<In, Out, kRowLanes, kGroups>,
                                dim3(partials), LayerNormBackwardSharedBytes(f.c), stream, p)) {
    return status;
  }
  return LaunchSumPartials({.partial = p.partial,
                            .out = p.d_gamma_beta,
                            .count = 2 * f.c,
                            .partials = partials,
                            .type = Scalar::kF32},
                           stream);
}

template <typename In, typename Out>
int ForWidth(const LayerNormBackwardParams& p, bool backward, void* stream) {
  switch (LanesPerRow(p.forward.c)) {
    case 8:
      return LaunchBoth<In, Out, 8, 1>(p, backward, stream);
    case 16:
      return LaunchBoth<In, Out, 16, 1>(p, backward, stream);
    default:
      break;
  }
  const int groups = GroupsPerLane(p.forward.c);
  return groups <= 2   ? LaunchBoth<In, Out, 32, 2>(p, backward, stream)
         : groups <= 4 ? LaunchBoth<In, Out, 32, 4>(p, backward, stream)
                       : LaunchBoth<In, Out, 32, 8>(p, backward, stream);
}

int ForTypes(const LayerNormBackwardParams& p, bool backward, void* stream) {
  const bool wide = p.forward.in_type == Scalar::kF32;
  switch (p.forward.out_type) {
    case Scalar::kF16:
      return wide ? ForWidth<float, F16>(p, backward, stream)
                  : ForWidth<F16, F16>(p, backward, stream);
    case Scalar::kBf16:
      return wide ? ForWidth<float, Bf16>(p, backward, stream)
                  : ForWidth<Bf16, Bf16>(p, backward, stream);
    case Scalar::kF32:
      break;
  }
  return ForWidth<float, float>(p, backward, stream);
}

}  // namespace

int LaunchLayerNorm(const LayerNormParams& p, void* stream) {
  return ForTypes({.forward = p}, /*backward=*/false, stream);
}

int LaunchLayerNormBackward(const LayerNormBackwardParams& p, void* stream) {
  return ForTypes(p, /*backward=*/true, stream);
}

}  // namespace pyramid::kernels::cuda
