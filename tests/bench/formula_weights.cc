// Writes weights that need no download and no training, for the benchmarks of serving.
//
//   formula_weights OUT.safetensors VARIANT CLASSES CHANNELS
#include <cstdio>
#include <cstdlib>

#include "tests/testing/weight_file.h"

int main(int argc, char** argv) {
  if (argc != 5 || pyramid::FindVariant(argv[2]) == nullptr) {
    std::fprintf(stderr, "formula_weights OUT.safetensors VARIANT CLASSES CHANNELS\n");
    return 2;
  }
  const absl::Status status = pyramid::testing::WriteFormulaFile(
      argv[1], {.variant = argv[2], .channels = std::atoi(argv[4]), .classes = std::atoi(argv[3])});
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return 1;
}
