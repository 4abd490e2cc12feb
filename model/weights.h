// Weights of a PVT v2 from anywhere: which network they are, whose numerics they were trained with,
// and each parameter's values under its official name, float32. Torch-free.
//
// `path` may be a pyramid checkpoint's folder, or a file that OpenWeightFile reads, under any
// naming and in the wrappers people save (model, state_dict, state_dict_ema, model_ema; module.,
// _orig_mod.). The origin decides padding, GELU, epsilons and the evaluation's pixels; each can be
// overridden. Strict: missing, unused and misshapen tensors are listed and refused.
#ifndef PYRAMID_MODEL_WEIGHTS_H_
#define PYRAMID_MODEL_WEIGHTS_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/formats/naming.h"
#include "model/formats/weight_file.h"
#include "proto/model.pb.h"

namespace pyramid {

struct WeightOptions {
  std::string origin;     // "official" | "timm" | "transformers" | "mindcv" | "pyramid"; empty: by
                          // naming or the file's own metadata
  std::string naming;     // empty: detected
  std::string pad_style;  // override, as in v1::Numerics; empty: the origin's
  std::string gelu;
  double eps_outer = 0;  // 0: the origin's
  bool ema = false;      // take the averaged weights; InvalidArgument if the file has none
  // "": the file's. "new": the classifier of the file, if any, is left out, and `num_classes` is
  // the network's; head.* then have no source and keep their initialisation.
  std::string head;
  int num_classes = 0;  // with head "new"
  int in_channels = 0;  // 0: the file's. Else the first convolution is adapted as timm does: 1
                        // sums the input axis; others repeat it and scale by 3 / in_channels
};

// One parameter of the network.
struct WeightParameter {
  std::string name;  // official
  std::vector<int64_t> shape;
  bool fresh = false;  // no source: a new head
};

class Weights {
 public:
  virtual ~Weights() = default;

  // Network, origin, preprocessing (the origin's, docs/formats.md; a folder's own; none with other
  // than 1 or 3 channels), labels (a folder's own; ImageNet's names with 1000 classes; none with a
  // new head), created_by. digest: over network, origin, preprocessing, labels and the source's
  // SHA-256. A folder's also has the folder's files and training record.
  virtual const v1::Manifest& manifest() const = 0;

  virtual const std::vector<WeightParameter>& parameters() const = 0;  // official order

  // The parameter's values; `out` has the product of shape floats. DataLoss, Internal as
  // ReadTensor; FailedPrecondition for a fresh one.
  virtual absl::Status Read(const WeightParameter& parameter, std::span<float> out) const = 0;

  // For people: "PyTorch zip", "timm", "state_dict_ema", and so on: {"format", …}, {"naming", …},
  // {"wrapper", …}, {"dtype", …}, {"sha256", …}, {"set aside", "180 optimizer tensors"}.
  virtual const std::vector<std::pair<std::string, std::string>>& facts() const = 0;
};

// Reads headers only (and the file once for its SHA-256). A file called
// <variant>-<8 hex digits>[-more].<suffix> is checked against that prefix of its SHA-256: DataLoss.
//   InvalidArgument  not a PVT v2; missing, unused, misshapen tensors; an unknown origin or naming;
//                    a classifier of another size without `head`
//   and what OpenWeightFile or VerifyCheckpoint return
absl::StatusOr<std::unique_ptr<Weights>> OpenWeights(const std::filesystem::path& path,
                                                     const WeightOptions& options = {});

// How a code base evaluates on ImageNet at 224 pixels (docs/models.md). Empty with other than 1 or
// 3 channels.
v1::Preprocessing OriginPreprocessing(absl::string_view origin, int channels);

enum class OutputFormat { kSafetensors, kTorchZip, kMindSpore };

// Writes all parameters as float32 under `naming`, streaming, aside and renamed. Safetensors'
// metadata, the zip's extra records and appended values of the .ckpt (none where MindCV's own
// settings hold) say origin, numerics, preprocessing and labels, so that reading it back gives the
// same model.
//   InvalidArgument  naming kTransformers; a fresh head; kMindSpore and another suffix than .ckpt,
//                    which MindSpore wouldn't read; kTorchZip over 4 GiB
//   ResourceExhausted  disk full; nothing is left behind
absl::Status WriteWeights(const Weights& weights, const std::filesystem::path& path,
                          OutputFormat format, Naming naming);

// The manifest and weights.safetensors of a checkpoint's folder (WriteCheckpoint), with
// `self_test` (bytes of self_test.safetensors; empty: none).
absl::StatusOr<v1::Manifest> WriteWeightsAsCheckpoint(const Weights& weights,
                                                      const std::filesystem::path& folder,
                                                      absl::string_view self_test);

// Where `pretrained: True` looks: PYRAMID_WEIGHTS, else ~/.cache/pyramid/weights.
//   NotFound  names the file, the folder and where it is published
absl::StatusOr<std::filesystem::path> FindPretrained(absl::string_view variant,
                                                     absl::string_view compat);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_WEIGHTS_H_
