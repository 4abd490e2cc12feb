#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/answerer.h"
#include "model/preprocess.h"
#include "proto/base/status.h"
#include "proto/base/time.h"

namespace pyramid {
namespace {

constexpr int kLargestBatch = 32;  // pictures in one forward pass

void SetError(v1::PictureResult& result, const absl::Status& status) {
  result.set_code(static_cast<int>(status.code()));
  result.set_message(std::string(status.message()));
}

// Softmax in double, best first; of equals the lower index.
void Rank(std::span<const float> logits, const v1::Manifest& manifest, const AnswerOptions& options,
          v1::PictureResult& result) {
  for (const float logit : logits) {
    if (!std::isfinite(logit)) {
      SetError(result, absl::InternalError("the network gave a logit that isn't a finite number"));
      return;
    }
  }
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const size_t count = std::min(order.size(), static_cast<size_t>(options.top_k));
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                    [&](int a, int b) {
                      const float left = logits[static_cast<size_t>(a)];
                      const float right = logits[static_cast<size_t>(b)];
                      return left != right ? left > right : a < b;
                    });
  for (size_t i = 0; i < count; ++i) {
    const int index = order[i];
    v1::Prediction& prediction = *result.add_predictions();
    prediction.set_index(index);
    prediction.set_label(index < manifest.labels_size() ? manifest.labels(index)
                                                        : absl::StrCat(index));
    prediction.set_probability(
        static_cast<float>(std::exp(logits[static_cast<size_t>(index)] - largest) / sum));
  }
  if (options.logits) result.mutable_logits()->Add(logits.begin(), logits.end());
}

class CheckpointAnswerer : public Answerer {
 public:
  CheckpointAnswerer(std::unique_ptr<Classifier> classifier, std::string name,
                     const AnswerOptions& options)
      : classifier_(std::move(classifier)), name_(std::move(name)), options_(options) {}

  absl::StatusOr<v1::ClassifyResponse> Classify(std::vector<v1::Picture> pictures) override {
    const absl::Time start = absl::Now();
    const v1::Manifest& manifest = classifier_->manifest();
    v1::ClassifyResponse response;
    response.set_model(name_);
    response.set_digest(manifest.digest());
    std::vector<Ready> ready;
    for (size_t i = 0; i < pictures.size(); ++i) {
      v1::PictureResult& result = *response.add_results();
      absl::StatusOr<Ready> one = Prepare(pictures[i], manifest, options_.decode);
      pictures[i].Clear();  // an array would be in memory twice
      if (!one.ok()) {
        SetError(result, one.status());
        continue;
      }
      one->index = static_cast<int>(i);
      ready.push_back(*std::move(one));
    }
    const absl::Time decoded = absl::Now();
    // Neighbours of one size share a forward pass.
    for (size_t first = 0; first < ready.size();) {
      size_t last = first + 1;
      while (last < ready.size() && last - first < kLargestBatch &&
             ready[last].height == ready[first].height && ready[last].width == ready[first].width) {
        ++last;
      }
      RETURN_IF_ERROR(Forward(std::span(ready).subspan(first, last - first), response));
      first = last;
    }
    v1::Timings& timings = *response.mutable_timings();
    *timings.mutable_decode() = ToProto(decoded - start);
    *timings.mutable_forward() = ToProto(absl::Now() - decoded);
    *timings.mutable_total() = ToProto(absl::Now() - start);
    return response;
  }

 private:
  struct Ready {
    int index = 0;
    int height = 0;
    int width = 0;
    std::vector<float> pixels;
  };

  static absl::StatusOr<Ready> Prepare(const v1::Picture& picture, const v1::Manifest& manifest,
                                       const DecodeLimits& limits) {
    Ready ready;
    if (picture.has_tensor()) {
      const v1::ImageTensor& tensor = picture.tensor();
      if (tensor.channels() != manifest.network().in_channels()) {
        return absl::InvalidArgumentError(absl::StrCat("the tensor has ", tensor.channels(),
                                                       " channels; the model takes ",
                                                       manifest.network().in_channels()));
      }
      ready.height = tensor.height();
      ready.width = tensor.width();
      ready.pixels.assign(tensor.values().begin(), tensor.values().end());
      return ready;
    }
    ASSIGN_OR_RETURN(ready.pixels,
                     DecodeAndPreprocess(picture.encoded(), manifest.preprocessing(), limits));
    ready.height = ready.width = manifest.preprocessing().crop();
    return ready;
  }

  absl::Status Forward(std::span<const Ready> batch, v1::ClassifyResponse& response) {
    std::vector<float> pixels;
    for (const Ready& one : batch) {
      pixels.insert(pixels.end(), one.pixels.begin(), one.pixels.end());
    }
    ASSIGN_OR_RETURN(const std::vector<float> logits,
                     classifier_->Forward(pixels, static_cast<int>(batch.size()), batch[0].height,
                                          batch[0].width));
    const auto classes = static_cast<size_t>(classifier_->manifest().network().num_classes());
    for (size_t i = 0; i < batch.size(); ++i) {
      Rank(std::span(logits).subspan(i * classes, classes), classifier_->manifest(), options_,
           *response.mutable_results(batch[i].index));
    }
    return absl::OkStatus();
  }

  const std::unique_ptr<Classifier> classifier_;
  const std::string name_;
  const AnswerOptions options_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Answerer>> AnswerFromCheckpoint(const Environment& environment,
                                                               const std::filesystem::path& path,
                                                               const ClassifierOptions& classifier,
                                                               const AnswerOptions& options) {
  if (!environment.load_classifier) {
    return absl::FailedPreconditionError(
        "this pyramid was built without LibTorch and can't load a checkpoint; promote it on a "
        "server and use --model");
  }
  absl::StatusOr<std::unique_ptr<Classifier>> loaded =
      environment.load_classifier(environment.folder / path, classifier);
  if (!loaded.ok()) {
    const absl::Status status = Annotate(loaded.status(), path.string());
    // A device that isn't there is no unreachable server.
    if (absl::IsUnavailable(status)) return absl::InternalError(status.message());
    return status;
  }
  return std::make_unique<CheckpointAnswerer>(*std::move(loaded), path.string(), options);
}

}  // namespace pyramid
