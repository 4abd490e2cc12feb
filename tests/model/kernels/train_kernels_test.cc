// Every set of training kernels against a double reference, with the plain computation in the set's
// dtype as the yardstick: operation by operation, sums in f32, each operation's result rounded to
// the activations' type. The reference itself is checked by finite differences.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "model/kernels/attention.h"
#include "model/kernels/cpu_kernels.h"
#include "model/kernels/train_table.h"
#include "tests/model/kernels/case_table.h"
#include "tests/model/kernels/reference.h"

namespace pyramid::kernels {
namespace {

using ::testing::Each;
using ::testing::ElementsAreArray;
using ::testing::FloatNear;

constexpr double kMostTimesPlain = 3;  // what an error may be of the plain computation's

// --- Numbers in the storage of a table ---

float ToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (!std::isnan(x)) bits += 0x7fff + ((bits >> 16) & 1);
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

std::vector<float> Stored(const TrainKernels& table, std::vector<float> numbers) {
  if (table.activation_bytes == 2)
    std::transform(numbers.begin(), numbers.end(), numbers.begin(), ToBf16);
  return numbers;
}

// Activations in guarded memory.
class Activations {
 public:
  // Untouched: every byte 0xff.
  Activations(const TrainKernels& table, int64_t count, size_t offset = 0)
      : bytes_(static_cast<size_t>(table.activation_bytes)),
        count_(static_cast<size_t>(count)),
        buffer_(bytes_ * count_, offset * bytes_) {}
  Activations(const TrainKernels& table, std::span<const float> numbers, size_t offset = 0)
      : Activations(table, static_cast<int64_t>(numbers.size()), offset) {
    for (size_t i = 0; i < count_; ++i) {
      const float x = bytes_ == 2 ? ToBf16(numbers[i]) : numbers[i];
      std::memcpy(at(i), reinterpret_cast<const char*>(&x) + (4 - bytes_), bytes_);
    }
  }
  void* get() { return buffer_.data<char>(); }
  char* at(size_t i) { return buffer_.data<char>() + i * bytes_; }
  std::vector<float> numbers() {
    std::vector<float> all(count_, 0.0f);
    for (size_t i = 0; i < count_; ++i) {
      std::memcpy(reinterpret_cast<char*>(&all[i]) + (4 - bytes_), at(i), bytes_);
    }
    return all;
  }
  bool OnlyValidWritten() const { return buffer_.OnlyValidWritten(); }

 private:
  size_t bytes_, count_;
  GuardedBuffer buffer_;
};

// Floats in guarded memory.
struct Floats {
  explicit Floats(std::span<const float> numbers) : buffer(numbers) {}
  explicit Floats(int64_t count, float value = 0)
      : buffer(std::vector<float>(static_cast<size_t>(count), value)) {}
  float* get() { return buffer.data<float>(); }
  std::vector<float> numbers() { return {buffer.floats().begin(), buffer.floats().end()}; }
  GuardedBuffer buffer;
};

// Our error against that of the plain computation, over a case's numbers of one kind.
class Comparison {
 public:
  void Add(double expected, double plain, float actual) {
    const float narrow = static_cast<float>(plain);
    ours_.Add({&expected, 1}, {&actual, 1});
    plain_.Add({&expected, 1}, {&narrow, 1});
  }
  // `floor`: what is forgiven beside, of the expected numbers' rms: f32's own unit, where the plain
  // computation happens to be exact.
  void Check(const std::string& what, double floor = 1.2e-7) const {
    EXPECT_LE(ours_.rms(), kMostTimesPlain * plain_.rms() + floor) << what;
    EXPECT_LE(ours_.max(), kMostTimesPlain * plain_.max() + 4 * floor) << what;
  }

 private:
  ErrorOf ours_, plain_;
};

// --- The backward passes in plain loops; Round is applied to every operation's result ---

struct Exact {
  using Real = double;
  double operator()(double x) const { return x; }
};
struct PlainF32 {
  using Real = float;
  float operator()(float x) const { return x; }
};
struct PlainBf16 {
  using Real = float;
  float operator()(float x) const { return ToBf16(x); }
};

template <typename Real>
Real GeluSlopeOf(Real x, Gelu gelu) {
  const Real half = static_cast<Real>(0.5);
  if (gelu == Gelu::kErf) {
    return half * (1 + std::erf(x / std::numbers::sqrt2_v<Real>)) +
           x * std::exp(-half * x * x) / std::sqrt(2 * std::numbers::pi_v<Real>);
  }
  const Real slope = std::sqrt(2 / std::numbers::pi_v<Real>), cubic = static_cast<Real>(0.044715);
  const Real t = std::tanh(slope * (x + cubic * x * x * x));
  return half * (1 + t) + half * x * (1 - t * t) * slope * (1 + 3 * cubic * x * x);
}

template <typename Round>
struct NormGrad {
  using Real = Round::Real;
  std::vector<Real> out, dx, dgamma, dbeta;
};
template <typename Round>
NormGrad<Round> NormGradOf(const std::vector<float>& in, const std::vector<float>& gamma,
                           const std::vector<float>& beta, float eps, const std::vector<float>& dy,
                           const std::vector<float>* add, size_t c) {
  using Real = Round::Real;
  const Round round;
  NormGrad<Round> all = {{}, {}, std::vector<Real>(c), std::vector<Real>(c)};
  for (size_t row = 0; row < in.size(); row += c) {
    Real mean = 0, variance = 0, g_mean = 0, gx_mean = 0;
    for (size_t i = 0; i < c; ++i) mean += Real{in[row + i]};
    mean /= static_cast<Real>(c);
    for (size_t i = 0; i < c; ++i) variance += (in[row + i] - mean) * (in[row + i] - mean);
    const Real inverse = 1 / std::sqrt(variance / static_cast<Real>(c) + Real{eps});
    const auto normal = [&](size_t i) { return (in[row + i] - mean) * inverse; };
    for (size_t i = 0; i < c; ++i) {
      const Real g = Real{dy[row + i]} * Real{gamma[i]};
      g_mean += g;
      gx_mean += g * normal(i);
      all.dgamma[i] += dy[row + i] * normal(i);
      all.dbeta[i] += Real{dy[row + i]};
      all.out.push_back(round(normal(i) * gamma[i] + beta[i]));
    }
    g_mean /= static_cast<Real>(c);
    gx_mean /= static_cast<Real>(c);
    for (size_t i = 0; i < c; ++i) {
      const Real g = Real{dy[row + i]} * Real{gamma[i]};
      const Real dx = round(inverse * (g - g_mean - normal(i) * gx_mean));
      all.dx.push_back(add == nullptr ? dx : round(dx + (*add)[row + i]));
    }
  }
  return all;
}

// One channel of n maps.
template <typename Round>
struct DwconvGrad {
  using Real = Round::Real;
  std::vector<Real> dhidden, gelu;
  Real dweight[9] = {};
  Real dbias = 0;
};
template <typename Round>
DwconvGrad<Round> DwconvGradOf(const std::vector<float>& hidden, const std::vector<float>& dout,
                               const float* weight, float bias, int n, int height, int width,
                               Gelu gelu) {
  using Real = Round::Real;
  const Round round;
  DwconvGrad<Round> all;
  std::vector<Real> dpre;
  // Calls f(index of the neighbour, tap) for the pixel's neighbours inside the picture.
  const auto around = [&](int picture, int y, int x, auto f) {
    for (int tap = 0; tap < 9; ++tap) {
      const int from_y = y + tap / 3 - 1, from_x = x + tap % 3 - 1;
      if (from_y < 0 || from_y >= height || from_x < 0 || from_x >= width) continue;
      f(static_cast<size_t>((picture * height + from_y) * width + from_x), tap);
    }
  };
  const auto every_pixel = [&](auto f) {
    for (int picture = 0; picture < n; ++picture) {
      for (int y = 0; y < height; ++y) {
        for (int x = 0; x < width; ++x) f(picture, y, x);
      }
    }
  };
  every_pixel([&](int picture, int y, int x) {
    Real pre = bias;
    around(picture, y, x, [&](size_t at, int tap) { pre += Real{hidden[at]} * Real{weight[tap]}; });
    all.gelu.push_back(round(kernels::GeluOf<Real>(round(pre), gelu)));
    const Real d = round(Real{dout[dpre.size()]} * GeluSlopeOf<Real>(round(pre), gelu));
    around(picture, y, x, [&](size_t at, int tap) { all.dweight[tap] += d * Real{hidden[at]}; });
    all.dbias += d;
    dpre.push_back(d);
  });
  every_pixel([&](int picture, int y, int x) {
    Real sum = 0;
    around(picture, y, x, [&](size_t at, int tap) { sum += dpre[at] * Real{weight[8 - tap]}; });
    all.dhidden.push_back(round(sum));
  });
  return all;
}

// Adaptive pooling of [height, width, c], the way PyTorch does it, and its gradient.
template <typename Round>
struct Pooled {
  using Real = Round::Real;
  std::vector<Real> out, dx;
};
template <typename Round>
Pooled<Round> PoolOf(const std::vector<float>& in, const std::vector<float>& dout, int height,
                     int width, int cells, int c) {
  using Real = Round::Real;
  const Round round;
  Pooled<Round> all = {{}, std::vector<Real>(in.size())};
  for (int cell = 0; cell < cells * cells; ++cell) {
    const int top = cell / cells * height / cells, left = cell % cells * width / cells;
    const int bottom = ((cell / cells + 1) * height + cells - 1) / cells,
              right = ((cell % cells + 1) * width + cells - 1) / cells;
    for (int i = 0; i < c; ++i) {
      Real sum = 0;
      for (int y = top; y < bottom; ++y) {
        for (int x = left; x < right; ++x) {
          const size_t at = static_cast<size_t>((y * width + x) * c + i);
          sum += Real{in[at]};
          all.dx[at] += Real{dout[static_cast<size_t>(cell * c + i)]} /
                        static_cast<Real>((bottom - top) * (right - left));
        }
      }
      all.out.push_back(round(sum / static_cast<Real>((bottom - top) * (right - left))));
    }
  }
  std::transform(all.dx.begin(), all.dx.end(), all.dx.begin(), round);
  return all;
}

// One head; all without gaps.
template <typename Round>
struct AttentionGrad {
  using Real = Round::Real;
  std::vector<Real> dq, dk, dv;
};
template <typename Round>
AttentionGrad<Round> AttentionGradOf(const std::vector<float>& q, const std::vector<float>& k,
                                     const std::vector<float>& v, const std::vector<float>& dout,
                                     size_t keys, size_t d) {
  using Real = Round::Real;
  const Round round;
  const auto dot = [d](const float* a, const float* b) {
    Real sum = 0;
    for (size_t i = 0; i < d; ++i) sum += Real{a[i]} * Real{b[i]};
    return sum;
  };
  AttentionGrad<Round> all = {{}, std::vector<Real>(keys * d), std::vector<Real>(keys * d)};
  std::vector<Real> p(keys), dp(keys), dq(d);
  for (size_t query = 0; query < q.size(); query += d) {
    Real most = -std::numeric_limits<Real>::infinity(), sum = 0, center = 0;
    for (size_t j = 0; j < keys; ++j) {
      p[j] = round(dot(&q[query], &k[j * d]));
      dp[j] = round(dot(&dout[query], &v[j * d]));
      most = std::max(most, p[j]);
    }
    for (Real& x : p) sum += x = std::exp2(x - most);
    for (size_t j = 0; j < keys; ++j) center += (p[j] = round(p[j] / sum)) * dp[j];
    std::fill(dq.begin(), dq.end(), Real{0});
    for (size_t j = 0; j < keys; ++j) {
      const Real ds = round(p[j] * (dp[j] - center) * std::numbers::ln2_v<Real>);
      for (size_t i = 0; i < d; ++i) {
        dq[i] += ds * Real{k[j * d + i]};
        all.dk[j * d + i] += ds * Real{q[query + i]};
        all.dv[j * d + i] += p[j] * Real{dout[query + i]};
      }
    }
    for (const Real x : dq) all.dq.push_back(round(x));
  }
  return all;
}

// --- The reference ---

// The derivative of sum(weights * f(x)) by x[i].
template <typename F>
double Difference(std::vector<float> x, size_t i, const std::vector<float>& weights, F f) {
  const auto value = [&](float xi) {
    x[i] = xi;
    const std::vector<double> out = f(x);
    double sum = 0;
    for (size_t j = 0; j < out.size(); ++j) sum += out[j] * weights[j];
    return sum;
  };
  const float at = x[i], below = at - 1.0f / 4096, above = at + 1.0f / 4096;
  const double high = value(above), low = value(below);
  return (high - low) / (static_cast<double>(above) - below);
}

TEST(TrainReferenceTest, LayerNormGradientsAreThoseOfFiniteDifferences) {
  constexpr size_t kC = 32;
  const auto in = Numbers(3 * kC, Values::kUnit, 1), gamma = Numbers(kC, Values::kUnit, 2),
             beta = Numbers(kC, Values::kUnit, 3), dy = Numbers(3 * kC, Values::kUnit, 4);
  const auto forward = [](const std::vector<float>& x, const std::vector<float>& g,
                          const std::vector<float>& b) {
    std::vector<double> out;
    for (size_t row = 0; row < x.size(); row += kC) {
      for (double y : LayerNormRow<double>(&x[row], g.data(), b.data(), 1e-6f, kC))
        out.push_back(y);
    }
    return out;
  };
  const auto grad = NormGradOf<Exact>(in, gamma, beta, 1e-6f, dy, nullptr, kC);
  for (size_t i = 0; i < in.size(); ++i) {
    EXPECT_NEAR(grad.dx[i], Difference(in, i, dy, [&](auto& x) { return forward(x, gamma, beta); }),
                1e-6);
  }
  for (size_t i = 0; i < kC; ++i) {
    EXPECT_NEAR(grad.dgamma[i],
                Difference(gamma, i, dy, [&](auto& x) { return forward(in, x, beta); }), 1e-6);
    EXPECT_NEAR(grad.dbeta[i],
                Difference(beta, i, dy, [&](auto& x) { return forward(in, gamma, x); }), 1e-6);
  }
}

TEST(TrainReferenceTest, DwconvGeluGradientsAreThoseOfFiniteDifferences) {
  constexpr int kHeight = 4, kWidth = 3;
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    const auto hidden = Numbers(kHeight * kWidth, Values::kUnit, 1),
               dout = Numbers(kHeight * kWidth, Values::kUnit, 2),
               weight = Numbers(9, Values::kUnit, 3), bias = Numbers(1, Values::kUnit, 4);
    const auto forward = [&](const std::vector<float>& x, const std::vector<float>& w,
                             const std::vector<float>& b) {
      std::vector<double> out;
      for (int y = 0; y < kHeight; ++y) {
        const auto row = [&](int i) {
          return i < 0 || i >= kHeight ? nullptr : &x[static_cast<size_t>(i * kWidth)];
        };
        for (double z : DwconvGeluRow<double>(row(y - 1), row(y), row(y + 1), w.data(), b.data(),
                                              kWidth, 1, gelu)) {
          out.push_back(z);
        }
      }
      return out;
    };
    const auto grad =
        DwconvGradOf<Exact>(hidden, dout, weight.data(), bias[0], 1, kHeight, kWidth, gelu);
    for (size_t i = 0; i < hidden.size(); ++i) {
      EXPECT_NEAR(grad.dhidden[i],
                  Difference(hidden, i, dout, [&](auto& x) { return forward(x, weight, bias); }),
                  1e-5);
    }
    for (size_t i = 0; i < 9; ++i) {
      EXPECT_NEAR(grad.dweight[i],
                  Difference(weight, i, dout, [&](auto& x) { return forward(hidden, x, bias); }),
                  1e-5);
    }
    EXPECT_NEAR(grad.dbias,
                Difference(bias, 0, dout, [&](auto& x) { return forward(hidden, weight, x); }),
                1e-5);
  }
}

TEST(TrainReferenceTest, PoolingGradientsAreThoseOfFiniteDifferences) {
  for (const auto& [height, width] : {std::pair{5, 9}, {2, 7}}) {
    const auto in = Numbers(height * width, Values::kUnit, 1), dout = Numbers(9, Values::kUnit, 2);
    const auto forward = [&](const std::vector<float>& x) {
      return PoolOf<Exact>(x, dout, height, width, 3, 1).out;
    };
    const auto dx = PoolOf<Exact>(in, dout, height, width, 3, 1).dx;
    for (size_t i = 0; i < in.size(); ++i)
      EXPECT_NEAR(dx[i], Difference(in, i, dout, forward), 1e-6);
  }
}

TEST(TrainReferenceTest, AttentionGradientsAreThoseOfFiniteDifferences) {
  constexpr size_t kKeys = 5, kD = 32, kQueries = 3;
  const auto q = Numbers(kQueries * kD, Values::kUnit, 1, 0.3f),
             k = Numbers(kKeys * kD, Values::kUnit, 2), v = Numbers(kKeys * kD, Values::kUnit, 3),
             dout = Numbers(kQueries * kD, Values::kUnit, 4);
  const auto forward = [&](const std::vector<float>& a, const std::vector<float>& b,
                           const std::vector<float>& c) {
    std::vector<double> out;
    for (size_t query = 0; query < a.size(); query += kD) {
      for (double z : AttentionRow<double>(&a[query], b.data(), c.data(), kD, kKeys, kD))
        out.push_back(z);
    }
    return out;
  };
  const auto grad = AttentionGradOf<Exact>(q, k, v, dout, kKeys, kD);
  for (size_t i = 0; i < q.size(); ++i) {
    EXPECT_NEAR(grad.dq[i], Difference(q, i, dout, [&](auto& x) { return forward(x, k, v); }),
                1e-5);
  }
  for (size_t i = 0; i < k.size(); ++i) {
    EXPECT_NEAR(grad.dk[i], Difference(k, i, dout, [&](auto& x) { return forward(q, x, v); }),
                1e-5);
    EXPECT_NEAR(grad.dv[i], Difference(v, i, dout, [&](auto& x) { return forward(q, k, x); }),
                1e-5);
  }
}

// --- The kernels ---

struct TestedSet {
  const TrainKernels* table;
  bool CpuFeatures::*needs;  // null: nothing
};
void PrintTo(const TestedSet& set, std::ostream* out) { *out << set.table->name; }

class TrainKernelsTest : public ::testing::TestWithParam<TestedSet> {
 protected:
  void SetUp() override {
    if (GetParam().needs != nullptr && !(DetectCpu().*GetParam().needs)) {
      GTEST_SKIP() << "this processor can't run " << GetParam().table->name;
    }
  }
  const TrainKernels& table() const { return *GetParam().table; }
  bool bf16() const { return table().activation_bytes == 2; }
  std::vector<float> StoredNumbers(int64_t count, Values values, uint64_t seed,
                                   float scale = 1.0f) const {
    return Stored(table(), Numbers(count, values, seed, scale));
  }
};

std::string Name(Values values) {
  switch (values) {
    case Values::kUnit:
      return " unit";
    case Values::kOffset:
      return " offset";
    case Values::kLarge:
      return " large";
    case Values::kDenormal:
      return " denormal";
  }
  return "";
}

// Linear

struct LinearRun {
  std::vector<float> dw, db;
};
LinearRun RunLinearGrad(const TrainKernels& table, const std::vector<float>& dy,
                        const std::vector<float>& x, int64_t m, int n, int k, float before = 0,
                        size_t offset = 0) {
  Activations dy_memory(table, dy, offset), x_memory(table, x, offset);
  Floats dw(int64_t{n} * k, before), db(n, before);
  table.linear_grad({dy_memory.get(), n, x_memory.get(), k, m, n, k, dw.get(), db.get()});
  EXPECT_TRUE(dy_memory.OnlyValidWritten() && x_memory.OnlyValidWritten() &&
              dw.buffer.OnlyValidWritten() && db.buffer.OnlyValidWritten());
  return {dw.numbers(), db.numbers()};
}

void CheckLinear(const TrainKernels& table, const LinearCase& shape, Values values, size_t offset) {
  const auto [m, n, k] = shape;
  const auto dy = Stored(table, Numbers(m * n, values, 1)),
             x = Stored(table, Numbers(m * k, values, 2));
  const LinearRun run = RunLinearGrad(table, dy, x, m, n, k, 0, offset);
  Comparison dw_error, db_error;
  std::vector<double> exact(static_cast<size_t>(k));
  std::vector<float> plain(static_cast<size_t>(k));
  for (const int64_t row : SampledRows(n)) {
    std::fill(exact.begin(), exact.end(), 0.0);
    std::fill(plain.begin(), plain.end(), 0.0f);
    double exact_sum = 0;
    float plain_sum = 0;
    for (int64_t r = 0; r < m; ++r) {
      const float y = dy[static_cast<size_t>(r * n + row)];
      const float* from = &x[static_cast<size_t>(r * k)];
      for (size_t i = 0; i < exact.size(); ++i) {
        exact[i] += double{y} * double{from[i]};
        plain[i] += y * from[i];
      }
      exact_sum += double{y};
      plain_sum += y;
    }
    for (size_t i = 0; i < exact.size(); ++i) {
      dw_error.Add(exact[i], plain[i], run.dw[static_cast<size_t>(row * k) + i]);
    }
    db_error.Add(exact_sum, plain_sum, run.db[static_cast<size_t>(row)]);
  }
  const std::string what = "m " + std::to_string(m) + " n " + std::to_string(n) + " k " +
                           std::to_string(k) + Name(values);
  dw_error.Check("dw " + what);
  db_error.Check("db " + what);
}

TEST_P(TrainKernelsTest, LinearGradientsAreAsExactAsThePlainOnes) {
  for (const LinearCase& shape : LinearCases()) {
    // The plain sums take most of the time: large shapes with fewer pictures' worth of rows.
    LinearCase small = shape;
    if (shape.m > 700) small.m = 700 + shape.m % 64;
    CheckLinear(table(), small, Values::kUnit, 0);
  }
  CheckLinear(table(), {4 * 3136, 64, 32}, Values::kUnit, 0);
  for (const Values values : kAllValues) {
    CheckLinear(table(), {517, 96, 64}, values, 0);
    CheckLinear(table(), {517, 320, 32}, values, 0);  // the narrow operand turned
    CheckLinear(table(), {33, 10, 40}, values, 3);
  }
}

TEST_P(TrainKernelsTest, LinearGradientsAreAddedAndBiasIsOptional) {
  const auto dy = StoredNumbers(70 * 320, Values::kUnit, 1),
             x = StoredNumbers(70 * 32, Values::kUnit, 2);
  for (const int n : {320, 32, 10}) {
    const std::vector<float> part(dy.begin(), dy.begin() + 70 * n);
    const LinearRun from_zero = RunLinearGrad(table(), part, x, 70, n, 32);
    const LinearRun from_two = RunLinearGrad(table(), part, x, 70, n, 32, 2.0f);
    for (size_t i = 0; i < from_zero.dw.size(); ++i)
      ASSERT_NEAR(from_two.dw[i], from_zero.dw[i] + 2, 2e-5);
    for (size_t i = 0; i < from_zero.db.size(); ++i)
      ASSERT_NEAR(from_two.db[i], from_zero.db[i] + 2, 2e-5);

    Activations dy_memory(table(), part), x_memory(table(), x);
    Floats dw(int64_t{n} * 32);
    table().linear_grad({dy_memory.get(), n, x_memory.get(), 32, 70, n, 32, dw.get(), nullptr});
    EXPECT_EQ(dw.numbers(), from_zero.dw);
  }
}

TEST_P(TrainKernelsTest, LinearGradientsReadRowsByTheirStrides) {
  constexpr int kM = 45, kN = 32, kK = 32;
  const auto wide_dy = StoredNumbers(kM * 96, Values::kUnit, 1),
             wide_x = StoredNumbers(kM * 64, Values::kUnit, 2);
  std::vector<float> dy, x;
  for (int r = 0; r < kM; ++r) {
    dy.insert(dy.end(), wide_dy.begin() + r * 96 + 32, wide_dy.begin() + r * 96 + 64);
    x.insert(x.end(), wide_x.begin() + r * 64 + 32, wide_x.begin() + r * 64 + 64);
  }
  Activations dy_memory(table(), wide_dy), x_memory(table(), wide_x);
  Floats dw(kN * kK), db(kN);
  table().linear_grad({dy_memory.at(32), 96, x_memory.at(32), 64, kM, kN, kK, dw.get(), db.get()});
  const LinearRun dense = RunLinearGrad(table(), dy, x, kM, kN, kK);
  EXPECT_EQ(dw.numbers(), dense.dw);
  EXPECT_EQ(db.numbers(), dense.db);
}

TEST_P(TrainKernelsTest, TheSameCallGivesTheSameBits) {
  const auto dy = StoredNumbers(1100 * 64, Values::kUnit, 1),
             x = StoredNumbers(1100 * 96, Values::kUnit, 2);
  const LinearRun first = RunLinearGrad(table(), dy, x, 1100, 64, 96);
  const LinearRun second = RunLinearGrad(table(), dy, x, 1100, 64, 96, 0, 5);
  EXPECT_EQ(first.dw, second.dw);
  EXPECT_EQ(first.db, second.db);
}

// Layer norm

struct NormRun {
  std::vector<float> out, dx, dgamma, dbeta;
};
// The rows in calls of at most `at_once`.
NormRun RunNorm(const TrainKernels& table, const std::vector<float>& in,
                const std::vector<float>& gamma, const std::vector<float>& beta, float eps,
                const std::vector<float>& dy, const std::vector<float>* add, int c, int64_t at_once,
                size_t offset = 0) {
  const int64_t rows = static_cast<int64_t>(in.size()) / c;
  Activations in_memory(table, in, offset), dy_memory(table, dy, offset),
      out(table, rows * c, offset), dx(table, rows * c, offset);
  Activations add_memory(table, add == nullptr ? std::vector<float>() : *add, offset);
  Floats g(gamma), b(beta), dgamma(c), dbeta(c), mean(rows), inverse(rows);
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t count = std::min(at_once, rows - row);
    const size_t at = static_cast<size_t>(row * c);
    table.layer_norm({in_memory.at(at), out.at(at), g.get(), b.get(), eps, count, c,
                      mean.get() + row, inverse.get() + row});
    table.layer_norm_grad({dy_memory.at(at), in_memory.at(at), g.get(), mean.get() + row,
                           inverse.get() + row, add == nullptr ? nullptr : add_memory.at(at),
                           dx.at(at), count, c, dgamma.get(), dbeta.get()});
  }
  EXPECT_TRUE(out.OnlyValidWritten() && dx.OnlyValidWritten() && mean.buffer.OnlyValidWritten() &&
              inverse.buffer.OnlyValidWritten() && dgamma.buffer.OnlyValidWritten() &&
              dbeta.buffer.OnlyValidWritten());
  return {out.numbers(), dx.numbers(), dgamma.numbers(), dbeta.numbers()};
}

template <typename Plain>
void CompareNorm(const NormRun& run, const NormGrad<Exact>& exact, const NormGrad<Plain>& plain,
                 const std::string& what) {
  Comparison out, dx, dgamma, dbeta;
  for (size_t i = 0; i < run.dx.size(); ++i) {
    out.Add(exact.out[i], plain.out[i], run.out[i]);
    dx.Add(exact.dx[i], plain.dx[i], run.dx[i]);
  }
  for (size_t i = 0; i < run.dgamma.size(); ++i) {
    dgamma.Add(exact.dgamma[i], plain.dgamma[i], run.dgamma[i]);
    dbeta.Add(exact.dbeta[i], plain.dbeta[i], run.dbeta[i]);
  }
  out.Check("out " + what);
  dx.Check("dx " + what);
  dgamma.Check("dgamma " + what);
  dbeta.Check("dbeta " + what);
}

void CheckNorm(const TrainKernels& table, int64_t rows, int c, Values values, float eps,
               bool with_add, size_t offset) {
  const auto in = Stored(table, Numbers(rows * c, values, 1)),
             dy = Stored(table,
                         Numbers(rows * c, values == Values::kLarge ? Values::kUnit : values, 2)),
             add = Stored(table, Numbers(rows * c, Values::kUnit, 3));
  const auto gamma = Numbers(c, Values::kUnit, 4), beta = Numbers(c, Values::kUnit, 5);
  const auto* more = with_add ? &add : nullptr;
  const NormRun run = RunNorm(table, in, gamma, beta, eps, dy, more, c, rows, offset);
  const size_t channels = static_cast<size_t>(c);
  const auto exact = NormGradOf<Exact>(in, gamma, beta, eps, dy, more, channels);
  const std::string what = std::to_string(rows) + " rows of " + std::to_string(c) + Name(values);
  if (table.activation_bytes == 2) {
    CompareNorm(run, exact, NormGradOf<PlainBf16>(in, gamma, beta, eps, dy, more, channels), what);
  } else {
    CompareNorm(run, exact, NormGradOf<PlainF32>(in, gamma, beta, eps, dy, more, channels), what);
  }
}

TEST_P(TrainKernelsTest, LayerNormAndItsGradientsAreAsExactAsThePlainOnes) {
  for (const LayerNormCase& shape : LayerNormCases())
    CheckNorm(table(), shape.rows, shape.c, Values::kUnit, 1e-6f, true, 0);
  for (const Values values : kAllValues) {
    for (const float eps : {1e-5f, 1e-6f}) {
      CheckNorm(table(), 37, 64, values, eps, true, 0);
      CheckNorm(table(), 37, 96, values, eps, false, 3);
    }
  }
}

TEST_P(TrainKernelsTest, LayerNormRowsDontDependOnTheirNeighbours) {
  constexpr int kC = 96;
  const auto in = StoredNumbers(61 * kC, Values::kUnit, 1),
             dy = StoredNumbers(61 * kC, Values::kUnit, 2),
             add = StoredNumbers(61 * kC, Values::kUnit, 3);
  const auto gamma = Numbers(kC, Values::kUnit, 4), beta = Numbers(kC, Values::kUnit, 5);
  const NormRun whole = RunNorm(table(), in, gamma, beta, 1e-6f, dy, &add, kC, 61);
  for (const int64_t at_once : {1, 5, 16, 19}) {
    const NormRun split = RunNorm(table(), in, gamma, beta, 1e-6f, dy, &add, kC, at_once);
    EXPECT_EQ(split.out, whole.out);
    EXPECT_EQ(split.dx, whole.dx);
  }
}

TEST_P(TrainKernelsTest, LayerNormGradientMayBeWrittenOverItsOperands) {
  constexpr int kC = 64;
  constexpr int64_t kRows = 21;
  const auto in = StoredNumbers(kRows * kC, Values::kUnit, 1),
             dy = StoredNumbers(kRows * kC, Values::kUnit, 2),
             add = StoredNumbers(kRows * kC, Values::kUnit, 3);
  const auto gamma = Numbers(kC, Values::kUnit, 4), beta = Numbers(kC, Values::kUnit, 5);
  const NormRun apart = RunNorm(table(), in, gamma, beta, 1e-6f, dy, &add, kC, kRows);
  Activations in_memory(table(), in), out(table(), kRows * kC);
  Floats g(gamma), b(beta), mean(kRows), inverse(kRows);
  table().layer_norm(
      {in_memory.get(), out.get(), g.get(), b.get(), 1e-6f, kRows, kC, mean.get(), inverse.get()});
  for (const bool over_dy : {true, false}) {
    Activations dy_memory(table(), dy), add_memory(table(), add);
    Floats dgamma(kC), dbeta(kC);
    Activations& dx = over_dy ? dy_memory : add_memory;
    table().layer_norm_grad({dy_memory.get(), in_memory.get(), g.get(), mean.get(), inverse.get(),
                             add_memory.get(), dx.get(), kRows, kC, dgamma.get(), dbeta.get()});
    EXPECT_EQ(dx.numbers(), apart.dx);
  }
}

// Depthwise convolution and GELU

struct DwconvRun {
  std::vector<float> dhidden, dweight, dbias, gelu;
};
// The channels in calls of at most `at_once`; `before`: what the gradients of parameters start
// with. Without `again` GELU's result isn't asked for.
DwconvRun RunDwconv(const TrainKernels& table, const std::vector<float>& hidden,
                    const std::vector<float>& dout, const std::vector<float>& weight,
                    const std::vector<float>& bias, int n, int height, int width, Gelu gelu,
                    int at_once, float before = 0, size_t offset = 0, bool relu = false,
                    bool again = true) {
  const int c = static_cast<int>(bias.size());
  Activations hidden_memory(table, hidden, offset), dout_memory(table, dout, offset),
      dhidden(table, static_cast<int64_t>(hidden.size()), offset),
      gelu_out(table, static_cast<int64_t>(hidden.size()), offset);
  Floats w(weight), b(bias), dweight(9 * c, before), dbias(c, before),
      scratch(static_cast<int64_t>(table.dwconv_grad_scratch_floats(width, c)), 1e30f);
  for (int channel = 0; channel < c; channel += at_once) {
    table.dwconv_gelu_grad({hidden_memory.get(), dout_memory.get(), w.get(), b.get(), dhidden.get(),
                            dweight.get(), dbias.get(), scratch.get(), n, height, width, channel,
                            std::min(channel + at_once, c), c, gelu, relu,
                            again ? gelu_out.get() : nullptr});
  }
  EXPECT_TRUE(dhidden.OnlyValidWritten() && gelu_out.OnlyValidWritten() &&
              dweight.buffer.OnlyValidWritten() && dbias.buffer.OnlyValidWritten() &&
              scratch.buffer.OnlyValidWritten());
  return {dhidden.numbers(), dweight.numbers(), dbias.numbers(), gelu_out.numbers()};
}

void CheckDwconv(const TrainKernels& table, int n, int height, int width, int c, Gelu gelu,
                 Values values, size_t offset, bool relu = false) {
  const int64_t pixels = int64_t{n} * height * width;
  auto hidden = Stored(table, Numbers(pixels * c, values, 1));
  if (relu) {
    for (float& x : hidden) x = std::max(x, 0.0f);
  }
  const auto dout = Stored(table, Numbers(pixels * c, Values::kUnit, 2));
  const auto weight = Numbers(9 * c, Values::kUnit, 3, 0.4f), bias = Numbers(c, Values::kUnit, 4);
  const DwconvRun run =
      RunDwconv(table, hidden, dout, weight, bias, n, height, width, gelu, c, 0, offset, relu);
  Comparison dhidden, dweight, dbias, gelu_again;
  for (int sample = 0; sample < 6; ++sample) {
    const int channel = sample * (c - 1) / 5;
    std::vector<float> h, d, w;
    for (int64_t i = 0; i < pixels; ++i) {
      h.push_back(hidden[static_cast<size_t>(i * c + channel)]);
      d.push_back(dout[static_cast<size_t>(i * c + channel)]);
    }
    for (int tap = 0; tap < 9; ++tap) w.push_back(weight[static_cast<size_t>(tap * c + channel)]);
    const float b = bias[static_cast<size_t>(channel)];
    const auto exact = DwconvGradOf<Exact>(h, d, w.data(), b, n, height, width, gelu);
    const auto compare = [&](const auto& plain) {
      for (int64_t i = 0; i < pixels; ++i) {
        gelu_again.Add(exact.gelu[static_cast<size_t>(i)], plain.gelu[static_cast<size_t>(i)],
                       run.gelu[static_cast<size_t>(i * c + channel)]);
        if (relu && h[static_cast<size_t>(i)] == 0) {
          ASSERT_EQ(run.dhidden[static_cast<size_t>(i * c + channel)], 0);
          continue;
        }
        dhidden.Add(exact.dhidden[static_cast<size_t>(i)], plain.dhidden[static_cast<size_t>(i)],
                    run.dhidden[static_cast<size_t>(i * c + channel)]);
      }
      for (int tap = 0; tap < 9; ++tap)
        dweight.Add(exact.dweight[tap], plain.dweight[tap],
                    run.dweight[static_cast<size_t>(tap * c + channel)]);
      dbias.Add(exact.dbias, plain.dbias, run.dbias[static_cast<size_t>(channel)]);
    };
    if (table.activation_bytes == 2) {
      compare(DwconvGradOf<PlainBf16>(h, d, w.data(), b, n, height, width, gelu));
    } else {
      compare(DwconvGradOf<PlainF32>(h, d, w.data(), b, n, height, width, gelu));
    }
  }
  const std::string what = std::to_string(n) + " maps " + std::to_string(height) + "x" +
                           std::to_string(width) + " of " + std::to_string(c) +
                           (gelu == Gelu::kErf ? " erf" : " tanh") + (relu ? " relu" : "") +
                           Name(values);
  dhidden.Check("dhidden " + what);
  dweight.Check("dweight " + what);
  dbias.Check("dbias " + what);
  gelu_again.Check("GELU again " + what);
}

TEST_P(TrainKernelsTest, DwconvGeluGradientsAreAsExactAsThePlainOnes) {
  int number = 0;
  for (const DwconvCase& shape : DwconvCases()) {
    CheckDwconv(table(), 1, shape.height, shape.width, shape.c,
                ++number % 2 ? Gelu::kErf : Gelu::kTanh, Values::kUnit, 0);
  }
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    for (const auto& [height, width] : {std::pair{7, 9}, {1, 1}, {2, 2}, {57, 29}}) {
      for (const int n : {1, 2, 3, 4})
        CheckDwconv(table(), n, height, width, 64, gelu, Values::kUnit, 0);
    }
    for (const Values values : kAllValues) CheckDwconv(table(), 2, 7, 9, 32, gelu, values, 3);
  }
}

TEST_P(TrainKernelsTest, BehindAReluNothingPassesWhereItGaveZero) {
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    for (const auto& [height, width] : {std::pair{7, 9}, {1, 1}, {2, 2}, {1, 37}, {57, 29}})
      CheckDwconv(table(), 3, height, width, 64, gelu, Values::kUnit, 0, true);
    for (const Values values : kAllValues) CheckDwconv(table(), 2, 7, 9, 32, gelu, values, 3, true);
  }
}

TEST_P(TrainKernelsTest, DwconvGeluGradientsDontDependOnHowChannelsAreShared) {
  constexpr int kN = 2, kHeight = 5, kWidth = 6, kC = 160;
  const auto hidden = StoredNumbers(kN * kHeight * kWidth * kC, Values::kUnit, 1),
             dout = StoredNumbers(kN * kHeight * kWidth * kC, Values::kUnit, 2);
  const auto weight = Numbers(9 * kC, Values::kUnit, 3), bias = Numbers(kC, Values::kUnit, 4);
  const DwconvRun whole =
      RunDwconv(table(), hidden, dout, weight, bias, kN, kHeight, kWidth, Gelu::kErf, kC);
  const DwconvRun shared =
      RunDwconv(table(), hidden, dout, weight, bias, kN, kHeight, kWidth, Gelu::kErf, 32);
  EXPECT_EQ(shared.dhidden, whole.dhidden);
  EXPECT_EQ(shared.dweight, whole.dweight);
  EXPECT_EQ(shared.dbias, whole.dbias);
  EXPECT_EQ(shared.gelu, whole.gelu);
  const DwconvRun without = RunDwconv(table(), hidden, dout, weight, bias, kN, kHeight, kWidth,
                                      Gelu::kErf, kC, 0, 0, false, /*again=*/false);
  EXPECT_EQ(without.dhidden, whole.dhidden);
  EXPECT_EQ(without.dweight, whole.dweight);
  const DwconvRun added =
      RunDwconv(table(), hidden, dout, weight, bias, kN, kHeight, kWidth, Gelu::kErf, kC, 2.0f);
  for (size_t i = 0; i < whole.dweight.size(); ++i)
    ASSERT_NEAR(added.dweight[i], whole.dweight[i] + 2, 1e-5);
  for (size_t i = 0; i < whole.dbias.size(); ++i)
    ASSERT_NEAR(added.dbias[i], whole.dbias[i] + 2, 1e-5);
}

TEST_P(TrainKernelsTest, GeluSlopesOfSaturatedValuesAreZeroAndOne) {
  // One pixel, so that dhidden is dout * slope * the middle tap.
  constexpr int kC = 32;
  std::vector<float> weight(9 * kC, 0.0f), hidden(kC), dout(kC, 1.0f);
  std::fill(weight.begin() + 4 * kC, weight.begin() + 5 * kC, 1.0f);
  const std::vector<float> bias(kC, 0.0f);
  for (int i = 0; i < kC; ++i)
    hidden[static_cast<size_t>(i)] = (i % 2 ? 1.0f : -1.0f) * std::ldexp(1.0f, 3 + 4 * (i / 2));
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    const DwconvRun run = RunDwconv(table(), hidden, dout, weight, bias, 1, 1, 1, gelu, kC);
    for (int i = 0; i < kC; ++i)
      ASSERT_NEAR(run.dhidden[static_cast<size_t>(i)], i % 2, 1.5e-7)
          << hidden[static_cast<size_t>(i)];
  }
}

// GELU by itself

template <typename Round>
std::vector<typename Round::Real> GeluOfEach(const std::vector<float>& in, Gelu gelu) {
  std::vector<typename Round::Real> out;
  for (const float x : in)
    out.push_back(Round()(GeluOf<typename Round::Real>(typename Round::Real{x}, gelu)));
  return out;
}
template <typename Round>
std::vector<typename Round::Real> GeluGradOfEach(const std::vector<float>& in,
                                                 const std::vector<float>& dout, Gelu gelu) {
  using Real = Round::Real;
  std::vector<Real> dx;
  for (size_t i = 0; i < in.size(); ++i)
    dx.push_back(Round()(Real{dout[i]} * GeluSlopeOf<Real>(Real{in[i]}, gelu)));
  return dx;
}

TEST_P(TrainKernelsTest, GeluAndItsGradientAreAsExactAsThePlainOnes) {
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    for (const Values values : kAllValues) {
      for (const int64_t n : {32, 49 * 64}) {
        for (const size_t offset : {0, 3}) {
          const auto in = StoredNumbers(n, values, 1, 2.0f),
                     dout = StoredNumbers(n, Values::kUnit, 2);
          Activations in_memory(table(), in, offset), dout_memory(table(), dout, offset),
              out(table(), n, offset), dx(table(), n, offset);
          table().gelu({in_memory.get(), out.get(), n, gelu});
          table().gelu_grad({in_memory.get(), dout_memory.get(), dx.get(), n, gelu});
          EXPECT_TRUE(out.OnlyValidWritten() && dx.OnlyValidWritten());
          Comparison out_error, dx_error;
          const auto compare = [&](auto round) {
            using Round = decltype(round);
            const auto exact = GeluOfEach<Exact>(in, gelu),
                       exact_dx = GeluGradOfEach<Exact>(in, dout, gelu);
            const auto plain = GeluOfEach<Round>(in, gelu),
                       plain_dx = GeluGradOfEach<Round>(in, dout, gelu);
            const auto ours = out.numbers(), our_dx = dx.numbers();
            for (size_t i = 0; i < in.size(); ++i) {
              out_error.Add(exact[i], plain[i], ours[i]);
              dx_error.Add(exact_dx[i], plain_dx[i], our_dx[i]);
            }
          };
          bf16() ? compare(PlainBf16()) : compare(PlainF32());
          const std::string what =
              std::to_string(n) + (gelu == Gelu::kErf ? " erf" : " tanh") + Name(values);
          out_error.Check("gelu " + what);
          dx_error.Check("gelu grad " + what);

          const auto apart = out.numbers(), apart_dx = dx.numbers();
          table().gelu_grad({in_memory.get(), dout_memory.get(), dout_memory.get(), n, gelu});
          table().gelu({in_memory.get(), in_memory.get(), n, gelu});
          EXPECT_EQ(dout_memory.numbers(), apart_dx) << "written over dout";
          EXPECT_EQ(in_memory.numbers(), apart) << "written over its input";
        }
      }
    }
  }
}

// Pooling

void CheckPool(const TrainKernels& table, int height, int width, int cells, int c, Values values,
               size_t offset) {
  const auto in = Stored(table, Numbers(int64_t{height} * width * c, values, 1));
  const auto dout = Numbers(cells * cells * c, values, 2);
  Activations in_memory(table, in, offset), out(table, cells * cells * c, offset),
      dx(table, int64_t{height} * width * c, offset);
  Floats dout_memory(dout);
  table.pool({in_memory.get(), out.get(), height, width, cells, c});
  table.pool_grad({dout_memory.get(), dx.get(), height, width, cells, c});
  EXPECT_TRUE(out.OnlyValidWritten() && dx.OnlyValidWritten());
  const auto ours = out.numbers(), our_dx = dx.numbers();
  Comparison out_error, dx_error;
  const auto compare = [&](auto round) {
    const auto exact = PoolOf<Exact>(in, dout, height, width, cells, c);
    const auto plain = PoolOf<decltype(round)>(in, dout, height, width, cells, c);
    for (size_t i = 0; i < ours.size(); ++i) out_error.Add(exact.out[i], plain.out[i], ours[i]);
    for (size_t i = 0; i < our_dx.size(); ++i) dx_error.Add(exact.dx[i], plain.dx[i], our_dx[i]);
  };
  table.activation_bytes == 2 ? compare(PlainBf16()) : compare(PlainF32());
  const std::string what = std::to_string(height) + "x" + std::to_string(width) + " to " +
                           std::to_string(cells) + " of " + std::to_string(c) + Name(values);
  out_error.Check("pooled " + what);
  dx_error.Check("pooling gradient " + what);
}

TEST_P(TrainKernelsTest, PoolingAndItsGradientAreAsExactAsThePlainOnes) {
  for (const StageShape& s : kStages) CheckPool(table(), s.side, s.side, 7, s.c, Values::kUnit, 0);
  for (const MapSize& map : kOddMaps)
    CheckPool(table(), map.height, map.width, 7, 96, Values::kUnit, 0);
  for (int side = 1; side <= 15; ++side)
    CheckPool(table(), side, 16 - side, 7, 32, Values::kUnit, 0);
  for (const Values values : kAllValues) CheckPool(table(), 15, 20, 7, 64, values, 3);
}

// Attention

struct AttentionRun {
  std::vector<float> dq, dk, dv;
};
// Two heads beside each other in memory, of which the second is computed; queries in calls of at
// most `at_once`.
AttentionRun RunAttention(const TrainKernels& table, const std::vector<float>& q,
                          const std::vector<float>& k, const std::vector<float>& v,
                          const std::vector<float>& dout, int keys, int d, int64_t at_once,
                          float before = 0, size_t offset = 0) {
  const int64_t queries = static_cast<int64_t>(q.size()) / d, ld = 2 * d, ld_kv = 4 * d;
  const auto spread = [&](const std::vector<float>& from, int64_t stride) {
    std::vector<float> to(from.size() / static_cast<size_t>(d) * static_cast<size_t>(stride),
                          std::numeric_limits<float>::quiet_NaN());
    for (size_t i = 0; i < from.size(); ++i)
      to[i / static_cast<size_t>(d) * static_cast<size_t>(stride) + i % static_cast<size_t>(d) +
         static_cast<size_t>(d)] = from[i];
    return to;
  };
  std::vector<float> no_out(static_cast<size_t>(queries * ld),
                            0.0f);  // computed anew by the kernels
  Activations q_memory(table, spread(q, ld), offset), k_memory(table, spread(k, ld_kv), offset),
      v_memory(table, spread(v, ld_kv), offset), dout_memory(table, spread(dout, ld), offset),
      out_memory(table, no_out, offset), dq(table, queries * ld, offset);
  Floats dk(int64_t{keys} * d, before), dv(int64_t{keys} * d, before),
      scratch(static_cast<int64_t>(table.attention_grad_scratch_floats(keys, d)), 1e30f);
  for (int64_t query = 0; query < queries; query += at_once) {
    const size_t at = static_cast<size_t>(query * ld + d), key = static_cast<size_t>(d);
    table.attention_grad({q_memory.at(at), k_memory.at(key), v_memory.at(key), out_memory.at(at),
                          dout_memory.at(at), ld, ld_kv, dq.at(at), dk.get(), dv.get(),
                          scratch.get(), std::min(at_once, queries - query), keys, d});
  }
  EXPECT_TRUE(dq.OnlyValidWritten() && dk.buffer.OnlyValidWritten() &&
              dv.buffer.OnlyValidWritten() && scratch.buffer.OnlyValidWritten());
  AttentionRun run = {{}, dk.numbers(), dv.numbers()};
  const std::vector<float> all = dq.numbers();
  for (int64_t query = 0; query < queries; ++query) {
    for (int64_t i = 0; i < ld; ++i) {
      const float x = all[static_cast<size_t>(query * ld + i)];
      if (i >= d) {
        run.dq.push_back(x);
      } else if (!std::isnan(x)) {
        ADD_FAILURE() << "written into the other head's columns";
        return run;
      }
    }
  }
  return run;
}

void CheckAttention(const TrainKernels& table, const AttentionCase& shape, Values values,
                    size_t offset) {
  const auto [queries, keys, d] = shape;
  const auto q = Stored(table, Numbers(queries * d, values, 1, 0.25f)),
             k = Stored(table, Numbers(int64_t{keys} * d, values, 2)),
             v = Stored(table, Numbers(int64_t{keys} * d, Values::kUnit, 3)),
             dout = Stored(table, Numbers(queries * d, Values::kUnit, 4));
  const AttentionRun run = RunAttention(table, q, k, v, dout, keys, d, queries, 0, offset);
  const size_t key_count = static_cast<size_t>(keys), size = static_cast<size_t>(d);
  const auto exact = AttentionGradOf<Exact>(q, k, v, dout, key_count, size);
  Comparison dq, dk, dv;
  const auto compare = [&](const auto& plain) {
    for (size_t i = 0; i < run.dq.size(); ++i) dq.Add(exact.dq[i], plain.dq[i], run.dq[i]);
    for (size_t i = 0; i < run.dk.size(); ++i) {
      dk.Add(exact.dk[i], plain.dk[i], run.dk[i]);
      dv.Add(exact.dv[i], plain.dv[i], run.dv[i]);
    }
  };
  if (table.activation_bytes == 2) {
    compare(AttentionGradOf<PlainBf16>(q, k, v, dout, key_count, size));
  } else {
    compare(AttentionGradOf<PlainF32>(q, k, v, dout, key_count, size));
  }
  // Scores reach 8, where the last place is worth this: with few numbers the plain computation may
  // be right by chance.
  constexpr double kScoreUnit = 4.8e-7;
  const std::string what = std::to_string(queries) + " queries " + std::to_string(keys) +
                           " keys of " + std::to_string(d) + Name(values);
  if (keys > 1) {
    dq.Check("dq " + what, kScoreUnit);
    dk.Check("dk " + what, kScoreUnit);
  } else {  // the probability is 1 whatever the score
    EXPECT_THAT(run.dq, Each(FloatNear(0, 5e-6f)));
    EXPECT_THAT(run.dk, Each(FloatNear(0, 5e-6f)));
  }
  dv.Check("dv " + what, kScoreUnit);
}

TEST_P(TrainKernelsTest, AttentionGradientsAreAsExactAsThePlainOnes) {
  for (const AttentionCase& shape : AttentionCases()) {
    if (shape.queries > 200 && shape.keys > 64) continue;  // a second each, and nothing new
    if (shape.queries > 1000 && shape.d > 32) continue;
    CheckAttention(table(), shape, Values::kUnit, 0);
  }
  for (const int d : {32, 64}) {
    for (const Values values : {Values::kUnit, Values::kOffset, Values::kDenormal}) {
      for (const int keys : {50, 256}) CheckAttention(table(), {45, keys, d}, values, 3);
    }
  }
}

TEST_P(TrainKernelsTest, AttentionGradientsOfASingleQueryDontDependOnTheOthers) {
  constexpr int kKeys = 49, kD = 64;
  const auto q = StoredNumbers(150 * kD, Values::kUnit, 1, 0.25f),
             k = StoredNumbers(kKeys * kD, Values::kUnit, 2),
             v = StoredNumbers(kKeys * kD, Values::kUnit, 3),
             dout = StoredNumbers(150 * kD, Values::kUnit, 4);
  const AttentionRun whole = RunAttention(table(), q, k, v, dout, kKeys, kD, 150);
  for (const int64_t at_once : {1, 7, 32, 70}) {
    const AttentionRun split = RunAttention(table(), q, k, v, dout, kKeys, kD, at_once);
    EXPECT_EQ(split.dq, whole.dq) << at_once;
    for (size_t i = 0; i < whole.dk.size(); ++i) ASSERT_NEAR(split.dk[i], whole.dk[i], 1e-4);
  }
  const AttentionRun added = RunAttention(table(), q, k, v, dout, kKeys, kD, 150, 2.0f);
  for (size_t i = 0; i < whole.dk.size(); ++i) {
    ASSERT_NEAR(added.dk[i], whole.dk[i] + 2, 1e-4);
    ASSERT_NEAR(added.dv[i], whole.dv[i] + 2, 1e-4);
  }
}

TEST_P(TrainKernelsTest, AttentionGradientsOfExtremeScoresAreFinite) {
  constexpr int kKeys = 50, kD = 32, kQueries = 20;
  const auto v = StoredNumbers(kKeys * kD, Values::kUnit, 3),
             dout = StoredNumbers(kQueries * kD, Values::kUnit, 4);
  // Near 65504² a score's last bit is worth hundreds: which key wins is chance, but one does.
  const AttentionRun large =
      RunAttention(table(), StoredNumbers(kQueries * kD, Values::kLarge, 1),
                   StoredNumbers(kKeys * kD, Values::kLarge, 2), v, dout, kKeys, kD, kQueries);
  for (const auto* numbers : {&large.dq, &large.dk, &large.dv}) {
    for (const float x : *numbers) ASSERT_TRUE(std::isfinite(x));
  }
  // Every score minus infinity: no key has a part.
  const AttentionRun none = RunAttention(
      table(), Stored(table(), std::vector<float>(kQueries * kD, -1e30f)),
      Stored(table(), std::vector<float>(kKeys * kD, 1e30f)), v, dout, kKeys, kD, kQueries);
  EXPECT_THAT(none.dq, Each(0.0f));
  EXPECT_THAT(none.dk, Each(0.0f));
  EXPECT_THAT(none.dv, Each(0.0f));
}

// Elementwise

double UnitAt(double x) {  // of f32's last place
  const float at = std::abs(static_cast<float>(x));
  return std::max(double{std::nextafter(at, std::numeric_limits<float>::infinity())} - at, 1e-45);
}

TEST_P(TrainKernelsTest, AdamWIsPyTorchsToTheLastPlaces) {
  constexpr double kLr = 1e-3, kDecay = 0.05, kBeta1 = 0.9, kBeta2 = 0.999, kEps = 1e-8;
  for (const int64_t n : {1, 3, 16, 33, 1000}) {
    for (const float grad_scale : {1.0f, 0.25f}) {
      Floats p(Numbers(n, Values::kUnit, 1)), m(Numbers(n, Values::kUnit, 2, 0.1f)),
          v(std::vector<float>(static_cast<size_t>(n), 0.0f));
      for (int step = 1; step <= 3; ++step) {
        const auto g = Numbers(n, Values::kUnit, static_cast<uint64_t>(10 + step));
        Floats grad(g);
        const auto p0 = p.numbers(), m0 = m.numbers(), v0 = v.numbers();
        const double bias1 = 1 - std::pow(kBeta1, step), bias2 = 1 - std::pow(kBeta2, step);
        table().adamw({p.get(), m.get(), v.get(), grad.get(), n, grad_scale, kLr, kDecay, kBeta1,
                       kBeta2, kEps, bias1, bias2});
        const auto p1 = p.numbers(), m1 = m.numbers(), v1 = v.numbers();
        for (size_t i = 0; i < p0.size(); ++i) {
          const double gi = double{g[i]} * grad_scale;
          const double mi = kBeta1 * m0[i] + (1 - kBeta1) * gi,
                       vi = kBeta2 * v0[i] + (1 - kBeta2) * gi * gi;
          // Of the new moments as they are stored: a moment that cancels has lost places before.
          const double pi =
              p0[i] * (1 - kLr * kDecay) - kLr / bias1 * m1[i] / (std::sqrt(v1[i] / bias2) + kEps);
          // Half a unit each: 0.1f, the difference, the product and the sum, if not fused.
          ASSERT_NEAR(
              m1[i], mi,
              2.5 * UnitAt(std::max({std::abs(double{m0[i]}), std::abs(mi), 0.1 * std::abs(gi)})));
          ASSERT_NEAR(v1[i], vi, 2 * UnitAt(vi));
          // The seven roundings of the update, and those of what it is taken from.
          ASSERT_NEAR(p1[i], pi,
                      2 * UnitAt(std::max(std::abs(double{p0[i]}), std::abs(pi))) +
                          3.5 * UnitAt(pi - p0[i] * (1 - kLr * kDecay)));
        }
      }
      EXPECT_TRUE(p.buffer.OnlyValidWritten() && m.buffer.OnlyValidWritten() &&
                  v.buffer.OnlyValidWritten());
    }
  }
}

TEST_P(TrainKernelsTest, AddScaledIsRoundedOnce) {
  for (const int64_t n : {1, 31, 32, 33, 64, 1000}) {
    for (const Values values : kAllValues) {
      const auto a = StoredNumbers(n, values, 1), b = StoredNumbers(n, values, 2);
      Activations a_memory(table(), a, 1), b_memory(table(), b, 1), out(table(), n, 1);
      table().add_scaled(a_memory.get(), b_memory.get(), 1.25f, out.get(), n);
      const auto sums = out.numbers();
      for (size_t i = 0; i < a.size(); ++i) {
        const double exact = double{a[i]} + 1.25 * double{b[i]};
        // bf16: half a unit of its last place, beside f32's rounding of a product that was not
        // fused.
        const double unit = UnitAt(std::max(std::abs(exact), std::abs(1.25 * double{b[i]})));
        // Denormal results may be zero.
        ASSERT_NEAR(sums[i], exact,
                    (bf16() ? std::ldexp(UnitAt(exact), 15) * 1.01 + unit : unit) + 2e-38)
            << n;
      }
      EXPECT_TRUE(out.OnlyValidWritten());
      table().add_scaled(a_memory.get(), b_memory.get(), 1.25f, a_memory.get(), n);
      EXPECT_THAT(a_memory.numbers(), ElementsAreArray(sums));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sets, TrainKernelsTest,
                         ::testing::Values(
#if defined(__x86_64__)
                             TestedSet{&kAmxTrainKernels, &CpuFeatures::amx_bf16},
                             TestedSet{&kAvx512TrainKernels, &CpuFeatures::avx512},
                             TestedSet{&kAvx2TrainKernels, &CpuFeatures::avx2},
#endif
                             TestedSet{&kPortableTrainKernels, nullptr}),
                         [](const auto& param) {
                           std::string name = param.param.table->name;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace pyramid::kernels
