// For null_server: a network that computes nothing, so that what remains is what serving costs. It
// takes any checkpoint's folder and answers zeros.
#include "model/checkpoint.h"
#include "model/classifier.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

class NullClassifier final : public Classifier {
 public:
  explicit NullClassifier(v1::Manifest manifest) : manifest_(std::move(manifest)) {}

  absl::StatusOr<std::vector<float>> Forward(std::span<const float> /*pixels*/, int batch,
                                             int /*height*/, int /*width*/) override {
    return std::vector<float>(static_cast<size_t>(batch) *
                              static_cast<size_t>(manifest_.network().num_classes()));
  }
  const v1::Manifest& manifest() const override { return manifest_; }
  std::string path() const override { return "null"; }

 private:
  const v1::Manifest manifest_;
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
