// The network and pictures of tests/golden/README.md's formula as LibTorch has them.
#ifndef PYRAMID_TESTS_TESTING_FORMULA_NETWORK_H_
#define PYRAMID_TESTS_TESTING_FORMULA_NETWORK_H_

#include <torch/torch.h>

#include <vector>

#include "model/pvt_v2.h"
#include "tests/testing/formula.h"

namespace pyramid::testing {

inline void SetFormulaWeights(PvtV2& network) {
  const torch::NoGradGuard no_grad;
  for (auto& item : network->named_parameters()) {
    std::vector<float> values = FormulaParameter(item.key(), item.value().sizes().vec());
    item.value().copy_(torch::from_blob(values.data(), item.value().sizes(), torch::kFloat32));
  }
}

// [batch, channels, height, width] f32 on the CPU, already normalised.
inline torch::Tensor FormulaPictures(int batch, int channels, int height, int width) {
  std::vector<float> values = FormulaImage(batch, channels, height, width);
  return torch::from_blob(values.data(), {batch, channels, height, width}, torch::kFloat32).clone();
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_FORMULA_NETWORK_H_
