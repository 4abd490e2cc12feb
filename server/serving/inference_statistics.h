// What ModelStatistics of the Open Inference Protocol tells about one loaded version: counts and
// times of requests and of forward passes, since it was loaded. Thread-safe; a snapshot is one
// moment's numbers.
#ifndef PYRAMID_SERVER_SERVING_INFERENCE_STATISTICS_H_
#define PYRAMID_SERVER_SERVING_INFERENCE_STATISTICS_H_

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "model/classifier.h"

namespace pyramid {

class InferenceStatistics {
 public:
  struct Times {  // of one request
    absl::Duration total;
    absl::Duration queue;   // its longest wait for a batch
    absl::Duration input;   // decoding, summed over its pictures
    absl::Duration infer;   // its longest forward pass
    absl::Duration output;  // ranking
  };
  struct Sum {
    int64_t count = 0;
    absl::Duration time;
    void Add(absl::Duration more) {
      ++count;
      time += more;
    }
  };
  struct Snapshot {
    absl::Time last;  // answer; the infinite past: none yet
    int64_t pictures = 0;
    int64_t executions = 0;
    // The counts of success, queue, input, infer and output are equal.
    Sum success, fail, queue, input, infer, output;
    std::map<int, Sum> batches;  // by size
  };

  void AddAnswer(int pictures, const Times& times, absl::Time now);
  void AddFailure(absl::Duration total);
  void AddBatch(int pictures, absl::Duration forward);
  Snapshot Get() const;

 private:
  mutable absl::Mutex mutex_;
  Snapshot sums_ ABSL_GUARDED_BY(mutex_){.last = absl::InfinitePast()};
};

// Counts the forward passes of a classifier. Both must outlive it.
class CountedClassifier final : public Classifier {
 public:
  CountedClassifier(Classifier& classifier, InferenceStatistics& statistics)
      : classifier_(classifier), statistics_(statistics) {}

  absl::StatusOr<std::vector<float>> Forward(std::span<const float> pixels, int batch, int height,
                                             int width) override;
  absl::StatusOr<std::vector<float>> ForwardPieces(std::span<const Pieces> pictures, int height,
                                                   int width, std::vector<uint8_t>* finite,
                                                   std::vector<float>& memory) override;
  const v1::Manifest& manifest() const override { return classifier_.manifest(); }
  std::string path() const override { return classifier_.path(); }
  int64_t weight_bytes() const override { return classifier_.weight_bytes(); }

 private:
  absl::StatusOr<std::vector<float>> Counted(
      int pictures, absl::FunctionRef<absl::StatusOr<std::vector<float>>()> pass);

  Classifier& classifier_;
  InferenceStatistics& statistics_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_INFERENCE_STATISTICS_H_
