// Files of formula weights (formula.h), for tests that read weights from anywhere.
#ifndef PYRAMID_TESTS_TESTING_WEIGHT_FILE_H_
#define PYRAMID_TESTS_TESTING_WEIGHT_FILE_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "model/formats/naming.h"
#include "model/formats/safetensors.h"
#include "model/variants.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "tests/testing/formula.h"

namespace pyramid::testing {

struct FormulaFile {
  std::string variant = "pvt_v2_b0";
  Naming naming = Naming::kOfficial;
  int channels = 3;
  int classes = 10;  // 0: a backbone without a classifier
};

// A safetensors file without metadata.
inline absl::Status WriteFormulaFile(const std::filesystem::path& path,
                                     const FormulaFile& file = {}) {
  std::vector<std::vector<float>> values;
  std::vector<TensorBytes> tensors;
  for (const ParameterShape& parameter :
       ParametersOf(*FindVariant(file.variant), file.channels, std::max(1, file.classes))) {
    if (file.classes == 0 && parameter.name.rfind("head.", 0) == 0) continue;
    values.push_back(FormulaParameter(parameter.name, parameter.shape));
    const std::vector<float>& last = values.back();  // its memory stays where it is
    tensors.push_back({.name = FromOfficial(parameter.name, file.naming),
                       .dtype = "F32",
                       .shape = parameter.shape,
                       .data = {reinterpret_cast<const char*>(last.data()), last.size() * 4}});
  }
  ASSIGN_OR_RETURN(const std::string bytes, SerializeSafetensors(tensors));
  return WriteFileAtomically(path, bytes);
}

// An .npy file, as numpy.save writes it.
inline absl::Status WriteNpy(const std::filesystem::path& path, const std::vector<int>& shape,
                             const std::vector<float>& values) {
  std::string text = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (const int side : shape) text += std::to_string(side) + ", ";
  text += "), }";
  text.resize((text.size() + 10 + 63) / 64 * 64 - 10 - 1, ' ');
  text += '\n';
  std::string bytes("\x93NUMPY\x01\x00", 8);
  bytes += static_cast<char>(text.size() & 255);
  bytes += static_cast<char>(text.size() >> 8);
  bytes += text;
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  return WriteFileAtomically(path, bytes);
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_WEIGHT_FILE_H_
