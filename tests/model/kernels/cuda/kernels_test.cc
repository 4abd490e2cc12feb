// The CUDA kernels themselves, run lane by lane on the host (emulated_lanes.h), against double
// arithmetic. The yardstick is the plain computation, which rounds every tensor to the same type.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "model/kernels/cuda/maps.h"
#include "model/kernels/cuda/params.h"
#include "tests/model/kernels/case_table.h"
#include "tests/model/kernels/cuda/emulated_lanes.h"
#include "tests/model/kernels/reference.h"

namespace pyramid::kernels::cuda {
namespace {

constexpr double kLuck = 4;  // the largest error of few elements is a matter of luck
constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename T>
constexpr Scalar kScalar = Scalar::kF32;
template <>
constexpr Scalar kScalar<F16> = Scalar::kF16;
template <>
constexpr Scalar kScalar<Bf16> = Scalar::kBf16;

template <typename T>
float Rounded(double x) {
  T out;
  FromFloat(static_cast<float>(x), out);
  return ToFloat(out);
}

// A tensor of T that ends before a guard page.
template <typename T>
class Array {
 public:
  explicit Array(int64_t count) : buffer_(count * sizeof(T)), count_(count) {
    std::memset(buffer_.data<char>(), 0xFF, count * sizeof(T));  // NaN
  }
  Array(int64_t count, Values values, uint64_t seed, float scale = 1) : Array(count) {
    const std::vector<float> numbers = Numbers(count, values, seed, scale);
    for (int64_t i = 0; i < count; ++i) FromFloat(numbers[i], data()[i]);
  }
  T* data() { return buffer_.template data<T>(); }
  float operator[](int64_t i) { return ToFloat(data()[i]); }
  std::vector<float> Floats() {
    std::vector<float> all(count_);
    for (int64_t i = 0; i < count_; ++i) all[i] = ToFloat(data()[i]);
    return all;
  }
  std::string Bits() { return std::string(buffer_.template data<char>(), count_ * sizeof(T)); }
  bool Sound() const { return buffer_.OnlyValidWritten(); }
  int64_t count() const { return count_; }

 private:
  GuardedBuffer buffer_;
  int64_t count_;
};

// `actual` is at most `times` as wrong as `plain`, or as wrong as rounding to T once.
template <typename T>
void ExpectAsGood(const std::vector<double>& expected, const std::vector<float>& plain,
                  const std::vector<float>& actual, double times) {
  const double rounding = kScalar<T> == Scalar::kF32   ? 0x1p-24
                          : kScalar<T> == Scalar::kF16 ? 0x1p-11
                                                       : 0x1p-8;
  ErrorOf ours, theirs;
  ours.Add(expected, actual);
  theirs.Add(expected, plain);
  EXPECT_LE(ours.rms(), std::max(times * theirs.rms(), 2 * rounding));
  EXPECT_LE(ours.max(), kLuck * std::max(times * theirs.max(), 8 * rounding));
}

// ---- Attention ----

struct Shape {
  int batch, heads, queries, keys, d;
};
std::string Describe(const Shape& s) {
  return std::to_string(s.batch) + " pictures, " + std::to_string(s.heads) + " heads of " +
         std::to_string(s.d) + ", " + std::to_string(s.queries) + " queries, " +
         std::to_string(s.keys) + " keys";
}

// q [B, N, C], kv [B, M, 2C], as the module has them.
template <typename T>
struct AttentionRun {
  AttentionRun(const Shape& shape, Values values, uint64_t seed)
      : s(shape),
        c(shape.heads * shape.d),
        q(int64_t{s.batch} * s.queries * c, values, seed),
        kv(int64_t{s.batch} * s.keys * 2 * c, values, seed + 1),
        out(q.count()),
        softmax(int64_t{s.batch} * s.heads * s.queries * 2),
        d_out(q.count(), Values::kUnit, seed + 2),
        dq(q.count()),
        dkv(kv.count()) {}

  AttentionParams Params() {
    return {.q = q.data(),
            .k = kv.data(),
            .v = kv.data() + c,
            .out = out.data(),
            .softmax = softmax.data(),
            .q_batch = int64_t{s.queries} * c,
            .q_row = c,
            .kv_batch = int64_t{s.keys} * 2 * c,
            .kv_row = 2 * c,
            .out_batch = int64_t{s.queries} * c,
            .out_row = c,
            .batch = s.batch,
            .heads = s.heads,
            .queries = s.queries,
            .keys = s.keys,
            .d = s.d,
            .scale = static_cast<float>(1 / std::sqrt(s.d)),
            .type = kScalar<T>};
  }
  void Forward() { ASSERT_EQ(LaunchAttention(Params(), nullptr), 0); }
  void Backward() {
    const int tile = kScalar<T> == Scalar::kF32 ? kPlainTile : kQueryTile;
    Array<float> dkv_partial(DkvPartialCount(s.batch, s.heads, s.queries, s.keys, s.d, tile));
    Array<float> dq_partial(DqPartialCount(s.batch, s.heads, s.queries, s.keys, s.d));
    ASSERT_EQ(LaunchAttentionBackward({.forward = Params(),
                                       .d_out = d_out.data(),
                                       .dq = dq.data(),
                                       .dkv = dkv.data(),
                                       .dkv_partial = dkv_partial.data(),
                                       .dq_partial = dq_partial.data()},
                                      nullptr),
              0);
    EXPECT_TRUE(dkv_partial.Sound() && dq_partial.Sound() && dq.Sound() && dkv.Sound());
  }

  // The same with sums in Real; every tensor that a plain computation stores goes through `store`.
  template <typename Real>
  struct Result {
    std::vector<Real> out, dq, dkv;
  };
  template <typename Real, typename Store>
  Result<Real> Reference(const Store& store, bool backward) {
    Result<Real> r{std::vector<Real>(out.count()), std::vector<Real>(backward ? dq.count() : 0),
                   std::vector<Real>(backward ? dkv.count() : 0)};
    const Real scale = 1 / std::sqrt(Real(s.d));
    for (int b = 0; b < s.batch; ++b) {
      for (int h = 0; h < s.heads; ++h) {
        for (int n = 0; n < s.queries; ++n) {
          const int64_t row = (int64_t{b} * s.queries + n) * c + h * s.d;
          auto key = [&](int m) { return (int64_t{b} * s.keys + m) * 2 * c + h * s.d; };
          std::vector<Real> p(s.keys);
          Real max = -kInfinity, sum = 0;
          for (int m = 0; m < s.keys; ++m) {
            for (int i = 0; i < s.d; ++i) p[m] += Real{q[row + i]} * kv[key(m) + i];
            p[m] = store(p[m]) * scale;
            max = std::max(max, p[m]);
          }
          for (Real& x : p) sum += x = max == -kInfinity ? 0 : std::exp(x - max);
          for (Real& x : p) x = sum == 0 ? 0 : store(x / sum);
          for (int i = 0; i < s.d; ++i) {
            Real total = 0;
            for (int m = 0; m < s.keys; ++m) total += p[m] * kv[key(m) + c + i];
            r.out[row + i] = store(total);
          }
          if (!backward) continue;
          Real product = 0;
          for (int i = 0; i < s.d; ++i) product += r.out[row + i] * d_out[row + i];
          for (int m = 0; m < s.keys; ++m) {
            Real dp = 0;
            for (int i = 0; i < s.d; ++i) dp += Real{d_out[row + i]} * kv[key(m) + c + i];
            const Real ds = store(p[m] * (store(dp) - product) * scale);
            for (int i = 0; i < s.d; ++i) {
              r.dq[row + i] += ds * kv[key(m) + i];
              r.dkv[key(m) + i] += ds * q[row + i];
              r.dkv[key(m) + c + i] += p[m] * d_out[row + i];
            }
          }
        }
      }
    }
    for (Real& x : r.dq) x = store(x);
    for (Real& x : r.dkv) x = store(x);
    return r;
  }

  void Check(bool backward) {
    SCOPED_TRACE(Describe(s));
    Forward();
    if (backward) Backward();
    const Result exact = Reference<double>([](double x) { return x; }, backward);
    const Result plain = Reference<float>(Rounded<T>, backward);
    ExpectAsGood<T>(exact.out, plain.out, out.Floats(), 2);
    EXPECT_TRUE(out.Sound() && softmax.Sound());
    if (!backward) return;
    if (s.keys > 1) {
      ExpectAsGood<T>(exact.dq, plain.dq, dq.Floats(), 3);
      ExpectAsGood<T>(exact.dkv, plain.dkv, dkv.Floats(), 3);
      return;
    }
    // Softmax of a single key is 1 and passes no gradient on; a relative error has no meaning.
    for (const float x : dq.Floats()) EXPECT_NEAR(x, 0, 1e-5);
    for (int b = 0; b < s.batch; ++b) {
      for (int64_t i = 2 * c * b; i < 2 * c * b + c; ++i) {
        EXPECT_NEAR(dkv[i], 0, 1e-4);
        EXPECT_NEAR(dkv[c + i], exact.dkv[c + i], 0.01 * s.queries);
      }
    }
  }

  Shape s;
  int64_t c;
  Array<T> q, kv, out;
  Array<float> softmax;
  Array<T> d_out, dq, dkv;
};

template <typename T>
class CudaAttentionTest : public ::testing::Test {};
using Types = ::testing::Types<float, F16, Bf16>;
struct TypeNames {
  template <typename T>
  static std::string GetName(int) {
    return kScalar<T> == Scalar::kF32 ? "f32" : kScalar<T> == Scalar::kF16 ? "f16" : "bf16";
  }
};
TYPED_TEST_SUITE(CudaAttentionTest, Types, TypeNames);

TYPED_TEST(CudaAttentionTest, AnswersTheCaseTable) {
  for (const AttentionCase& test : AttentionCases()) {
    if (test.queries > 784) continue;  // more of the same; the maps are checked for all
    AttentionRun<TypeParam>({1, 1, static_cast<int>(test.queries), test.keys, test.d},
                            Values::kUnit, test.keys)
        .Check(/*backward=*/false);
  }
}

TYPED_TEST(CudaAttentionTest, BlocksWithSeveralTilesAnswerAll) {
  AttentionRun<TypeParam>({2, 256, 65, 9, 32}, Values::kUnit, 1).Check(/*backward=*/false);
}

TYPED_TEST(CudaAttentionTest, DifferentiatesStagesAndTails) {
  for (const int d : {32, 64}) {
    for (const int keys : {1, 4, 9, 16, 17, 49, 63, 64, 65, 100, 144, 255, 256}) {
      for (const int queries : {1, 19, 49, 130}) {
        AttentionRun<TypeParam>({1, 1, queries, keys, d}, Values::kUnit, keys)
            .Check(/*backward=*/true);
      }
    }
    AttentionRun<TypeParam>({2, 3, 75, 49, d}, Values::kUnit, 3).Check(/*backward=*/true);
    AttentionRun<TypeParam>({2, 2, 75, 130, d}, Values::kUnit, 4).Check(/*backward=*/true);
  }
}

TYPED_TEST(CudaAttentionTest, SplitsWithSeveralTilesAddUp) {
  AttentionRun<TypeParam>({1, 260, 130, 20, 32}, Values::kUnit, 5).Check(/*backward=*/true);
}

TYPED_TEST(CudaAttentionTest, TakesOffsetsAndLargeNumbers) {
  AttentionRun<TypeParam>({1, 2, 40, 49, 32}, Values::kOffset, 6).Check(/*backward=*/false);
  AttentionRun<TypeParam>({1, 2, 40, 49, 64}, Values::kDenormal, 7).Check(/*backward=*/true);
  AttentionRun<TypeParam> large({1, 2, 40, 49, 32}, Values::kLarge, 8);
  large.Forward();
  for (const float x : large.out.Floats()) EXPECT_TRUE(std::isfinite(x));
}

TYPED_TEST(CudaAttentionTest, AQueryThatReachesNoKeyGetsZerosAndGivesNone) {
  AttentionRun<TypeParam> run({1, 1, 20, 40, 32}, Values::kUnit, 9);
  for (int64_t i = 0; i < run.c; ++i) {
    // Query 3 times any key is minus infinity.
    FromFloat(i == 0 ? -INFINITY : 0.0f, run.q.data()[3 * run.c + i]);
  }
  for (int64_t m = 0; m < 40; ++m) FromFloat(1.0f, run.kv.data()[m * 2 * run.c]);
  run.Forward();
  for (const float x : run.out.Floats()) EXPECT_TRUE(std::isfinite(x));
  for (int64_t i = 0; i < run.c; ++i) EXPECT_EQ(run.out[3 * run.c + i], 0);
  EXPECT_EQ(run.softmax[6], 0);
  EXPECT_EQ(run.softmax[7], 0);
  run.Backward();
  for (int64_t i = 0; i < run.c; ++i) EXPECT_EQ(run.dq[3 * run.c + i], 0);
}

TYPED_TEST(CudaAttentionTest, BlocksAndWarpsMayComeInAnyOrder) {
  std::vector<std::string> bits;
  for (const Order order : {Order::kForward, Order::kBackward}) {
    SetOrder(order);
    AttentionRun<TypeParam> run({2, 2, 150, 144, 64}, Values::kUnit, 10);
    run.Forward();
    run.Backward();
    bits.push_back(run.out.Bits() + run.softmax.Bits() + run.dq.Bits() + run.dkv.Bits());
  }
  SetOrder(Order::kForward);
  EXPECT_TRUE(bits[0] == bits[1]);
}

// ---- Depthwise convolution ----

template <typename T>
struct DwconvRun {
  DwconvRun(int64_t batch_size, const DwconvCase& shape, bool tanh_form, uint64_t seed,
            Values values = Values::kUnit)
      : batch(batch_size),
        s(shape),
        tanh(tanh_form),
        in(batch * s.height * s.width * s.c, values, seed),
        weight(int64_t{9} * s.c, Values::kUnit, seed + 1, 0.4f),
        bias(s.c, Values::kUnit, seed + 2),
        out(in.count()),
        d_out(in.count(), Values::kUnit, seed + 3),
        d_hidden(in.count()),
        d_in(in.count()),
        d_weight(int64_t{10} * s.c) {}

  void Run() {
    const DwconvParams params = {.in = in.data(),
                                 .weight = weight.data(),
                                 .bias = bias.data(),
                                 .out = out.data(),
                                 .batch = batch,
                                 .height = s.height,
                                 .width = s.width,
                                 .c = s.c,
                                 .tanh = tanh,
                                 .type = kScalar<T>};
    Array<float> partial(DwconvPartialCount(batch, s.height, s.width, s.c));
    ASSERT_EQ(LaunchDwconvGelu(params, nullptr), 0);
    ASSERT_EQ(LaunchDwconvGeluBackward({.forward = params,
                                        .d_out = d_out.data(),
                                        .d_hidden = d_hidden.data(),
                                        .d_in = d_in.data(),
                                        .d_weight = d_weight.data(),
                                        .partial = partial.data()},
                                       nullptr),
              0);
    EXPECT_TRUE(out.Sound() && d_hidden.Sound() && d_in.Sound() && d_weight.Sound() &&
                partial.Sound());
  }

  template <typename Real>
  Real Slope(Real x) const {
    if (!tanh) {
      return Real(0.5) * std::erfc(-x / std::sqrt(Real(2))) +
             x * std::exp(-x * x / 2) / std::sqrt(Real(2 * M_PI));
    }
    const Real k = std::sqrt(2 / M_PI), t = std::tanh(k * (x + Real(0.044715) * x * x * x));
    return Real(0.5) * (1 + t) + Real(0.5) * x * (1 - t * t) * k * (1 + 3 * Real(0.044715) * x * x);
  }

  template <typename Real, typename Store>
  void Reference(const Store& store, std::vector<Real>& y, std::vector<Real>& dx,
                 std::vector<Real>& dw) {
    y.assign(in.count(), 0);
    dx.assign(in.count(), 0);
    dw.assign(10 * s.c, 0);
    auto at = [&](int64_t b, int r, int x) { return ((b * s.height + r) * s.width + x) * s.c; };
    for (int64_t b = 0; b < batch; ++b) {
      for (int r = 0; r < s.height; ++r) {
        for (int x = 0; x < s.width; ++x) {
          for (int c = 0; c < s.c; ++c) {
            auto each_tap = [&](auto&& visit) {
              for (int t = 0; t < 9; ++t) {
                const int ry = r + t / 3 - 1, rx = x + t % 3 - 1;
                if (ry >= 0 && ry < s.height && rx >= 0 && rx < s.width)
                  visit(t, at(b, ry, rx) + c);
              }
            };
            Real hidden = bias[c];
            each_tap([&](int t, int64_t i) { hidden += Real{weight[t * s.c + c]} * in[i]; });
            hidden = store(hidden);
            const int64_t here = at(b, r, x) + c;
            y[here] = store(GeluOf<Real>(hidden, tanh ? Gelu::kTanh : Gelu::kErf));
            const Real slope = store(d_out[here] * Slope<Real>(hidden));
            dw[9 * s.c + c] += slope;
            each_tap([&](int t, int64_t i) {
              dw[t * s.c + c] += slope * in[i];
              dx[i] += slope * weight[t * s.c + c];
            });
          }
        }
      }
    }
    for (Real& value : dx) value = store(value);
  }

  void Check() {
    SCOPED_TRACE(std::to_string(batch) + " pictures of " + std::to_string(s.height) + "x" +
                 std::to_string(s.width) + "x" + std::to_string(s.c) + (tanh ? ", tanh" : ", erf"));
    Run();
    std::vector<double> y, dx, dw;
    std::vector<float> plain_y, plain_dx, plain_dw;
    Reference<double>([](double x) { return x; }, y, dx, dw);
    Reference<float>(Rounded<T>, plain_y, plain_dx, plain_dw);
    ExpectAsGood<T>(y, plain_y, out.Floats(), 2);
    ExpectAsGood<T>(dx, plain_dx, d_in.Floats(), 3);
    ExpectAsGood<T>(dw, plain_dw, d_weight.Floats(), 3);
  }

  int64_t batch;
  DwconvCase s;
  bool tanh;
  Array<T> in;
  Array<float> weight, bias;
  Array<T> out, d_out, d_hidden, d_in;
  Array<float> d_weight;
};

template <typename T>
class CudaDwconvTest : public ::testing::Test {};
TYPED_TEST_SUITE(CudaDwconvTest, Types, TypeNames);

TYPED_TEST(CudaDwconvTest, AnswersAndDifferentiatesTheCaseTable) {
  for (const DwconvCase& test : DwconvCases()) {
    // Channels are independent of each other: enough of them for a whole block and a part of one.
    const DwconvCase shape = {test.height, test.width,
                              test.height * test.width > 400 ? 32 : std::min(test.c, 160)};
    DwconvRun<TypeParam>(1, shape, /*tanh_form=*/false, 1).Check();
  }
  DwconvRun<TypeParam>(3, {7, 9, 132}, /*tanh_form=*/true, 2).Check();
  DwconvRun<TypeParam>(2, {14, 14, 64}, /*tanh_form=*/true, 3).Check();
}

TYPED_TEST(CudaDwconvTest, LargeNumbersGiveNoNaN) {
  for (const bool tanh : {false, true}) {
    DwconvRun<TypeParam> run(1, {7, 9, 32}, tanh, 4, Values::kLarge);
    run.Run();
    for (const float x : run.out.Floats()) EXPECT_FALSE(std::isnan(x));
    for (const float x : run.d_in.Floats()) EXPECT_TRUE(std::isfinite(x));
    for (const float x : run.d_weight.Floats()) EXPECT_TRUE(std::isfinite(x));
  }
}

TYPED_TEST(CudaDwconvTest, BlocksAndWarpsMayComeInAnyOrder) {
  std::vector<std::string> bits;
  for (const Order order : {Order::kForward, Order::kBackward}) {
    SetOrder(order);
    DwconvRun<TypeParam> run(2, {14, 14, 160}, false, 5);
    run.Run();
    bits.push_back(run.out.Bits() + run.d_in.Bits() + run.d_weight.Bits());
  }
  SetOrder(Order::kForward);
  EXPECT_TRUE(bits[0] == bits[1]);
}

// ---- LayerNorm ----

template <typename In, typename Out>
void CheckNorm(int64_t rows, int c, Values values) {
  SCOPED_TRACE(std::to_string(rows) + " rows of " + std::to_string(c));
  constexpr float kEps = 1e-6f;
  Array<In> in(rows * c, values, 1), d_in(rows * c);
  Array<Out> out(rows * c), d_out(rows * c, Values::kUnit, 2);
  Array<float> gamma(c, Values::kUnit, 3), beta(c, Values::kUnit, 4), mean(rows), rstd(rows);
  Array<float> d_gamma_beta(2 * c), partial(LayerNormPartialCount(rows, c));
  const LayerNormParams params = {.in = in.data(),
                                  .gamma = gamma.data(),
                                  .beta = beta.data(),
                                  .out = out.data(),
                                  .mean = mean.data(),
                                  .rstd = rstd.data(),
                                  .rows = rows,
                                  .c = c,
                                  .eps = kEps,
                                  .in_type = kScalar<In>,
                                  .out_type = kScalar<Out>};
  ASSERT_EQ(LaunchLayerNorm(params, nullptr), 0);
  ASSERT_EQ(LaunchLayerNormBackward({.forward = params,
                                     .d_out = d_out.data(),
                                     .d_in = d_in.data(),
                                     .d_gamma_beta = d_gamma_beta.data(),
                                     .partial = partial.data()},
                                    nullptr),
            0);
  EXPECT_TRUE(out.Sound() && d_in.Sound() && d_gamma_beta.Sound() && mean.Sound() && rstd.Sound() &&
              partial.Sound());

  // With sums in Real.
  auto reference = [&]<typename Real>(std::vector<Real>& y, std::vector<Real>& dx,
                                      std::vector<Real>& d) {
    y.assign(rows * c, 0);
    dx.assign(rows * c, 0);
    d.assign(2 * c, 0);
    for (int64_t r = 0; r < rows; ++r) {
      Real m = 0, variance = 0, sum = 0, product = 0;
      for (int i = 0; i < c; ++i) m += static_cast<Real>(in[r * c + i]);
      m /= c;
      for (int i = 0; i < c; ++i) {
        const Real x = static_cast<Real>(in[r * c + i]) - m;
        variance += x * x;
      }
      const Real scale = 1 / std::sqrt(variance / c + Real{kEps});
      for (int i = 0; i < c; ++i) {
        const Real x = (static_cast<Real>(in[r * c + i]) - m) * scale;
        const Real dy = static_cast<Real>(d_out[r * c + i]);
        y[r * c + i] = x * static_cast<Real>(gamma[i]) + static_cast<Real>(beta[i]);
        d[i] += dy * x;
        d[c + i] += dy;
        sum += dy * static_cast<Real>(gamma[i]);
        product += dy * static_cast<Real>(gamma[i]) * x;
      }
      for (int i = 0; i < c; ++i) {
        const Real x = (static_cast<Real>(in[r * c + i]) - m) * scale;
        const Real dy = static_cast<Real>(d_out[r * c + i]) * static_cast<Real>(gamma[i]);
        dx[r * c + i] = scale * (dy - sum / c - x * product / c);
      }
    }
  };
  std::vector<double> y, dx, d;
  std::vector<float> plain_y, plain_dx, plain_d;
  reference(y, dx, d);
  reference(plain_y, plain_dx, plain_d);
  for (float& x : plain_y) x = Rounded<Out>(x);
  for (float& x : plain_dx) x = Rounded<In>(x);
  ExpectAsGood<Out>(y, plain_y, out.Floats(), 2);
  ExpectAsGood<In>(dx, plain_dx, d_in.Floats(), 3);
  ExpectAsGood<float>(d, plain_d, d_gamma_beta.Floats(), 3);
}

template <typename T>
class CudaLayerNormTest : public ::testing::Test {};
TYPED_TEST_SUITE(CudaLayerNormTest, Types, TypeNames);

TYPED_TEST(CudaLayerNormTest, AnswersAndDifferentiatesTheCaseTable) {
  for (const LayerNormCase& test : LayerNormCases()) {
    CheckNorm<TypeParam, TypeParam>(test.rows, test.c, Values::kUnit);
  }
  for (const int c : {4, 36, 516, 1020, 1024}) CheckNorm<TypeParam, TypeParam>(9, c, Values::kUnit);
}

TYPED_TEST(CudaLayerNormTest, TakesF32Rows) {
  for (const int c : {32, 64, 160, 512}) CheckNorm<float, TypeParam>(37, c, Values::kUnit);
}

TYPED_TEST(CudaLayerNormTest, TakesRowsFarFromZero) {
  CheckNorm<TypeParam, TypeParam>(37, 160, Values::kOffset);
}

TEST(CudaKernelsTest, NoLaunchAskedForMoreSharedMemoryThanACardHas) {
  AttentionRun<F16>({1, 1, 19, 256, 64}, Values::kUnit, 1).Check(/*backward=*/true);
  AttentionRun<float>({1, 1, 19, 256, 64}, Values::kUnit, 1).Check(/*backward=*/true);
  EXPECT_LE(MostSharedBytes(), kMostSharedBytes);
}

}  // namespace
}  // namespace pyramid::kernels::cuda
