// Weights by the formula of tests/golden/README.md, without a file. Torch-free.
#ifndef PYRAMID_TESTS_TESTING_FORMULA_WEIGHTS_H_
#define PYRAMID_TESTS_TESTING_FORMULA_WEIGHTS_H_

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "model/imagenet_labels.h"
#include "model/recipe.h"
#include "model/variants.h"
#include "model/weights.h"
#include "tests/testing/formula.h"

namespace pyramid::testing {

// As if read from a file of `origin`.
class FormulaWeights final : public Weights {
 public:
  FormulaWeights(const std::string& variant, const std::string& origin, int classes = 1000,
                 int channels = 3) {
    v1::NetworkConfig& network = *manifest_.mutable_network();
    network.set_variant(variant);
    network.set_num_classes(classes);
    network.set_in_channels(channels);
    *network.mutable_numerics() = NumericsOf(origin);
    manifest_.set_origin(origin);
    *manifest_.mutable_preprocessing() = OriginPreprocessing(origin, channels);
    if (classes == 1000) {
      for (const std::string& label : ImageNetLabels()) manifest_.add_labels(label);
    }
    for (ParameterShape& shape : ParametersOf(*FindVariant(variant), channels, classes)) {
      parameters_.push_back({std::move(shape.name), std::move(shape.shape)});
    }
  }

  const v1::Manifest& manifest() const override { return manifest_; }
  v1::Manifest& mutable_manifest() { return manifest_; }
  const std::vector<WeightParameter>& parameters() const override { return parameters_; }
  std::vector<WeightParameter>& mutable_parameters() { return parameters_; }
  const std::vector<std::pair<std::string, std::string>>& facts() const override { return facts_; }

  absl::Status Read(const WeightParameter& parameter, std::span<float> out) const override {
    const std::vector<float> values = FormulaParameter(parameter.name, parameter.shape);
    std::copy(values.begin(), values.end(), out.begin());
    return absl::OkStatus();
  }

 private:
  v1::Manifest manifest_;
  std::vector<WeightParameter> parameters_;
  std::vector<std::pair<std::string, std::string>> facts_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_FORMULA_WEIGHTS_H_
