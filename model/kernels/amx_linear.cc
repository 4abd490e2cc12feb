// Linear layers of bf16 on AMX tiles: 32 x 32 outputs are four tiles of f32 sums.
//
// A block of K = 32 costs 64 cycles of multiplying, 64 of storing its tiles and about 90 of turning
// them into outputs, and the processor does them one after the other unless the program interleaves
// them. So tiles go to a scratch array, and what is in the scratch is turned into outputs
// ("finished") while the next block multiplies:
//   K to 128  16 x 32 halves alternate between two pairs of tiles: one multiplies while the other
//             is stored and finished (1.06-1.18x at K = 32, 1.06x at 128)
//   else      four rows of the last block are finished after each step of K (up to 1.1x)
// From K = 768 on neither rows nor weights stay in the first-level cache: kDeepRows rows share a
// slice of the weights that does, sums waiting in f32 meanwhile (1.1-1.2x, and 1.4-1.7x with
// weights beyond the second-level cache). Tried and lost: prefetching the weights (the path from
// the second-level cache is full), copying the rows to tiles of their own, integer rounding.
//
// An output is the same sum in the same order wherever its row stands. The last rows, if less than
// a tile, are a tile that begins earlier: what it has again is not written again.
#include "model/kernels/bf16_outputs.h"

namespace pyramid::kernels::amx {
namespace {

constexpr int kFinishedAStep = 4;          // rows
constexpr int64_t kShallowSteps = 4;       // up to here halves alternate
constexpr int64_t kSlicedSteps = 24;       // from here on K is cut
constexpr int64_t kDeepSteps = 8;          // steps of a slice: 16 KiB of weights
constexpr int64_t kDeepRows = 128;         // rows that share it
constexpr int64_t kNearWeights = 1 << 20;  // bytes that stay in the second-level cache
constexpr int64_t kFarBlocks = 16;         // blocks that pass over a panel of weights that don't

// Tiles 0 to 3: sums, 4 and 5: rows, 6 and 7: weights.
constexpr TileConfig Config(uint8_t rows) {
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = t < 6 ? rows : 16;
  }
  return config;
}
struct Configs {
  TileConfig of[kTile + 1];  // by rows
};
constexpr Configs AllConfigs() {
  Configs all = {};
  for (int rows = 1; rows <= kTile; ++rows) all.of[rows] = Config(static_cast<uint8_t>(rows));
  return all;
}
constexpr Configs kConfigs = AllConfigs();

// Sums in the scratch that are not outputs yet: rows of 32.
struct Pending {
  const float* sums;
  const uint16_t* residual;
  char* out;
  int rows;
  __mmask32 columns;

  bool whole() const { return columns == ~__mmask32{0}; }
};

template <typename Finisher, int kRows>
__attribute__((always_inline)) inline void FinishSome(const LinearParams& p, Pending& pending) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    Finisher::template Row<true>(pending.sums, pending.residual, pending.out, 0);
    pending.sums += kBlock;
    pending.out += p.ldo * Finisher::kBytes;
    if (Finisher::kReads) pending.residual += p.ldo;
  }
  pending.rows -= kRows;
}

// By value: what a call could change would live in memory, and a tile instruction may change
// memory.
template <typename Finisher>
__attribute__((noinline)) void FinishRest(const LinearParams p, Pending pending) {
  if (pending.whole()) {
    while (pending.rows >= kTile) FinishSome<Finisher, kTile>(p, pending);
    while (pending.rows >= kFinishedAStep) FinishSome<Finisher, kFinishedAStep>(p, pending);
  }
  for (; pending.rows > 0; --pending.rows) {
    Finisher::template Row<false>(pending.sums, pending.residual, pending.out, pending.columns);
    pending.sums += kBlock;
    pending.out += p.ldo * Finisher::kBytes;
    if (Finisher::kReads) pending.residual += p.ldo;
  }
}

template <typename Finisher>
__attribute__((always_inline)) inline void FinishAll(const LinearParams& p, Pending& pending) {
  if (pending.whole()) {
    while (pending.rows >= kFinishedAStep) FinishSome<Finisher, kFinishedAStep>(p, pending);
  }
  if (pending.rows > 0) FinishRest<Finisher>(p, pending);
  pending.rows = 0;
}

// `sums`, of rows [row, behind) and a panel's columns.
template <typename Finisher>
inline Pending PendingOf(const LinearParams& p, const float* sums, int64_t row, int64_t behind,
                         int64_t panel) {
  const int64_t columns = p.n - panel * kBlock, at = row * p.ldo + panel * kBlock;
  return {.sums = sums,
          .residual = Finisher::kReads ? static_cast<const uint16_t*>(p.residual) + at : nullptr,
          .out = static_cast<char*>(p.out) + at * Finisher::kBytes,
          .rows = static_cast<int>(behind - row),
          .columns = columns >= kBlock ? ~__mmask32{0} : (__mmask32{1} << columns) - 1};
}

// -------------------------------------------------------------------------------- multiplications

struct Rows {
  const uint16_t* at;
  int64_t stride;  // bytes
};

inline Rows RowsOf(const LinearParams& p, int64_t row) {
  return {static_cast<const uint16_t*>(p.a) + row * p.lda, p.lda * 2};
}

// The last step of rows whose K isn't a multiple of 32: copied, zeros behind.
__attribute__((noinline)) Rows LastStep(const LinearParams p, int64_t row, uint16_t* copy) {
  const __mmask32 mask = (__mmask32{1} << (p.k % kBlock)) - 1;
  const uint16_t* at = RowsOf(p, row).at + p.k / kBlock * kBlock;
  for (int64_t r = 0; r < Least(kTile, p.m - row); ++r) {
    _mm512_store_si512(copy + r * kBlock, _mm512_maskz_loadu_epi16(mask, at + r * p.lda));
  }
  return {copy, 64};
}

// One step of 32 x 32 sums in tiles 0 to 3; of 16 x 32 if not kTwo.
template <bool kTwo>
__attribute__((always_inline)) inline void BlockStep(Rows first, Rows second,
                                                     const uint16_t* weight) {
  LoadTile<4>(first.at, first.stride);
  LoadTile<6>(weight, 64);
  if constexpr (kTwo) LoadTile<5>(second.at, second.stride);
  LoadTile<7>(weight + kTileElements, 64);
  MultiplyTiles<0, 4, 6>();
  if constexpr (kTwo) MultiplyTiles<2, 5, 6>();
  MultiplyTiles<1, 4, 7>();
  if constexpr (kTwo) MultiplyTiles<3, 5, 7>();
}

template <int kSums>
__attribute__((always_inline)) inline void StoreHalf(float* to) {
  StoreTile<kSums>(to, kBlock * sizeof(float));
  StoreTile<kSums + 1>(to + kTile, kBlock * sizeof(float));
}

// ------------------------------------------------------------------------------------ K up to 64

// 16 rows from `row` on times a panel, in tiles kSums and kSums + 1; of them [fresh, behind) are
// wanted. The other pair, which `pending` tells about, is stored and finished meanwhile. kOneStep:
// K is at most 32; a block's rows stay in their tiles for all panels, and a panel's weights for the
// block's second half.
template <typename Finisher, bool kOneStep, int kSums>
__attribute__((always_inline)) inline void Half(const LinearParams& p, int64_t row, int64_t fresh,
                                                int64_t behind, int64_t panel, Pending& pending,
                                                float (&scratch)[2][kTile * kBlock],
                                                uint16_t* copy) {
  constexpr int kRowsTile = kSums == 0 ? 4 : 5;
  const float* bias = p.bias + panel * kBlock;
  LoadTile<kSums>(bias, 0);
  LoadTile<kSums + 1>(bias + kTile, 0);
  Rows rows = RowsOf(p, row);
  const uint16_t* weight = PanelOf(p, panel);
  const int64_t steps = kOneStep ? 1 : Steps(p.k);
  for (int64_t s = 0; s < steps; ++s) {
    if (!kOneStep || panel == 0) {
      if ((s + 1) * kBlock > p.k) rows = LastStep(p, row, copy);
      LoadTile<kRowsTile>(rows.at, rows.stride);
    }
    if (!kOneStep || kSums == 0) {
      LoadTile<6>(weight, 64);
      LoadTile<7>(weight + kTileElements, 64);
    }
    MultiplyTiles<kSums, kRowsTile, 6>();
    MultiplyTiles<kSums + 1, kRowsTile, 7>();
    rows.at += kBlock;
    weight += kStepElements;
  }
  if (pending.rows > 0) {
    StoreHalf<2 - kSums>(scratch[1 - kSums / 2]);
    if (pending.rows == kTile && pending.whole()) {
      FinishSome<Finisher, kTile>(p, pending);
    } else {
      FinishAll<Finisher>(p, pending);
    }
  }
  pending =
      PendingOf<Finisher>(p, scratch[kSums / 2] + (fresh - row) * kBlock, fresh, behind, panel);
}

template <typename Finisher, bool kOneStep>
void Shallow(const LinearParams p) {
  alignas(64) float scratch[2][kTile * kBlock];
  alignas(64) uint16_t copy[kTile * kBlock];
  Pending pending = {};
  for (int64_t first = 0; first < p.m; first += kBlock) {
    const int64_t left = p.m - first;
    for (int64_t panel = 0; panel < Panels(p.n); ++panel) {
      if (left > kTile) {
        Half<Finisher, kOneStep, 0>(p, first, first, first + kTile, panel, pending, scratch, copy);
        const int64_t behind = Least(first + kBlock, p.m);
        Half<Finisher, kOneStep, 2>(p, behind - kTile, first + kTile, behind, panel, pending,
                                    scratch, copy);
      } else {
        const int64_t row = p.m < kTile ? 0 : p.m - kTile;
        Half<Finisher, kOneStep, 0>(p, row, first, p.m, panel, pending, scratch, copy);
        StoreHalf<0>(scratch[0]);
        FinishAll<Finisher>(p, pending);
      }
    }
  }
  if (pending.rows > 0) {
    StoreHalf<2>(scratch[1]);
    FinishAll<Finisher>(p, pending);
  }
}

// ---------------------------------------------------------------------------------------- any K

// Steps [begin, end) of a block of 32 rows (or 16) onto the sums in the tiles, while `pending` is
// finished.
template <typename Finisher, bool kTwo>
__attribute__((always_inline)) inline void Multiply(const LinearParams& p, int64_t row,
                                                    int64_t second_row, int64_t panel,
                                                    int64_t begin, int64_t end, Pending& pending,
                                                    uint16_t* copy) {
  Rows first = RowsOf(p, row), second = RowsOf(p, second_row);
  first.at += begin * kBlock;
  second.at += begin * kBlock;
  const uint16_t* weight = PanelOf(p, panel) + begin * kStepElements;
  for (int64_t s = begin; s < Least(end, p.k / kBlock); ++s) {
    BlockStep<kTwo>(first, second, weight);
    first.at += kBlock;
    second.at += kBlock;
    weight += kStepElements;
    if (pending.rows >= kFinishedAStep && pending.whole()) {
      FinishSome<Finisher, kFinishedAStep>(p, pending);
    }
  }
  if (end * kBlock > p.k) {
    second = kTwo ? LastStep(p, second_row, copy + kTileElements) : second;
    BlockStep<kTwo>(LastStep(p, row, copy), second, weight);
  }
}

template <typename Finisher>
void Deep(const LinearParams p) {
  alignas(64) float scratch[2][kBlock * kBlock];
  alignas(64) float waiting[kDeepRows / kBlock][kBlock * kBlock];
  alignas(64) uint16_t copy[2 * kTileElements];
  const int64_t steps = Steps(p.k), panels = Panels(p.n);
  const int64_t blocks = (p.m + kBlock - 1) / kBlock;
  // Slices of K, and the blocks that pass over one.
  const bool sliced = steps >= kSlicedSteps && blocks > 1;
  const int64_t slice = sliced ? kDeepSteps : steps;
  const int64_t group = sliced ? kDeepRows / kBlock : 1;
  const bool near = panels * steps * kStepElements * 2 <= kNearWeights;
  const int64_t pass = near ? group : kFarBlocks;

  Pending pending = {};
  int turn = 0;
  const auto slice_of = [&](int64_t block, int64_t b, int64_t panel, int64_t begin)
      __attribute__((always_inline)) {
    const int64_t end = Least(begin + slice, steps);
    const int64_t row = block * kBlock, left = p.m - row;
    const bool two = left > kTile;
    const int64_t first_row = two ? row : (p.m < kTile ? 0 : p.m - kTile);
    const int64_t second_row = left >= kBlock ? row + kTile : p.m - kTile;
    // Sums begin with the bias, or with what the slices before have left.
    const float* sums = begin == 0 ? p.bias + panel * kBlock : waiting[b];
    const int64_t stride = begin == 0 ? 0 : kBlock * sizeof(float);
    const float* second_sums = begin == 0 ? sums : sums + kTile * kBlock;
    LoadTile<0>(sums, stride);
    LoadTile<1>(sums + kTile, stride);
    if (two) {
      LoadTile<2>(second_sums, stride);
      LoadTile<3>(second_sums + kTile, stride);
      Multiply<Finisher, true>(p, first_row, second_row, panel, begin, end, pending, copy);
    } else {
      Multiply<Finisher, false>(p, first_row, second_row, panel, begin, end, pending, copy);
    }
    if (end < steps) {
      StoreHalf<0>(waiting[b]);
      if (two) StoreHalf<2>(waiting[b] + kTile * kBlock);
      return;
    }
    FinishAll<Finisher>(p, pending);
    float* to = scratch[turn];
    turn ^= 1;
    if (two) {
      // Where the tiles overlap, they are the same.
      StoreHalf<0>(to);
      StoreHalf<2>(to + (second_row - row) * kBlock);
    } else {
      StoreHalf<0>(to);
      to += (row - first_row) * kBlock;
    }
    pending = PendingOf<Finisher>(p, to, row, Least(row + kBlock, p.m), panel);
  };

  for (int64_t first = 0; first < blocks; first += pass) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t g = first; g < Least(first + pass, blocks); g += group) {
        for (int64_t begin = 0; begin < steps; begin += slice) {
          for (int64_t block = g; block < Least(g + group, blocks); ++block) {
            slice_of(block, block - g, panel, begin);
          }
        }
      }
    }
  }
  FinishAll<Finisher>(p, pending);
}

template <typename Finisher>
void Run(const LinearParams& p) {
  UseTiles(kConfigs.of[Least(p.m, kTile)]);
  if (Steps(p.k) == 1) {
    Shallow<Finisher, true>(p);
  } else if (Steps(p.k) <= kShallowSteps) {
    Shallow<Finisher, false>(p);
  } else {
    Deep<Finisher>(p);
  }
}

void Run(const LinearParams& p, Kind hidden) {
  if (p.m <= 0) return;
  const Kind kind = p.output == Output::kFloat    ? Kind::kFloat
                    : p.output == Output::kHidden ? hidden
                                                  : Kind::kBf16;
  const auto run = [&p](auto finisher) { Run<decltype(finisher)>(p); };
  switch (kind) {
    case Kind::kBf16:
      return WithFinish<Kind::kBf16>(p, run);
    case Kind::kFp16:
      return WithFinish<Kind::kFp16>(p, run);
    case Kind::kFloat:
      return WithFinish<Kind::kFloat>(p, run);
  }
}

// --- Packing: one tile, outputs [output, output + 16) and inputs [input, input + 32) ---

// An output's inputs lie beside each other.
void PackRows(const PackLinearParams& p, int64_t output, int64_t input, uint16_t* to) {
  const __m512 scale = _mm512_set1_ps(p.scale);
  const float* from = p.weight + output * p.output_stride + input;
  __m512i rows[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r, from += p.output_stride) {
    rows[r] = ToBf16(_mm512_mul_ps(_mm512_loadu_ps(from), scale),
                     _mm512_mul_ps(_mm512_loadu_ps(from + 16), scale));
  }
  Transpose(rows);
#pragma GCC unroll 16
  for (int pair = 0; pair < 16; ++pair) _mm512_storeu_si512(to + pair * 32, rows[pair]);
}

// An input's outputs lie beside each other.
void PackColumns(const PackLinearParams& p, int64_t output, int64_t input, uint16_t* to) {
  const __m512 scale = _mm512_set1_ps(p.scale);
  const float* from = p.weight + input * p.input_stride + output;
  for (int pair = 0; pair < 16; ++pair, from += 2 * p.input_stride) {
    const __m512 even = _mm512_mul_ps(_mm512_loadu_ps(from), scale);
    const __m512 odd = _mm512_mul_ps(_mm512_loadu_ps(from + p.input_stride), scale);
    _mm512_storeu_si512(to + pair * 32, Interleave(even, odd));
  }
}

// Part of the tile is outside the weight.
void PackEdge(const PackLinearParams& p, int64_t output, int64_t input, uint16_t* to) {
  for (int64_t i = 0; i < kTileElements; ++i) {
    const int64_t j = output + i % 32 / 2, row = input + i / 32 * 2 + i % 2;
    to[i] = j < p.n && row < p.inputs
                ? ToBf16(p.weight[j * p.output_stride + row * p.input_stride] * p.scale)
                : uint16_t{0};
  }
}

}  // namespace

size_t PackedLinearBytes(int n, int k) {
  return static_cast<size_t>(Panels(n) * Steps(k) * kStepElements) * sizeof(uint16_t);
}

void PackLinear(const PackLinearParams& p) {
  uint16_t* to = static_cast<uint16_t*>(p.packed);
  for (int64_t panel = 0; panel < Panels(p.n); ++panel) {
    for (int64_t step = 0; step < Steps(p.k); ++step) {
      for (int64_t tile = 0; tile < 2; ++tile, to += kTileElements) {
        const int64_t output = panel * kBlock + tile * kTile, input = step * kBlock;
        if (output + kTile > p.n || input + kBlock > p.inputs) {
          PackEdge(p, output, input, to);
        } else if (p.input_stride == 1) {
          PackRows(p, output, input, to);
        } else {
          PackColumns(p, output, input, to);
        }
      }
    }
  }
}

void LinearHiddenFp16(const LinearParams& p) { Run(p, Kind::kFp16); }
void LinearHiddenBf16(const LinearParams& p) { Run(p, Kind::kBf16); }

}  // namespace pyramid::kernels::amx
