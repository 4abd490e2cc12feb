// A small made-up data set in the IDX format: each class is a bright bar at its own angle and
// place, with noise; a network learns it within a few dozen steps.
#ifndef PYRAMID_TESTS_TESTING_IDX_DATA_H_
#define PYRAMID_TESTS_TESTING_IDX_DATA_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace pyramid::testing {

struct IdxSplit {
  int count = 0;
  int side = 28;
  std::vector<uint8_t> pixels;  // count * side * side
  std::vector<uint8_t> labels;
};

IdxSplit MakeIdxSplit(int count, int classes, uint64_t seed, int side = 28);

// Writes {train,t10k}-{images-idx3,labels-idx1}-ubyte, not compressed.
void WriteIdxFolder(const std::filesystem::path& folder, int train, int val, int classes = 10,
                    int side = 28);

void WriteIdxImages(const std::filesystem::path& file, const IdxSplit& split);
void WriteIdxLabels(const std::filesystem::path& file, const IdxSplit& split);

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_IDX_DATA_H_
