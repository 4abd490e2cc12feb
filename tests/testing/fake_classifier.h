// A network that a test understands: the logit of class c is mean(pixels) + bias - c. Checkpoints
// for it, a loader that reads them, a self-test that they pass.
#ifndef PYRAMID_TESTS_TESTING_FAKE_CLASSIFIER_H_
#define PYRAMID_TESTS_TESTING_FAKE_CLASSIFIER_H_

#include <filesystem>
#include <functional>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "model/checkpoint.h"
#include "model/classifier.h"
#include "proto/base/status.h"

namespace pyramid::testing {

// What a test sees and decides of all fake networks that share it. Thread-safe.
class FakeNetwork {
 public:
  // While shut, Forward waits. Open at first.
  void Shut() {
    absl::MutexLock lock(&mutex_);
    open_ = false;
  }
  void Open() {
    absl::MutexLock lock(&mutex_);
    open_ = true;
  }
  void Fail(absl::Status status) {
    absl::MutexLock lock(&mutex_);
    failure_ = std::move(status);
  }
  // Called in each Forward.
  void OnForward(std::function<void()> hook) {
    absl::MutexLock lock(&mutex_);
    hook_ = std::move(hook);
  }
  void Forget() {
    absl::MutexLock lock(&mutex_);
    batches_.clear();
  }

  // Pictures of each Forward that has begun.
  std::vector<int> batches() const {
    absl::MutexLock lock(&mutex_);
    return batches_;
  }
  int pictures() const {
    const std::vector<int> all = batches();
    return std::accumulate(all.begin(), all.end(), 0);
  }
  // Returns when `count` Forwards have begun, or after ten seconds: false.
  bool AwaitBatches(int count) const {
    absl::MutexLock lock(&mutex_);
    const auto begun = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
      return static_cast<int>(batches_.size()) >= count;
    };
    return mutex_.AwaitWithTimeout(absl::Condition(&begun), absl::Seconds(10));
  }

  absl::Status Enter(int batch) {
    std::function<void()> hook;
    {
      absl::MutexLock lock(&mutex_);
      batches_.push_back(batch);
      hook = hook_;
    }
    if (hook) hook();
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(&open_));
    return failure_;
  }

 private:
  mutable absl::Mutex mutex_;
  bool open_ ABSL_GUARDED_BY(mutex_) = true;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  std::function<void()> hook_ ABSL_GUARDED_BY(mutex_);
  std::vector<int> batches_ ABSL_GUARDED_BY(mutex_);
};

class FakeClassifier final : public Classifier {
 public:
  FakeClassifier(FakeNetwork& network, v1::Manifest manifest, double bias = 0)
      : network_(network), manifest_(std::move(manifest)), bias_(bias) {}

  absl::StatusOr<std::vector<float>> Forward(std::span<const float> pixels, int batch, int height,
                                             int width) override {
    RETURN_IF_ERROR(network_.Enter(batch));
    const size_t each = static_cast<size_t>(manifest_.network().in_channels()) *
                        static_cast<size_t>(height * width);
    if (pixels.size() != each * static_cast<size_t>(batch)) {
      return absl::InvalidArgumentError(absl::StrCat(pixels.size(), " numbers for ", batch, "x",
                                                     manifest_.network().in_channels(), "x", height,
                                                     "x", width));
    }
    std::vector<float> logits;
    for (size_t i = 0; i < static_cast<size_t>(batch); ++i) {
      const std::span<const float> one = pixels.subspan(i * each, each);
      const double mean = std::accumulate(one.begin(), one.end(), 0.0) / static_cast<double>(each);
      for (int c = 0; c < manifest_.network().num_classes() + extra_logits_; ++c) {
        logits.push_back(static_cast<float>(mean + bias_ - c));
      }
    }
    return logits;
  }

  const v1::Manifest& manifest() const override { return manifest_; }
  void set_extra_logits(int count) { extra_logits_ = count; }

 private:
  FakeNetwork& network_;
  const v1::Manifest manifest_;
  const double bias_;
  int extra_logits_ = 0;
};

// Three classes "ankle boot", "bag", "coat"; grey pictures resized to 32x32, 0..1.
inline v1::Manifest FakeManifest() {
  v1::Manifest manifest;
  manifest.mutable_network()->set_variant("pvt_v2_b0");
  manifest.mutable_network()->set_num_classes(3);
  manifest.mutable_network()->set_in_channels(1);
  manifest.set_origin("pyramid");
  v1::Preprocessing& p = *manifest.mutable_preprocessing();
  p.set_channels(1);
  p.set_exif("apply");
  p.mutable_resize()->set_side(32);
  p.mutable_resize()->set_kernel("bilinear");
  p.mutable_resize()->set_antialias("none");
  p.mutable_resize()->set_other_side("floor");
  p.set_crop(32);
  p.add_mean(0);
  p.add_std(1);
  for (const char* label : {"ankle boot", "bag", "coat"}) manifest.add_labels(label);
  return manifest;
}

// A checkpoint on disk whose fake network has this bias; other biases give other digests.
inline absl::StatusOr<v1::Manifest> WriteFakeCheckpoint(const std::filesystem::path& folder,
                                                        int bias,
                                                        v1::Manifest manifest = FakeManifest()) {
  const std::string weights = absl::StrCat(bias);
  return WriteCheckpoint(folder, std::move(manifest), {{std::string(kWeightsFile), weights}});
}

// As LoadClassifier, for such checkpoints. `network` must outlive what is loaded.
inline ClassifierLoader FakeLoader(FakeNetwork& network) {
  return [&network](const std::filesystem::path& folder,
                    const ClassifierOptions&) -> absl::StatusOr<std::unique_ptr<Classifier>> {
    ASSIGN_OR_RETURN(v1::Manifest manifest, VerifyCheckpoint(folder));
    ASSIGN_OR_RETURN(const std::string weights, ReadCheckpointFile(folder, manifest, kWeightsFile));
    double bias = 0;
    if (!absl::SimpleAtod(weights, &bias)) return absl::DataLossError("no number in the weights");
    return std::make_unique<FakeClassifier>(network, std::move(manifest), bias);
  };
}

// A self-test that every model passes.
inline absl::StatusOr<SelfTestResult> PassingSelfTest(Classifier&, const std::filesystem::path&,
                                                      const ClassifierOptions&) {
  return SelfTestResult{};
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_FAKE_CLASSIFIER_H_
