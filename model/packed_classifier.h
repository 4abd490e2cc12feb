// The classifier on the CPU's fast path: PackedNetwork behind the façade. Torch-free.
#ifndef PYRAMID_MODEL_PACKED_CLASSIFIER_H_
#define PYRAMID_MODEL_PACKED_CLASSIFIER_H_

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/classifier.h"
#include "model/weights.h"

namespace pyramid {

// InvalidArgument unless `floats` is what [batch, in_channels, height, width] takes and the sides
// are large enough for the variant.
absl::Status CheckPixels(const v1::NetworkConfig& network, size_t floats, int batch, int height,
                         int width);

// Packs `weights` for options.dtype. PYRAMID_KERNELS forces a kernel set. `plain` makes the network
// that inputs with too many keys go to; it is called once, when the first of them comes.
//
// fp16 between the layers of an MLP can overflow where bf16 doesn't. Made-up pictures, saturated
// ones among them, are tried at loading, and each answer is looked at: a picture with a logit that
// isn't finite is computed again in f32 arithmetic. If its pixels are such as a file can have, f32
// arithmetic takes over for good, and a warning says so.
//   InvalidArgument, FailedPrecondition  as ChooseCpuKernels; and what Weights::Read returns
absl::StatusOr<std::unique_ptr<Classifier>> MakePackedClassifier(
    std::unique_ptr<Weights> weights, const ClassifierOptions& options,
    std::function<absl::StatusOr<std::unique_ptr<Classifier>>(const Weights&)> plain);

// Threads inside a forward pass for `options.threads` as ClassifierOptions says; one setting for
// the process.
void SetForwardThreads(int threads);
int ForwardThreads();

}  // namespace pyramid

#endif  // PYRAMID_MODEL_PACKED_CLASSIFIER_H_
