#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "model/formats/weight_writer.h"
#include "model/imagenet_labels.h"
#include "model/recipe.h"
#include "model/weight_notes.h"
#include "model/weights.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

absl::Status CheckWhole(const Weights& weights) {
  for (const WeightParameter& parameter : weights.parameters()) {
    if (parameter.fresh) {
      return absl::InvalidArgumentError(absl::StrCat(
          parameter.name, " is new and untrained; write weights without head new, or train first"));
    }
  }
  return absl::OkStatus();
}

std::vector<TensorHeader> HeadersOf(const Weights& weights, Naming naming) {
  std::vector<TensorHeader> headers;
  for (const WeightParameter& parameter : weights.parameters()) {
    headers.push_back({FromOfficial(parameter.name, naming), parameter.shape});
  }
  return headers;
}

// A .ckpt in MindCV's names is taken for MindCV's own; where that is right notes aren't needed.
bool SaysEnoughByItself(const v1::Manifest& manifest, Naming naming) {
  using google::protobuf::util::MessageDifferencer;
  const v1::NetworkConfig& network = manifest.network();
  const std::span<const std::string> imagenet = ImageNetLabels();
  const bool own_labels =
      manifest.labels_size() > 0 && !std::equal(imagenet.begin(), imagenet.end(),
                                                manifest.labels().begin(), manifest.labels().end());
  return naming == Naming::kMindCv && manifest.origin() == "mindcv" && !own_labels &&
         MessageDifferencer::Equals(network.numerics(), NumericsOf("mindcv")) &&
         MessageDifferencer::Equals(manifest.preprocessing(),
                                    OriginPreprocessing("mindcv", network.in_channels()));
}

}  // namespace

absl::Status WriteWeights(const Weights& weights, const std::filesystem::path& path,
                          OutputFormat format, Naming naming) {
  if (naming == Naming::kTransformers) {
    return absl::InvalidArgumentError(
        "transformers' naming is read, not written; use official, timm or mindcv");
  }
  if (format == OutputFormat::kMindSpore && path.extension() != ".ckpt") {
    return absl::InvalidArgumentError(absl::StrCat(
        path.string(), ": MindSpore reads only files whose name ends in .ckpt; use such a name"));
  }
  RETURN_IF_ERROR(CheckWhole(weights));
  const std::vector<TensorHeader> headers = HeadersOf(weights, naming);
  const WeightNotes notes = WeightNotesOf(weights.manifest());
  const auto fill = [&](size_t index, std::span<float> out) {
    return weights.Read(weights.parameters()[index], out);
  };
  const auto write = [&](ByteSink sink) -> absl::Status {
    switch (format) {
      case OutputFormat::kSafetensors:
        return StreamSafetensors(headers, notes, fill, sink);
      case OutputFormat::kTorchZip:
        return StreamTorchZip(headers, notes, fill, sink);
      case OutputFormat::kMindSpore:
        return StreamMindSpore(
            headers, SaysEnoughByItself(weights.manifest(), naming) ? WeightNotes{} : notes, fill,
            sink);
    }
    return absl::InvalidArgumentError("unknown output format");
  };
  return Annotate(WriteAside(path, write), absl::StrCat("writing ", path.string()));
}

absl::StatusOr<v1::Manifest> WriteWeightsAsCheckpoint(const Weights& weights,
                                                      const std::filesystem::path& folder,
                                                      absl::string_view self_test) {
  RETURN_IF_ERROR(CheckWhole(weights));
  std::string file;
  RETURN_IF_ERROR(StreamSafetensors(
      HeadersOf(weights, Naming::kOfficial), {},
      [&](size_t index, std::span<float> out) {
        return weights.Read(weights.parameters()[index], out);
      },
      [&](absl::string_view bytes) {
        absl::StrAppend(&file, bytes);
        return absl::OkStatus();
      }));
  std::vector<CheckpointFile> files = {{std::string(kWeightsFile), file}};
  if (!self_test.empty()) files.push_back({std::string(kSelfTestFile), self_test});
  return WriteCheckpoint(folder, weights.manifest(), files);
}

}  // namespace pyramid
