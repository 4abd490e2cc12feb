#include "tests/testing/formula.h"

#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace pyramid::testing {

std::vector<double> FormulaLevels(absl::string_view name, int64_t count) {
  uint64_t seed = 0xCBF29CE484222325u;  // FNV-1a 64
  for (const char c : name) seed = (seed ^ static_cast<uint8_t>(c)) * 0x100000001B3u;
  std::vector<double> levels(static_cast<size_t>(count));
  for (double& level : levels) {
    seed += 0x9E3779B97F4A7C15u;  // SplitMix64
    uint64_t z = seed;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    level = (static_cast<double>(z >> 56) - 127.5) / 127.5;
  }
  return levels;
}

std::vector<float> FormulaParameter(absl::string_view name, const std::vector<int64_t>& shape) {
  int64_t fan_in = 1;
  for (size_t i = 1; i < shape.size(); ++i) fan_in *= shape[i];
  const double spread = std::sqrt(3.0 / static_cast<double>(fan_in));
  std::vector<float> values;
  for (const double u : FormulaLevels(name, fan_in * shape.at(0))) {
    const double value = absl::EndsWith(name, ".bias") ? 0.1 * u
                         : shape.size() == 1           ? 1 + 0.25 * u
                                                       : u * spread;
    values.push_back(static_cast<float>(value));
  }
  return values;
}

std::vector<float> FormulaImage(int batch, int channels, int height, int width) {
  const std::string name = absl::StrCat("input:", batch, "x", channels, "x", height, "x", width);
  std::vector<float> values;
  for (const double u : FormulaLevels(name, int64_t{batch} * channels * height * width)) {
    values.push_back(static_cast<float>(2 * u));
  }
  return values;
}

}  // namespace pyramid::testing
