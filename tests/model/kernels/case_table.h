// The shapes that every kernel set is tested with, and the values it is tested on. Shared by the
// tests of all sets, gradient checks and benchmarks.
#ifndef PYRAMID_TESTS_MODEL_KERNELS_CASE_TABLE_H_
#define PYRAMID_TESTS_MODEL_KERNELS_CASE_TABLE_H_

#include <array>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace pyramid::kernels {

// The stages of all variants at 224x224 (model/variants.h), each once.
struct StageShape {
  int side;  // of the map; tokens are side * side
  int c;     // channels
  int hidden;
  int heads;  // of c / heads channels
  int keys;
  int reduction_k;  // inputs of the spatial reduction's convolution; 0: none
  int embed_k;      // inputs of the patch embedding's convolution
};
inline constexpr std::array<StageShape, 10> kStages = {{
    {56, 32, 256, 1, 49, 2048, 147},    // b0
    {28, 64, 512, 2, 49, 1024, 288},    //
    {14, 160, 640, 5, 49, 640, 576},    //
    {7, 256, 1024, 8, 49, 0, 1440},     //
    {56, 64, 512, 1, 49, 4096, 147},    // b1 to b4; b2_li reduces with k = c
    {28, 128, 1024, 2, 49, 2048, 576},  //
    {14, 320, 1280, 5, 49, 1280, 1152},
    {7, 512, 2048, 8, 49, 0, 2880},
    {56, 64, 256, 1, 49, 64, 147},  // b5; its stages 3 and 4 are b4's. The reduction is b2_li's
    {28, 128, 512, 2, 49, 128, 576},
}};

// Maps of stages 1 to 4 for pictures of 7x9 tokens, 29², 225², 240x320 and 299² pixels.
struct MapSize {
  int height, width;
};
inline constexpr std::array<MapSize, 17> kOddMaps = {{
    {7, 9},
    {8, 8},
    {4, 4},
    {2, 2},
    {1, 1},
    {57, 57},
    {29, 29},
    {15, 15},
    {60, 80},
    {30, 40},
    {15, 20},
    {8, 10},
    {75, 75},
    {38, 38},
    {19, 19},
    {10, 10},
    {1, 37},
}};

struct LinearCase {
  int64_t m;
  int n, k;
};
inline std::vector<LinearCase> LinearCases() {
  std::vector<LinearCase> all;
  for (const StageShape& s : kStages) {
    const int tokens = s.side * s.side;
    all.push_back({tokens, s.c, s.c});        // q, proj
    all.push_back({s.keys, 2 * s.c, s.c});    // kv
    all.push_back({tokens, s.hidden, s.c});   // fc1
    all.push_back({tokens, s.c, s.hidden});   // fc2
    all.push_back({tokens, s.c, s.embed_k});  // patch embedding
    if (s.reduction_k > 0) all.push_back({s.keys, s.c, s.reduction_k});
  }
  all.push_back({49, 320, 320});  // b2_li's reduction in stage 3
  for (int64_t batch = 1; batch <= 33; ++batch) {
    all.push_back({batch, 1000, 256});  // heads
    all.push_back({batch, 10, 512});
    all.push_back({batch, 160, 160});  // tails of the register blocks
  }
  for (const MapSize& map : kOddMaps) all.push_back({map.height * map.width, 64, 64});
  for (const int n : {1, 7, 15, 16, 17, 31, 33, 48, 100}) all.push_back({5, n, 64});
  for (const int k : {1, 2, 3, 31, 33, 49, 147, 333}) all.push_back({13, 32, k});
  return all;
}

struct LayerNormCase {
  int64_t rows;
  int c;
};
inline std::vector<LayerNormCase> LayerNormCases() {
  std::vector<LayerNormCase> all;
  for (const StageShape& s : kStages) {
    all.push_back({int64_t{s.side} * s.side, s.c});
    all.push_back({s.keys, s.c});  // of the reduced map
  }
  for (int64_t rows = 1; rows <= 33; ++rows) all.push_back({rows, 160});
  for (int c = 32; c <= 512; c += 32) all.push_back({7, c});
  return all;
}

struct DwconvCase {
  int height, width, c;
};
inline std::vector<DwconvCase> DwconvCases() {
  std::vector<DwconvCase> all;
  for (const StageShape& s : kStages) all.push_back({s.side, s.side, s.hidden});
  for (const MapSize& map : kOddMaps) all.push_back({map.height, map.width, 64});
  for (int width = 1; width <= 9; ++width) all.push_back({3, width, 96});
  return all;
}

struct AttentionCase {
  int64_t queries;
  int keys, d;
};
inline std::vector<AttentionCase> AttentionCases() {
  std::vector<AttentionCase> all;
  for (const int d : {32, 64}) {
    for (const int64_t queries : {3136, 784, 196, 49}) {
      for (const int keys : {49, 64, 144, 256}) all.push_back({queries, keys, d});
    }
    for (int keys = 1; keys <= 256; ++keys) all.push_back({19, keys, d});
    for (int64_t queries = 1; queries <= 33; ++queries) all.push_back({queries, 49, d});
  }
  return all;
}

// Rows of `count` to compare with the reference, which is slow: all of a few, else the first, the
// last and some between.
inline std::vector<int64_t> SampledRows(int64_t count) {
  std::vector<int64_t> rows;
  constexpr int64_t kAll = 40;
  if (count <= kAll) {
    for (int64_t r = 0; r < count; ++r) rows.push_back(r);
    return rows;
  }
  for (int64_t r = 0; r < 12; ++r) rows.push_back(r);
  for (int64_t r = 12; r < kAll - 13; ++r) rows.push_back(r * (count - 13) / (kAll - 13));
  for (int64_t r = count - 13; r < count; ++r) rows.push_back(r);
  return rows;
}

enum class Values {
  kUnit,      // normally distributed, deviation 1
  kOffset,    // the same around 30
  kLarge,     // every eighth is ±65504, the others as kUnit
  kDenormal,  // every second is a denormal number of either sign, the others as kUnit
};
inline constexpr std::array<Values, 4> kAllValues = {Values::kUnit, Values::kOffset, Values::kLarge,
                                                     Values::kDenormal};

// The same numbers on every machine.
std::vector<float> Numbers(int64_t count, Values values, uint64_t seed, float scale = 1.0f);

}  // namespace pyramid::kernels

#endif  // PYRAMID_TESTS_MODEL_KERNELS_CASE_TABLE_H_
