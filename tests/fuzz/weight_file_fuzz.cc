// A file of weights in any format: opened, then every tensor's values read.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "model/formats/safetensors.h"
#include "model/formats/weight_file.h"
#include "tests/fuzz/fuzz_target.h"

namespace {

using pyramid::fuzz::Require;

constexpr int64_t kMaxTensorBytes = int64_t{1} << 20;
constexpr int64_t kMaxReadBytes = int64_t{8} << 20;  // of one file, in all

// The bytes where they are, so that what the reader holds is the reader's.
class InPlace : public pyramid::ByteSource {
 public:
  InPlace(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  int64_t size() const override { return static_cast<int64_t>(size_); }
  absl::Status Read(int64_t offset, std::span<char> out) const override {
    if (offset < 0 || offset > size() || out.size() > size_ - static_cast<size_t>(offset)) {
      return absl::DataLossError("beyond the end");
    }
    if (!out.empty()) std::memcpy(out.data(), data_ + offset, out.size());
    return absl::OkStatus();
  }

 private:
  const uint8_t* data_;
  const size_t size_;
};

bool Promised(const absl::Status& status) {
  return status.ok() || absl::IsDataLoss(status) || absl::IsInvalidArgument(status);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = pyramid::OpenWeightBytes(std::make_shared<const InPlace>(data, size));
  Require(Promised(file.status()), "a file that isn't taken is damaged or refused");
  if (!file.ok()) return 0;
  Require(file->tensors.size() <= pyramid::kMaxStoredTensors, "the number of tensors is bounded");
  int64_t left = kMaxReadBytes;
  for (const pyramid::StoredTensor& tensor : file->tensors) {
    Require(pyramid::CheckStoredTensor(tensor, file->source->size()).ok(), "tensors fit the file");
    const int64_t bytes = tensor.elements() * pyramid::SafetensorsElementSize(tensor.dtype);
    if (bytes > kMaxTensorBytes || bytes > left) continue;
    left -= bytes;
    std::vector<char> raw(static_cast<size_t>(bytes));
    Require(Promised(pyramid::ReadTensor(*file, tensor, raw)), "values are read or damaged");
    std::vector<float> values(static_cast<size_t>(tensor.elements()));
    Require(Promised(pyramid::ReadTensorAsFloat(*file, tensor, values)), "and so as floats");
  }
  return 0;
}
