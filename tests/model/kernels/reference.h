// The kernels' meaning in plain loops, one output row at a time. In double it is what every set is
// measured against, in float it is the plain computation whose error is the yardstick.
#ifndef PYRAMID_TESTS_MODEL_KERNELS_REFERENCE_H_
#define PYRAMID_TESTS_MODEL_KERNELS_REFERENCE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "model/kernels/kernel_table.h"

namespace pyramid::kernels {

// a [k], weight [n, k], bias [n], residual [n] or null → [n]. Products and sums in Real.
template <typename Real>
std::vector<Real> LinearRow(const float* a, const float* weight, const float* bias,
                            const float* residual, int n, int k, bool relu);

// in, gamma, beta [c] → [c].
template <typename Real>
std::vector<Real> LayerNormRow(const float* in, const float* gamma, const float* beta, float eps,
                               int c);

// Three rows [width, c], null: outside the picture; weight [c, 3, 3], bias [c] → [width, c].
template <typename Real>
std::vector<Real> DwconvGeluRow(const float* above, const float* here, const float* below,
                                const float* weight, const float* bias, int width, int c,
                                Gelu gelu);

// q [d]; k and v [keys, d], row stride ld → [d]. Scores are base-2 exponents. A row whose scores
// are all minus infinity is zeros.
template <typename Real>
std::vector<Real> AttentionRow(const float* q, const float* k, const float* v, int64_t ld, int keys,
                               int d);

template <typename Real>
Real GeluOf(Real x, Gelu gelu);

// Errors over everything that was added. Infinities and NaN of `actual` where `expected` is finite
// make both infinite.
class ErrorOf {
 public:
  void Add(std::span<const double> expected, std::span<const float> actual);
  double rms() const;  // relative to the rms of what was expected
  double max() const;  // relative to the same

 private:
  double squares_ = 0;
  double expected_squares_ = 0;
  double largest_ = 0;
  size_t count_ = 0;
};

// Memory that ends where the contract says (model/kernels/kernel_table.h): `bytes` aligned to 64,
// then `slack` readable bytes, then a page that can't be touched; another one lies in front. The
// slack holds NaN patterns, and OnlyValidWritten tells whether they are still there. `offset`:
// bytes past the alignment at which data() begins. AddressSanitizer guards to the byte.
class GuardedBuffer {
 public:
  // While one lives, buffers begin where the page in front ends, instead of ending at the other.
  class AtTheFront {
   public:
    AtTheFront() { at_the_front_ = true; }
    ~AtTheFront() { at_the_front_ = false; }
    AtTheFront(const AtTheFront&) = delete;
    AtTheFront& operator=(const AtTheFront&) = delete;
  };

  explicit GuardedBuffer(size_t bytes, size_t offset = 0, size_t slack = kSlack);
  explicit GuardedBuffer(std::span<const float> content, size_t offset = 0, size_t slack = kSlack);
  ~GuardedBuffer();
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  template <typename T = float>
  T* data() {
    return reinterpret_cast<T*>(data_);
  }
  std::span<float> floats() { return {data<float>(), bytes_ / sizeof(float)}; }
  bool OnlyValidWritten() const;

 private:
  void Forbid(bool forbid) const;  // what no page guards, to AddressSanitizer

  static inline bool at_the_front_ = false;
  unsigned char* memory_ = nullptr;  // with the guards
  size_t memory_bytes_ = 0;
  unsigned char* data_ = nullptr;
  size_t bytes_;
  size_t slack_;
};

// What isn't an activation is readable to its last byte only: weights, biases and the like, whose
// last one is the last before the guard page, and what kernels pack, aligned to 64.
class ExactBuffer : public GuardedBuffer {
 public:
  explicit ExactBuffer(std::span<const float> content)
      : GuardedBuffer(content, (64 - content.size_bytes() % 64) % 64, 0) {}
  explicit ExactBuffer(size_t packed_bytes) : GuardedBuffer(packed_bytes, 0, 0) {}
};

}  // namespace pyramid::kernels

#endif  // PYRAMID_TESTS_MODEL_KERNELS_REFERENCE_H_
