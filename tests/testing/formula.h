// Weights and pictures that any language can make again from their names, so that golden outputs
// need no weight files: the rule of tests/golden/README.md. Torch-free.
#ifndef PYRAMID_TESTS_TESTING_FORMULA_H_
#define PYRAMID_TESTS_TESTING_FORMULA_H_

#include <cstdint>
#include <vector>

#include "absl/strings/string_view.h"

namespace pyramid::testing {

// `count` numbers in [-1, 1] in 256 levels.
std::vector<double> FormulaLevels(absl::string_view name, int64_t count);

// A parameter by its official name ("block1.0.attn.q.weight") and shape.
std::vector<float> FormulaParameter(absl::string_view name, const std::vector<int64_t>& shape);

// Pictures [batch, channels, height, width], already normalised.
std::vector<float> FormulaImage(int batch, int channels, int height, int width);

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_FORMULA_H_
