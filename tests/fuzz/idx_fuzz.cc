// A pair of IDX files, plain or gzipped. Input: two bytes, the length of the labels' file (little
// endian), that file, and the rest is the pictures' file.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz_target.h"
#include "tests/testing/temp_folder.h"
#include "worker/data/dataset.h"

namespace pyramid {
namespace {

using fuzz::Require;

void Write(const std::filesystem::path& path, const uint8_t* data, size_t size) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  Require(file.good(), "the temporary folder takes files");
}

void TryPicture(const Dataset& dataset, int64_t index) {
  const int label = dataset.label(index);
  Require(label >= 0 && label < static_cast<int>(dataset.classes().size()),
          "labels lie within the classes");
  for (const int channels : {1, 3}) {
    const auto image = dataset.Read(index, channels, true);
    Require(image.ok(), "a picture of an open file can be read");
    Require(image->pixels.size() == static_cast<size_t>(image->width) *
                                        static_cast<size_t>(image->height) *
                                        static_cast<size_t>(channels),
            "as many bytes as the sides say");
  }
  Require(dataset.ReadEncoded(index).ok(), "a picture of an open file can be made a PNG");
}

}  // namespace
}  // namespace pyramid

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const pyramid::testing::TempFolder folder;
  if (size < 2) return 0;
  const size_t labels = std::min<size_t>(data[0] | data[1] << 8, size - 2);
  pyramid::Write(folder / "train-labels-idx1-ubyte", data + 2, labels);
  pyramid::Write(folder / "train-images-idx3-ubyte", data + 2 + labels, size - 2 - labels);

  const auto dataset =
      pyramid::OpenIdx(folder.path(), "train", std::vector<std::string>(10, "class"));
  if (!dataset.ok()) return 0;
  pyramid::TryPicture(**dataset, 0);
  pyramid::TryPicture(**dataset, (*dataset)->size() - 1);
  return 0;
}
