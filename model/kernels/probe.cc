#include "model/kernels/probe.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "model/kernels/cpu_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyramid::kernels {
namespace {

#if defined(__x86_64__)

// One function of this signature does `rounds` rounds of work and returns its operations.
using Work = double (*)(int64_t rounds);

// Operations a second of all threads together.
double Rate(Work work, int threads) {
  constexpr auto kTime = std::chrono::milliseconds(100);
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<double> rates(static_cast<size_t>(threads));
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t) {
    all.emplace_back([&, t] {
      work(1000);
      ready.fetch_add(1);
      while (!go) std::this_thread::yield();
      const auto begin = std::chrono::steady_clock::now();
      double operations = 0;
      std::chrono::duration<double> seconds{};
      do {
        operations += work(20000);
        seconds = std::chrono::steady_clock::now() - begin;
      } while (seconds < kTime);
      rates[static_cast<size_t>(t)] = operations / seconds.count();
    });
  }
  while (ready < threads) std::this_thread::yield();
  go = true;
  for (std::thread& thread : all) thread.join();
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

constexpr int kChains = 12;  // more than latency times ports

__attribute__((target("avx512f"))) double FmaAvx512(int64_t rounds) {
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_set1_ps(1);
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, a, b);
  }
  __m512 total = sums[0];
  for (int i = 1; i < kChains; ++i) total = _mm512_add_ps(total, sums[i]);
  alignas(64) float out[16];
  _mm512_store_ps(out, total);
  volatile float sink = out[0];
  (void)sink;
  return static_cast<double>(rounds) * kChains * 16 * 2;
}

__attribute__((target("avx2,fma"))) double FmaAvx2(int64_t rounds) {
  __m256 sums[kChains];
  for (__m256& sum : sums) sum = _mm256_set1_ps(1);
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, a, b);
  }
  __m256 total = sums[0];
  for (int i = 1; i < kChains; ++i) total = _mm256_add_ps(total, sums[i]);
  alignas(32) float out[8];
  _mm256_store_ps(out, total);
  volatile float sink = out[0];
  (void)sink;
  return static_cast<double>(rounds) * kChains * 8 * 2;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((target("amx-tile,amx-bf16"))) double Amx(int64_t rounds) {
  alignas(64) static thread_local char memory[4][1024];
  const TileConfig config;
  asm volatile("" ::"r"(&config) : "memory");  // g++ 12 drops the stores otherwise
  _tile_loadconfig(&config);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_loadd(4, memory[0], 64);
    _tile_loadd(5, memory[1], 64);
    _tile_loadd(6, memory[2], 64);
    _tile_loadd(7, memory[3], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(rounds) * 4 * 16 * 16 * 32 * 2;
}

#endif

}  // namespace

Probe ProbeMachine(int threads) {
  Probe probe;
#if defined(__x86_64__)
  const CpuFeatures features = DetectCpu();
  if (features.avx512) {
    probe.fma_gflops = Rate(FmaAvx512, threads) / 1e9;
  } else if (features.avx2) {
    probe.fma_gflops = Rate(FmaAvx2, threads) / 1e9;
  }
  if (features.amx_bf16) probe.amx_gflops = Rate(Amx, threads) / 1e9;
#else
  (void)threads;
#endif
  return probe;
}

}  // namespace pyramid::kernels
