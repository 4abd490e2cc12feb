// Linear layers of bf16 on AVX512-BF16's dot products of pairs, for machines without AMX tiles. The
// weights are packed for tiles (bf16_outputs.h): a row of a tile is one vector, 16 outputs' pairs.
//
// An output is the same sum in the same order whatever block its row is in.
#include <array>
#include <utility>

#include "model/kernels/bf16_outputs.h"

namespace pyramid::kernels::amx {
namespace {

constexpr int kBlockRows = 12;  // times two vectors: 24 of the 32 registers are sums
// Rows that stay in the second-level cache while all panels pass over them.
constexpr int64_t kChunkBytes = 512 << 10;

inline __m512 AddProducts(__m512 sum, uint32_t pair, __m512i weights) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)),
                          (__m512bh)weights);
}

inline uint32_t PairAt(const uint16_t* at) {
  uint32_t pair = 0;
  __builtin_memcpy(&pair, at, sizeof pair);
  return pair;
}

// Blocks of rows times a panel, one after the other.
struct Blocks {
  int64_t count = 0;
  const uint16_t* a = nullptr;
  const uint16_t* panel = nullptr;
  const float* bias = nullptr;
  const uint16_t* residual = nullptr;
  char* out = nullptr;
};

// A block of kRows rows; only the columns of `mask` if not kFull. Nothing behind the last row's k
// numbers is read.
template <int kRows, typename Finisher, bool kFull>
inline void Products(const LinearParams& p, const uint16_t* a, const uint16_t* panel,
                     const float* bias, const uint16_t* residual, char* out, __mmask32 mask) {
  const int64_t lda = p.lda;
  const int k = p.k;
  __m512 sum[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = _mm512_loadu_ps(bias);
    sum[r][1] = _mm512_loadu_ps(bias + kTile);
  }
  // Rows are reached as group + {0, 1, 2} lda: one pointer a row is more than x86 has registers.
  constexpr int kGroups = (kRows + 2) / 3;
  const uint16_t* group[kGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) group[g] = a + 3 * g * lda;
  for (int first = 0; first < k; first += kBlock) {
    const int pairs = k - first < kBlock ? (k - first) / 2 : kTile;
    for (int i = 0; i < pairs; ++i) {
      const __m512i left = _mm512_loadu_si512(panel + i * kBlock);
      const __m512i right = _mm512_loadu_si512(panel + kTileElements + i * kBlock);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const uint32_t x = PairAt(group[r / 3] + first + 2 * i + (r % 3) * lda);
        sum[r][0] = AddProducts(sum[r][0], x, left);
        sum[r][1] = AddProducts(sum[r][1], x, right);
      }
    }
    panel += kStepElements;
  }
  if (k % 2 != 0) {
    const uint16_t* last = panel - kStepElements + k % kBlock / 2 * kBlock;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const uint32_t x = a[r * lda + k - 1];
      sum[r][0] = AddProducts(sum[r][0], x, _mm512_loadu_si512(last));
      sum[r][1] = AddProducts(sum[r][1], x, _mm512_loadu_si512(last + kTileElements));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    Finisher::template Row<kFull>(sum[r][0], sum[r][1], residual, out, mask);
    out += p.ldo * Finisher::kBytes;
    if (Finisher::kReads) residual += p.ldo;
  }
}

template <int kRows, typename Finisher, bool kFull>
void AllProducts(const LinearParams& p, const Blocks& blocks, __mmask32 mask) {
  const uint16_t* a = blocks.a;
  const uint16_t* residual = blocks.residual;
  char* out = blocks.out;
  for (int64_t b = 0; b < blocks.count; ++b) {
    Products<kRows, Finisher, kFull>(p, a, blocks.panel, blocks.bias, residual, out, mask);
    a += kRows * p.lda;
    if (Finisher::kReads) residual += kRows * p.ldo;
    out += kRows * p.ldo * Finisher::kBytes;
  }
}

using BlocksFunction = void (*)(const LinearParams&, const Blocks&, __mmask32);
// By rows, less one.
template <typename Finisher, bool kFull, int... kLess>
constexpr std::array<BlocksFunction, kBlockRows> ByRows(std::integer_sequence<int, kLess...>) {
  return {AllProducts<kLess + 1, Finisher, kFull>...};
}

// Rows [first, behind) times a panel, in blocks of as equal heights as can be.
template <typename Finisher>
void Rows(const LinearParams& p, int64_t first, int64_t behind, int64_t panel) {
  constexpr auto kHeights = std::make_integer_sequence<int, kBlockRows>();
  static constexpr auto kFull = ByRows<Finisher, true>(kHeights);
  static constexpr auto kPart = ByRows<Finisher, false>(kHeights);
  const int64_t count = behind - first, blocks = (count + kBlockRows - 1) / kBlockRows;
  if (count == 0) return;
  const int64_t columns = Least(p.n - panel * kBlock, kBlock);
  const __mmask32 mask = columns == kBlock ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
  const int64_t rows = count / blocks, larger = count % blocks;  // so many have a row more
  const auto multiply = [&](int64_t row, int64_t height, int64_t number) {
    if (number == 0) return;
    const int64_t at = row * p.ldo + panel * kBlock;
    const Blocks some{
        .count = number,
        .a = static_cast<const uint16_t*>(p.a) + row * p.lda,
        .panel = PanelOf(p, panel),
        .bias = p.bias + panel * kBlock,
        .residual = Finisher::kReads ? static_cast<const uint16_t*>(p.residual) + at : nullptr,
        .out = static_cast<char*>(p.out) + at * Finisher::kBytes};
    (columns == kBlock ? kFull : kPart)[static_cast<size_t>(height - 1)](p, some, mask);
  };
  multiply(first, rows + 1, larger);
  multiply(first + larger * (rows + 1), rows, blocks - larger);
}

template <typename Finisher>
void Run(const LinearParams& p) {
  const int64_t chunks = (p.m * p.k * int64_t{sizeof(uint16_t)} + kChunkBytes - 1) / kChunkBytes;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t panel = 0; panel < Panels(p.n); ++panel) {
      Rows<Finisher>(p, p.m * chunk / chunks, p.m * (chunk + 1) / chunks, panel);
    }
  }
}

}  // namespace

void LinearByPairs(const LinearParams& p) {
  if (p.m <= 0) return;
  const auto run = [&p](auto finisher) { Run<decltype(finisher)>(p); };
  p.output == Output::kFloat ? WithFinish<Kind::kFloat>(p, run) : WithFinish<Kind::kBf16>(p, run);
}

}  // namespace pyramid::kernels::amx
