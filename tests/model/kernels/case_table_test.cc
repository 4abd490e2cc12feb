// The case table holds what the networks call the kernels with.
#include "tests/model/kernels/case_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "model/kernels/attention.h"
#include "model/kernels/patches.h"
#include "model/variants.h"

namespace pyramid::kernels {
namespace {

template <typename Case, typename Same>
bool Has(const std::vector<Case>& all, const Same& same) {
  return std::any_of(all.begin(), all.end(), same);
}

void ExpectLinear(int64_t m, int n, int k) {
  static const std::vector<LinearCase> all = LinearCases();
  EXPECT_TRUE(Has(all, [=](const LinearCase& c) { return c.m == m && c.n == n && c.k == k; }))
      << m << " x " << k << " x " << n;
}

void ExpectLayerNorm(int64_t rows, int c) {
  static const std::vector<LayerNormCase> all = LayerNormCases();
  EXPECT_TRUE(Has(all, [=](const LayerNormCase& x) { return x.rows == rows && x.c == c; }))
      << rows << " x " << c;
}

TEST(CaseTableTest, HasEveryStageOfEveryVariant) {
  for (const Variant& v : Variants()) {
    SCOPED_TRACE(v.name);
    int side = 224, channels = 3;
    for (size_t s = 0; s < 4; ++s) {
      const int c = v.dims[s], hidden = c * v.mlp_ratios[s], sr = v.sr_ratios[s];
      const int kernel = s == 0 ? 7 : 3;
      side /= s == 0 ? 4 : 2;
      const int tokens = side * side;
      const int reduced = v.linear ? 7 : side / sr;
      const int keys = reduced * reduced;
      ExpectLinear(tokens, c, kernel * kernel * channels);  // patch embedding
      ExpectLinear(tokens, c, c);                           // q, proj
      ExpectLinear(keys, 2 * c, c);                         // kv
      ExpectLinear(tokens, hidden, c);                      // fc1
      ExpectLinear(tokens, c, hidden);                      // fc2
      ExpectLayerNorm(tokens, c);
      if (v.linear || sr > 1) {
        ExpectLinear(keys, c, v.linear ? c : sr * sr * c);
        ExpectLayerNorm(keys, c);
      }
      EXPECT_TRUE(Has(DwconvCases(),
                      [&](const DwconvCase& d) {
                        return d.height == side && d.width == side && d.c == hidden;
                      }))
          << side << " " << hidden;
      EXPECT_TRUE(Has(AttentionCases(),
                      [&](const AttentionCase& a) {
                        return a.queries == tokens && a.keys == keys && a.d == c / v.heads[s];
                      }))
          << tokens << " " << keys << " " << c / v.heads[s];
      channels = c;
    }
  }
}

TEST(CaseTableTest, HasTheMapsOfOddPictures) {
  const auto has = [](int64_t height, int64_t width) {
    return std::any_of(kOddMaps.begin(), kOddMaps.end(), [=](const MapSize& map) {
      return map.height == height && map.width == width;
    });
  };
  EXPECT_TRUE(has(7, 9));
  for (const MapSize& picture :
       {MapSize{29, 29}, MapSize{225, 225}, MapSize{240, 320}, MapSize{299, 299}}) {
    int64_t height = picture.height, width = picture.width;
    for (int stage = 0; stage < 4; ++stage) {
      const int kernel = stage == 0 ? 7 : 3, stride = stage == 0 ? 4 : 2;
      height = PatchSide(height, kernel, stride, false).outputs;
      width = PatchSide(width, kernel, stride, false).outputs;
      EXPECT_TRUE(has(height, width)) << height << " x " << width;
    }
  }
}

TEST(CaseTableTest, HasEveryBatchAndEveryNumberOfKeys) {
  for (int batch = 1; batch <= 33; ++batch) {
    ExpectLinear(batch, 1000, 256);
    ExpectLayerNorm(batch, 160);
    for (const int d : {32, 64}) {
      EXPECT_TRUE(Has(AttentionCases(), [&](const AttentionCase& a) {
        return a.queries == batch && a.d == d;
      })) << batch;
    }
  }
  for (int keys = 1; keys <= kMostKeys; ++keys) {
    for (const int d : {32, 64}) {
      EXPECT_TRUE(Has(AttentionCases(), [&](const AttentionCase& a) {
        return a.keys == keys && a.d == d;
      })) << keys;
    }
  }
}

}  // namespace
}  // namespace pyramid::kernels
