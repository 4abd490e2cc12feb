// What the machine can do right now, to print beside every measurement: two virtual cores may or
// may not be two real ones, and neighbours come and go.
#ifndef PYRAMID_MODEL_KERNELS_PROBE_H_
#define PYRAMID_MODEL_KERNELS_PROBE_H_

namespace pyramid::kernels {

struct Probe {
  double fma_gflops = 0;  // f32 multiply-adds in registers, AVX-512 or AVX2; 0: neither
  double amx_gflops = 0;  // bf16 tile products with their loads from L1; 0: no AMX
};

// Takes about 0.2 s on `threads` threads.
Probe ProbeMachine(int threads);

}  // namespace pyramid::kernels

#endif  // PYRAMID_MODEL_KERNELS_PROBE_H_
