// Patches against loops over every element, in buffers that end where the contract says.
#include "model/kernels/patches.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "tests/model/kernels/case_table.h"
#include "tests/model/kernels/reference.h"

namespace pyramid::kernels {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// Bytes that differ from their neighbours, in memory without slack.
struct SomeBytes : ExactBuffer {
  explicit SomeBytes(int64_t count) : ExactBuffer(Size(count)) {
    for (int64_t i = 0; i < count; ++i) {
      data<uint8_t>()[i] = static_cast<uint8_t>(1 + i * 7 % 251);  // never 0
    }
  }
};

TEST(PatchSideTest, EmbeddingsHaveOnePatchForEachStride) {
  struct Row {
    int64_t side, kernel, stride;
    bool same;
    int64_t before, outputs;
  };
  for (const Row& r : std::vector<Row>{{224, 7, 4, false, 3, 56},
                                       {29, 7, 4, false, 3, 8},
                                       {1, 7, 4, false, 3, 1},
                                       {56, 3, 2, false, 1, 28},
                                       {7, 3, 2, false, 1, 4},
                                       // MindSpore: the odd zero is behind.
                                       {224, 7, 4, true, 1, 56},
                                       {225, 7, 4, true, 3, 57},
                                       {56, 3, 2, true, 0, 28},
                                       {57, 3, 2, true, 1, 29},
                                       {56, 3, 1, true, 1, 56}}) {
    const WindowSide side = PatchSide(r.side, r.kernel, r.stride, r.same);
    EXPECT_EQ(side.before, r.before) << r.side << " by " << r.stride;
    EXPECT_EQ(side.outputs, r.outputs) << r.side << " by " << r.stride;
  }
}

TEST(PatchSideTest, ReductionsLeaveOutOrFillUp) {
  EXPECT_EQ(ReductionSide(57, 8, false).outputs, 7);
  EXPECT_EQ(ReductionSide(57, 8, false).before, 0);
  EXPECT_EQ(ReductionSide(57, 8, true).outputs, 8);
  EXPECT_EQ(ReductionSide(57, 8, true).before, 3);
  EXPECT_EQ(ReductionSide(56, 8, true).before, 0);
  EXPECT_EQ(ReductionSide(7, 8, false).outputs, 0);
}

std::vector<MapWindows> Windows(int64_t token_bytes) {
  std::vector<MapWindows> all;
  for (const MapSize& map : kOddMaps) {
    for (const bool same : {false, true}) {
      MapWindows w{.height = map.height,
                   .width = map.width,
                   .token_bytes = token_bytes,
                   .kernel = 3,
                   .stride = 2,
                   .top = PatchSide(map.height, 3, 2, same),
                   .left = PatchSide(map.width, 3, 2, same)};
      all.push_back(w);
      for (const int64_t stride : {2, 4, 8}) {
        w.kernel = w.stride = stride;
        w.top = ReductionSide(map.height, stride, same);
        w.left = ReductionSide(map.width, stride, same);
        if (w.outputs() > 0) all.push_back(w);
      }
    }
  }
  return all;
}

std::string Name(const MapWindows& w) {
  return std::to_string(w.height) + " x " + std::to_string(w.width) + ", " +
         std::to_string(w.kernel) + " by " + std::to_string(w.stride) + " from -" +
         std::to_string(w.top.before) + ", -" + std::to_string(w.left.before);
}

// Where byte `i` of patch `r` comes from; -1: outside the map.
int64_t Source(const MapWindows& w, int64_t r, int64_t i) {
  const int64_t y = r / w.left.outputs * w.stride - w.top.before + i / w.token_bytes / w.kernel;
  const int64_t x = r % w.left.outputs * w.stride - w.left.before + i / w.token_bytes % w.kernel;
  if (y < 0 || y >= w.height || x < 0 || x >= w.width) return -1;
  return (y * w.width + x) * w.token_bytes + i % w.token_bytes;
}

TEST(PatchesTest, AreTheMapsElementsAndZerosAround) {
  for (const int64_t token_bytes : {6, 64}) {
    for (const MapWindows& w : Windows(token_bytes)) {
      SCOPED_TRACE(Name(w));
      SomeBytes map(w.height * w.width * token_bytes);
      // In three pieces, as threads and strips do.
      const int64_t rows = w.outputs(), third = rows / 3;
      ExactBuffer out(Size(rows * w.patch_bytes()));
      for (const auto& [first, count] :
           {std::pair<int64_t, int64_t>{0, third}, {third, third}, {2 * third, rows - 2 * third}}) {
        GatherPatches(w, map.data<char>(), first, count,
                      out.data<char>() + first * w.patch_bytes());
      }
      int64_t wrong = 0;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < w.patch_bytes(); ++i) {
          const int64_t from = Source(w, r, i);
          const uint8_t expected = from < 0 ? 0 : map.data<uint8_t>()[from];
          wrong += out.data<uint8_t>()[r * w.patch_bytes() + i] != expected;
        }
      }
      EXPECT_EQ(wrong, 0);
      EXPECT_TRUE(out.OnlyValidWritten());
    }
  }
}

TEST(PatchesTest, ScatteringAddsEachPatchToWhereItCameFrom) {
  constexpr int64_t kChannels = 5;
  for (const MapWindows& w : Windows(kChannels * 4)) {
    SCOPED_TRACE(Name(w));
    const int64_t size = w.height * w.width * kChannels, patch = w.patch_bytes() / 4;
    ExactBuffer patches(Numbers(w.outputs() * patch, Values::kUnit, 1));
    const std::vector<float> before = Numbers(size, Values::kUnit, 2);
    ExactBuffer map(before);
    std::vector<double> expected(before.begin(), before.end());
    for (int64_t r = 0; r < w.outputs(); ++r) {
      for (int64_t i = 0; i < patch; ++i) {
        const int64_t from = Source(w, r, i * 4);
        if (from >= 0) expected[Size(from / 4)] += double{patches.data()[r * patch + i]};
      }
    }
    ScatterPatches(w, patches.data(), map.data());
    double worst = 0;
    for (int64_t i = 0; i < size; ++i) {
      worst = std::max(worst, std::abs(expected[Size(i)] - double{map.data()[i]}));
    }
    EXPECT_LE(worst, 4e-6);  // sums of up to 10 numbers
    EXPECT_TRUE(map.OnlyValidWritten());
  }
}

TEST(PatchesTest, OfPlanesAreSevenBySevenEveryFour) {
  for (const int64_t bytes : {2, 4}) {
    for (const int64_t planes : {1, 3, 4}) {
      for (const auto& [height, width] : {std::pair<int64_t, int64_t>{7, 7}, {13, 35}, {230, 31}}) {
        SCOPED_TRACE(::testing::Message() << planes << " x " << height << " x " << width);
        PlaneWindows w{.planes = planes,
                       .plane_height = height,
                       .plane_width = width,
                       .element_bytes = bytes,
                       .outputs_wide = (width - 7) / 4 + 1,
                       .patch_elements = (planes * 49 + 31) / 32 * 32};
        if (planes == 4) w.patch_elements = planes * 49;  // nothing to fill up
        const int64_t all = planes * height * width;
        SomeBytes memory((all + 8) * bytes);  // 8 more are readable
        const int64_t rows = ((height - 7) / 4 + 1) * w.outputs_wide;
        ExactBuffer out(Size(rows * w.patch_elements * bytes));
        const int64_t half = rows / 2;
        GatherPlanePatches(w, memory.data<char>(), 0, half, out.data<char>());
        GatherPlanePatches(w, memory.data<char>(), half, rows - half,
                           out.data<char>() + half * w.patch_elements * bytes);
        int64_t wrong = 0;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < w.patch_elements; ++i) {
            const int64_t y = r / w.outputs_wide * 4 + i % 49 / 7;
            const int64_t x = r % w.outputs_wide * 4 + i % 7;
            const uint8_t* got = out.data<uint8_t>() + (r * w.patch_elements + i) * bytes;
            const std::vector<uint8_t> zero(Size(bytes));
            const uint8_t* expected =
                i >= planes * 49
                    ? zero.data()
                    : memory.data<uint8_t>() + ((i / 49 * height + y) * width + x) * bytes;
            wrong += std::memcmp(got, expected, Size(bytes)) != 0;
          }
        }
        EXPECT_EQ(wrong, 0);
        EXPECT_TRUE(out.OnlyValidWritten());
      }
    }
  }
}

}  // namespace
}  // namespace pyramid::kernels
