// A loaded network that answers: floats in, logits out. The façade behind which LibTorch and the
// kernels stay.
#ifndef PYRAMID_MODEL_CLASSIFIER_H_
#define PYRAMID_MODEL_CLASSIFIER_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/weights.h"
#include "proto/base/pieces.h"
#include "proto/model.pb.h"

namespace pyramid {

struct ForwardProfile;  // packed_network.h

// Thread-safe: Forward may be called from several threads at once.
class Classifier {
 public:
  virtual ~Classifier() = default;

  // pixels: [batch, in_channels, height, width] float32, normalised; all pictures of one size.
  // Result: [batch, num_classes] logits, float32.
  //   InvalidArgument    the sizes don't fit, height or width under 29 (pvt_v2_b2_li: 1)
  //   ResourceExhausted  out of memory
  //   Internal           the network failed
  virtual absl::StatusOr<std::vector<float>> Forward(std::span<const float> pixels, int batch,
                                                     int height, int width) = 0;

  // The same of pictures that lie anywhere: each is its in_channels * height * width floats,
  // little-endian, perhaps unaligned. `finite`, if not null: whether all of a picture's values are;
  // the logits of one whose aren't mean nothing, those of the others are as they would be without
  // it. `memory` may be used; the caller keeps it for the next call, as fresh memory is slow.
  virtual absl::StatusOr<std::vector<float>> ForwardPieces(std::span<const Pieces> pictures,
                                                           int height, int width,
                                                           std::vector<uint8_t>* finite,
                                                           std::vector<float>& memory);

  virtual const v1::Manifest& manifest() const = 0;

  // What computes: "plain" (LibTorch's operations), "packed amx", "packed avx512" …
  virtual std::string path() const { return "plain"; }

  // Memory of the weights as they are held, on whichever device.
  virtual int64_t weight_bytes() const { return 0; }

  // As Forward without the answer; adds each part's seconds to `profile`. Unimplemented on the
  // plain path.
  virtual absl::Status Profile(std::span<const float> /*pixels*/, int /*batch*/, int /*height*/,
                               int /*width*/, ForwardProfile* /*profile*/) {
    return absl::UnimplementedError("the plain path has no profile");
  }
};

inline absl::StatusOr<std::vector<float>> Classifier::ForwardPieces(
    std::span<const Pieces> pictures, int height, int width, std::vector<uint8_t>* finite,
    std::vector<float>& memory) {
  if (pictures.empty()) return absl::InvalidArgumentError("no pictures");
  const size_t each = pictures.front().size() / sizeof(float);
  const bool copy = pictures.size() > 1 || !pictures.front().LieAsFloats();
  if (copy && memory.size() < each * pictures.size()) memory.resize(each * pictures.size());
  const float* const pixels =
      copy ? memory.data() : reinterpret_cast<const float*>(pictures.front().Whole().data());
  if (finite != nullptr) finite->assign(pictures.size(), 1);
  for (size_t i = 0; i < pictures.size(); ++i) {
    if (pictures[i].size() != each * sizeof(float)) {
      return absl::InvalidArgumentError("the pictures differ in size");
    }
    if (copy) pictures[i].CopyTo(memory.data() + i * each);
    if (finite != nullptr) (*finite)[i] = AllFinite(pixels + i * each, each) ? 1 : 0;
  }
  return Forward({pixels, each * pictures.size()}, static_cast<int>(pictures.size()), height,
                 width);
}

struct ClassifierOptions {
  bool plain = false;  // LibTorch's operations instead of the packed network; devices other than
                       // the CPU have nothing else
  std::string device = "cpu";  // "cpu", "cuda:N", "npu:N"
  std::string dtype = "fp32";  // "fp32" | "bf16" (sums in fp32; without AMX computed in fp32)
  int threads = 0;  // inside one Forward; one setting for the whole process, the last asked for. 0:
                    // as it is, at first as many as the machine has cores
  WeightOptions weights;  // whose they are, overrides; a new head can't be asked for
};

// Loads a checkpoint's folder, every file verified, or a file of weights that OpenWeights reads.
// Parameters go straight into the network: beside its tensors there are 16 MiB at most.
//   NotFound, DataLoss, FailedPrecondition  as OpenWeights
//   InvalidArgument  as OpenWeights; no or unusable preprocessing, unknown dtype or device, threads
//                    under 0, weights.head
//   Unavailable      the device isn't there; says which are
absl::StatusOr<std::unique_ptr<Classifier>> LoadClassifier(const std::filesystem::path& path,
                                                           const ClassifierOptions& options);

struct SelfTestResult {
  bool available = false;  // false: the checkpoint has no self-test
  int pictures = 0;
  double max_error = 0;  // of any logit
  double tolerance =
      0;  // absolute, of a logit: fp32 on the CPU 1e-4, on another device 1e-3; bf16 0.25
  // What was asked and answered, for a comparison with another network.
  int height = 0;
  int width = 0;
  std::vector<float> pixels = {};  // [pictures, in_channels, height, width]
  std::vector<float> logits = {};  // [pictures, num_classes], of this classifier
};

// Runs the checkpoint's stored pictures and compares with the stored logits.
//   FailedPrecondition  max_error > tolerance, or a logit isn't finite; the message has the numbers
//   DataLoss            the file is damaged or holds no such arrays; and what Forward returns
absl::StatusOr<SelfTestResult> RunSelfTest(Classifier& classifier,
                                           const std::filesystem::path& folder,
                                           const ClassifierOptions& options);

// The bytes of self_test.safetensors for a checkpoint of this network: `pictures` made-up pictures
// of the preprocessing's size, always the same ones, and what `classifier` answers. It should be an
// fp32 one on the CPU. InvalidArgument under 1 picture; and what Forward returns.
absl::StatusOr<std::string> MakeSelfTest(Classifier& classifier, int pictures);

// How a server gets its classifiers; tests give a fake.
using ClassifierLoader = absl::AnyInvocable<absl::StatusOr<std::unique_ptr<Classifier>>(
    const std::filesystem::path& folder, const ClassifierOptions& options) const>;

}  // namespace pyramid

#endif  // PYRAMID_MODEL_CLASSIFIER_H_
