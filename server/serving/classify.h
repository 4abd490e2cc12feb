// The way of a Classify request: admit → decode and preprocess (decode pool; tensors need neither)
// → batch (the network reads tensors where they are, and looks them through) → rank.
//
// Nothing is decoded for a request that can't be answered: the deadline, the version and room in
// the queue come first, and deadline and caller are looked at again before each picture.
// Thread-safe; Classify never blocks.
#ifndef PYRAMID_SERVER_SERVING_CLASSIFY_H_
#define PYRAMID_SERVER_SERVING_CLASSIFY_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "model/preprocess.h"
#include "proto/base/clock.h"
#include "proto/base/pieces.h"
#include "proto/classification.pb.h"
#include "server/metrics.h"
#include "server/serving/batcher.h"
#include "server/serving/door.h"
#include "server/serving/model_registry.h"
#include "server/serving/recent_slow.h"
#include "server/serving/work_pool.h"

namespace pyramid {

// A picture of a request where it came in, so that nobody copies it into a message first. What it
// points at must live until the answer.
struct PictureView {
  enum class Kind { kNothing, kEncoded, kFloats };
  Kind kind = Kind::kNothing;
  Pieces bytes;      // a JPEG, PNG … file, whole; or channels * height * width floats,
                     // row-major CHW, little-endian, normalised, perhaps unaligned
  int channels = 0;  // of floats, as the next two
  int height = 0;
  int width = 0;
};

// The request's pictures, where they lie in it.
std::vector<PictureView> ViewsOf(const v1::ClassifyRequest& request);

class ClassifyPipeline {
 public:
  struct Options {
    int max_pictures = 64;  // per request; at most Batcher::Options::max_queue
    int decode_threads = 2;
    int decode_queue = 512;  // pictures waiting to be decoded
    DecodeLimits decode;
    // Floats that aren't finite: InvalidArgument, or they go through the network and what comes out
    // is the answer (its probabilities are meaningless).
    bool refuse_non_finite = true;
    // The deadline of requests that come without one or with a later one, from their arrival; 0:
    // none.
    absl::Duration default_timeout = absl::ZeroDuration();
  };
  using Done = absl::AnyInvocable<void(absl::StatusOr<v1::ClassifyResponse>) &&>;

  // All must outlive the pipeline.
  ClassifyPipeline(const Options& options, ModelRegistry& registry, Metrics& metrics,
                   Clock& clock = Clock::Real());
  ~ClassifyPipeline();  // waits for the requests in progress
  ClassifyPipeline(const ClassifyPipeline&) = delete;
  ClassifyPipeline& operator=(const ClassifyPipeline&) = delete;

  // Calls `done` exactly once, from any thread, perhaps before this returns. `request` must live
  // until then; `cancelled` may be set by then. A picture that can't be decoded carries its own
  // error. Of the whole request:
  //   InvalidArgument    no picture, over max_pictures, a picture without content, a tensor of
  //                      the wrong shape, negative top_k
  //   NotFound           no such model or version
  //   ResourceExhausted  a queue is full; PushbackMillis says when to come back
  //   DeadlineExceeded   `deadline` has passed
  //   Cancelled          the caller is gone
  //   Unavailable        draining
  //   DataLoss           the version named is damaged on disk
  //   Internal           the network failed, or gave a picture no finite answer: pictures[i]
  void Classify(const v1::ClassifyRequest& request, absl::Time deadline, CancelFlag cancelled,
                Done done);
  // As above with `pictures`; request.pictures() isn't looked at.
  void Classify(const v1::ClassifyRequest& request, std::vector<PictureView> pictures,
                absl::Time deadline, CancelFlag cancelled, Done done);

  // Before a request's message is read: ResourceExhausted if it can't be answered in time should it
  // ask for what all the others lately did (door.h), counted as Classify counts. Otherwise a pass,
  // to be kept until the message has been read or the call is over, whichever comes first; also
  // for what Classify refuses for another reason, and where versions share a model's traffic:
  // nobody knows yet whose queue it would wait in.
  absl::StatusOr<Door::Pass> EnterDoor(absl::Time deadline);

  // A request to `model` was read `time` after its call had begun.
  void Received(absl::string_view model, absl::Duration time);

  // An answer has left `time` after it was ready. Requests come in through the same queues, unseen
  // until they are read: so much of their time is taken to be gone by then, and as much is kept for
  // their answers.
  void Sent(absl::Duration time) { way_.Observe(time); }

  // From now on requests get Unavailable. Waits until those in progress have been answered; false:
  // `until` came first.
  bool Drain(absl::Time until);

  const Options& options() const { return options_; }

 private:
  struct Call;

  // Of the last dozen or so. A hiccup counts as four times the mean at most. Thread-safe.
  class MeanTime {
   public:
    void Observe(absl::Duration time);
    absl::Duration Mean() const;

   private:
    mutable absl::Mutex mutex_;
    absl::Duration mean_ ABSL_GUARDED_BY(mutex_);
  };

  absl::Status Admit(Call& call);
  void LoadThenStart(const std::shared_ptr<Call>& call);
  void Start(const std::shared_ptr<Call>& call);
  absl::Status AdmitPictures(const std::shared_ptr<Call>& call);
  absl::Time Shortened(absl::Time deadline, absl::Time now) const;
  absl::Time DueFor(absl::Time deadline, absl::Time now) const;
  // `size` of the largest file; none: tensors only.
  absl::Duration UntilDecoded(const Batcher::Request& request,
                              std::optional<WorkPool::Size> size) const;
  void Decode(const std::shared_ptr<Call>& call, int index, WorkPool::Size size);
  struct PictureTimes {
    absl::Duration decode;
    absl::Duration preprocess;  // of a file
  };
  // `times`: none if it wasn't tried.
  void Decoded(const std::shared_ptr<Call>& call, int index,
               absl::StatusOr<std::vector<float>> pixels, std::optional<PictureTimes> times);
  void Answered(const std::shared_ptr<Call>& call, int index,
                absl::StatusOr<Batcher::Answer> answer);
  void Finish(Call& call);
  void End(Call& call, absl::StatusOr<v1::ClassifyResponse> result);

  const Options options_;
  ModelRegistry& registry_;
  Metrics& metrics_;
  Clock& clock_;

  absl::Mutex mutex_;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  int in_progress_ ABSL_GUARDED_BY(mutex_) = 0;

  std::array<MeanTime, 2> decode_times_;  // by WorkPool::Size
  Door door_;
  RecentSlow way_;

  // Last: their threads use what is above.
  WorkPool decode_pool_;
  WorkPool load_pool_;  // versions that a request names and nobody has loaded
};

// The best `top_k` classes, best first (the lower index of equals), with softmax probabilities
// summed in double; `top_k` from 1. `labels` empty: the index as text. Internal: a logit isn't
// finite.
absl::StatusOr<std::vector<v1::Prediction>> Rank(
    std::span<const float> logits, const google::protobuf::RepeatedPtrField<std::string>& labels,
    int top_k);

// InvalidArgument unless a network with `channels` input channels can take the tensor.
absl::Status CheckTensorShape(const PictureView& tensor, int channels);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SERVING_CLASSIFY_H_
