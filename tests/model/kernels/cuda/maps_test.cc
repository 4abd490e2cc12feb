// The maps that the CUDA kernels go by, over the case table: everything is somebody's, once, and
// fits.
#include "model/kernels/cuda/maps.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>
#include <vector>

#include "tests/model/kernels/case_table.h"

namespace pyramid::kernels::cuda {
namespace {

constexpr int kShapesOfBatch[] = {1, 2, 8, 33, 256};

// All lanes' cells, and how often each came.
void ExpectEachOnce(int rows, int columns, int registers, const std::function<Cell(int, int)>& of) {
  std::vector<int> times(rows * columns);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < registers; ++i) {
      const Cell cell = of(lane, i);
      ASSERT_GE(cell.row, 0);
      ASSERT_LT(cell.row, rows);
      ASSERT_GE(cell.column, 0);
      ASSERT_LT(cell.column, columns);
      ++times[cell.row * columns + cell.column];
    }
  }
  EXPECT_THAT(times, ::testing::Each(1));
}

TEST(CudaMapsTest, EveryElementOfAMultiplyIsOneLanes) {
  ExpectEachOnce(16, 8, 4, AccumulatorCell);
  ExpectEachOnce(16, 16, 8, [](int lane, int i) { return OperandACell(lane, i / 2, i % 2); });
  ExpectEachOnce(16, 8, 4, [](int lane, int i) { return OperandBCell(lane, i / 2, i % 2); });
}

TEST(CudaMapsTest, TwoAccumulatorsAreAnOperand) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int h = 0; h < 2; ++h) {
        // AsOperand: register r has elements 2 · (r % 2) + h of accumulator r / 2.
        const Cell accumulator = AccumulatorCell(lane, r % 2 * 2 + h), a = OperandACell(lane, r, h);
        EXPECT_EQ(a.row, accumulator.row);
        EXPECT_EQ(a.column, r / 2 * 8 + accumulator.column);
      }
    }
  }
}

// What ldmatrix gives lane `lane` in half `h` of register `m`, as a cell of the tile in shared
// memory.
Cell Loaded(const std::function<Cell(int)>& address, bool transposed, int lane, int m, int h) {
  const int row = transposed ? lane % 4 * 2 + h : lane / 4;
  const int column = transposed ? lane / 4 : lane % 4 * 2 + h;
  const Cell start = address(8 * m + row);
  return {start.row, start.column + column};
}

TEST(CudaMapsTest, LoadedMatricesAreOperands) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int m = 0; m < 4; ++m) {
      for (int h = 0; h < 2; ++h) {
        const Cell a = OperandACell(lane, m, h);      // [m][k]
        const Cell b = OperandBCell(lane, m % 2, h);  // [k][n], of the first or second eight n
        const int n = b.column + m / 2 * 8;
        const Cell down = Loaded(DownFirst, false, lane, m, h);
        EXPECT_TRUE(down.row == a.row && down.column == a.column);
        const Cell across_transposed = Loaded(AcrossFirst, true, lane, m, h);  // of [k][m]
        EXPECT_TRUE(across_transposed.row == a.column && across_transposed.column == a.row);
        const Cell across = Loaded(AcrossFirst, false, lane, m, h);  // of [n][k]
        EXPECT_TRUE(across.row == n && across.column == b.row);
        const Cell down_transposed = Loaded(DownFirst, true, lane, m, h);  // of [k][n]
        EXPECT_TRUE(down_transposed.row == b.row && down_transposed.column == n);
      }
    }
  }
}

TEST(CudaMapsTest, MatrixRowsLieInDifferentBanks) {
  for (const int columns : {32, 64, kKeyChunk}) {
    std::set<int> banks;  // of eight rows of 16 bytes
    for (int row = 0; row < 8; ++row) {
      EXPECT_EQ(row * SharedStride(columns) * 2 % 16, 0);
      for (int word = 0; word < 4; ++word) {
        banks.insert((row * SharedStride(columns) * 2 / 4 + word) % 32);
      }
    }
    EXPECT_EQ(banks.size(), 32u) << columns;
  }
}

TEST(CudaMapsTest, EveryQueryIsOneWarpsAndEveryKeyHasAStep) {
  for (const AttentionCase& test : AttentionCases()) {
    const int queries = static_cast<int>(test.queries);
    const int tiles = CeilDiv(queries, kQueryTile);
    for (const int both : kShapesOfBatch) {
      std::vector<int> times(queries);
      const int each = TilesPerBlock(tiles, both), blocks = AttentionBlocks(queries, both);
      for (int block = 0; block < blocks; ++block) {
        const int last = std::min(tiles, (block + 1) * each);
        ASSERT_LT(block * each, last);  // no block without work
        for (int tile = block * each; tile < last; ++tile) {
          for (int warp = 0; warp < kWarps; ++warp) {
            const int first = tile * kQueryTile + warp * kWarpQueries;
            for (int q = first; q < std::min(queries, first + kWarpQueries); ++q) ++times[q];
          }
        }
      }
      ASSERT_THAT(times, ::testing::Each(1)) << queries << " queries, " << both << " heads";
    }
    EXPECT_GE(PaddedKeys(test.keys), test.keys);
    EXPECT_LT(PaddedKeys(test.keys), test.keys + kKeyStep);
    EXPECT_LE(PaddedKeys(test.keys), StepsFor(test.keys) * kKeyStep);
    EXPECT_LE(AttentionSharedBytes(test.keys, test.d), kMostSharedBytes);
    EXPECT_EQ(AttentionSharedBytes(test.keys, test.d) % 16, 0);
  }
}

TEST(CudaMapsTest, EveryTileOfTheBackwardPassIsOneSplits) {
  for (const AttentionCase& test : AttentionCases()) {
    const int queries = static_cast<int>(test.queries);
    for (const int tile : {kQueryTile, kPlainTile}) {
      for (const int both : kShapesOfBatch) {
        const int tiles = CeilDiv(queries, tile);
        const int each = TilesPerSplit(queries, test.keys, both, tile);
        const int splits = QuerySplits(queries, test.keys, both, tile);
        ASSERT_GE(splits * each, tiles);
        ASSERT_LT((splits - 1) * each, tiles);  // no split without work
        ASSERT_EQ(DkvPartialCount(both, 1, queries, test.keys, test.d, tile),
                  int64_t{splits} * both * test.keys * 2 * test.d);
      }
    }
    EXPECT_GE(KeyChunks(test.keys) * kKeyChunk, test.keys);
    EXPECT_LT((KeyChunks(test.keys) - 1) * kKeyChunk, test.keys);
    EXPECT_EQ(DqPartialCount(2, 3, 5, test.keys, test.d),
              test.keys <= kKeyChunk ? 0 : int64_t{KeyChunks(test.keys)} * 2 * 3 * 5 * test.d);
  }
  for (const int d : {32, 64}) {
    EXPECT_LE(AttentionBackwardSharedBytes(d), kMostSharedBytes);
    EXPECT_LE(PlainAttentionSharedBytes(d), kMostSharedBytes);
    EXPECT_LE(PlainBackwardSharedBytes(d), kMostSharedBytes);
  }
}

TEST(CudaMapsTest, EveryPixelAndChannelIsOneLanes) {
  for (const DwconvCase& test : DwconvCases()) {
    for (const int64_t batch : {1, 3}) {
      const int64_t strips = Strips(batch, test.height, test.width);
      std::vector<int> times(batch * test.height * test.width);
      for (int64_t index = 0; index < strips; ++index) {
        const Strip s = StripAt(index, test.height, test.width);
        ASSERT_GE(s.count, 1);
        ASSERT_LE(s.count, kStrip);
        ASSERT_EQ(s.y, s.row % test.height);
        for (int x = s.x; x < s.x + s.count; ++x) ++times[s.row * test.width + x];
      }
      ASSERT_THAT(times, ::testing::Each(1)) << test.height << "x" << test.width;
      const int64_t each = DwconvBackwardStripsPerBlock(strips, test.c);
      const int partials = DwconvPartials(strips, test.c);
      ASSERT_GE(partials * each, strips);
      ASSERT_LT((partials - 1) * each, strips);
    }
    std::vector<int> channels(test.c);
    for (int block = 0; block < ChannelBlocks(test.c); ++block) {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < kGroup && ChannelOf(block, lane) < test.c; ++i) {
          ++channels.at(ChannelOf(block, lane) + i);
        }
      }
    }
    EXPECT_THAT(channels, ::testing::Each(1)) << test.c;
  }
  EXPECT_LE(kDwconvSharedBytes, kMostSharedBytes);
}

TEST(CudaMapsTest, EveryChannelOfARowIsOneLanes) {
  for (int c = kGroup; c <= kNormMostChannels; c += kGroup) {
    std::vector<int> channels(c);
    const int lanes = LanesPerRow(c);
    for (int group = 0; group < GroupsPerLane(c); ++group) {
      for (int place = 0; place < lanes; ++place) {
        const int first = NormChannel(group, lanes, place);
        for (int i = 0; i < kGroup && first < c; ++i) ++channels.at(first + i);
      }
    }
    EXPECT_THAT(channels, ::testing::Each(1)) << c;
    EXPECT_LE(GroupsPerLane(c), 8);  // the kernel is compiled for up to eight
    EXPECT_LE(LayerNormBackwardSharedBytes(c), kMostSharedBytes);
    EXPECT_EQ(LayerNormBackwardSharedBytes(c) % 16, 0);
    for (const int64_t rows : {1, 33, 3136, 100352}) {
      EXPECT_GE(LayerNormPartials(rows, c), 1);
      EXPECT_LE(LayerNormPartials(rows, c), kNormMostPartials);
    }
  }
}

}  // namespace
}  // namespace pyramid::kernels::cuda
