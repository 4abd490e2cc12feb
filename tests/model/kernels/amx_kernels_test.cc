// The bf16 sets against the double reference, for all shapes of the case table. The yardstick is
// the plain computation in bf16: numbers rounded to bf16, sums in f32, results rounded to bf16.
// Buffers end before guard pages (reference.h), and nothing outside the valid elements may change.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_replace.h"
#include "model/kernels/cpu_kernels.h"
#include "model/kernels/kernel_table.h"
#include "tests/model/kernels/case_table.h"
#include "tests/model/kernels/reference.h"

#if defined(__x86_64__)

namespace pyramid::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// The largest error of few elements is a matter of luck; this many deviations it may always be.
constexpr double kLuck = 5;
// What rounding results to bf16 costs.
constexpr double kRoundingRms = 0x1p-10;

using Bits = std::vector<uint16_t>;

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// ------------------------------------------------------------------------------ formats in
// software

uint16_t ToBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float FromBf16(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }
float Rounded(float x) { return FromBf16(ToBf16(x)); }

// To nearest even; below 2^-14 multiples of 2^-24.
uint16_t ToFp16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::abs(x);
  if (std::isnan(x)) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
  const uint32_t bits = std::bit_cast<uint32_t>(size);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - ((127 - 15) << 10));
}
float FromFp16(uint16_t x) {
  const float sign = x & 0x8000 ? -1.0f : 1.0f;
  const int exponent = x >> 10 & 31, mantissa = x & 0x3ff;
  if (exponent == 31) return mantissa != 0 ? kNaN : sign * kInfinity;
  if (exponent == 0) return sign * static_cast<float>(mantissa) * 0x1p-24f;
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

template <uint16_t (*kConvert)(float)>
Bits All(const std::vector<float>& in) {
  Bits out;
  for (const float x : in) out.push_back(kConvert(x));
  return out;
}
std::vector<float> Rounded(std::vector<float> in) {
  for (float& x : in) x = Rounded(x);
  return in;
}
std::vector<float> Floats(const uint16_t* bits, int64_t n) {
  std::vector<float> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(FromBf16(bits[i]));
  return out;
}

std::vector<float> FloatsOfFp16(const uint16_t* bits, int64_t n) {
  std::vector<float> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(FromFp16(bits[i]));
  return out;
}

// 16-bit numbers in guarded memory.
class Halves {
 public:
  explicit Halves(int64_t n, size_t offset = 0) : memory_(Size(n) * 2, offset), size_(Size(n)) {}
  explicit Halves(const Bits& content, size_t offset = 0)
      : Halves(static_cast<int64_t>(content.size()), offset) {
    std::memcpy(data(), content.data(), content.size() * 2);
  }
  uint16_t* data() { return memory_.data<uint16_t>(); }
  Bits bits() { return {data(), data() + size_}; }
  bool OnlyValidWritten() const { return memory_.OnlyValidWritten(); }

 private:
  GuardedBuffer memory_;
  size_t size_;
};

// ------------------------------------------------------------------------------------------- tests

struct Set {
  const CpuKernels* kernels;
  bool CpuFeatures::*needs[2];
};

class AmxKernelsTest : public ::testing::TestWithParam<Set> {
 protected:
  void SetUp() override {
    const CpuFeatures features = DetectCpu();
    if (!features.avx512_bf16 || !(features.*GetParam().needs[0]) ||
        !(features.*GetParam().needs[1])) {
      GTEST_SKIP() << "this machine hasn't " << kernels().name;
    }
    ASSERT_TRUE(kernels().prepare_thread());
  }
  const CpuKernels& kernels() const { return *GetParam().kernels; }
  bool fp16() const { return &kernels() == &kAmxKernels; }
};
INSTANTIATE_TEST_SUITE_P(
    Sets, AmxKernelsTest,
    ::testing::Values(Set{&kAmxKernels, {&CpuFeatures::amx_bf16, &CpuFeatures::avx512_fp16}},
                      Set{&kAmxF32MathKernels, {&CpuFeatures::amx_bf16, &CpuFeatures::avx512}},
                      Set{&kAvx512Bf16Kernels, {&CpuFeatures::avx512_bf16, &CpuFeatures::avx512}}),
    [](const auto& set) {
      return absl::StrReplaceAll(set.param.kernels->name, {{"-", "_"}});
    });

// Ours is at most twice as wrong as the plain computation, or as wrong as rounding.
void ExpectTwiceThePlainError(const ErrorOf& ours, const ErrorOf& plain) {
  EXPECT_LE(ours.rms(), std::max(2 * plain.rms(), kRoundingRms)) << "plain: " << plain.rms();
  EXPECT_LE(ours.max(), 2 * std::max(plain.max(), kLuck * std::max(plain.rms(), kRoundingRms)))
      << "plain: " << plain.max() << ", rms " << plain.rms();
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

// ----------------------------------------------------------------------------------------- linear

struct LinearData {
  LinearCase shape;
  int64_t lda, ldo;
  std::vector<float> a_values, residual_values;
  ExactBuffer weight, bias;
  Halves a, residual;
  ExactBuffer packed;
  bool relu = false;

  LinearData(const CpuKernels& kernels, LinearCase c, Values values, int64_t gap = 0,
             size_t offset = 0)
      : shape(c),
        lda(c.k + gap),
        ldo(c.n + gap),
        a_values(Rounded(Numbers(c.m * lda - gap, values, 3))),
        residual_values(Rounded(Numbers(c.m * ldo - gap, values, 4))),
        weight(Rounded(Numbers(int64_t{c.n} * c.k, Values::kUnit, 1))),
        bias(Numbers((c.n + 31) / 32 * 32, Values::kUnit, 2)),
        a(All<ToBf16>(a_values), offset),
        residual(All<ToBf16>(residual_values), offset),
        packed(kernels.packed_linear_bytes(c.n, c.k)) {
    std::fill(bias.floats().begin() + c.n, bias.floats().end(), 0.0f);
    kernels.pack_linear(RowMajor(weight.data(), c.n, c.k, packed.data<void>()));
  }

  // Rows [first, first + rows) into `out`, which begins at row 0.
  void Run(const CpuKernels& kernels, void* out, bool add, int64_t first, int64_t rows,
           Output output = Output::kActivation) {
    const int64_t bytes = output == Output::kFloat ? 4 : 2;
    kernels.linear({.a = a.data() + first * lda,
                    .lda = lda,
                    .weight = packed.data(),
                    .bias = bias.data(),
                    .residual = add ? residual.data() + first * ldo : nullptr,
                    .out = static_cast<char*>(out) + first * ldo * bytes,
                    .ldo = ldo,
                    .m = rows,
                    .n = shape.n,
                    .k = shape.k,
                    .output = output,
                    .relu = relu});
  }

  template <typename Real>
  std::vector<Real> Row(int64_t r, bool add) {
    return LinearRow<Real>(a_values.data() + r * lda, weight.data(), bias.data(),
                           add ? residual_values.data() + r * ldo : nullptr, shape.n, shape.k,
                           relu);
  }
};

void CheckLinear(const CpuKernels& kernels, LinearData& data, bool add,
                 Output output = Output::kActivation) {
  SCOPED_TRACE(::testing::Message() << data.shape.m << " x " << data.shape.k << " x "
                                    << data.shape.n << ", residual " << add);
  Halves out((data.shape.m - 1) * data.ldo + data.shape.n);
  data.Run(kernels, out.data(), add, 0, data.shape.m, output);
  const bool fp16 = output == Output::kHidden && &kernels == &kAmxKernels;
  ErrorOf ours, plain;
  for (const int64_t r : SampledRows(data.shape.m)) {
    const std::vector<double> expected = data.Row<double>(r, add);
    plain.Add(expected, Rounded(data.Row<float>(r, add)));
    const uint16_t* row = out.data() + r * data.ldo;
    ours.Add(expected, fp16 ? FloatsOfFp16(row, data.shape.n) : Floats(row, data.shape.n));
  }
  ExpectTwiceThePlainError(ours, plain);
  EXPECT_TRUE(out.OnlyValidWritten());
}

TEST_P(AmxKernelsTest, LinearIsAsExactAsThePlainComputation) {
  for (const LinearCase& c : LinearCases()) {
    LinearData data(kernels(), c, Values::kUnit);
    CheckLinear(kernels(), data, c.k % 3 == 0);
  }
}

TEST_P(AmxKernelsTest, HiddenRowsAreAsExactAsThePlainComputation) {
  for (const LinearCase& c : LinearCases()) {
    LinearData data(kernels(), c, Values::kUnit);
    CheckLinear(kernels(), data, false, Output::kHidden);
  }
}

TEST_P(AmxKernelsTest, LinearDoesNotClampNan) {
  for (const Output output : {Output::kActivation, Output::kHidden}) {
    for (const int k : {32, 64, 640}) {
      LinearData data(kernels(), {20, 33, k}, Values::kUnit);
      data.relu = true;
      data.a.data()[2 * k + 7] = ToBf16(kNaN);
      Halves out(20 * 33);
      data.Run(kernels(), out.data(), false, 0, 20, output);
      for (int64_t i = 0; i < 20 * 33; ++i) {
        const bool half = output == Output::kHidden && fp16();
        const float x = half ? FromFp16(out.data()[i]) : FromBf16(out.data()[i]);
        EXPECT_EQ(std::isnan(x), i / 33 == 2) << k << ", " << i;
      }
    }
  }
}

TEST_P(AmxKernelsTest, LinearTakesEveryCountOfRowsAndDepth) {
  for (int64_t m = 1; m <= 100; ++m) {
    for (const int k : {32, 64, 70, 96, 512, 544, 608}) {
      LinearData data(kernels(), {m, 32, k}, Values::kUnit);
      CheckLinear(kernels(), data, true);
    }
  }
}

TEST_P(AmxKernelsTest, LinearTakesExtremeValues) {
  for (const Values values : kAllValues) {
    for (const LinearCase c : {LinearCase{49, 64, 256}, {7, 10, 33}, {100, 32, 147}}) {
      LinearData data(kernels(), c, values);
      CheckLinear(kernels(), data, true);
    }
  }
}

TEST_P(AmxKernelsTest, LinearClampsThenAddsTheResidual) {
  for (const LinearCase c : {LinearCase{196, 160, 640}, {13, 100, 64}, {1, 7, 31}}) {
    LinearData data(kernels(), c, Values::kUnit);
    data.relu = true;
    CheckLinear(kernels(), data, false);
    CheckLinear(kernels(), data, true);
  }
}

TEST_P(AmxKernelsTest, LinearWritesNothingBetweenRows) {
  constexpr int64_t kGap = 5;
  for (const int n : {10, 32, 33, 64}) {
    for (const int k : {48, 96, 800}) {
      for (const size_t offset : {0, 2, 20}) {  // bytes off the alignment
        LinearData data(kernels(), {53, n, k}, Values::kUnit, kGap, offset);
        CheckLinear(kernels(), data, true);
        Halves out(Bits(Size(53 * data.ldo - kGap), 0x1234), offset);
        data.Run(kernels(), out.data(), false, 0, 53);
        for (int64_t r = 0; r < 52; ++r) {
          for (int64_t j = n; j < data.ldo; ++j) ASSERT_EQ(out.data()[r * data.ldo + j], 0x1234);
        }
      }
    }
  }
}

TEST_P(AmxKernelsTest, LinearAddsToItsOwnOutput) {
  for (const LinearCase c : {LinearCase{50, 96, 64}, {113, 96, 640}, {9, 32, 96}}) {
    LinearData data(kernels(), c, Values::kUnit);
    Halves apart(c.m * c.n), own(data.residual.bits());
    data.Run(kernels(), apart.data(), true, 0, c.m);
    kernels().linear({.a = data.a.data(),
                      .lda = c.k,
                      .weight = data.packed.data(),
                      .bias = data.bias.data(),
                      .residual = own.data(),
                      .out = own.data(),
                      .ldo = c.n,
                      .m = c.m,
                      .n = c.n,
                      .k = c.k,
                      .output = Output::kActivation,
                      .relu = false});
    EXPECT_EQ(own.bits(), apart.bits());
  }
}

TEST_P(AmxKernelsTest, LinearOutputsAreOneResultInThreeFormats) {
  for (const LinearCase c : {LinearCase{53, 64, 32}, {49, 100, 640}, {5, 10, 512}}) {
    LinearData data(kernels(), c, Values::kUnit);
    GuardedBuffer floats(Size(c.m * c.n) * 4);
    Halves hidden(c.m * c.n), activations(c.m * c.n);
    data.Run(kernels(), floats.data(), false, 0, c.m, Output::kFloat);
    data.Run(kernels(), hidden.data(), false, 0, c.m, Output::kHidden);
    data.Run(kernels(), activations.data(), false, 0, c.m);
    for (int64_t i = 0; i < c.m * c.n; ++i) {
      const float x = floats.data()[i];
      ASSERT_EQ(hidden.data()[i], fp16() ? ToFp16(x) : ToBf16(x));
      ASSERT_EQ(activations.data()[i], ToBf16(x));
    }
    EXPECT_TRUE(floats.OnlyValidWritten());
    EXPECT_TRUE(hidden.OnlyValidWritten());
    // f32 sums: as exact as f32, but for the order of the sum.
    for (int64_t r = 0; r < c.m; ++r) {
      const auto expected = data.Row<double>(r, false);
      for (int64_t j = 0; j < c.n; ++j) {
        ASSERT_NEAR(floats.data()[r * c.n + j], expected[Size(j)], 1e-3);
      }
    }
  }
}

TEST_P(AmxKernelsTest, HiddenNumbersBeyondFp16AreInfiniteInFp16Only) {
  LinearData data(kernels(), {5, 32, 32}, Values::kUnit);
  for (int64_t i = 0; i < 5 * 32; ++i) data.a.data()[i] = ToBf16(65536.0f);
  std::fill(data.weight.floats().begin(), data.weight.floats().end(), 1.0f);
  kernels().pack_linear(RowMajor(data.weight.data(), 32, 32, data.packed.data<void>()));
  Halves out(5 * 32);
  data.Run(kernels(), out.data(), false, 0, 5, Output::kHidden);
  for (const uint16_t x : out.bits()) {
    if (fp16()) {
      EXPECT_EQ(FromFp16(x), kInfinity);
    } else {
      EXPECT_EQ(FromBf16(x), 2097152.0f);
    }
  }
}

TEST_P(AmxKernelsTest, LinearIgnoresWhatFollowsItsRows) {
  // A row of NaN follows the last one; NaN would show in the result.
  for (const int k : {32, 40, 600}) {
    LinearData data(kernels(), {14, 32, k}, Values::kUnit);
    std::fill_n(data.a.data() + 13 * k, k, ToBf16(kNaN));
    Halves out(13 * 32);
    data.Run(kernels(), out.data(), false, 0, 13);
    for (const uint16_t x : out.bits()) EXPECT_TRUE(std::isfinite(FromBf16(x)));
  }
}

TEST_P(AmxKernelsTest, SplittingTheRowsOfALinearChangesNoBit) {
  for (const LinearCase c :
       {LinearCase{1000, 96, 300}, {203, 10, 512}, {500, 64, 2048}, {333, 96, 32}}) {
    for (const Output output : {Output::kActivation, Output::kHidden, Output::kFloat}) {
      LinearData data(kernels(), c, Values::kOffset);
      const size_t bytes = Size(c.m * c.n) * (output == Output::kFloat ? 4 : 2);
      GuardedBuffer whole(bytes), pieces(bytes);
      data.Run(kernels(), whole.data(), true, 0, c.m, output);
      InPieces(c.m, [&](int64_t first, int64_t rows) {
        data.Run(kernels(), pieces.data(), true, first, rows, output);
      });
      EXPECT_EQ(std::memcmp(whole.data(), pieces.data(), bytes), 0);
    }
  }
}

// ------------------------------------------------------------------------------------- layer_norm

struct LayerNormData {
  std::vector<float> values;
  ExactBuffer gamma, beta;
  Halves in, out;

  LayerNormData(std::vector<float> numbers, int c, size_t offset = 0)
      : values(Rounded(std::move(numbers))),
        gamma(Numbers(c, Values::kUnit, 1)),
        beta(Numbers(c, Values::kUnit, 2)),
        in(All<ToBf16>(values), offset),
        out(static_cast<int64_t>(values.size()), offset) {}
};

void CheckLayerNorm(const CpuKernels& kernels, LayerNormData& data, int64_t rows, int c,
                    float eps) {
  SCOPED_TRACE(::testing::Message() << rows << " x " << c);
  const float* gamma = data.gamma.data();
  const float* beta = data.beta.data();
  kernels.layer_norm({.in = data.in.data(),
                      .out = data.out.data(),
                      .gamma = gamma,
                      .beta = beta,
                      .eps = eps,
                      .rows = rows,
                      .c = c});
  ErrorOf ours, plain;
  for (const int64_t r : SampledRows(rows)) {
    const float* row = data.values.data() + r * c;
    const auto expected = LayerNormRow<double>(row, gamma, beta, eps, c);
    plain.Add(expected, Rounded(LayerNormRow<float>(row, gamma, beta, eps, c)));
    ours.Add(expected, Floats(data.out.data() + r * c, c));
  }
  ExpectTwiceThePlainError(ours, plain);
  EXPECT_TRUE(data.out.OnlyValidWritten());
}

TEST_P(AmxKernelsTest, LayerNormIsAsExactAsThePlainComputation) {
  for (const Values values : kAllValues) {
    for (const LayerNormCase& shape : LayerNormCases()) {
      LayerNormData data(Numbers(shape.rows * shape.c, values, 3), shape.c);
      for (const float eps : {1e-6f, 1e-5f}) {
        CheckLayerNorm(kernels(), data, shape.rows, shape.c, eps);
      }
    }
  }
}

TEST_P(AmxKernelsTest, LayerNormTakesUnalignedRows) {
  for (const size_t offset : {2, 20, 62}) {  // bytes off the alignment
    for (const int c : {32, 160, 512}) {
      LayerNormData data(Numbers(int64_t{21} * c, Values::kOffset, 3), c, offset);
      CheckLayerNorm(kernels(), data, 21, c, 1e-6f);
    }
  }
}

TEST_P(AmxKernelsTest, LayerNormOfAMeanFarBeyondTheDeviationStaysExact) {
  // Around 4096 bf16 has steps of 16 to 32: the deviation is a step or two. And a row whose first
  // element is alone far from the others, which are what the others are measured from.
  constexpr int kChannels = 256;
  for (const float mean : {256.0f, -4096.0f, 1e6f, 3e17f}) {
    SCOPED_TRACE(mean);
    auto numbers = Numbers(int64_t{50} * kChannels, Values::kUnit, 5, std::abs(mean) / 128);
    for (float& x : numbers) x += mean;
    for (int64_t r = 0; r < 50; r += 2) numbers[Size(r * kChannels)] = -mean;
    LayerNormData data(std::move(numbers), kChannels);
    CheckLayerNorm(kernels(), data, 50, kChannels, 1e-6f);
  }
  // All alike: the variance is 0.
  LayerNormData data(std::vector<float>(Size(3 * kChannels), 300.0f), kChannels);
  CheckLayerNorm(kernels(), data, 3, kChannels, 1e-6f);
}

TEST_P(AmxKernelsTest, LayerNormInPlaceAndInPiecesIsTheSame) {
  constexpr int64_t kRows = 203;
  constexpr int kChannels = 96;
  LayerNormData data(Numbers(kRows * kChannels, Values::kOffset, 1), kChannels);
  const auto run = [&](const uint16_t* from, uint16_t* to, int64_t rows) {
    kernels().layer_norm({.in = from,
                          .out = to,
                          .gamma = data.gamma.data(),
                          .beta = data.beta.data(),
                          .eps = 1e-6f,
                          .rows = rows,
                          .c = kChannels});
  };
  run(data.in.data(), data.out.data(), kRows);
  InPieces(kRows, [&](int64_t first, int64_t rows) {
    run(data.in.data() + first * kChannels, data.in.data() + first * kChannels, rows);
  });
  EXPECT_EQ(data.in.bits(), data.out.bits());
}

// ------------------------------------------------------------------------------------ dwconv_gelu

struct DwconvData {
  DwconvCase shape;
  std::vector<float> values, weight;
  std::vector<float> plain_values, plain_weight;  // rounded to bf16
  ExactBuffer bias;
  Halves in, zeros;
  ExactBuffer packed;

  DwconvData(const CpuKernels& kernels, DwconvCase s, Values kind, size_t offset = 0)
      : shape(s),
        values(Numbers(int64_t{s.height} * s.width * s.c, kind, 3)),
        weight(Numbers(int64_t{s.c} * 9, Values::kUnit, 1, 0.5f)),
        plain_values(Rounded(values)),
        plain_weight(Rounded(weight)),
        bias(Numbers(s.c, Values::kUnit, 2)),
        in(&kernels == &kAmxKernels ? All<ToFp16>(values) : All<ToBf16>(values), offset),
        zeros(Bits(Size(int64_t{s.width} * s.c)), offset),
        packed(kernels.packed_dwconv_bytes(s.c)) {
    Pack(kernels);
  }

  // After a change of the weights.
  void Pack(const CpuKernels& kernels) {
    ExactBuffer exact(weight);
    kernels.pack_dwconv(exact.data(), bias.data(), shape.c, packed.data<void>());
  }

  int64_t row_size() const { return int64_t{shape.width} * shape.c; }
  int64_t size() const { return row_size() * shape.height; }

  // Rows [first, first + count) into `out`, which begins at row 0.
  void Run(const CpuKernels& kernels, Gelu gelu, uint16_t* out, int first, int count) {
    std::vector<const void*> rows;
    for (int y = first - 1; y <= first + count; ++y) {
      rows.push_back(y < 0 || y >= shape.height ? zeros.data() : in.data() + y * row_size());
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
  std::vector<Real> Row(int y, Gelu gelu, const std::vector<float>& from,
                        const std::vector<float>& taps) {
    const auto row = [&](int at) {
      return at < 0 || at >= shape.height ? nullptr : from.data() + at * row_size();
    };
    return DwconvGeluRow<Real>(row(y - 1), row(y), row(y + 1), taps.data(), bias.data(),
                               shape.width, shape.c, gelu);
  }
};

void CheckDwconv(const CpuKernels& kernels, DwconvCase shape, Values values, Gelu gelu,
                 size_t offset = 0) {
  SCOPED_TRACE(::testing::Message() << shape.height << " x " << shape.width << " x " << shape.c);
  DwconvData data(kernels, shape, values, offset);
  Halves out(data.size(), offset);
  data.Run(kernels, gelu, out.data(), 0, shape.height);
  ErrorOf ours, plain;
  for (int y = 0; y < shape.height; ++y) {
    if (y > 2 && y < shape.height - 3 && y % 8 != 0) continue;  // the reference is slow
    const auto expected = data.Row<double>(y, gelu, data.values, data.weight);
    plain.Add(expected, Rounded(data.Row<float>(y, gelu, data.plain_values, data.plain_weight)));
    ours.Add(expected, Floats(out.data() + y * data.row_size(), data.row_size()));
  }
  ExpectTwiceThePlainError(ours, plain);
  EXPECT_TRUE(out.OnlyValidWritten());
}

TEST_P(AmxKernelsTest, DwconvGeluIsAsExactAsThePlainComputation) {
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    for (const DwconvCase& shape : DwconvCases()) {
      CheckDwconv(kernels(), shape, Values::kUnit, gelu);
    }
  }
}

TEST_P(AmxKernelsTest, DwconvGeluTakesExtremeValues) {
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    for (const Values values : kAllValues) {
      if (fp16() && values == Values::kLarge) continue;  // the next test
      CheckDwconv(kernels(), {7, 9, 96}, values, gelu);
    }
  }
}

TEST_P(AmxKernelsTest, DwconvGeluTakesUnalignedRows) {
  for (const size_t offset : {2, 20, 62}) {  // bytes off the alignment
    for (const int width : {1, 2, 7}) {
      CheckDwconv(kernels(), {5, width, 96}, Values::kUnit, Gelu::kErf, offset);
    }
  }
}

// GELU's limit there is 0: a number beyond fp16 would be lost without a trace.
TEST_P(AmxKernelsTest, HiddenNumbersBelowFp16ShowInTheResult) {
  if (!fp16()) GTEST_SKIP() << "bf16 has f32's range";
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    for (const int height : {1, 4, 5}) {
      DwconvData data(kernels(), {height, 3, 64}, Values::kUnit);
      for (float& x : data.weight) x = std::abs(x) + 0.1f;  // sums of -∞, not +∞
      data.Pack(kernels());
      const int64_t broken = data.row_size() * (height / 2) + 64 + 40;  // the middle column
      data.in.data()[broken] = ToFp16(-kInfinity);
      Halves out(data.size());
      data.Run(kernels(), gelu, out.data(), 0, height);
      for (int64_t i = 0; i < data.size(); ++i) {
        const bool near = i % 64 == 40 && std::abs(i / data.row_size() - height / 2) <= 1;
        EXPECT_EQ(std::isfinite(FromBf16(out.data()[i])), !near) << height << ", " << i;
      }
    }
  }
}

TEST_P(AmxKernelsTest, SumsBeyondFp16AreInfiniteInFp16Only) {
  DwconvData data(kernels(), {3, 5, 32}, Values::kUnit);
  const uint16_t large = fp16() ? ToFp16(60000.0f) : ToBf16(60000.0f);
  std::fill_n(data.in.data() + data.row_size(), data.row_size(), large);
  data.weight.assign(data.weight.size(), 0.5f);
  data.Pack(kernels());
  Halves out(data.size());
  data.Run(kernels(), Gelu::kErf, out.data(), 0, 3);
  for (int64_t i = 0; i < data.size(); ++i) {
    const float x = FromBf16(out.data()[i]);
    const int64_t column = i / 32 % 5;
    if (column == 0 || column == 4) {
      EXPECT_NEAR(x, 60000.0f, 300.0f);
    } else if (fp16()) {
      EXPECT_EQ(x, kInfinity);
    } else {
      EXPECT_NEAR(x, 90000.0f, 400.0f);
    }
  }
}

TEST_P(AmxKernelsTest, SplittingTheRowsOfADwconvChangesNoBit) {
  for (const int width : {1, 2, 9}) {
    DwconvData data(kernels(), {21, width, 64}, Values::kUnit);
    Halves whole(data.size()), pieces(data.size());
    data.Run(kernels(), Gelu::kErf, whole.data(), 0, 21);
    InPieces(21, [&](int64_t first, int64_t rows) {
      data.Run(kernels(), Gelu::kErf, pieces.data(), static_cast<int>(first),
               static_cast<int>(rows));
    });
    EXPECT_EQ(whole.bits(), pieces.bits());
  }
}

// GELU alone: a convolution whose centre is 1, one column a row.
std::vector<float> GeluOf(const CpuKernels& kernels, std::vector<float> x, Gelu gelu) {
  constexpr int kChannels = 32;
  x.resize((x.size() + kChannels - 1) / kChannels * kChannels);
  std::vector<float> weight(kChannels * 9), bias(kChannels);
  for (size_t i = 0; i < kChannels; ++i) weight[i * 9 + 4] = 1.0f;
  std::vector<char> packed(kernels.packed_dwconv_bytes(kChannels));
  kernels.pack_dwconv(weight.data(), bias.data(), kChannels, packed.data());
  const Bits in = &kernels == &kAmxKernels ? All<ToFp16>(x) : All<ToBf16>(x);
  const Bits zeros(kChannels);
  Bits out(x.size());
  std::vector<const void*> rows(3, zeros.data());
  for (size_t i = 0; i < x.size(); i += kChannels) {
    rows[1] = in.data() + i;
    kernels.dwconv_gelu({.rows = rows.data(),
                         .weight = packed.data(),
                         .out = out.data() + i,
                         .count = 1,
                         .width = 1,
                         .c = kChannels,
                         .gelu = gelu});
  }
  return Floats(out.data(), static_cast<int64_t>(out.size()));
}

TEST_P(AmxKernelsTest, GeluIsExactToAFewThousandths) {
  std::vector<float> x;
  for (float at = -12.0f; at <= 12.0f; at += 1.0f / 64) x.push_back(at);  // exact in fp16
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    const std::vector<float> out = GeluOf(kernels(), x, gelu);
    double worst = 0, rounding = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const float in = fp16() ? x[i] : Rounded(x[i]);
      const double exact = kernels::GeluOf(double{in}, gelu);
      // bf16 rounds |gelu| > 0.1 to 0.4 %.
      const double unit = std::max(std::abs(exact), 0.1);
      worst = std::max(worst, std::abs(exact - double{out[i]}) / unit);
      rounding = std::max(rounding, std::abs(exact - Rounded(static_cast<float>(exact))) / unit);
    }
    EXPECT_LE(worst, 2 * rounding) << (gelu == Gelu::kErf ? "erf" : "tanh");
  }
}

TEST_P(AmxKernelsTest, GeluOfExtremesIsTheirLimit) {
  const std::vector<float> x = {0.0f,  -0.0f,     65504.0f, -65504.0f, 5.0f,   -5.0f,
                                1e-5f, kInfinity, -1e-5f,   kNaN,      100.0f, -100.0f};
  for (const Gelu gelu : {Gelu::kErf, Gelu::kTanh}) {
    const std::vector<float> out = GeluOf(kernels(), x, gelu);
    EXPECT_EQ(out[0], 0.0f);
    EXPECT_EQ(out[1], 0.0f);
    EXPECT_EQ(out[2], 65536.0f);  // 65504 in bf16
    EXPECT_NEAR(out[3], 0.0f, 4e-6f);
    EXPECT_EQ(out[4], 5.0f);
    EXPECT_NEAR(out[5], 0.0f, 1e-5f);
    EXPECT_NEAR(out[6], 0.5e-5f, 6.2e-5f);
    EXPECT_EQ(out[7], kInfinity);
    EXPECT_NEAR(out[8], -0.5e-5f, 6.2e-5f);
    EXPECT_TRUE(std::isnan(out[9]));  // a broken network stays visible
    EXPECT_EQ(out[10], 100.0f);
    EXPECT_NEAR(out[11], 0.0f, 4e-6f);
  }
}

// -------------------------------------------------------------------------------------- attention

struct AttentionData {
  AttentionCase shape;
  int64_t ld;
  std::vector<float> q_values, k_values, v_values;
  Halves q, k, v;
  ExactBuffer packed;

  AttentionData(const CpuKernels& kernels, AttentionCase s, Values values, int64_t gap = 0,
                size_t offset = 0, float scale = 0.4f)
      : shape(s),
        ld(s.d + gap),
        // Scores of a few units, as trained networks have.
        q_values(Rounded(Numbers(s.queries * ld - gap, Values::kUnit, 1, scale))),
        k_values(Rounded(Numbers(s.keys * ld - gap, Values::kUnit, 2))),
        v_values(Rounded(Numbers(s.keys * ld - gap, values, 3))),
        q(All<ToBf16>(q_values), offset),
        k(All<ToBf16>(k_values), offset),
        v(All<ToBf16>(v_values), offset),
        packed(kernels.packed_keys_bytes(s.keys, s.d)) {
    Pack(kernels);
  }

  // After a change of the values.
  void Pack(const CpuKernels& kernels) {
    const auto fill = [](const std::vector<float>& from, Halves& to) {
      for (size_t i = 0; i < from.size(); ++i) to.data()[i] = ToBf16(from[i]);
    };
    fill(q_values, q);
    fill(k_values, k);
    fill(v_values, v);
    kernels.pack_keys({.k = k.data(),
                       .v = v.data(),
                       .ld = ld,
                       .keys = shape.keys,
                       .d = shape.d,
                       .packed = packed.data<void>()});
  }

  int64_t size() const { return (shape.queries - 1) * ld + shape.d; }

  void Run(const CpuKernels& kernels, uint16_t* out, int64_t first, int64_t queries) {
    kernels.attention({.q = q.data() + first * ld,
                       .packed = packed.data(),
                       .out = out + first * ld,
                       .ld = ld,
                       .queries = queries,
                       .keys = shape.keys,
                       .d = shape.d});
  }

  std::vector<double> Row(int64_t r) const {
    return AttentionRow<double>(q_values.data() + r * ld, k_values.data(), v_values.data(), ld,
                                shape.keys, shape.d);
  }

  // Probabilities in bf16 before they meet the values, as PyTorch's plain attention in bf16.
  std::vector<float> Plain(int64_t r) const {
    std::vector<float> scores(Size(shape.keys)), out(Size(shape.d));
    float most = -kInfinity, total = 0;
    for (int64_t j = 0; j < shape.keys; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < shape.d; ++i)
        sum += q_values[Size(r * ld + i)] * k_values[Size(j * ld + i)];
      scores[Size(j)] = sum;
      most = std::max(most, sum);
    }
    for (float& x : scores) total += x = std::exp2(x - most);
    for (int64_t j = 0; j < shape.keys; ++j) {
      const float share = Rounded(scores[Size(j)] / total);
      for (int64_t i = 0; i < shape.d; ++i) out[Size(i)] += share * v_values[Size(j * ld + i)];
    }
    return Rounded(out);
  }
};

void CheckAttention(const CpuKernels& kernels, AttentionData& data, size_t offset = 0) {
  const AttentionCase& shape = data.shape;
  SCOPED_TRACE(::testing::Message()
               << shape.queries << " queries, " << shape.keys << " keys of " << shape.d);
  Halves out(Bits(Size(data.size()), 0x1234), offset);
  data.Run(kernels, out.data(), 0, shape.queries);
  ErrorOf ours, plain;
  for (const int64_t r : SampledRows(shape.queries)) {
    const auto expected = data.Row(r);
    plain.Add(expected, data.Plain(r));
    ours.Add(expected, Floats(out.data() + r * data.ld, shape.d));
  }
  ExpectTwiceThePlainError(ours, plain);
  EXPECT_TRUE(out.OnlyValidWritten());
  for (int64_t r = 0; r + 1 < shape.queries; ++r) {
    for (int64_t i = shape.d; i < data.ld; ++i) ASSERT_EQ(out.data()[r * data.ld + i], 0x1234);
  }
}

TEST_P(AmxKernelsTest, AttentionIsAsExactAsThePlainComputation) {
  for (const AttentionCase& shape : AttentionCases()) {
    AttentionData data(kernels(), shape, Values::kUnit);
    CheckAttention(kernels(), data);
  }
}

TEST_P(AmxKernelsTest, AttentionTakesExtremeAndUnalignedValues) {
  for (const Values values : kAllValues) {
    for (const size_t offset : {0, 2, 36}) {
      for (const int keys : {1, 17, 49, 113, 255}) {
        AttentionData data(kernels(), {21, keys, 32}, values, 7, offset);
        CheckAttention(kernels(), data, offset);
      }
    }
  }
}

TEST_P(AmxKernelsTest, AttentionOfLargeScoresIsAsExact) {
  for (const int d : {32, 64}) {
    for (const float scale : {4.0f, 40.0f, 4000.0f}) {
      for (const int keys : {1, 16, 17, 49, 81, 100, 256}) {
        AttentionData data(kernels(), {50, keys, d}, Values::kUnit, 0, 0, scale);
        CheckAttention(kernels(), data);
      }
    }
  }
}

TEST_P(AmxKernelsTest, AttentionOfHugeScoresTakesTheLargest) {
  for (const int winner : {30, 48}) {
    AttentionData data(kernels(), {5, 49, 64}, Values::kUnit);
    for (float& x : data.q_values) x = 65536.0f;
    for (int64_t j = 0; j < 49; ++j) {
      std::fill_n(data.k_values.begin() + j * 64, 64, j == winner ? 65536.0f : -65536.0f);
    }
    data.Pack(kernels());
    Halves out(data.size());
    data.Run(kernels(), out.data(), 0, 5);
    for (int64_t i = 0; i < 5 * 64; ++i) {
      EXPECT_NEAR(FromBf16(out.data()[i]), data.v_values[Size(winner * 64 + i % 64)], 0.02);
    }
  }
}

TEST_P(AmxKernelsTest, AttentionNeverMakesNanOfMinusInfinity) {
  for (const int keys : {1, 5, 16, 49, 81, 256}) {
    AttentionData data(kernels(), {14, keys, 32}, Values::kUnit);
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t i = 0; i < 32; ++i) data.k_values[Size(j * 32 + i)] = 1.0f;
      // Every second key is out of reach, for all queries.
      if (j % 2 == 1) data.k_values[Size(j * 32)] = -kInfinity;
    }
    for (float& x : data.q_values) x = Rounded(std::abs(x) + 0.1f);
    // Query 3 reaches no key.
    data.q_values[3 * 32 + 1] = -kInfinity;
    data.Pack(kernels());
    Halves out(data.size());
    data.Run(kernels(), out.data(), 0, 14);
    for (int64_t r = 0; r < 14; ++r) {
      const auto expected = data.Row(r);
      for (int64_t i = 0; i < 32; ++i) {
        const float x = FromBf16(out.data()[r * 32 + i]);
        if (r == 3) {
          EXPECT_EQ(x, 0.0f) << keys;
        } else {
          EXPECT_NEAR(x, expected[Size(i)], 0.02) << keys;
        }
      }
    }
  }
}

TEST_P(AmxKernelsTest, AttentionOfNanIsNanInItsRowOnly) {
  for (const int keys : {7, 49, 100}) {
    for (const float broken : {kNaN, kInfinity}) {  // infinity: scores of both signs, or infinite
      AttentionData data(kernels(), {18, keys, 32}, Values::kUnit);
      data.q_values[5 * 32 + 2] = broken;
      data.Pack(kernels());
      Halves out(data.size());
      data.Run(kernels(), out.data(), 0, 18);
      for (int64_t i = 0; i < 18 * 32; ++i) {
        EXPECT_EQ(std::isnan(FromBf16(out.data()[i])), i / 32 == 5) << keys << ", " << i;
      }
    }
  }
}

// A broken network stays visible.
TEST_P(AmxKernelsTest, ABrokenKeyOrValueIsNanForAllQueries) {
  for (const int keys : {7, 16, 17, 49, 81, 100}) {
    for (const int at : {0, keys - 1}) {
      AttentionData data(kernels(), {18, keys, 32}, Values::kUnit);
      Halves out(data.size());
      const float good = std::exchange(data.k_values[Size(at * 32 + 3)], kNaN);
      data.Pack(kernels());
      data.Run(kernels(), out.data(), 0, 18);
      for (int64_t i = 0; i < 18 * 32; ++i) {
        EXPECT_TRUE(std::isnan(FromBf16(out.data()[i]))) << keys << ", " << at << ", " << i;
      }

      data.k_values[Size(at * 32 + 3)] = good;
      data.v_values[Size(at * 32 + 3)] = kNaN;
      data.Pack(kernels());
      data.Run(kernels(), out.data(), 0, 18);
      for (int64_t i = 0; i < 18 * 32; ++i) {
        EXPECT_EQ(std::isnan(FromBf16(out.data()[i])), i % 32 == 3)
            << keys << ", " << at << ", " << i;
      }
    }
  }
}

// Scores of extreme queries and keys are far beyond what their rounding lets anybody agree on; a
// mean of the values is between them in any case.
TEST_P(AmxKernelsTest, AttentionOfExtremeQueriesAndKeysStaysBetweenTheValues) {
  for (const Values of_queries : kAllValues) {
    for (const Values of_keys : kAllValues) {
      for (const int keys : {1, 7, 17, 49, 81, 256}) {
        AttentionData data(kernels(), {21, keys, 32}, Values::kUnit);
        data.q_values = Rounded(Numbers(21 * 32, of_queries, 4));
        data.k_values = Rounded(Numbers(int64_t{keys} * 32, of_keys, 5));
        data.Pack(kernels());
        Halves out(data.size());
        data.Run(kernels(), out.data(), 0, 21);
        for (int64_t i = 0; i < 32; ++i) {
          float least = kInfinity, most = -kInfinity;
          for (int64_t j = 0; j < keys; ++j) {
            least = std::min(least, data.v_values[Size(j * 32 + i)]);
            most = std::max(most, data.v_values[Size(j * 32 + i)]);
          }
          for (int64_t r = 0; r < 21; ++r) {
            const float x = FromBf16(out.data()[r * 32 + i]);
            ASSERT_TRUE(x >= least - 0.02f && x <= most + 0.02f) << x << ", " << keys << " keys";
          }
        }
      }
    }
  }
}

TEST_P(AmxKernelsTest, SplittingTheQueriesChangesNoBit) {
  // Scores around the limit from which on the maximum is subtracted: a group's neighbours decide.
  for (const int d : {32, 64}) {
    for (const int keys : {49, 60, 81}) {
      for (const float scale : {0.4f, 1.2f, 3.0f}) {
        AttentionData data(kernels(), {203, keys, d}, Values::kUnit, 0, 0, scale);
        Halves whole(data.size()), pieces(data.size());
        data.Run(kernels(), whole.data(), 0, 203);
        InPieces(203, [&](int64_t first, int64_t rows) {
          data.Run(kernels(), pieces.data(), first, rows);
        });
        EXPECT_EQ(whole.bits(), pieces.bits());
      }
    }
  }
}

// ------------------------------------------------------------------------------------------- rest

TEST_P(AmxKernelsTest, NothingInFrontOfTheBuffersIsRead) {
  const GuardedBuffer::AtTheFront at_the_front;
  for (const LinearCase c : {LinearCase{1, 10, 33}, {7, 32, 32}, {17, 64, 96}, {53, 100, 640}}) {
    LinearData data(kernels(), c, Values::kUnit);
    CheckLinear(kernels(), data, true);
  }
  for (const int64_t rows : {1, 7, 33}) {
    LayerNormData data(Numbers(rows * 96, Values::kUnit, 3), 96);
    CheckLayerNorm(kernels(), data, rows, 96, 1e-6f);
  }
  for (const DwconvCase c : {DwconvCase{1, 1, 32}, {3, 2, 32}, {7, 9, 96}}) {
    CheckDwconv(kernels(), c, Values::kUnit, Gelu::kErf);
  }
  for (const AttentionCase c : {AttentionCase{1, 1, 32}, {7, 49, 32}, {17, 17, 64}, {33, 81, 64}}) {
    AttentionData data(kernels(), c, Values::kUnit);
    CheckAttention(kernels(), data);
  }
}

TEST_P(AmxKernelsTest, NoRowsAreNoWork) {
  Halves out(2048);
  const Bits before = out.bits();
  LinearData linear(kernels(), {3, 64, 64}, Values::kUnit);
  for (const Output output : {Output::kActivation, Output::kHidden, Output::kFloat}) {
    linear.Run(kernels(), out.data(), true, 0, 0, output);
  }
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
  kernels().to_float(linear.a.data(), reinterpret_cast<float*>(out.data()), 0);
  EXPECT_EQ(out.bits(), before);
}

TEST_P(AmxKernelsTest, FloatsBecomeTheNearestBf16) {
  auto in = Numbers(1003, Values::kUnit, 1);
  in.insert(in.end(), {0.0f, -0.0f, kInfinity, -kInfinity, 3.3e38f, 65504.0f, 1.00390625f});
  const int64_t n = static_cast<int64_t>(in.size());
  Halves there(n);
  GuardedBuffer back(in.size() * 4);
  kernels().from_float(in.data(), there.data(), n);
  kernels().to_float(there.data(), back.data(), n);
  for (size_t i = 0; i < in.size(); ++i) {
    EXPECT_EQ(there.data()[i], ToBf16(in[i])) << in[i];
    EXPECT_EQ(back.data()[i], Rounded(in[i]));
  }
  EXPECT_TRUE(there.OnlyValidWritten());
  EXPECT_TRUE(back.OnlyValidWritten());
  EXPECT_EQ(kernels().activation_bytes, 2);
  EXPECT_EQ(kernels().hidden_bytes, 2);
}

TEST_P(AmxKernelsTest, ThreadsAndKernelsShareNoTiles) {
  // Linear layers and attention configure tiles differently; threads have their own.
  LinearData linear(kernels(), {77, 64, 160}, Values::kUnit);
  AttentionData attention(kernels(), {40, 49, 32}, Values::kUnit);
  Halves linear_out(77 * 64), attention_out(attention.size());
  linear.Run(kernels(), linear_out.data(), false, 0, 77);
  attention.Run(kernels(), attention_out.data(), 0, 40);
  const Bits linear_bits = linear_out.bits(), attention_bits = attention_out.bits();
  std::vector<std::thread> threads;
  std::vector<int> wrong(2, 0);
  for (size_t t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      if (!kernels().prepare_thread()) ++wrong[t];
      for (int round = 0; round < 100; ++round) {
        Halves a(77 * 64), b(attention.size());
        linear.Run(kernels(), a.data(), false, 0, 77);
        attention.Run(kernels(), b.data(), 0, 40);
        linear.Run(kernels(), a.data(), false, 0, 5);
        wrong[t] += a.bits() != linear_bits || b.bits() != attention_bits;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(2, 0));
}

}  // namespace
}  // namespace pyramid::kernels

#endif
