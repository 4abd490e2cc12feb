// PVT v2 for answering: weights folded and packed once, memory planned per input size, fused
// kernels (model/kernels). The fast path of LoadClassifier; pvt_v2.h is the reference it is
// measured against. Torch-free.
//
//   fp32  golden logits within 3e-5
//   bf16  relative rms of logits at most 1.1x PyTorch's bf16 autocast
//
// Parallel on two levels: pictures first, and with fewer pictures than threads, the rows of each.
#ifndef PYRAMID_MODEL_PACKED_NETWORK_H_
#define PYRAMID_MODEL_PACKED_NETWORK_H_

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/kernels/kernel_table.h"
#include "model/variants.h"
#include "proto/base/pieces.h"
#include "proto/model.pb.h"

namespace pyramid {

// Seconds of all threads together, by part.
struct ForwardProfile {
  enum Part { kImage, kPatchEmbed, kNorm, kQuery, kReduce, kAttention, kMlp, kHead, kParts };
  static const char* Name(int part);
  std::array<double, 4 * kParts> seconds{};  // [stage][part]; kImage in stage 0, kHead in stage 3
};

// Multiplications and additions of the matrix products and depthwise convolutions, one picture;
// laid out as the profile's seconds.
std::array<double, 4 * ForwardProfile::kParts> ForwardWork(const Variant& variant, int height,
                                                           int width, int num_classes);

class PackedNetwork {
 public:
  // Fills `out` with a parameter's values by its official name.
  using ReadParameter =
      absl::FunctionRef<absl::Status(const std::string& name, std::span<float> out)>;

  // `kernels` for the body; the classifier is always computed in f32.
  //   InvalidArgument  unknown variant; and what `read` returns
  static absl::StatusOr<std::unique_ptr<const PackedNetwork>> Create(
      const v1::NetworkConfig& config, const kernels::CpuKernels& kernels, ReadParameter read);

  virtual ~PackedNetwork() = default;

  // False: more than kernels::kMostKeys keys in a stage; take the plain path.
  virtual bool Takes(int height, int width) const = 0;

  // Pictures of in_channels * height * width floats each, wherever they lie → logits
  // [pictures, num_classes]. height, width at least SmallestSide, and Takes. `threads` at most.
  // Thread-safe; allocates nothing once its memory for this size and as many callers exists. The
  // answer doesn't depend on threads or on the pictures beside. `finite`: empty, or one a picture,
  // which becomes 0 if a value of it isn't finite and stays otherwise; the picture's logits mean
  // nothing then. `profile`: null, or added to.
  virtual void Forward(std::span<const Pieces> pictures, int height, int width, int threads,
                       std::span<float> logits, std::span<uint8_t> finite = {},
                       ForwardProfile* profile = nullptr) const = 0;

  // pixels [batch, in_channels, height, width].
  void Forward(std::span<const float> pixels, int batch, int height, int width, int threads,
               std::span<float> logits, ForwardProfile* profile = nullptr) const {
    Forward(PiecesOf(pixels, batch), height, width, threads, logits, {}, profile);
  }

  virtual const kernels::CpuKernels& kernels() const = 0;
  virtual int64_t packed_bytes() const = 0;  // of weights
};

}  // namespace pyramid

#endif  // PYRAMID_MODEL_PACKED_NETWORK_H_
