#include "model/classifier.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "model/device.h"
#include "model/exception_guard.h"
#include "model/formats/safetensors.h"
#include "model/packed_classifier.h"
#include "model/preprocess.h"
#include "model/pvt_v2.h"
#include "model/tensors.h"
#include "model/thread_limit.h"
#include "proto/base/log.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

// OpenMP keeps its count per calling thread, so each Forward sets its own.
void UseForwardThreads() {
  const int threads = ThreadLimit::Of(ForwardThreads());
  if (at::get_num_threads() != threads) at::set_num_threads(threads);
}

// Weights of linear layers and convolutions in bf16; norms, the residual sum and the head stay f32.
// As fast as bf16 throughout, and the logits' root mean square error is 15-30 % smaller (b0 and b2,
// formula weights, 64 and 224 pixels, AMX).
void ConvertToBf16(PvtV2& network) {
  for (const auto& [name, module] : network->named_modules("", /*include_self=*/false).pairs()) {
    const bool matrix = module->as<torch::nn::LinearImpl>() != nullptr ||
                        module->as<torch::nn::Conv2dImpl>() != nullptr;
    if (matrix && name != "head") module->to(torch::kBFloat16);
  }
}

class TorchClassifier : public Classifier {
 public:
  TorchClassifier(PvtV2 network, v1::Manifest manifest, DeviceName name, torch::Device device,
                  bool records)
      : network_(std::move(network)),
        manifest_(std::move(manifest)),
        name_(std::move(name)),
        device_(device),
        records_(records) {}

  absl::StatusOr<std::vector<float>> Forward(std::span<const float> pixels, int batch, int height,
                                             int width) override {
    RETURN_IF_ERROR(CheckPixels(manifest_.network(), pixels.size(), batch, height, width));
    return Guard("forward", absl::StatusCode::kInternal,
                 [&]() -> absl::StatusOr<std::vector<float>> {
                   UseForwardThreads();
                   const torch::InferenceMode inference;
                   const torch::Tensor input = torch::from_blob(
                       const_cast<float*>(pixels.data()),
                       {batch, manifest_.network().in_channels(), height, width}, torch::kFloat32);
                   ASSIGN_OR_RETURN(const torch::Tensor logits, Answer(input));
                   const float* values = logits.const_data_ptr<float>();
                   return std::vector<float>(values, values + logits.numel());
                 });
  }

  const v1::Manifest& manifest() const override { return manifest_; }
  int64_t weight_bytes() const override {
    int64_t bytes = 0;
    for (const torch::Tensor& tensor : network_->parameters())
      bytes += static_cast<int64_t>(tensor.nbytes());
    return bytes;
  }

 private:
  // A forward pass of one input size, recorded on the device: queued at once instead of operation
  // by operation.
  struct Recording {
    torch::Tensor in, out;
    std::unique_ptr<RecordedWork> work;  // null: this size can't be recorded
  };
  static constexpr size_t kMostRecordings = 32;  // input sizes; later ones go without

  absl::StatusOr<torch::Tensor> Answer(const torch::Tensor& input) {
    const auto on_cpu = [](const torch::Tensor& t) {
      return t.to(torch::kCPU, torch::kFloat32).contiguous();
    };
    if (!records_) return on_cpu(network_->forward(input.to(device_)));
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto size = input.sizes().vec();
    const auto found = recordings_.find(size);
    if (found == recordings_.end() && recordings_.size() >= kMostRecordings)
      return on_cpu(network_->forward(input.to(device_)));
    Recording& recording = found == recordings_.end() ? Record(input) : found->second;
    if (recording.work == nullptr) return on_cpu(network_->forward(input.to(device_)));
    recording.in.copy_(input);
    RETURN_IF_ERROR(recording.work->Replay());
    return on_cpu(recording.out);
  }

  // mutex_ is held.
  Recording& Record(const torch::Tensor& input) {
    Recording& recording = recordings_[input.sizes().vec()];
    recording.in = input.to(device_);
    recording.out = torch::empty({input.size(0), manifest_.network().num_classes()},
                                 torch::TensorOptions(torch::kFloat32).device(device_));
    auto work = RecordWork(name_, [&] { recording.out.copy_(network_->forward(recording.in)); });
    if (work.ok()) {
      recording.work = *std::move(work);
    } else {
      log::Info("not_recorded", {{"why", work.status().message()}});
      recording.in = recording.out = torch::Tensor();
    }
    return recording;
  }

  // forward() isn't const in LibTorch's modules; in eval mode it changes nothing.
  PvtV2 network_;
  const v1::Manifest manifest_;
  const DeviceName name_;
  const torch::Device device_;
  const bool records_;
  std::mutex mutex_;
  std::map<std::vector<int64_t>, Recording> recordings_;  // by mutex_
};

// The tensor called `name`, f32. DataLoss if there is none.
absl::StatusOr<torch::Tensor> Find(const NamedTensors& tensors, absl::string_view name) {
  for (const auto& [key, tensor] : tensors) {
    if (key == name && tensor.scalar_type() == torch::kFloat32) return tensor;
  }
  return absl::DataLossError(absl::StrCat(kSelfTestFile, " has no tensor ", name, " of type F32"));
}

// Number `index` of a fixed set: a gradient in its own direction, coarse squares and noise, so that
// all scales of the network have something to see.
RgbImage MadeUpPicture(int side, int channels, int index) {
  RgbImage image = BlankImage(side, side, channels);
  uint64_t state = static_cast<uint64_t>(index) + 1;
  uint8_t* out = image.pixels.data();
  for (int y = 0; y < side; ++y) {
    for (int x = 0; x < side; ++x) {
      for (int c = 0; c < channels; ++c) {
        state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
        const int noise = static_cast<int>(state >> 58);              // 0..63
        const int along = (index % 3 == 0 ? x : index % 3 == 1 ? y : x + y) * 96 / side;
        const int square = ((x / 16) * (index + 2 + c) + (y / 16) * (index + 5)) % 4 * 24;
        *out++ = static_cast<uint8_t>(std::min(255, along + square + noise));
      }
    }
  }
  return image;
}

double ToleranceOf(const ClassifierOptions& options) {
  if (options.dtype == "bf16") return 0.25;
  return options.device == "cpu" ? 1e-4 : 1e-3;  // other devices sum in another order
}

// LibTorch's operations, on any device; `device_ops`: with the plug-in's own, and recorded.
absl::StatusOr<std::unique_ptr<Classifier>> MakePlainClassifier(const Weights& weights,
                                                                const DeviceName& device, bool bf16,
                                                                bool device_ops) {
  const v1::Manifest& manifest = weights.manifest();
  ASSIGN_OR_RETURN(PvtV2 network, MakePvtV2(manifest.network()));
  RETURN_IF_ERROR(LoadWeightsInto(*network, weights));
  return Guard("loading the network", absl::StatusCode::kInternal,
               [&]() -> absl::StatusOr<std::unique_ptr<Classifier>> {
                 const torch::Device torch_device(
                     device.kind == "cpu" ? "cpu" : absl::StrCat(device.kind, ":", device.index));
                 network->eval();
                 for (torch::Tensor& parameter : network->parameters())
                   parameter.set_requires_grad(false);
                 if (bf16) ConvertToBf16(network);
                 network->to(torch_device);
                 if (device_ops) network->UseDeviceOps();
                 return std::make_unique<TorchClassifier>(std::move(network), manifest, device,
                                                          torch_device, device_ops);
               });
}

}  // namespace

absl::StatusOr<std::unique_ptr<Classifier>> LoadClassifier(const std::filesystem::path& path,
                                                           const ClassifierOptions& options) {
  if (options.dtype != "fp32" && options.dtype != "bf16") {
    return absl::InvalidArgumentError(
        absl::StrCat("dtype is \"", options.dtype, "\"; use fp32 or bf16"));
  }
  if (options.threads < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads is ", options.threads, "; use 0 (as many as cores) or more"));
  }
  if (!options.weights.head.empty()) {
    return absl::InvalidArgumentError("weights.head: a new head has to be trained first");
  }
  ASSIGN_OR_RETURN(const DeviceName device, OpenDevice(options.device));
  ASSIGN_OR_RETURN(std::unique_ptr<Weights> weights, OpenWeights(path, options.weights));
  const v1::Manifest& manifest = weights->manifest();
  RETURN_IF_ERROR(CheckPreprocessing(manifest.preprocessing()));
  if (manifest.preprocessing().channels() != manifest.network().in_channels()) {
    return absl::InvalidArgumentError(
        absl::StrCat("preprocessing.channels is ", manifest.preprocessing().channels(),
                     ", the network takes ", manifest.network().in_channels()));
  }
  if (options.threads > 0) SetForwardThreads(options.threads);
  const bool bf16 = options.dtype == "bf16";
  absl::StatusOr<std::unique_ptr<Classifier>> classifier;
  if (device.kind == "cpu" && !options.plain) {
    classifier =
        MakePackedClassifier(std::move(weights), options, [device, bf16](const Weights& same) {
          return MakePlainClassifier(same, device, bf16, /*device_ops=*/false);
        });
  } else {
    classifier = MakePlainClassifier(*weights, device, bf16,
                                     /*device_ops=*/device.kind != "cpu" && !options.plain);
  }
  if (!classifier.ok()) return Annotate(classifier.status(), path.string());
  log::Info("classifier_loaded", {{"variant", (*classifier)->manifest().network().variant()},
                                  {"device", options.device},
                                  {"dtype", options.dtype},
                                  {"kernels", (*classifier)->path()}});
  return classifier;
}

absl::StatusOr<SelfTestResult> RunSelfTest(Classifier& classifier,
                                           const std::filesystem::path& folder,
                                           const ClassifierOptions& options) {
  SelfTestResult result{.tolerance = ToleranceOf(options)};
  const v1::Manifest& manifest = classifier.manifest();
  for (const v1::FileEntry& entry : manifest.files()) {
    if (absl::string_view(entry.name()) == kSelfTestFile) result.available = true;
  }
  if (!result.available) return result;

  ASSIGN_OR_RETURN(const std::string file, ReadCheckpointFile(folder, manifest, kSelfTestFile));
  ASSIGN_OR_RETURN(const NamedTensors tensors, TensorsFromSafetensors(file));
  ASSIGN_OR_RETURN(const torch::Tensor pixels, Find(tensors, "pixels"));
  ASSIGN_OR_RETURN(const torch::Tensor logits, Find(tensors, "logits"));
  const int64_t classes = manifest.network().num_classes();
  if (pixels.dim() != 4 || logits.dim() != 2 || pixels.size(0) != logits.size(0) ||
      logits.size(1) != classes || pixels.numel() == 0) {
    return absl::DataLossError(
        absl::StrCat(kSelfTestFile, ": pixels must be [N, C, H, W] and logits [N, ", classes, "]"));
  }
  result.pictures = static_cast<int>(pixels.size(0));
  ASSIGN_OR_RETURN(
      const std::vector<float> answer,
      classifier.Forward({pixels.const_data_ptr<float>(), static_cast<size_t>(pixels.numel())},
                         result.pictures, static_cast<int>(pixels.size(2)),
                         static_cast<int>(pixels.size(3))));
  if (answer.size() != static_cast<size_t>(logits.numel())) {
    return absl::InternalError(absl::StrCat("self-test: the network gave ", answer.size(),
                                            " logits, not ", logits.numel()));
  }
  result.height = static_cast<int>(pixels.size(2));
  result.width = static_cast<int>(pixels.size(3));
  result.pixels.assign(pixels.const_data_ptr<float>(),
                       pixels.const_data_ptr<float>() + pixels.numel());
  const float* expected = logits.const_data_ptr<float>();
  for (size_t i = 0; i < answer.size(); ++i) {
    const double error = std::abs(double{answer[i]} - double{expected[i]});
    if (!std::isfinite(error)) {
      return absl::FailedPreconditionError(absl::StrCat(
          "self-test: logit ", i % classes, " of picture ", i / classes, " is ", answer[i],
          ", stored was ", expected[i], "; the weights don't give finite numbers"));
    }
    result.max_error = std::max(result.max_error, error);
  }
  if (result.max_error > result.tolerance) {
    return absl::FailedPreconditionError(absl::StrCat(
        "self-test: a logit of ", result.pictures, " stored pictures is off by ", result.max_error,
        ", allowed is ", result.tolerance, " (", options.dtype, " on ", options.device, ")"));
  }
  result.logits = answer;
  return result;
}

absl::StatusOr<std::string> MakeSelfTest(Classifier& classifier, int pictures) {
  if (pictures < 1) {
    return absl::InvalidArgumentError(absl::StrCat("pictures is ", pictures, "; use 1 or more"));
  }
  const v1::Preprocessing& p = classifier.manifest().preprocessing();
  RETURN_IF_ERROR(CheckPreprocessing(p));
  const int side = p.crop();
  const size_t each = size_t{1} * p.channels() * side * side;
  std::vector<float> pixels(each * pictures);
  for (int i = 0; i < pictures; ++i) {
    Normalise(MadeUpPicture(side, p.channels(), i), p, pixels.data() + each * i);
  }
  ASSIGN_OR_RETURN(const std::vector<float> logits,
                   classifier.Forward(pixels, pictures, side, side));
  const auto bytes = [](const std::vector<float>& values) {
    return absl::string_view(reinterpret_cast<const char*>(values.data()), values.size() * 4);
  };
  const auto classes = static_cast<int64_t>(logits.size()) / pictures;
  return SerializeSafetensors(
      {{"pixels", "F32", {pictures, p.channels(), side, side}, bytes(pixels)},
       {"logits", "F32", {pictures, classes}, bytes(logits)}});
}

}  // namespace pyramid
