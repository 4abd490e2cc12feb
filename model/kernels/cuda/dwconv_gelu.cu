// Depthwise 3x3 convolution, bias and GELU, forward and backward. A lane has four channels and
// slides over a strip of pixels of one row; a warp's lanes have neighbouring channels. The backward
// pass computes the convolution again instead of keeping it.
#include <cmath>

#include "model/kernels/cuda/lanes.h"

namespace pyramid::kernels::cuda {
namespace {

constexpr float kSqrtHalf = 0.70710678118654752440f;
constexpr float kTwoOverSqrtPi = 1.12837916709551257390f;
constexpr float kSqrtTwoOverPi = 0.79788456080286535588f;
constexpr float kCubic = 0.044715f;  // of the tanh form

template <bool kTanh>
__device__ inline float Gelu(float x) {
  if (kTanh) return 0.5f * x * (1 + tanhf(kSqrtTwoOverPi * (x + kCubic * x * x * x)));
  return 0.5f * x * (1 + erff(x * kSqrtHalf));
}

template <bool kTanh>
__device__ inline float GeluDerivative(float x) {
  if (kTanh) {
    const float t = tanhf(kSqrtTwoOverPi * (x + kCubic * x * x * x));
    // At large |x| the second factor is 0 and the third may be infinite.
    const float slope = 1 - t * t;
    const float tail = slope == 0 ? 0 : slope * kSqrtTwoOverPi * (1 + 3 * kCubic * x * x);
    return 0.5f * (1 + t) + 0.5f * x * tail;
  }
  const float density = 0.5f * kTwoOverSqrtPi * kSqrtHalf * expf(-0.5f * x * x);
  return 0.5f * (1 + erff(x * kSqrtHalf)) + (density == 0 ? 0 : x * density);
}

enum class Of { kOutput, kHiddenGradient, kInputGradient };

// The three columns of three rows around a pixel, four channels of each.
struct Window {
  float at[3][3][4];  // [row][column]
};

// Column x of the rows around strip `s`, to column `to` of the window; zeros outside the picture.
template <typename T>
__device__ inline void LoadColumn(const T* in, const DwconvParams& p, const Strip& s, int x, int c,
                                  int to, Window& window) {
#pragma unroll
  for (int r = 0; r < 3; ++r) {
    const int y = s.y + r - 1;
    float(&four)[4] = window.at[r][to];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = 0;
    if (x >= 0 && x < p.width && y >= 0 && y < p.height) {
      Load4(in + ((s.row + r - 1) * p.width + x) * p.c + c, four);
    }
  }
}

struct DwconvWork {
  DwconvParams p;     // of kInputGradient: in is the hidden gradient, out the input's
  const void* d_out;  // kHiddenGradient
  float* partial;     // kHiddenGradient
  int64_t strips_per_block;
};

template <typename T, Of kOf, bool kTanh>
__global__ void __launch_bounds__(kThreads) DwconvKernel(DwconvWork work) {
  const DwconvParams& p = work.p;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int c = ChannelOf(blockIdx.y, lane);
  const bool mine = c < p.c;
  const T* in = static_cast<const T*>(p.in);

  // The gradient's convolution has the taps turned round and no bias.
  float weight[kTaps][4], bias[4] = {0, 0, 0, 0};
  if (mine) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      Load4(p.weight + (kOf == Of::kInputGradient ? kTaps - 1 - t : t) * p.c + c, weight[t]);
    }
    if (kOf != Of::kInputGradient) Load4(p.bias + c, bias);
  }
  float d_weight[kTaps + 1][4];
  if (kOf == Of::kHiddenGradient) {
#pragma unroll
    for (int t = 0; t <= kTaps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d_weight[t][i] = 0;
    }
  }

  const int64_t strips = Strips(p.batch, p.height, p.width);
  const int64_t first = int64_t{blockIdx.x} * work.strips_per_block;
  const int64_t end =
      first + work.strips_per_block < strips ? first + work.strips_per_block : strips;
  for (int64_t index = first + warp; mine && index < end; index += kWarps) {
    const Strip s = StripAt(index, p.height, p.width);
    Window window;
    LoadColumn(in, p, s, s.x - 1, c, 0, window);
    LoadColumn(in, p, s, s.x, c, 1, window);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      if (i >= s.count) break;
      // Column (i + 2) % 3 held the one that the window has left.
      LoadColumn(in, p, s, s.x + i + 1, c, (i + 2) % 3, window);
      float hidden[4] = {bias[0], bias[1], bias[2], bias[3]};
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
#pragma unroll
        for (int j = 0; j < 4; ++j) hidden[j] += weight[t][j] * window.at[t / 3][(i + t) % 3][j];
      }
      const int64_t pixel = (s.row * p.width + s.x + i) * p.c + c;
      if (kOf == Of::kOutput) {
#pragma unroll
        for (int j = 0; j < 4; ++j) hidden[j] = Gelu<kTanh>(hidden[j]);
      } else if (kOf == Of::kHiddenGradient) {
        float d_out[4];
        Load4(static_cast<const T*>(work.d_out) + pixel, d_out);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          hidden[j] = d_out[j] * GeluDerivative<kTanh>(hidden[j]);
          d_weight[kTaps][j] += hidden[j];
#pragma unroll
          for (int t = 0; t < kTaps; ++t) {
            d_weight[t][j] += hidden[j] * window.at[t / 3][(i + t) % 3][j];
          }
        }
      }
      Store4(hidden, static_cast<T*>(p.out) + pixel);
    }
  }

  if (kOf == Of::kHiddenGradient) {
    float* sums = reinterpret_cast<float*>(SharedMemory());  // [kWarps][kTaps + 1][kWarpChannels]
#pragma unroll
    for (int t = 0; t <= kTaps; ++t) {
      Store4(d_weight[t], sums + (warp * (kTaps + 1) + t) * kWarpChannels + lane * kGroup);
    }
    SyncBlock();
    for (int i = threadIdx.x; i < (kTaps + 1) * kWarpChannels; i += kThreads) {
      const int t = i / kWarpChannels, channel = blockIdx.y * kWarpChannels + i % kWarpChannels;
      if (channel >= p.c) continue;
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += sums[w * (kTaps + 1) * kWarpChannels + i];
      work.partial[(int64_t{blockIdx.x} * (kTaps + 1) + t) * p.c + channel] = sum;
    }
  }
}

template <Of kOf, bool kTanh>
int LaunchFor(const DwconvWork& work, void* stream) {
  const DwconvParams& p = work.p;
  const int64_t strips = Strips(p.batch, p.height, p.width);
  const dim3 grid(static_cast<unsigned>(CeilDiv(strips, work.strips_per_block)),
                  ChannelBlocks(p.c));
  const int shared = kOf == Of::kHiddenGradient ? kDwconvSharedBytes : 0;
  switch (p.type) {
    case Scalar::kF16:
      return Launch(DwconvKernel<F16, kOf, kTanh>, grid, shared, stream, work);
    case Scalar::kBf16:
      return Launch(DwconvKernel<Bf16, kOf, kTanh>, grid, shared, stream, work);
    case Scalar::kF32:
      break;
  }
  return Launch(DwconvKernel<float, kOf, kTanh>, grid, shared, stream, work);
}

}  // namespace

int LaunchDwconvGelu(const DwconvParams& p, void* stream) {
  const DwconvWork work = {.p = p, .strips_per_block = DwconvStripsPerBlock()};
  return p.tanh ? LaunchFor<Of::kOutput, true>(work, stream)
                : LaunchFor<Of::kOutput, false>(work, stream);
}

int LaunchDwconvGeluBackward(const DwconvBackwardParams& p, void* stream) {
  const DwconvParams& f = p.forward;
  const int64_t strips = Strips(f.batch, f.height, f.width);
  DwconvWork hidden = {.p = f,
                       .d_out = p.d_out,
                       .partial = p.partial,
                       .strips_per_block = DwconvBackwardStripsPerBlock(strips, f.c)};
  hidden.p.out = p.d_hidden;
  if (const int status = f.tanh ? LaunchFor<Of::kHiddenGradient, true>(hidden, stream)
                                : LaunchFor<Of::kHiddenGradient, false>(hidden, stream)) {
    return status;
  }
  if (const int status = LaunchSumPartials({.partial = p.partial,
                                            .out = p.d_weight,
                                            .count = (kTaps + 1) * f.c,
                                            .partials = DwconvPartials(strips, f.c),
                                            .type = Scalar::kF32},
                                           stream)) {
    return status;
  }
  DwconvWork input = {.p = f, .strips_per_block = DwconvStripsPerBlock()};
  input.p.in = p.d_hidden;
  input.p.out = p.d_in;
  return LaunchFor<Of::kInputGradient, false>(input, stream);
}

}  // namespace pyramid::kernels::cuda
