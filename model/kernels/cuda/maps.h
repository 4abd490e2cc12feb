// Who does what: how the CUDA kernels cut their work into blocks, warps and lanes, where a lane's
// elements lie, and how much shared memory and workspace that takes. Pure functions, used by the
// kernels, by their launchers and by the host's tests.
#ifndef PYRAMID_MODEL_KERNELS_CUDA_MAPS_H_
#define PYRAMID_MODEL_KERNELS_CUDA_MAPS_H_

#include <cstdint>

#ifdef __CUDACC__
#define PYRAMID_BOTH __host__ __device__ constexpr
#else
#define PYRAMID_BOTH constexpr
#endif

namespace pyramid::kernels::cuda {

inline constexpr int kLanes = 32;
inline constexpr int kWarps = 4;  // a block, in every kernel here
inline constexpr int kThreads = kLanes * kWarps;
// What a block of every supported architecture can have: sm_120's 99 KB is the smallest.
inline constexpr int kMostSharedBytes = 99 * 1024;

template <typename A, typename B>
PYRAMID_BOTH auto CeilDiv(A a, B b) {
  return (a + b - 1) / b;
}
PYRAMID_BOTH int Smaller(int a, int b) { return a < b ? a : b; }

struct Cell {
  int row, column;
};

// ---- mma.sync m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16") ----

// Element `i` of 4 of the f32 accumulator that `lane` holds, in the 16x8 tile.
PYRAMID_BOTH Cell AccumulatorCell(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}
// Half `h` of register `r` of the A operand, in the 16x16 tile.
PYRAMID_BOTH Cell OperandACell(int lane, int r, int h) {
  return {lane / 4 + r % 2 * 8, r / 2 * 8 + lane % 4 * 2 + h};
}
// Half `h` of register `r` of the B operand, in the 16x8 tile (row: k, column: n).
PYRAMID_BOTH Cell OperandBCell(int lane, int r, int h) {
  return {r * 8 + lane % 4 * 2 + h, lane / 4};
}

// ldmatrix.x4 loads four 8x8 matrices, the rows of matrix m from the addresses that lanes 8m … 8m +
// 7 give. In a 16x16 tile of shared memory, down first:
//   A operand of a [m][k] tile;  transposed: two B operands of a [k][n] tile
PYRAMID_BOTH Cell DownFirst(int lane) { return {lane % 16, lane / 16 * 8}; }
// and across first:
//   two B operands of a [n][k] tile;  transposed: A operand of a [k][m] tile
PYRAMID_BOTH Cell AcrossFirst(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }

// ---- Attention on tensor cores ----

inline constexpr int kMostKeys = 256;
inline constexpr int kQueryTile = 64;      // queries a block takes at once
inline constexpr int kWarpQueries = 16;    // of them a warp
inline constexpr int kKeyStep = 16;        // keys a multiply of probabilities and values takes
inline constexpr int kKeyChunk = 64;       // keys a block of the backward pass takes
inline constexpr int kPiece = 8;           // 16-bit elements in 16 bytes
inline constexpr int kPad = 8;             // elements after each shared row: no bank conflicts
inline constexpr int kBlocksWanted = 512;  // enough for 132 to 148 multiprocessors, several each

// Key steps of the forward kernel that takes `keys`: it is compiled for 64, 160 and 256 keys.
PYRAMID_BOTH int StepsFor(int keys) { return keys <= 64 ? 4 : keys <= 160 ? 10 : 16; }
PYRAMID_BOTH int PaddedKeys(int keys) { return CeilDiv(keys, kKeyStep) * kKeyStep; }
// Stride of a shared row of `d` elements.
PYRAMID_BOTH int SharedStride(int d) { return d + kPad; }

// Tiles of queries that a block takes one after the other with the same keys in shared memory: more
// where there are blocks enough without it.
PYRAMID_BOTH int TilesPerBlock(int tiles, int64_t heads_and_pictures) {
  const int64_t spare = tiles * heads_and_pictures / kBlocksWanted;
  return spare >= 4 ? Smaller(4, tiles) : spare >= 2 ? Smaller(2, tiles) : 1;
}
PYRAMID_BOTH int AttentionSharedBytes(int keys, int d) {
  return (2 * PaddedKeys(keys) + kQueryTile) * SharedStride(d) * 2;
}
// Query blocks of a head.
PYRAMID_BOTH int AttentionBlocks(int queries, int64_t heads_and_pictures) {
  const int tiles = CeilDiv(queries, kQueryTile);
  return CeilDiv(tiles, TilesPerBlock(tiles, heads_and_pictures));
}

// Backward: a block takes one chunk of keys and the query tiles of one split.
PYRAMID_BOTH int KeyChunks(int keys) { return CeilDiv(keys, kKeyChunk); }
PYRAMID_BOTH int TilesPerSplit(int queries, int keys, int64_t heads_and_pictures, int tile) {
  const int tiles = CeilDiv(queries, tile);
  const int64_t wanted = CeilDiv(int64_t{kBlocksWanted}, heads_and_pictures * KeyChunks(keys));
  return CeilDiv(tiles, wanted < tiles ? static_cast<int>(wanted) : tiles);
}
PYRAMID_BOTH int QuerySplits(int queries, int keys, int64_t heads_and_pictures, int tile) {
  return CeilDiv(CeilDiv(queries, tile), TilesPerSplit(queries, keys, heads_and_pictures, tile));
}
PYRAMID_BOTH int AttentionBackwardSharedBytes(int d) {
  // Keys, values, queries, gradients of the output; probabilities and their gradients; three
  // numbers a query.
  return 4 * kKeyChunk * SharedStride(d) * 2 + 2 * kQueryTile * SharedStride(kKeyChunk) * 2 +
         3 * kQueryTile * 4;
}

// ---- Attention in f32, without tensor cores ----

inline constexpr int kPlainTile = 32;  // queries a block of the backward pass takes at once
inline constexpr int kPlainPad = 4;    // floats after each shared row: 16 bytes
// Forward: a thread a query, kKeyChunk keys and values at a time in shared memory.
PYRAMID_BOTH int PlainAttentionSharedBytes(int d) { return 2 * kKeyChunk * d * 4; }
PYRAMID_BOTH int PlainBackwardSharedBytes(int d) {
  return (2 * kKeyChunk * (d + kPlainPad) + 2 * kPlainTile * (d + kPlainPad) +
          2 * kPlainTile * (kKeyChunk + kPlainPad) + 3 * kPlainTile) *
         4;
}

// Workspaces of either backward pass.
PYRAMID_BOTH int64_t DkvPartialCount(int batch, int heads, int queries, int keys, int d, int tile) {
  return int64_t{QuerySplits(queries, keys, int64_t{batch} * heads, tile)} * batch * keys * 2 *
         heads * d;
}
PYRAMID_BOTH int64_t DqPartialCount(int batch, int heads, int queries, int keys, int d) {
  return KeyChunks(keys) == 1 ? 0 : int64_t{KeyChunks(keys)} * batch * queries * heads * d;
}

// ---- Depthwise convolution ----

inline constexpr int kGroup = 4;                       // channels of a lane
inline constexpr int kWarpChannels = kLanes * kGroup;  // channels of a block
inline constexpr int kStrip = 8;                       // pixels of a row that a lane slides over
inline constexpr int kStripsPerWarp = 4;               // forward
inline constexpr int kTaps = 9;

struct Strip {
  int64_t row;   // of batch · height
  int y;         // in its picture
  int x, count;  // pixels x … x + count - 1
};
PYRAMID_BOTH int StripsPerRow(int width) { return CeilDiv(width, kStrip); }
PYRAMID_BOTH int64_t Strips(int64_t batch, int height, int width) {
  return batch * height * StripsPerRow(width);
}
PYRAMID_BOTH Strip StripAt(int64_t index, int height, int width) {
  const int strips = StripsPerRow(width);
  const int64_t row = index / strips;
  const int x = static_cast<int>(index % strips) * kStrip;
  return {row, static_cast<int>(row % height), x, Smaller(kStrip, width - x)};
}
// First channel of a lane; it may lie behind the last.
PYRAMID_BOTH int ChannelOf(int block, int lane) { return block * kWarpChannels + lane * kGroup; }
PYRAMID_BOTH int ChannelBlocks(int c) { return CeilDiv(c, kWarpChannels); }
PYRAMID_BOTH int64_t DwconvStripsPerBlock() { return kWarps * kStripsPerWarp; }
// Backward: blocks that share a channel, each with its own partial sum.
PYRAMID_BOTH int64_t DwconvBackwardStripsPerBlock(int64_t strips, int c) {
  const int64_t wanted = CeilDiv(2 * kBlocksWanted, ChannelBlocks(c));
  const int64_t least = DwconvStripsPerBlock();
  const int64_t share = CeilDiv(strips, wanted);
  return share < least ? least : share;
}
PYRAMID_BOTH int DwconvPartials(int64_t strips, int c) {
  return static_cast<int>(CeilDiv(strips, DwconvBackwardStripsPerBlock(strips, c)));
}
PYRAMID_BOTH int64_t DwconvPartialCount(int64_t batch, int height, int width, int c) {
  return int64_t{DwconvPartials(Strips(batch, height, width), c)} * (kTaps + 1) * c;
}
inline constexpr int kDwconvSharedBytes = kWarps * (kTaps + 1) * kWarpChannels * 4;

// ---- LayerNorm ----

inline constexpr int kNormMostChannels = 1024;
inline constexpr int kNormMostPartials = 256;
// Lanes that share a row, each with kGroup channels at a time: a warp has several narrow rows.
PYRAMID_BOTH int LanesPerRow(int c) { return c <= 8 * kGroup ? 8 : c <= 16 * kGroup ? 16 : 32; }
PYRAMID_BOTH int RowsPerBlock(int c) { return kThreads / LanesPerRow(c); }
// Groups of channels that a lane has: its group g starts at channel (g · LanesPerRow + its place in
// the row) · kGroup, which may lie behind the last.
PYRAMID_BOTH int GroupsPerLane(int c) { return CeilDiv(c, LanesPerRow(c) * kGroup); }
PYRAMID_BOTH int NormChannel(int group, int lanes, int place) {
  return (group * lanes + place) * kGroup;
}
PYRAMID_BOTH int LayerNormPartials(int64_t rows, int c) {
  const int64_t blocks = CeilDiv(rows, RowsPerBlock(c));
  return blocks < kNormMostPartials ? static_cast<int>(blocks) : kNormMostPartials;
}
PYRAMID_BOTH int64_t LayerNormPartialCount(int64_t rows, int c) {
  return int64_t{LayerNormPartials(rows, c)} * 2 * c;
}
PYRAMID_BOTH int LayerNormBackwardSharedBytes(int c) { return RowsPerBlock(c) * 2 * c * 4; }

}  // namespace pyramid::kernels::cuda

#endif  // PYRAMID_MODEL_KERNELS_CUDA_MAPS_H_
