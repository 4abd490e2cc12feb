// For null_server: a network that computes nothing, so that what remains is what serving costs. It
// takes any checkpoint's folder and answers zeros. With PYRAMID_NULL_US=N in the environment a pass
// takes N microseconds of its thread for each picture, as a network of another machine would.
#include <time.h>

#include <cstdlib>

#include "model/checkpoint.h"
#include "model/classifier.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

double ThreadSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

class NullClassifier final : public Classifier {
 public:
  explicit NullClassifier(v1::Manifest manifest) : manifest_(std::move(manifest)) {
    const char* const microseconds = std::getenv("PYRAMID_NULL_US");
    if (microseconds != nullptr) seconds_ = 1e-6 * std::atof(microseconds);
  }

  absl::StatusOr<std::vector<float>> Forward(std::span<const float> /*pixels*/, int batch,
                                             int /*height*/, int /*width*/) override {
    const double until = ThreadSeconds() + seconds_ * batch;
    while (seconds_ > 0 && ThreadSeconds() < until) {
    }
    return std::vector<float>(static_cast<size_t>(batch) *
                              static_cast<size_t>(manifest_.network().num_classes()));
  }
  const v1::Manifest& manifest() const override { return manifest_; }
  std::string path() const override { return "null"; }

 private:
  const v1::Manifest manifest_;
  double seconds_ = 0;  // of a picture
};

}  // namespace

absl::StatusOr<std::unique_ptr<Classifier>> LoadClassifier(const std::filesystem::path& path,
                                                           const ClassifierOptions& /*options*/) {
  ASSIGN_OR_RETURN(v1::Manifest manifest, VerifyCheckpoint(path));
  return std::make_unique<NullClassifier>(std::move(manifest));
}

absl::StatusOr<SelfTestResult> RunSelfTest(Classifier& /*classifier*/,
                                           const std::filesystem::path& /*folder*/,
                                           const ClassifierOptions& /*options*/) {
  return SelfTestResult{};
}

}  // namespace pyramid
