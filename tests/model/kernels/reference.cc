#include "tests/model/kernels/reference.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numbers>

#include "tests/model/kernels/case_table.h"

namespace pyramid::kernels {
namespace {

constexpr unsigned char kUntouched = 0xff;  // four of them: a NaN

uint64_t Next(uint64_t& state) {  // SplitMix64
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Sum of twelve uniform numbers: deviation 1, and the same bits everywhere.
float Normal(uint64_t& state) {
  int64_t sum = 0;
  for (int i = 0; i < 3; ++i) {
    const uint64_t bits = Next(state);
    for (int k = 0; k < 4; ++k) sum += static_cast<int64_t>((bits >> (16 * k)) & 0xffff);
  }
  return static_cast<float>(static_cast<double>(sum) / 65536.0 - 6.0);
}

}  // namespace

std::vector<float> Numbers(int64_t count, Values values, uint64_t seed, float scale) {
  uint64_t state = seed * 0x2545f4914f6cdd1du + 1;
  std::vector<float> all(static_cast<size_t>(count));
  for (float& x : all) {
    x = Normal(state) * scale;
    const uint64_t dice = Next(state);
    const float sign = dice & 64 ? 1.0f : -1.0f;
    if (values == Values::kOffset) x += 30.0f * scale;
    if (values == Values::kLarge && dice % 8 == 0) x = sign * 65504.0f;
    if (values == Values::kDenormal && dice % 2 == 0) {
      x = sign * std::numeric_limits<float>::denorm_min() * static_cast<float>((dice >> 8) % 1000);
    }
  }
  return all;
}

template <typename Real>
Real GeluOf(Real x, Gelu gelu) {
  const Real half = static_cast<Real>(0.5);
  if (gelu == Gelu::kErf) return half * x * (1 + std::erf(x / std::numbers::sqrt2_v<Real>));
  const Real slope = std::sqrt(2 / std::numbers::pi_v<Real>);
  const Real cubic = static_cast<Real>(0.044715);
  return half * x * (1 + std::tanh(slope * (x + cubic * x * x * x)));
}

template <typename Real>
std::vector<Real> LinearRow(const float* a, const float* weight, const float* bias,
                            const float* residual, int n, int k, bool relu) {
  std::vector<Real> out(static_cast<size_t>(n));
  for (int j = 0; j < n; ++j) {
    Real sum = 0;
    for (int i = 0; i < k; ++i) sum += Real{a[i]} * Real{weight[int64_t{j} * k + i]};
    sum += Real{bias[j]};
    if (relu) sum = std::max(sum, Real{0});
    if (residual != nullptr) sum += Real{residual[j]};
    out[static_cast<size_t>(j)] = sum;
  }
  return out;
}

template <typename Real>
std::vector<Real> LayerNormRow(const float* in, const float* gamma, const float* beta, float eps,
                               int c) {
  Real mean = 0;
  for (int i = 0; i < c; ++i) mean += Real{in[i]};
  mean /= static_cast<Real>(c);
  Real variance = 0;
  for (int i = 0; i < c; ++i) variance += (Real{in[i]} - mean) * (Real{in[i]} - mean);
  variance /= static_cast<Real>(c);
  const Real scale = 1 / std::sqrt(variance + Real{eps});
  std::vector<Real> out(static_cast<size_t>(c));
  for (int i = 0; i < c; ++i) {
    out[static_cast<size_t>(i)] = (Real{in[i]} - mean) * scale * Real{gamma[i]} + Real{beta[i]};
  }
  return out;
}

template <typename Real>
std::vector<Real> DwconvGeluRow(const float* above, const float* here, const float* below,
                                const float* weight, const float* bias, int width, int c,
                                Gelu gelu) {
  const float* const rows[3] = {above, here, below};
  std::vector<Real> out(static_cast<size_t>(width) * static_cast<size_t>(c));
  for (int x = 0; x < width; ++x) {
    for (int i = 0; i < c; ++i) {
      Real sum = Real{bias[i]};
      for (int ky = 0; ky < 3; ++ky) {
        for (int kx = 0; kx < 3; ++kx) {
          const int from = x + kx - 1;
          if (rows[ky] == nullptr || from < 0 || from >= width) continue;
          sum += Real{rows[ky][int64_t{from} * c + i]} * Real{weight[i * 9 + ky * 3 + kx]};
        }
      }
      out[static_cast<size_t>(x) * static_cast<size_t>(c) + static_cast<size_t>(i)] =
          GeluOf(sum, gelu);
    }
  }
  return out;
}

template <typename Real>
std::vector<Real> AttentionRow(const float* q, const float* k, const float* v, int64_t ld, int keys,
                               int d) {
  std::vector<Real> scores(static_cast<size_t>(keys));
  Real most = -std::numeric_limits<Real>::infinity();
  for (int j = 0; j < keys; ++j) {
    Real sum = 0;
    for (int i = 0; i < d; ++i) sum += Real{q[i]} * Real{k[j * ld + i]};
    scores[static_cast<size_t>(j)] = sum;
    most = std::max(most, sum);
  }
  std::vector<Real> out(static_cast<size_t>(d), Real{0});
  if (most == -std::numeric_limits<Real>::infinity()) return out;
  Real total = 0;
  for (Real& score : scores) total += score = std::exp2(score - most);
  for (int j = 0; j < keys; ++j) {
    for (int i = 0; i < d; ++i) {
      out[static_cast<size_t>(i)] += scores[static_cast<size_t>(j)] * Real{v[j * ld + i]};
    }
  }
  for (Real& x : out) x /= total;
  return out;
}

#define PYRAMID_INSTANTIATE(Real)                                                                  \
  template Real GeluOf<Real>(Real, Gelu);                                                          \
  template std::vector<Real> LinearRow<Real>(const float*, const float*, const float*,             \
                                             const float*, int, int, bool);                        \
  template std::vector<Real> LayerNormRow<Real>(const float*, const float*, const float*, float,   \
                                                int);                                              \
  template std::vector<Real> DwconvGeluRow<Real>(const float*, const float*, const float*,         \
                                                 const float*, const float*, int, int, Gelu);      \
  template std::vector<Real> AttentionRow<Real>(const float*, const float*, const float*, int64_t, \
                                                int, int);
PYRAMID_INSTANTIATE(float)
PYRAMID_INSTANTIATE(double)
#undef PYRAMID_INSTANTIATE

void ErrorOf::Add(std::span<const double> expected, std::span<const float> actual) {
  if (expected.size() != actual.size()) std::abort();
  for (size_t i = 0; i < expected.size(); ++i) {
    double error = std::abs(expected[i] - static_cast<double>(actual[i]));
    if (std::isnan(error)) error = std::numeric_limits<double>::infinity();
    squares_ += error * error;
    expected_squares_ += expected[i] * expected[i];
    largest_ = std::max(largest_, error);
  }
  count_ += expected.size();
}

double ErrorOf::rms() const { return squares_ == 0 ? 0 : std::sqrt(squares_ / expected_squares_); }

double ErrorOf::max() const {
  return largest_ == 0 ? 0 : largest_ / std::sqrt(expected_squares_ / static_cast<double>(count_));
}

GuardedBuffer::GuardedBuffer(size_t bytes, size_t offset, size_t slack)
    : bytes_(bytes), slack_(slack) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // Up to 63 bytes stay unguarded, so that data() is aligned (or off by `offset`).
  const size_t content = (offset + bytes + slack + 63) / 64 * 64;
  const size_t pages = (content + page - 1) / page * page;
  memory_bytes_ = pages + 2 * page;
  void* memory =
      mmap(nullptr, memory_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  memory_ = static_cast<unsigned char*>(memory);
  if (mprotect(memory_ + page, pages, PROT_READ | PROT_WRITE) != 0) std::abort();
  std::memset(memory_ + page, kUntouched, pages);
  data_ = memory_ + page + (at_the_front_ ? 0 : pages - content) + offset;
  Forbid(true);
}

void GuardedBuffer::Forbid(bool forbid) const {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto set = [forbid](unsigned char* from, unsigned char* to) {
    if (forbid) {
      ASAN_POISON_MEMORY_REGION(from, static_cast<size_t>(to - from));
    } else {
      ASAN_UNPOISON_MEMORY_REGION(from, static_cast<size_t>(to - from));
    }
  };
  set(memory_ + page, data_);
  set(data_ + bytes_ + slack_, memory_ + memory_bytes_ - page);
}

GuardedBuffer::GuardedBuffer(std::span<const float> content, size_t offset, size_t slack)
    : GuardedBuffer(content.size_bytes(), offset, slack) {
  if (!content.empty()) std::memcpy(data_, content.data(), content.size_bytes());
}

GuardedBuffer::~GuardedBuffer() {
  Forbid(false);
  munmap(memory_, memory_bytes_);
}

bool GuardedBuffer::OnlyValidWritten() const {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto untouched = [](unsigned char byte) { return byte == kUntouched; };
  Forbid(false);
  const bool only = std::all_of(memory_ + page, data_, untouched) &&
                    std::all_of(data_ + bytes_, memory_ + memory_bytes_ - page, untouched);
  Forbid(true);
  return only;
}

}  // namespace pyramid::kernels
