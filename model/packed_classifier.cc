#include "model/packed_classifier.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "model/kernels/cpu_kernels.h"
#include "model/packed_network.h"
#include "model/thread_team.h"
#include "model/variants.h"
#include "proto/base/cores.h"
#include "proto/base/log.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

using kernels::CpuKernels;

std::atomic<int> forward_threads{0};

absl::StatusOr<std::shared_ptr<const PackedNetwork>> Pack(const Weights& weights,
                                                          const CpuKernels& kernels) {
  std::map<std::string, const WeightParameter*> by_name;
  for (const WeightParameter& parameter : weights.parameters())
    by_name[parameter.name] = &parameter;
  return PackedNetwork::Create(weights.manifest().network(), kernels,
                               [&](const std::string& name, std::span<float> out) -> absl::Status {
                                 const auto found = by_name.find(name);
                                 if (found == by_name.end())
                                   return absl::InternalError(absl::StrCat(name, " isn't there"));
                                 return weights.Read(*found->second, out);
                               });
}

class PackedClassifier : public Classifier {
 public:
  using MakePlain = std::function<absl::StatusOr<std::unique_ptr<Classifier>>(const Weights&)>;

  PackedClassifier(std::unique_ptr<Weights> weights, std::shared_ptr<const PackedNetwork> network,
                   bool bf16, MakePlain plain)
      : weights_(std::move(weights)),
        manifest_(weights_->manifest()),
        bf16_(bf16),
        make_plain_(std::move(plain)),
        network_(std::move(network)) {}

  absl::StatusOr<std::vector<float>> Forward(std::span<const float> pixels, int batch, int height,
                                             int width) override {
    RETURN_IF_ERROR(CheckPixels(manifest_.network(), pixels.size(), batch, height, width));
    std::vector<float> memory;
    return ForwardPieces(PiecesOf(pixels, batch), height, width, nullptr, memory);
  }

  absl::StatusOr<std::vector<float>> ForwardPieces(std::span<const Pieces> pictures, int height,
                                                   int width, std::vector<uint8_t>* finite,
                                                   std::vector<float>& memory) override {
    if (pictures.empty()) return absl::InvalidArgumentError("no pictures");
    for (const Pieces& picture : pictures) {
      RETURN_IF_ERROR(
          CheckPixels(manifest_.network(), picture.size() / sizeof(float), 1, height, width));
    }
    std::shared_ptr<const PackedNetwork> network = Current();
    if (!network->Takes(height, width)) {
      ASSIGN_OR_RETURN(Classifier* const plain, Plain(height, width));
      return plain->ForwardPieces(pictures, height, width, finite, memory);
    }
    if (finite != nullptr) finite->assign(pictures.size(), 1);
    std::vector<float> logits(pictures.size() *
                              static_cast<size_t>(manifest_.network().num_classes()));
    network->Forward(pictures, height, width, ForwardThreads(), logits,
                     finite == nullptr ? std::span<uint8_t>() : std::span(*finite));
    if (UsesFp16(*network)) RETURN_IF_ERROR(MendOverflows(pictures, height, width, logits));
    return logits;
  }

  const v1::Manifest& manifest() const override { return manifest_; }
  int64_t weight_bytes() const override { return Current()->packed_bytes(); }

  std::string path() const override {
    const std::string name = Current()->kernels().name;
    const bool computes_f32 = Current()->kernels().activation_bytes == 4;
    return absl::StrCat("packed ", name, bf16_ && computes_f32 ? " (bf16 computed in f32)" : "");
  }

  absl::Status Profile(std::span<const float> pixels, int batch, int height, int width,
                       ForwardProfile* profile) override {
    RETURN_IF_ERROR(CheckPixels(manifest_.network(), pixels.size(), batch, height, width));
    const std::shared_ptr<const PackedNetwork> network = Current();
    if (!network->Takes(height, width))
      return Classifier::Profile(pixels, batch, height, width, profile);
    std::vector<float> logits(size_t{1} * batch * manifest_.network().num_classes());
    network->Forward(pixels, batch, height, width, ForwardThreads(), logits, profile);
    return absl::OkStatus();
  }

 private:
  static bool UsesFp16(const PackedNetwork& network) {
    return absl::string_view(network.kernels().name) == "amx";
  }

  std::shared_ptr<const PackedNetwork> Current() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return network_;
  }

  // Pictures that have finite pixels and got a logit that isn't are computed again in f32
  // arithmetic; the others keep their answers. That is how it stays if a picture's pixels could
  // come from a file: of others one caller could slow down all the rest.
  absl::Status MendOverflows(std::span<const Pieces> pictures, int height, int width,
                             std::span<float> logits) {
    const size_t classes = logits.size() / pictures.size();
    for (size_t i = 0; i < pictures.size(); ++i) {
      const std::span<float> answer = logits.subspan(i * classes, classes);
      if (AllFinite(answer.data(), classes)) continue;
      std::vector<float> picture(pictures[i].size() / sizeof(float));
      pictures[i].CopyTo(picture.data());
      if (!AllFinite(picture.data(), picture.size())) continue;
      ASSIGN_OR_RETURN(const std::shared_ptr<const PackedNetwork> network, WithoutFp16());
      network->Forward(picture, 1, height, width, ForwardThreads(), answer);
      if (CouldBeAFile(picture)) UseFromNowOn(network);
    }
    return absl::OkStatus();
  }

  bool CouldBeAFile(std::span<const float> picture) const {
    const v1::Preprocessing& p = manifest_.preprocessing();
    float largest = 2;  // as ExtremePictures has without a mean
    for (int i = 0; i < std::min(p.mean_size(), p.std_size()); ++i) {
      const double ends[] = {-p.mean(i) / p.std(i), (1 - p.mean(i)) / p.std(i)};
      for (const double end : ends) largest = std::max(largest, static_cast<float>(std::abs(end)));
    }
    return std::all_of(picture.begin(), picture.end(),
                       [&](float v) { return std::abs(v) <= 1.01f * largest; });
  }

  absl::StatusOr<std::shared_ptr<const PackedNetwork>> WithoutFp16() {
    const std::lock_guard<std::mutex> lock(mutex_);
#if defined(__x86_64__)
    if (without_fp16_ == nullptr) {
      ASSIGN_OR_RETURN(without_fp16_, Pack(*weights_, kernels::kAmxF32MathKernels));
    }
#endif
    return without_fp16_;
  }

  void UseFromNowOn(std::shared_ptr<const PackedNetwork> network) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (network_ == network) return;
    log::Warning("fp16_overflow", {{"variant", manifest_.network().variant()},
                                   {"digest", manifest_.digest()},
                                   {"now",
                                    "f32 arithmetic between the layers, about a third "
                                    "slower"}});
    network_ = std::move(network);
  }

  absl::StatusOr<Classifier*> Plain(int height, int width) {
    const std::lock_guard<std::mutex> lock(plain_mutex_);
    if (plain_ == nullptr) {
      ASSIGN_OR_RETURN(plain_, make_plain_(*weights_));
      log::Info("plain_path", {{"why", absl::StrCat(width, "x", height, " pixels have more than ",
                                                    kernels::kMostKeys, " keys")}});
    }
    return plain_.get();
  }

  const std::unique_ptr<Weights> weights_;
  const v1::Manifest manifest_;
  const bool bf16_;
  const MakePlain make_plain_;
  mutable std::mutex mutex_;
  std::shared_ptr<const PackedNetwork> network_;       // by mutex_
  std::shared_ptr<const PackedNetwork> without_fp16_;  // by mutex_; null: not needed so far
  std::mutex plain_mutex_;
  std::unique_ptr<Classifier> plain_;  // by plain_mutex_
};

// Black, white, columns and noise at both ends of the range, and noise in between: what reaches
// furthest in the first layers. [4, channels, side, side]
std::vector<float> ExtremePictures(const v1::Manifest& manifest, int side) {
  const v1::Preprocessing& p = manifest.preprocessing();
  const int channels = manifest.network().in_channels();
  std::vector<float> pixels(size_t{4} * channels * side * side);
  float* out = pixels.data();
  uint64_t state = 1;
  for (int picture = 0; picture < 4; ++picture) {
    for (int c = 0; c < channels; ++c) {
      const auto end = [&](double value) {
        const int i = std::min(c, p.mean_size() - 1);
        return i < 0 ? static_cast<float>(4 * value - 2)
                     : static_cast<float>((value - p.mean(i)) / p.std(i));
      };
      for (int y = 0; y < side; ++y) {
        for (int x = 0; x < side; ++x) {
          state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
          const double noise = static_cast<double>(state >> 40) / (1 << 24);
          const double values[] = {c % 2 == 0 ? 1.0 : 0.0, x / 4 % 2 == 0 ? 1.0 : 0.0,
                                   noise < 0.5 ? 0.0 : 1.0, noise};
          *out++ = end(values[picture]);
        }
      }
    }
  }
  return pixels;
}

}  // namespace

absl::Status CheckPixels(const v1::NetworkConfig& network, size_t floats, int batch, int height,
                         int width) {
  if (batch < 1) {
    return absl::InvalidArgumentError(absl::StrCat("batch is ", batch, "; use 1 or more"));
  }
  const Variant* variant = FindVariant(network.variant());
  const int smallest = variant == nullptr ? 1 : SmallestSide(*variant);
  if (height < smallest || width < smallest) {
    return absl::InvalidArgumentError(absl::StrCat("pictures are ", width, "x", height, " pixels; ",
                                                   network.variant(), " takes ", smallest, "x",
                                                   smallest, " or more"));
  }
  const int64_t picture = int64_t{network.in_channels()} * height * width;
  if (picture > (int64_t{1} << 40) / batch || floats != static_cast<size_t>(batch * picture)) {
    return absl::InvalidArgumentError(
        absl::StrCat("pixels has ", floats, " numbers; [", batch, ", ", network.in_channels(), ", ",
                     height, ", ", width, "] needs batch x channels x height x width of them"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Classifier>> MakePackedClassifier(
    std::unique_ptr<Weights> weights, const ClassifierOptions& options,
    std::function<absl::StatusOr<std::unique_ptr<Classifier>>(const Weights&)> plain) {
  ASSIGN_OR_RETURN(
      const CpuKernels* kernels,
      kernels::ChooseCpuKernels(kernels::DetectCpu(), options.dtype, kernels::ForcedCpuKernels()));
  ASSIGN_OR_RETURN(std::shared_ptr<const PackedNetwork> network, Pack(*weights, *kernels));
  const v1::Manifest manifest = weights->manifest();
  auto classifier = std::make_unique<PackedClassifier>(std::move(weights), std::move(network),
                                                       options.dtype == "bf16", std::move(plain));
  if (absl::string_view(kernels->name) == "amx") {
    const int side = std::max(64, std::min(manifest.preprocessing().crop(), 224));
    const std::vector<float> pixels = ExtremePictures(manifest, side);
    RETURN_IF_ERROR(classifier->Forward(pixels, 4, side, side).status());
  }
  return classifier;
}

void SetForwardThreads(int threads) { forward_threads = threads; }

int ForwardThreads() {
  const int threads = forward_threads.load();
  return threads > 0 ? threads : UsableCores();
}

}  // namespace pyramid
