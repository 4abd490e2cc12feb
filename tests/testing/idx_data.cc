#include "tests/testing/idx_data.h"

#include <cmath>
#include <fstream>
#include <random>

namespace pyramid::testing {
namespace {

void PutBigEndian(std::ofstream& out, uint32_t value) {
  const char bytes[4] = {static_cast<char>(value >> 24), static_cast<char>(value >> 16),
                         static_cast<char>(value >> 8), static_cast<char>(value)};
  out.write(bytes, 4);
}

}  // namespace

IdxSplit MakeIdxSplit(int count, int classes, uint64_t seed, int side) {
  IdxSplit split;
  split.count = count;
  split.side = side;
  split.pixels.resize(static_cast<size_t>(count) * side * side);
  split.labels.resize(count);
  std::mt19937_64 random(seed);
  for (int i = 0; i < count; ++i) {
    const int label = static_cast<int>(random() % classes);
    split.labels[i] = static_cast<uint8_t>(label);
    const double angle = M_PI * label / classes;
    const double offset = (label % 3 - 1) * side / 6.0;
    uint8_t* picture = split.pixels.data() + static_cast<size_t>(i) * side * side;
    for (int y = 0; y < side; ++y) {
      for (int x = 0; x < side; ++x) {
        const double across =
            (x - side / 2.0) * std::sin(angle) - (y - side / 2.0) * std::cos(angle);
        const int noise = static_cast<int>(random() % 40);
        picture[y * side + x] =
            static_cast<uint8_t>(noise + (std::abs(across - offset) < side / 10.0 ? 200 : 0));
      }
    }
  }
  return split;
}

void WriteIdxImages(const std::filesystem::path& file, const IdxSplit& split) {
  std::ofstream out(file, std::ios::binary);
  PutBigEndian(out, 0x803);
  PutBigEndian(out, split.count);
  PutBigEndian(out, split.side);
  PutBigEndian(out, split.side);
  out.write(reinterpret_cast<const char*>(split.pixels.data()),
            static_cast<std::streamsize>(split.pixels.size()));
}

void WriteIdxLabels(const std::filesystem::path& file, const IdxSplit& split) {
  std::ofstream out(file, std::ios::binary);
  PutBigEndian(out, 0x801);
  PutBigEndian(out, split.count);
  out.write(reinterpret_cast<const char*>(split.labels.data()),
            static_cast<std::streamsize>(split.labels.size()));
}

void WriteIdxFolder(const std::filesystem::path& folder, int train, int val, int classes,
                    int side) {
  std::filesystem::create_directories(folder);
  const IdxSplit train_split = MakeIdxSplit(train, classes, 1, side);
  WriteIdxImages(folder / "train-images-idx3-ubyte", train_split);
  WriteIdxLabels(folder / "train-labels-idx1-ubyte", train_split);
  const IdxSplit val_split = MakeIdxSplit(val, classes, 2, side);
  WriteIdxImages(folder / "t10k-images-idx3-ubyte", val_split);
  WriteIdxLabels(folder / "t10k-labels-idx1-ubyte", val_split);
}

}  // namespace pyramid::testing
