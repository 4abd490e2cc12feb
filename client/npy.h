// NumPy's .npy files, as far as pictures need them: float32, C order, [batch, channels, height,
// width].
#ifndef PYRAMID_CLIENT_NPY_H_
#define PYRAMID_CLIENT_NPY_H_

#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pyramid {

struct NpyTensor {
  int batch = 0;
  int channels = 0;
  int height = 0;
  int width = 0;
  std::vector<float> values;  // batch * channels * height * width

  std::span<const float> picture(int index) const {
    const size_t size = values.size() / static_cast<size_t>(batch);
    return std::span(values).subspan(size * static_cast<size_t>(index), size);
  }
};

// Reads a file's bytes, header versions 1 and 2. No length in it is trusted.
//   InvalidArgument  not a .npy file, another version, another dtype or order (says which), not
//   four dimensions of at least 1 DataLoss         shorter or longer than its header says
absl::StatusOr<NpyTensor> ParseNpy(absl::string_view file);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_NPY_H_
