// The f32 sets against the double reference, for all shapes of the case table. Buffers end before
// guard pages (reference.h), and nothing outside the valid elements may change.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "model/kernels/cpu_kernels.h"
#include "model/kernels/kernel_table.h"
#include "tests/model/kernels/case_table.h"
#include "tests/model/kernels/reference.h"

namespace pyramid::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// What rounding the exact result itself costs: half a unit in the last place of numbers of the
// output's rms, and of its largest elements.
constexpr double kRoundingRms = 0x1p-24;
constexpr double kRoundingMax = 0x1p-22;
// The largest error of few elements is a matter of luck; this many deviations it may always be.
constexpr double kLuck = 5;

struct Set {
  const CpuKernels* kernels;
  bool CpuFeatures::*needs;
};

std::vector<Set> Sets() {
#if defined(__x86_64__)
  return {{&kPortableKernels, nullptr},
          {&kAvx2Kernels, &CpuFeatures::avx2},
          {&kAvx512Kernels, &CpuFeatures::avx512}};
#else
  return {{&kPortableKernels, nullptr}};
#endif
}

class F32KernelsTest : public ::testing::TestWithParam<Set> {
 protected:
  void SetUp() override {
    const Set& set = GetParam();
    if (set.needs != nullptr && !(DetectCpu().*set.needs)) {
      GTEST_SKIP() << "this machine hasn't " << set.kernels->name;
    }
  }
  const CpuKernels& kernels() const { return *GetParam().kernels; }
};
INSTANTIATE_TEST_SUITE_P(Sets, F32KernelsTest, ::testing::ValuesIn(Sets()),
                         [](const auto& set) { return std::string(set.param.kernels->name); });

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// Ours is at most twice as wrong as the plain computation, or as wrong as rounding.
void ExpectTwiceThePlainError(const ErrorOf& ours, const ErrorOf& plain) {
  EXPECT_LE(ours.rms(), std::max(2 * plain.rms(), kRoundingRms)) << "plain: " << plain.rms();
  EXPECT_LE(ours.max(), std::max(2 * std::max(plain.max(), kLuck * plain.rms()), kRoundingMax))
      << "plain: " << plain.max() << ", rms " << plain.rms();
}

// ----------------------------------------------------------------------------------------- linear

struct LinearData {
  LinearCase shape;
  int64_t lda, ldo;
  ExactBuffer weight, bias;
  GuardedBuffer a, residual;
  ExactBuffer packed;
  bool relu = false;

  LinearData(const CpuKernels& kernels, LinearCase c, Values values, int64_t gap = 0,
             size_t offset = 0)
      : shape(c),
        lda(c.k + gap),
        ldo(c.n + gap),
        weight(Numbers(int64_t{c.n} * c.k, Values::kUnit, 1)),
        bias(Numbers((c.n + 31) / 32 * 32, Values::kUnit, 2)),
        a(Numbers(c.m * lda - gap, values, 3), offset),
        residual(Numbers(c.m * ldo - gap, values, 4), offset),
        packed(kernels.packed_linear_bytes(c.n, c.k)) {
    std::fill(bias.floats().begin() + c.n, bias.floats().end(), 0.0f);
    kernels.pack_linear(RowMajor(weight.data(), c.n, c.k, packed.data<void>()));
  }

  // Rows [first, first + rows) into `out`, which begins at row 0.
  void Run(const CpuKernels& kernels, float* out, bool add, int64_t first, int64_t rows,
           Output output = Output::kActivation) {
    kernels.linear({.a = a.data() + first * lda,
                    .lda = lda,
                    .weight = packed.data(),
                    .bias = bias.data(),
                    .residual = add ? residual.data() + first * ldo : nullptr,
                    .out = out + first * ldo,
                    .ldo = ldo,
                    .m = rows,
                    .n = shape.n,
                    .k = shape.k,
                    .output = output,
                    .relu = relu});
  }

  template <typename Real>
  std::vector<Real> Row(int64_t r, bool add) {
    return LinearRow<Real>(a.data() + r * lda, weight.data(), bias.data(),
                           add ? residual.data() + r * ldo : nullptr, shape.n, shape.k, relu);
  }
};

std::vector<float> Floats(std::span<const float> row) { return {row.begin(), row.end()}; }

void CheckLinear(const CpuKernels& kernels, LinearData& data, bool add) {
  SCOPED_TRACE(::testing::Message() << data.shape.m << " x " << data.shape.k << " x "
                                    << data.shape.n << ", residual " << add);
  GuardedBuffer out(Size((data.shape.m - 1) * data.ldo + data.shape.n) * sizeof(float));
  data.Run(kernels, out.data(), add, 0, data.shape.m);
  ErrorOf ours, plain;
  for (const int64_t r : SampledRows(data.shape.m)) {
    const std::vector<double> expected = data.Row<double>(r, add);
    plain.Add(expected, data.Row<float>(r, add));
    ours.Add(expected, std::span(out.data() + r * data.ldo, Size(data.shape.n)));
  }
  ExpectTwiceThePlainError(ours, plain);
  EXPECT_TRUE(out.OnlyValidWritten());
}

TEST_P(F32KernelsTest, LinearIsAsExactAsThePlainComputation) {
  for (const LinearCase& c : LinearCases()) {
    LinearData data(kernels(), c, Values::kUnit);
    CheckLinear(kernels(), data, false);
  }
}

TEST_P(F32KernelsTest, LinearTakesEveryCountOfRows) {
  for (int64_t m = 1; m <= 40; ++m) {
    for (const int k : {1, 32, 70}) {
      LinearData data(kernels(), {m, 48, k}, Values::kUnit);
      CheckLinear(kernels(), data, true);
    }
  }
}

TEST_P(F32KernelsTest, LinearTakesExtremeValues) {
  for (const Values values : kAllValues) {
    for (const LinearCase c : {LinearCase{49, 64, 256}, {7, 10, 33}, {100, 32, 147}}) {
      LinearData data(kernels(), c, values);
      CheckLinear(kernels(), data, true);
    }
  }
}

TEST_P(F32KernelsTest, LinearClampsThenAddsTheResidual) {
  for (const LinearCase c : {LinearCase{196, 160, 640}, {13, 100, 64}, {1, 7, 31}}) {
    LinearData data(kernels(), c, Values::kUnit);
    data.relu = true;
    CheckLinear(kernels(), data, false);
    CheckLinear(kernels(), data, true);
  }
}

TEST_P(F32KernelsTest, LinearDoesNotClampNan) {
  LinearData data(kernels(), {5, 33, 64}, Values::kUnit);
  data.relu = true;
  data.a.data()[2 * 64 + 7] = kNaN;
  GuardedBuffer out(Size(5 * 33) * sizeof(float));
  data.Run(kernels(), out.data(), false, 0, 5);
  for (int64_t i = 0; i < 5 * 33; ++i) EXPECT_EQ(std::isnan(out.data()[i]), i / 33 == 2) << i;
}

TEST_P(F32KernelsTest, LinearOutputsAreOneFormat) {
  LinearData data(kernels(), {53, 100, 160}, Values::kUnit);
  GuardedBuffer all[] = {GuardedBuffer(Size(53 * 100) * 4), GuardedBuffer(Size(53 * 100) * 4),
                         GuardedBuffer(Size(53 * 100) * 4)};
  data.Run(kernels(), all[0].data(), true, 0, 53, Output::kActivation);
  data.Run(kernels(), all[1].data(), true, 0, 53, Output::kHidden);
  data.Run(kernels(), all[2].data(), true, 0, 53, Output::kFloat);
  EXPECT_EQ(Floats(all[0].floats()), Floats(all[1].floats()));
  EXPECT_EQ(Floats(all[0].floats()), Floats(all[2].floats()));
}

TEST_P(F32KernelsTest, LinearWritesNothingBetweenRows) {
  constexpr int64_t kGap = 5;
  for (const int n : {10, 32, 33, 64}) {
    for (const size_t offset : {0, 4, 20}) {  // bytes off the alignment
      LinearData data(kernels(), {25, n, 48}, Values::kUnit, kGap, offset);
      CheckLinear(kernels(), data, true);
      GuardedBuffer out(Size(25 * data.ldo - kGap) * sizeof(float), offset);
      std::fill(out.floats().begin(), out.floats().end(), 123.0f);
      data.Run(kernels(), out.data(), false, 0, 25);
      for (int64_t r = 0; r < 24; ++r) {
        for (int64_t j = n; j < data.ldo; ++j) ASSERT_EQ(out.data()[r * data.ldo + j], 123.0f);
      }
    }
  }
}

TEST_P(F32KernelsTest, LinearAddsToItsOwnOutput) {
  LinearData data(kernels(), {50, 96, 64}, Values::kUnit);
  GuardedBuffer apart(Size(50 * 96) * sizeof(float));
  data.Run(kernels(), apart.data(), true, 0, 50);
  GuardedBuffer own(Floats(data.residual.floats()));
  kernels().linear({.a = data.a.data(),
                    .lda = 64,
                    .weight = data.packed.data(),
                    .bias = data.bias.data(),
                    .residual = own.data(),
                    .out = own.data(),
                    .ldo = 96,
                    .m = 50,
                    .n = 96,
                    .k = 64,
                    .output = Output::kFloat,
                    .relu = false});
  EXPECT_EQ(Floats(own.floats()), Floats(apart.floats()));
}

TEST_P(F32KernelsTest, LinearNeverReadsBehindItsRows) {
  // A row is twice as long as the slack: reading one more meets the guard page.
  constexpr int kLong = 4096;
  static_assert(kLong * sizeof(float) >= 2 * kSlack);
  for (int64_t m = 1; m <= 14; ++m) {
    LinearData data(kernels(), {m, 32, kLong}, Values::kUnit);
    CheckLinear(kernels(), data, false);
  }
}

// Calls `rows(first, count)` for pieces of many sizes that together are `all`.
template <typename Rows>
void InPieces(int64_t all, const Rows& rows) {
  int64_t first = 0;
  for (int64_t piece = 1; first < all; piece = piece * 2 + 1) {
    const int64_t count = std::min(piece % 64, all - first);
    rows(first, count);
    first += count;
  }
}

TEST_P(F32KernelsTest, SplittingTheRowsOfALinearChangesNoBit) {
  for (const LinearCase c : {LinearCase{1000, 96, 300}, {203, 10, 512}, {100, 64, 2048}}) {
    LinearData data(kernels(), c, Values::kOffset);
    GuardedBuffer whole(Size(c.m * c.n) * sizeof(float)), pieces(Size(c.m * c.n) * sizeof(float));
    data.Run(kernels(), whole.data(), true, 0, c.m);
    InPieces(c.m, [&](int64_t first, int64_t rows) {
      data.Run(kernels(), pieces.data(), true, first, rows);
    });
    EXPECT_EQ(std::memcmp(whole.data(), pieces.data(), whole.floats().size_bytes()), 0);
  }
}

// ------------------------------------------------------------------------------------- layer_norm

void CheckLayerNorm(const CpuKernels& kernels, std::vector<float> numbers, int c,
                    size_t offset = 0) {
  const int64_t rows = static_cast<int64_t>(numbers.size()) / c;
  SCOPED_TRACE(::testing::Message() << rows << " x " << c << ", offset " << offset);
  ExactBuffer gamma(Numbers(c, Values::kUnit, 1)), beta(Numbers(c, Values::kUnit, 2));
  GuardedBuffer in(numbers, offset);
  GuardedBuffer out(in.floats().size_bytes(), offset);
  for (const float eps : {1e-6f, 1e-5f}) {
    kernels.layer_norm({.in = in.data(),
                        .out = out.data(),
                        .gamma = gamma.data(),
                        .beta = beta.data(),
                        .eps = eps,
                        .rows = rows,
                        .c = c});
    ErrorOf ours, plain;
    for (const int64_t r : SampledRows(rows)) {
      const float* row = in.data() + r * c;
      const auto expected = LayerNormRow<double>(row, gamma.data(), beta.data(), eps, c);
      plain.Add(expected, LayerNormRow<float>(row, gamma.data(), beta.data(), eps, c));
      ours.Add(expected, std::span(out.data() + r * c, Size(c)));
    }
    ExpectTwiceThePlainError(ours, plain);
  }
  EXPECT_TRUE(out.OnlyValidWritten());
}

TEST_P(F32KernelsTest, LayerNormIsAsExactAsThePlainComputation) {
  for (const Values values : kAllValues) {
    for (const LayerNormCase& shape : LayerNormCases()) {
      CheckLayerNorm(kernels(), Numbers(shape.rows * shape.c, values, 3), shape.c);
    }
  }
}

TEST_P(F32KernelsTest, LayerNormTakesUnalignedRows) {
  for (const size_t offset : {4, 20, 60}) {  // bytes off the alignment
    for (const int c : {32, 160, 512}) {
      CheckLayerNorm(kernels(), Numbers(int64_t{21} * c, Values::kOffset, 3), c, offset);
    }
  }
}

TEST_P(F32KernelsTest, LayerNormOfAMeanFarBeyondTheDeviationStaysExact) {
  constexpr int kChannels = 256;
  for (const float mean : {256.0f, -65504.0f, 1e6f, 3e17f}) {
    SCOPED_TRACE(mean);
    auto numbers = Numbers(int64_t{50} * kChannels, Values::kUnit, 5, std::abs(mean) / 65536);
    for (float& x : numbers) x += mean;
    for (int64_t r = 0; r < 50; r += 2) numbers[Size(r * kChannels)] = -mean;
    CheckLayerNorm(kernels(), numbers, kChannels);
  }
  // All alike: the variance is 0.
  CheckLayerNorm(kernels(), std::vector<float>(Size(3 * kChannels), 300.0f), kChannels);
}

TEST_P(F32KernelsTest, LayerNormInPlaceAndInPiecesIsTheSame) {
  constexpr int64_t kRows = 203;
  constexpr int kChannels = 96;
  const std::vector<float> ones(kChannels, 1.0f), zeros(kChannels, 0.0f);
  GuardedBuffer in(Numbers(kRows * kChannels, Values::kOffset, 1));
  GuardedBuffer whole(in.floats().size_bytes());
  const auto run = [&](const float* from, float* to, int64_t rows) {
    kernels().layer_norm({.in = from,
                          .out = to,
                          .gamma = ones.data(),
                          .beta = zeros.data(),
                          .eps = 1e-6f,
                          .rows = rows,
                          .c = kChannels});
  };
  run(in.data(), whole.data(), kRows);
  InPieces(kRows, [&](int64_t first, int64_t rows) {
    run(in.data() + first * kChannels, in.data() + first * kChannels, rows);
  });
  EXPECT_EQ(Floats(in.floats()), Floats(whole.floats()));
}

// ------------------------------------------------------------------------------------ dwconv_gelu

struct DwconvData {
  DwconvCase shape;
  ExactBuffer weight, bias;
  GuardedBuffer in, zeros;
  ExactBuffer packed;

  DwconvData(const CpuKernels& kernels, DwconvCase s, Values values, size_t offset = 0)
      : shape(s),
        weight(Numbers(int64_t{s.c} * 9, Values::kUnit, 1, 0.5f)),
        bias(Numbers(s.c, Values::kUnit, 2)),
        in(Numbers(int64_t{s.height} * s.width * s.c, values, 3), offset),
        zeros(std::vector<float>(Size(int64_t{s.width} * s.c)), offset),
        packed(kernels.packed_dwconv_bytes(s.c)) {
    kernels.pack_dwconv(weight.data(), bias.data(), s.c, packed.data<void>());
  }

  int64_t row_size() const { return int64_t{shape.width} * shape.c; }
  const float* Row(int y) {
    return y < 0 || y >= shape.height ? nullptr : in.data() + y * row_size();
  }

  // Rows [first, first + count) into `out`, which begins at row 0.
  void Run(const CpuKernels& kernels, Gelu gelu, float* out, int first, int count) {
    std::vector<const void*> rows;
    for (int y = first - 1; y <= first + count; ++y) {
      rows.push_back(Row(y) == nullptr ? zeros.data() : Row(y));
    }
    kernels.dwconv_gelu({.rows = rows.data(),
                         .weight = packed.data(),
                         .out = out + first * row_size(),
                         .count = count,
                         .width = shape.width,
                         .c = shape.c,
                         .gelu = gelu});
  }

  template <typename Real>
  std::vector<Real> Expected(int y, Gelu gelu) {
    return DwconvGeluRow<Real>(Row(y - 1), Row(y), Row(y + 1), weight.data(), bias.data(),
                               shape.width, shape.c, gelu);
  }
};

void CheckDwconv(const CpuKernels& kernels, DwconvCase shape, Values values, Gelu gelu,
                 size_t offset = 0) {
  SCOPED_TRACE(::testing::Message() << shape.height << " x " << shape.width << " x " << shape.c);
  DwconvData data(kernels, shape, values, offset);
  GuardedBuffer out(data.in.floats().size_bytes(), offset);
  data.Run(kernels, gelu, out.data(), 0, shape.height);
  ErrorOf ours, plain;
  for (int y = 0; y < shape.height; ++y) {
    if (y > 2 && y < shape.height - 3 && y % 8 != 0) continue;  // the reference is slow
    const auto expected = data.Expected<double>(y, gelu);
    plain.Add(expected, data.Expected<float>(y, gelu));
    ours.Add(expected, std::span(out.data() + y * data.row_size(), Size(data.row_size())));
  }
  ExpectTwiceThePlainError(ours, plain);
  EXPECT_TRUE(out.OnlyValidWritten());
}

TEST_P(F32KernelsTest, DwconvGeluIsAsExactAsThePlainComputation) {
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    for (const DwconvCase& shape : DwconvCases()) {
      CheckDwconv(kernels(), shape, Values::kUnit, gelu);
    }
  }
}

TEST_P(F32KernelsTest, DwconvGeluTakesExtremeValues) {
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    for (const Values values : kAllValues) CheckDwconv(kernels(), {7, 9, 96}, values, gelu);
  }
}

TEST_P(F32KernelsTest, DwconvGeluTakesUnalignedRows) {
  for (const size_t offset : {4, 20, 60}) {  // bytes off the alignment
    for (const int width : {1, 2, 7}) {
      CheckDwconv(kernels(), {5, width, 96}, Values::kUnit, Gelu::kErf, offset);
    }
  }
}

TEST_P(F32KernelsTest, SplittingTheRowsOfADwconvChangesNoBit) {
  for (const int width : {1, 2, 9}) {
    DwconvData data(kernels(), {21, width, 64}, Values::kUnit);
    GuardedBuffer whole(data.in.floats().size_bytes()), pieces(data.in.floats().size_bytes());
    data.Run(kernels(), Gelu::kErf, whole.data(), 0, 21);
    InPieces(21, [&](int64_t first, int64_t rows) {
      data.Run(kernels(), Gelu::kErf, pieces.data(), static_cast<int>(first),
               static_cast<int>(rows));
    });
    EXPECT_EQ(Floats(whole.floats()), Floats(pieces.floats()));
  }
}

// GELU alone: a convolution whose centre is 1.
std::vector<float> GeluOf(const CpuKernels& kernels, std::vector<float> x, Gelu gelu) {
  constexpr int kChannels = 32;
  x.resize((x.size() + kChannels - 1) / kChannels * kChannels);
  std::vector<float> weight(kChannels * 9), bias(kChannels), zeros(x.size()), out(x.size() + 2048);
  for (size_t i = 0; i < kChannels; ++i) weight[i * 9 + 4] = 1.0f;
  std::vector<char> packed(kernels.packed_dwconv_bytes(kChannels));
  kernels.pack_dwconv(weight.data(), bias.data(), kChannels, packed.data());
  // One column a row, so that no neighbour (0 times infinity) comes in.
  std::vector<const void*> rows(3, zeros.data());
  for (size_t i = 0; i < x.size(); i += kChannels) {
    rows[1] = x.data() + i;
    kernels.dwconv_gelu({.rows = rows.data(),
                         .weight = packed.data(),
                         .out = out.data() + i,
                         .count = 1,
                         .width = 1,
                         .c = kChannels,
                         .gelu = gelu});
  }
  return out;
}

TEST_P(F32KernelsTest, GeluIsWithinThreeRoundings) {
  std::vector<float> x;
  for (float at = -12.0f; at <= 12.0f; at += 1.0f / 4096) x.push_back(at);
  for (float at = 1e-30f; at < 1e30f; at *= 1.7f) {
    x.push_back(at);
    x.push_back(-at);
  }
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    const std::vector<float> out = GeluOf(kernels(), x, gelu);
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = kernels::GeluOf(double{x[i]}, gelu);
      // Relative to x: where GELU is small beside it, its argument's own rounding is that large.
      const double error = std::abs(exact - double{out[i]}) / std::abs(double{x[i]});
      if (x[i] != 0) worst = std::max(worst, error);
    }
    EXPECT_LE(worst, 3 * 0x1p-24) << (gelu == Gelu::kErf ? "erf" : "tanh");
  }
}

TEST_P(F32KernelsTest, GeluOfExtremesIsTheirLimit) {
  const std::vector<float> x = {0.0f,   -0.0f,     65504.0f, -65504.0f, 3e38f,
                                -3e38f, kInfinity, 1e-40f,   -1e-40f,   kNaN};
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    const std::vector<float> out = GeluOf(kernels(), x, gelu);
    EXPECT_EQ(out[0], 0.0f);
    EXPECT_EQ(out[1], 0.0f);
    EXPECT_EQ(out[2], 65504.0f);
    EXPECT_NEAR(out[3], 0.0f, 1e-8f);
    EXPECT_EQ(out[4], 3e38f);
    EXPECT_NEAR(out[5], 0.0f, 1e-8f);
    EXPECT_EQ(out[6], kInfinity);
    EXPECT_NEAR(out[7], 0.5e-40f, 1e-44f);
    EXPECT_NEAR(out[8], -0.5e-40f, 1e-44f);
    EXPECT_TRUE(std::isnan(out[9]));  // a broken network stays visible
  }
}

// -------------------------------------------------------------------------------------- attention

struct AttentionData {
  AttentionCase shape;
  int64_t ld;
  GuardedBuffer q, k, v;
  ExactBuffer packed;

  AttentionData(const CpuKernels& kernels, AttentionCase s, Values values, int64_t gap = 0,
                size_t offset = 0, float scale = 0.4f)
      : shape(s),
        ld(s.d + gap),
        // Scores of a few units, as trained networks have.
        q(Numbers(s.queries * ld - gap, Values::kUnit, 1, scale), offset),
        k(Numbers(s.keys * ld - gap, Values::kUnit, 2), offset),
        v(Numbers(s.keys * ld - gap, values, 3), offset),
        packed(kernels.packed_keys_bytes(s.keys, s.d)) {
    Pack(kernels);
  }

  void Pack(const CpuKernels& kernels) {
    kernels.pack_keys({.k = k.data(),
                       .v = v.data(),
                       .ld = ld,
                       .keys = shape.keys,
                       .d = shape.d,
                       .packed = packed.data<void>()});
  }

  void Run(const CpuKernels& kernels, float* out, int64_t first, int64_t queries) {
    kernels.attention({.q = q.data() + first * ld,
                       .packed = packed.data(),
                       .out = out + first * ld,
                       .ld = ld,
                       .queries = queries,
                       .keys = shape.keys,
                       .d = shape.d});
  }

  template <typename Real>
  std::vector<Real> Row(int64_t r) {
    return AttentionRow<Real>(q.data() + r * ld, k.data(), v.data(), ld, shape.keys, shape.d);
  }
};

void CheckAttention(const CpuKernels& kernels, AttentionData& data, size_t offset = 0) {
  const AttentionCase& shape = data.shape;
  SCOPED_TRACE(::testing::Message()
               << shape.queries << " queries, " << shape.keys << " keys of " << shape.d);
  GuardedBuffer out(data.q.floats().size_bytes(), offset);
  data.Run(kernels, out.data(), 0, shape.queries);
  ErrorOf ours, plain;
  for (const int64_t r : SampledRows(shape.queries)) {
    const auto expected = data.Row<double>(r);
    plain.Add(expected, data.Row<float>(r));
    ours.Add(expected, std::span(out.data() + r * data.ld, Size(shape.d)));
  }
  ExpectTwiceThePlainError(ours, plain);
  EXPECT_TRUE(out.OnlyValidWritten());
  for (int64_t r = 0; r + 1 < shape.queries; ++r) {
    for (int64_t i = shape.d; i < data.ld; ++i) {
      ASSERT_TRUE(std::isnan(out.data()[r * data.ld + i])) << "written between rows";
    }
  }
}

TEST_P(F32KernelsTest, AttentionIsAsExactAsThePlainComputation) {
  for (const AttentionCase& shape : AttentionCases()) {
    AttentionData data(kernels(), shape, Values::kUnit);
    CheckAttention(kernels(), data);
  }
}

TEST_P(F32KernelsTest, AttentionTakesExtremeAndUnalignedValues) {
  for (const Values values : kAllValues) {
    for (const size_t offset : {0, 4, 36}) {
      for (const int keys : {1, 49, 255}) {
        AttentionData data(kernels(), {21, keys, 32}, values, 7, offset);
        CheckAttention(kernels(), data, offset);
      }
    }
  }
}

TEST_P(F32KernelsTest, AttentionOfHugeScoresTakesTheLargest) {
  AttentionData data(kernels(), {5, 49, 64}, Values::kUnit);
  for (float& x : data.q.floats()) x = 65504.0f;
  for (int64_t j = 0; j < 49; ++j) {
    std::fill_n(data.k.data() + j * 64, 64, j == 30 ? 65504.0f : -65504.0f);
  }
  data.Pack(kernels());
  GuardedBuffer out(data.q.floats().size_bytes());
  data.Run(kernels(), out.data(), 0, 5);
  for (int64_t i = 0; i < 5 * 64; ++i) EXPECT_EQ(out.data()[i], data.v.data()[30 * 64 + i % 64]);
}

TEST_P(F32KernelsTest, AttentionNeverMakesNanOfMinusInfinity) {
  for (const int keys : {1, 5, 16, 49, 256}) {
    AttentionData data(kernels(), {14, keys, 32}, Values::kUnit);
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t i = 0; i < 32; ++i) data.k.data()[j * 32 + i] = 1.0f;
      // Every second key is out of reach, for all queries.
      if (j % 2 == 1) data.k.data()[j * 32] = -kInfinity;
    }
    for (float& x : data.q.floats()) x = std::abs(x) + 0.1f;
    // Every score of query 3 is minus infinity.
    data.q.data()[3 * 32 + 1] = -kInfinity;
    data.Pack(kernels());
    GuardedBuffer out(data.q.floats().size_bytes());
    data.Run(kernels(), out.data(), 0, 14);
    for (int64_t r = 0; r < 14; ++r) {
      const auto expected = data.Row<double>(r);
      for (int64_t i = 0; i < 32; ++i) {
        const float x = out.data()[r * 32 + i];
        if (r == 3) {
          EXPECT_EQ(x, 0.0f) << keys;
        } else {
          EXPECT_NEAR(x, expected[Size(i)], 1e-5) << keys;
        }
      }
    }
  }
}

// Few rows, those with two scores that are nearly the largest, have most of the error: many rows
// together tell more than luck.
TEST_P(F32KernelsTest, AttentionOfLargeScoresIsAsExact) {
  constexpr int64_t kQueries = 200;
  for (const int d : {32, 64}) {
    for (const float scale : {4.0f, 40.0f}) {
      ErrorOf ours, plain;
      for (const int keys : {1, 16, 17, 49, 100, 256}) {
        AttentionData data(kernels(), {kQueries, keys, d}, Values::kUnit, 0, 0, scale);
        GuardedBuffer out(data.q.floats().size_bytes());
        data.Run(kernels(), out.data(), 0, kQueries);
        for (int64_t r = 0; r < kQueries; ++r) {
          const auto expected = data.Row<double>(r);
          plain.Add(expected, data.Row<float>(r));
          ours.Add(expected, std::span(out.data() + r * d, Size(d)));
        }
      }
      SCOPED_TRACE(::testing::Message() << "heads of " << d << ", scale " << scale);
      ExpectTwiceThePlainError(ours, plain);
    }
  }
}

// Scores of extreme queries and keys are far beyond what their rounding lets anybody agree on; a
// mean of the values is between them in any case.
TEST_P(F32KernelsTest, AttentionOfExtremeQueriesAndKeysStaysBetweenTheValues) {
  for (const Values of_queries : kAllValues) {
    for (const Values of_keys : kAllValues) {
      for (const int keys : {1, 7, 49, 81, 256}) {
        AttentionData data(kernels(), {21, keys, 32}, Values::kUnit);
        const auto q = Numbers(21 * 32, of_queries, 4), k = Numbers(int64_t{keys} * 32, of_keys, 5);
        std::copy(q.begin(), q.end(), data.q.data());
        std::copy(k.begin(), k.end(), data.k.data());
        data.Pack(kernels());
        GuardedBuffer out(data.q.floats().size_bytes());
        data.Run(kernels(), out.data(), 0, 21);
        for (int64_t i = 0; i < 32; ++i) {
          float least = kInfinity, most = -kInfinity;
          for (int64_t j = 0; j < keys; ++j) {
            least = std::min(least, data.v.data()[j * 32 + i]);
            most = std::max(most, data.v.data()[j * 32 + i]);
          }
          for (int64_t r = 0; r < 21; ++r) {
            const float x = out.data()[r * 32 + i];
            ASSERT_TRUE(x >= least - 1e-5f && x <= most + 1e-5f) << x << ", " << keys << " keys";
          }
        }
      }
    }
  }
}

TEST_P(F32KernelsTest, AttentionOfNanIsNanInItsRowOnly) {
  for (const int keys : {7, 49, 100}) {
    for (const float broken : {kNaN, kInfinity}) {  // infinity: scores of both signs, or infinite
      AttentionData data(kernels(), {18, keys, 32}, Values::kUnit);
      data.q.data()[5 * 32 + 2] = broken;
      GuardedBuffer out(data.q.floats().size_bytes());
      data.Run(kernels(), out.data(), 0, 18);
      for (int64_t i = 0; i < 18 * 32; ++i) {
        EXPECT_EQ(std::isnan(out.data()[i]), i / 32 == 5) << keys << ", " << i;
      }
    }
  }
}

// A broken network stays visible.
TEST_P(F32KernelsTest, ABrokenKeyOrValueIsNanForAllQueries) {
  for (const int keys : {7, 16, 17, 49, 100}) {
    for (const int at : {0, keys - 1}) {
      AttentionData data(kernels(), {18, keys, 32}, Values::kUnit);
      GuardedBuffer out(data.q.floats().size_bytes());
      const float good = std::exchange(data.k.data()[at * 32 + 3], kNaN);
      data.Pack(kernels());
      data.Run(kernels(), out.data(), 0, 18);
      for (int64_t i = 0; i < 18 * 32; ++i) EXPECT_TRUE(std::isnan(out.data()[i])) << keys;

      data.k.data()[at * 32 + 3] = good;
      data.v.data()[at * 32 + 3] = kNaN;
      data.Pack(kernels());
      data.Run(kernels(), out.data(), 0, 18);
      for (int64_t i = 0; i < 18 * 32; ++i) {
        EXPECT_EQ(std::isnan(out.data()[i]), i % 32 == 3) << keys << ", " << i;
      }
    }
  }
}

TEST_P(F32KernelsTest, SplittingTheQueriesChangesNoBit) {
  for (const int d : {32, 64}) {
    AttentionData data(kernels(), {203, 49, d}, Values::kUnit);
    GuardedBuffer whole(data.q.floats().size_bytes()), pieces(data.q.floats().size_bytes());
    data.Run(kernels(), whole.data(), 0, 203);
    InPieces(203,
             [&](int64_t first, int64_t rows) { data.Run(kernels(), pieces.data(), first, rows); });
    EXPECT_EQ(Floats(whole.floats()), Floats(pieces.floats()));
  }
}

// ------------------------------------------------------------------------------------------- rest

TEST_P(F32KernelsTest, NothingInFrontOfTheBuffersIsRead) {
  const GuardedBuffer::AtTheFront at_the_front;
  for (const LinearCase c : {LinearCase{1, 10, 33}, {7, 32, 32}, {53, 100, 640}}) {
    LinearData data(kernels(), c, Values::kUnit);
    CheckLinear(kernels(), data, true);
  }
  for (const int64_t rows : {1, 7, 33}) {
    CheckLayerNorm(kernels(), Numbers(rows * 96, Values::kUnit, 3), 96);
  }
  for (const DwconvCase c : {DwconvCase{1, 1, 32}, {3, 2, 32}, {7, 9, 96}}) {
    CheckDwconv(kernels(), c, Values::kUnit, Gelu::kErf);
  }
  for (const AttentionCase c : {AttentionCase{1, 1, 32}, {7, 49, 32}, {33, 81, 64}}) {
    AttentionData data(kernels(), c, Values::kUnit);
    CheckAttention(kernels(), data);
  }
}

TEST_P(F32KernelsTest, NoRowsAreNoWork) {
  GuardedBuffer out(4096);
  LinearData linear(kernels(), {3, 64, 64}, Values::kUnit);
  linear.Run(kernels(), out.data(), true, 0, 0);
  DwconvData dwconv(kernels(), {3, 3, 32}, Values::kUnit);
  dwconv.Run(kernels(), Gelu::kErf, out.data(), 0, 0);
  AttentionData attention(kernels(), {3, 49, 32}, Values::kUnit);
  attention.Run(kernels(), out.data(), 0, 0);
  kernels().layer_norm({.in = attention.q.data(),
                        .out = out.data(),
                        .gamma = linear.bias.data(),
                        .beta = linear.bias.data(),
                        .eps = 1e-6f,
                        .rows = 0,
                        .c = 32});
  kernels().from_float(linear.bias.data(), out.data(), 0);
  kernels().to_float(linear.bias.data(), out.data(), 0);
  EXPECT_THAT(Floats(out.floats()), ::testing::Each(::testing::IsNan()));
}

TEST_P(F32KernelsTest, FloatsComeAndGoUnchanged) {
  ExactBuffer in(Numbers(1003, Values::kDenormal, 1));
  GuardedBuffer there(1003 * sizeof(float), 4);
  ExactBuffer back(std::vector<float>(1003));
  kernels().from_float(in.data(), there.data(), 1003);
  kernels().to_float(there.data(), back.data(), 1003);
  EXPECT_EQ(std::memcmp(in.data(), back.data(), 1003 * sizeof(float)), 0);
  EXPECT_TRUE(there.OnlyValidWritten());
  EXPECT_TRUE(back.OnlyValidWritten());
  EXPECT_EQ(kernels().activation_bytes, 4);
  EXPECT_EQ(kernels().hidden_bytes, 4);
}

}  // namespace
}  // namespace pyramid::kernels
