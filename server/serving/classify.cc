#include "server/serving/classify.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status.h"
#include "proto/base/time.h"
#include "server/serving/pushback.h"

namespace pyramid {
namespace {

using Rejection = ModelMetrics::Rejection;
using Stage = ModelMetrics::Stage;

constexpr int kDefaultTopK = 5;
constexpr int kLeastSide = 29;  // below it the network's last stage has nothing left to look at
constexpr int64_t kMostTensorPixels =
    int64_t{1024} * 1024;      // attention's memory grows with the square
constexpr int kMaxLoads = 64;  // requests that wait for a version to be loaded
// A forward pass on the CPU waits at each layer for its slowest thread: one that decoding has
// pushed aside holds up all. 64 JPEGs in flight, b0 at 224 in bf16 on two cores: 280 a second with
// 0 steps, 400 with 5, 425 with 10; but workers of training jobs would push aside decoding.
constexpr int kDecodeNice = 5;
constexpr size_t kLargeFile = 1 << 20;  // bytes; some megapixels, tens of milliseconds

Rejection ReasonOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      return IsPredictedLate(status) ? Rejection::kPredictedLate : Rejection::kQueueFull;
    case absl::StatusCode::kDeadlineExceeded:
      return Rejection::kExpired;
    case absl::StatusCode::kCancelled:
      return Rejection::kCancelled;
    case absl::StatusCode::kUnavailable:
      return Rejection::kDraining;
    default:
      return Rejection::kInvalid;
  }
}

PictureView ViewOf(const v1::Picture& picture) {
  static_assert(std::endian::native == std::endian::little, "floats are sent little-endian");
  PictureView view;
  if (picture.has_encoded()) {
    view.kind = PictureView::Kind::kEncoded;
    view.bytes = absl::string_view(picture.encoded());
  } else if (picture.has_tensor()) {
    const v1::ImageTensor& tensor = picture.tensor();
    view.kind = PictureView::Kind::kFloats;
    view.bytes = absl::string_view(reinterpret_cast<const char*>(tensor.values().data()),
                                   static_cast<size_t>(tensor.values_size()) * sizeof(float));
    view.channels = tensor.channels();
    view.height = tensor.height();
    view.width = tensor.width();
  }
  return view;
}

// The logits with something finite in place of what can't be ranked.
std::vector<float> Ordered(std::vector<float> logits) {
  constexpr float kMost = std::numeric_limits<float>::max();
  for (float& logit : logits) {
    if (!std::isfinite(logit)) logit = logit > 0 ? kMost : -kMost;
  }
  return logits;
}

// Indices of the `count` largest values, the largest first, the lower index of equals first.
std::vector<int> Best(std::span<const float> values, size_t count) {
  const auto better = [values](int a, int b) {
    const float left = values[static_cast<size_t>(a)];
    const float right = values[static_cast<size_t>(b)];
    return left != right ? left > right : a < b;
  };
  std::vector<int> best(std::min(values.size(), count));  // a heap, the worst of them on top
  std::iota(best.begin(), best.end(), 0);
  std::make_heap(best.begin(), best.end(), better);
  for (size_t i = best.size(); i < values.size(); ++i) {
    if (values[i] <= values[static_cast<size_t>(best.front())]) continue;
    std::pop_heap(best.begin(), best.end(), better);
    best.back() = static_cast<int>(i);
    std::push_heap(best.begin(), best.end(), better);
  }
  std::sort_heap(best.begin(), best.end(), better);
  return best;
}

}  // namespace

std::vector<PictureView> ViewsOf(const v1::ClassifyRequest& request) {
  std::vector<PictureView> views;
  views.reserve(static_cast<size_t>(request.pictures_size()));
  for (const v1::Picture& picture : request.pictures()) views.push_back(ViewOf(picture));
  return views;
}

absl::Status CheckTensorShape(const PictureView& tensor, int channels) {
  if (tensor.channels != channels) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor.channels is ", tensor.channels, "; the model takes ", channels));
  }
  if (tensor.height < kLeastSide || tensor.width < kLeastSide) {
    return absl::InvalidArgumentError(absl::StrCat("tensor is ", tensor.height, "x", tensor.width,
                                                   "; each side must be at least ", kLeastSide));
  }
  const int64_t pixels = int64_t{tensor.height} * tensor.width;
  if (pixels > kMostTensorPixels) {
    return absl::InvalidArgumentError(absl::StrCat("tensor is ", tensor.height, "x", tensor.width,
                                                   "; at most ", kMostTensorPixels,
                                                   " pixels are taken"));
  }
  if (tensor.bytes.size() != static_cast<size_t>(pixels * channels) * sizeof(float)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor.values has ", tensor.bytes.size() / sizeof(float), " numbers; ",
                     channels, "x", tensor.height, "x", tensor.width, " is ", pixels * channels));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<v1::Prediction>> Rank(
    std::span<const float> logits, const google::protobuf::RepeatedPtrField<std::string>& labels,
    int top_k) {
  if (logits.empty()) return std::vector<v1::Prediction>();
  if (!AllFinite(logits.data(), logits.size())) {
    const auto bad =
        std::find_if(logits.begin(), logits.end(), [](float x) { return !std::isfinite(x); });
    return absl::InternalError(
        absl::StrCat("the network's logit of class ", bad - logits.begin(), " isn't finite"));
  }
  const std::vector<int> best = Best(logits, static_cast<size_t>(top_k));
  const float largest = logits[static_cast<size_t>(best[0])];
  // Floats will do: each exponential is off by about 1e-6 of itself.
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);

  std::vector<v1::Prediction> predictions(best.size());
  for (size_t i = 0; i < best.size(); ++i) {
    const int index = best[i];
    const double above = double{logits[static_cast<size_t>(index)]} - largest;
    predictions[i].set_index(index);
    predictions[i].set_label(index < labels.size() ? labels.Get(index) : absl::StrCat(index));
    predictions[i].set_probability(static_cast<float>(std::exp(above) / sum));
  }
  return predictions;
}

// One request in progress. The pictures' tasks share it; the one that finishes last ends it.
struct ClassifyPipeline::Call {
  struct Picture {
    absl::Status status;        // its own error
    std::vector<float> logits;  // if it has none
  };

  const v1::ClassifyRequest& request;
  const std::vector<PictureView> views;
  const absl::Time started;
  const absl::Time deadline;
  const CancelFlag cancelled;
  Done done;
  ModelMetrics* metrics = nullptr;            // null: no such model
  std::shared_ptr<const ModelVersion> model;  // set before the pictures start
  absl::Duration rank;                        // by the last of their tasks

  Call(const v1::ClassifyRequest& a_request, std::vector<PictureView> a_views, absl::Time now,
       absl::Time a_deadline, CancelFlag a_cancelled, Done a_done)
      : request(a_request),
        views(std::move(a_views)),
        started(now),
        deadline(a_deadline),
        cancelled(std::move(a_cancelled)),
        done(std::move(a_done)) {}

  int count() const { return static_cast<int>(views.size()); }
  int priority() const {
    return request.priority() == 0 ? kDefaultPriority : static_cast<int>(request.priority());
  }

  // Whose way it goes where a model's traffic is shared.
  uint64_t RouteKey() const {
    return RouteKeyOf(request, views.empty() ? Pieces() : views.front().bytes);
  }

  // OK while somebody waits for the answer.
  absl::Status Wanted(absl::Time now) const {
    if (deadline <= now) return absl::DeadlineExceededError("the deadline has passed");
    if (cancelled != nullptr && cancelled->load()) return absl::CancelledError("the caller left");
    return absl::OkStatus();
  }

  absl::Mutex mutex;
  std::vector<Picture> pictures ABSL_GUARDED_BY(mutex);
  Batcher::Room room ABSL_GUARDED_BY(mutex);
  std::vector<Batcher::Picture> ready ABSL_GUARDED_BY(mutex);  // decoded, not yet submitted
  int undecoded ABSL_GUARDED_BY(mutex) = 0;
  int unanswered ABSL_GUARDED_BY(mutex) = 0;
  absl::Status failure ABSL_GUARDED_BY(mutex);  // of the whole request; the first one counts
  absl::Duration decode ABSL_GUARDED_BY(mutex);
  absl::Duration queue ABSL_GUARDED_BY(mutex);
  absl::Duration forward ABSL_GUARDED_BY(mutex);
};

ClassifyPipeline::ClassifyPipeline(const Options& options, ModelRegistry& registry,
                                   Metrics& metrics, Clock& clock)
    : options_(options),
      registry_(registry),
      metrics_(metrics),
      clock_(clock),
      decode_pool_("decode", options.decode_threads, options.decode_queue, kDecodeNice),
      load_pool_("model-load", 1, kMaxLoads) {}

ClassifyPipeline::~ClassifyPipeline() { Drain(absl::InfiniteFuture()); }

bool ClassifyPipeline::Drain(absl::Time until) {
  absl::MutexLock lock(&mutex_);
  draining_ = true;
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return in_progress_ == 0; };
  return clock_.AwaitUntil(mutex_, absl::Condition(&idle), until);
}

void ClassifyPipeline::MeanTime::Observe(absl::Duration time) {
  absl::MutexLock lock(&mutex_);
  const bool first = mean_ == absl::ZeroDuration();
  mean_ = first ? time : mean_ + (std::min(time, 4 * mean_) - mean_) / 12;
}

absl::Duration ClassifyPipeline::MeanTime::Mean() const {
  absl::MutexLock lock(&mutex_);
  return mean_;
}

void ClassifyPipeline::Classify(const v1::ClassifyRequest& request, absl::Time deadline,
                                CancelFlag cancelled, Done done) {
  Classify(request, ViewsOf(request), deadline, std::move(cancelled), std::move(done));
}

void ClassifyPipeline::Classify(const v1::ClassifyRequest& request,
                                std::vector<PictureView> pictures, absl::Time deadline,
                                CancelFlag cancelled, Done done) {
  const absl::Time now = clock_.Now();
  const auto call =
      std::make_shared<Call>(request, std::move(pictures), now, Shortened(deadline, now),
                             std::move(cancelled), std::move(done));
  metrics_.AddInflight(1);
  absl::Status admitted = Admit(*call);
  if (!admitted.ok()) {
    End(*call, std::move(admitted));
  } else if (call->model != nullptr) {
    Start(call);
  } else {
    LoadThenStart(call);
  }
}

absl::Status ClassifyPipeline::Admit(Call& call) {
  bool draining = false;
  {
    absl::MutexLock lock(&mutex_);
    ++in_progress_;
    draining = draining_;
  }
  const v1::ClassifyRequest& request = call.request;
  call.metrics = registry_.MetricsOf(request.model());
  if (draining) return absl::UnavailableError("the server is shutting down; try another one");
  RETURN_IF_ERROR(call.Wanted(clock_.Now()));
  if (call.count() == 0) {
    return absl::InvalidArgumentError("pictures is empty; send 1 or more");
  }
  if (call.count() > options_.max_pictures) {
    return absl::InvalidArgumentError(absl::StrCat("pictures has ", call.count(),
                                                   " entries; at most ", options_.max_pictures,
                                                   " are taken per request"));
  }
  if (request.top_k() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_k is ", request.top_k(), "; use 1 or more, or 0 for ", kDefaultTopK));
  }
  if (request.priority() > kLowestPriority) {
    return absl::InvalidArgumentError(
        absl::StrCat("priority is ", request.priority(), "; use 1, the highest, to ",
                     kLowestPriority, ", or 0 for the model's default, ", kDefaultPriority));
  }
  ASSIGN_OR_RETURN(call.model, registry_.Find(request.model(), request.version(),
                                              [&call] { return call.RouteKey(); }));
  return absl::OkStatus();
}

void ClassifyPipeline::LoadThenStart(const std::shared_ptr<Call>& call) {
  std::vector<WorkPool::Task> tasks;
  tasks.emplace_back([this, call] {
    absl::Status wanted = call->Wanted(clock_.Now());
    if (!wanted.ok()) return End(*call, std::move(wanted));
    auto loaded = registry_.Get(call->request.model(), call->request.version(),
                                [&call] { return call->RouteKey(); });
    if (!loaded.ok()) return End(*call, loaded.status());
    call->model = *std::move(loaded);
    Start(call);
  });
  absl::Status posted = load_pool_.Post(std::move(tasks));
  if (!posted.ok()) End(*call, std::move(posted));
}

void ClassifyPipeline::Start(const std::shared_ptr<Call>& call) {
  absl::Status started = AdmitPictures(call);
  if (!started.ok()) End(*call, std::move(started));
}

// On success the pictures' tasks own the call.
absl::Status ClassifyPipeline::AdmitPictures(const std::shared_ptr<Call>& call) {
  const int channels = call->model->manifest().network().in_channels();
  const int crop = call->model->manifest().preprocessing().crop();
  Batcher::Request request{.pictures = call->count(),
                           .height = 0,
                           .width = 0,
                           .priority = call->priority(),
                           .deadline = DueFor(call->deadline, call->started)};
  std::optional<WorkPool::Size> size;
  for (int i = 0; i < call->count(); ++i) {
    const PictureView& picture = call->views[static_cast<size_t>(i)];
    if (picture.kind == PictureView::Kind::kNothing) {
      return absl::InvalidArgumentError(
          absl::StrCat("pictures[", i, "] has neither encoded bytes nor a tensor"));
    }
    if (picture.kind == PictureView::Kind::kFloats) {
      RETURN_IF_ERROR(
          Annotate(CheckTensorShape(picture, channels), absl::StrCat("pictures[", i, "]")));
    }
    const bool file = picture.kind == PictureView::Kind::kEncoded;
    if (file) {
      size = picture.bytes.size() > kLargeFile ? WorkPool::Size::kLarge
                                               : size.value_or(WorkPool::Size::kUsual);
    }
    const int height = file ? crop : picture.height;
    const int width = file ? crop : picture.width;
    if (int64_t{height} * width > int64_t{request.height} * request.width) {
      request.height = height;
      request.width = width;
    }
  }
  door_.Read({.model = call->request.model(),
              .version = call->request.version(),
              .pictures = request,
              .decode = size},
             call->started);
  request.until_ready = UntilDecoded(request, size);
  ASSIGN_OR_RETURN(Batcher::Room room, call->model->batcher().Admit(request));
  {
    absl::MutexLock lock(&call->mutex);
    call->room = std::move(room);
    call->pictures.resize(static_cast<size_t>(call->count()));
    call->undecoded = call->count();
    call->unanswered = call->count();
  }
  const int count = call->count();
  if (!size.has_value()) {  // another thread would take longer to wake up
    for (int i = 0; i < count; ++i) Decode(call, i, WorkPool::Size::kUsual);
    return absl::OkStatus();
  }
  std::vector<WorkPool::Task> tasks;
  tasks.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    tasks.emplace_back([this, call, i, size = *size] { Decode(call, i, size); });
  }
  const Order order{.priority = request.priority, .deadline = request.deadline};
  return decode_pool_.Post(std::move(tasks), order, *size);
}

absl::Time ClassifyPipeline::Shortened(absl::Time deadline, absl::Time now) const {
  if (options_.default_timeout == absl::ZeroDuration()) return deadline;
  return std::min(deadline, now + options_.default_timeout);
}

// When the answer must be ready: the way here is gone already, the way back is to come. They take
// half of the time at most: a hiccup mustn't lock everybody out.
absl::Time ClassifyPipeline::DueFor(absl::Time deadline, absl::Time now) const {
  if (deadline == absl::InfiniteFuture()) return deadline;
  return deadline - std::min(2 * way_.Get(), std::max(absl::ZeroDuration(), deadline - now) / 2);
}

absl::Duration ClassifyPipeline::UntilDecoded(const Batcher::Request& request,
                                              std::optional<WorkPool::Size> size) const {
  if (!size.has_value()) return absl::ZeroDuration();
  const Order order{.priority = request.priority, .deadline = request.deadline};
  return decode_times_[static_cast<size_t>(*size)].Mean() *
         ((decode_pool_.Ahead(order, *size) + request.pictures - 1) / decode_pool_.threads(*size) +
          1);
}

void ClassifyPipeline::Received(absl::string_view model, absl::Duration time) {
  ModelMetrics* metrics = registry_.MetricsOf(model);
  if (metrics != nullptr) metrics->ObserveStage(Stage::kReceive, time);
}

absl::StatusOr<Door::Pass> ClassifyPipeline::EnterDoor(absl::Time deadline) {
  const absl::Time now = clock_.Now();
  bool draining = false;
  {
    absl::MutexLock lock(&mutex_);
    draining = draining_;
  }
  if (draining || deadline <= now) return door_.Enter(now);
  std::optional<Door::Wish> wish = door_.Expect(now);
  if (!wish.has_value()) return door_.Enter(now);
  bool shared = false;
  const auto model = registry_.Find(wish->model, wish->version, [&shared] {
    shared = true;
    return uint64_t{0};
  });
  if (shared || !model.ok() || *model == nullptr) return door_.Enter(now);
  Batcher::Request request = wish->pictures;
  request.deadline = DueFor(Shortened(deadline, now), now);
  // Those before it that are still being read will have asked for the same by then.
  request.pictures *= 1 + door_.Reading(now);
  request.until_ready = UntilDecoded(request, wish->decode);
  absl::Status admitted = (*model)->batcher().Check(request);
  if (admitted.ok() || !door_.Refuse(now)) return door_.Enter(now);
  (*model)->statistics().AddFailure(absl::ZeroDuration());
  if (ModelMetrics* metrics = registry_.MetricsOf(wish->model); metrics != nullptr) {
    metrics->CountRequest((*model)->version(), admitted.code());
    metrics->ObserveRequest(clock_.Now() - now);
    metrics->CountRejection(ReasonOf(admitted), wish->pictures.pictures);
  }
  return admitted;
}

void ClassifyPipeline::Decode(const std::shared_ptr<Call>& call, int index, WorkPool::Size size) {
  const absl::Time started = clock_.Now();
  absl::Status useless = call->Wanted(started);
  if (useless.ok()) {
    absl::MutexLock lock(&call->mutex);
    useless = call->failure;
    if (useless.ok()) useless = call->model->batcher().CheckInTime(call->room);
  }
  if (!useless.ok()) {
    call->metrics->CountRejection(ReasonOf(useless), 1);
    {
      absl::MutexLock lock(&call->mutex);
      call->failure.Update(useless);
    }
    return Decoded(call, index, std::move(useless), std::nullopt);
  }
  const PictureView& picture = call->views[static_cast<size_t>(index)];
  absl::StatusOr<std::vector<float>> pixels =
      std::vector<float>();  // of a tensor: none, they stay where they are
  PictureTimes times;
  if (picture.kind != PictureView::Kind::kFloats) {
    pixels = DecodeAndPreprocess(picture.bytes.Whole(), call->model->manifest().preprocessing(),
                                 options_.decode, &times.decode);
    const absl::Duration duration = clock_.Now() - started;
    decode_times_[static_cast<size_t>(size)].Observe(duration);
    times.decode = std::min(times.decode, duration);
    times.preprocess = duration - times.decode;
  }
  if (!pixels.ok()) call->metrics->CountRejection(Rejection::kDecode, 1);
  Decoded(call, index, std::move(pixels), times);
}

// Pictures go to the batcher as soon as they fill a batch or none is left to decode: one at a time
// would make a batch of one first.
void ClassifyPipeline::Decoded(const std::shared_ptr<Call>& call, int index,
                               absl::StatusOr<std::vector<float>> pixels,
                               std::optional<PictureTimes> times) {
  Batcher& batcher = call->model->batcher();
  const v1::Preprocessing& preprocessing = call->model->manifest().preprocessing();
  bool last = false;
  {
    absl::MutexLock lock(&call->mutex);
    if (times.has_value()) call->decode += times->decode + times->preprocess;
    --call->undecoded;
    if (pixels.ok()) {
      const PictureView& picture = call->views[static_cast<size_t>(index)];
      const bool tensor = picture.kind == PictureView::Kind::kFloats;
      Batcher::Picture& ready = call->ready.emplace_back();
      ready.pixels = *std::move(pixels);
      if (tensor) ready.values = picture.bytes;
      ready.refuse_non_finite = tensor && options_.refuse_non_finite;
      ready.height = tensor ? picture.height : preprocessing.crop();
      ready.width = tensor ? picture.width : preprocessing.crop();
      ready.cancelled = call->cancelled;
      ready.done = [this, call, index](absl::StatusOr<Batcher::Answer> answer) {
        Answered(call, index, std::move(answer));
      };
    } else {
      call->pictures[static_cast<size_t>(index)].status = pixels.status();
      last = --call->unanswered == 0;
    }
    if (static_cast<int>(call->ready.size()) >= batcher.options().max_batch ||
        call->undecoded == 0) {
      batcher.Submit(call->room, std::exchange(call->ready, {}));
    }
    if (call->undecoded == 0) call->room = Batcher::Room();  // of those that couldn't be decoded
    // Here: who sees it knows that the picture is in the queue; who has the answer sees it.
    if (times.has_value()) {
      const bool file = call->views[static_cast<size_t>(index)].kind == PictureView::Kind::kEncoded;
      if (file) call->metrics->ObserveStage(Stage::kPreprocess, times->preprocess);
      call->metrics->ObserveStage(Stage::kDecode, times->decode);
    }
  }
  if (last) Finish(*call);
}

void ClassifyPipeline::Answered(const std::shared_ptr<Call>& call, int index,
                                absl::StatusOr<Batcher::Answer> answer) {
  bool last = false;
  {
    absl::MutexLock lock(&call->mutex);
    if (answer.ok()) {
      call->pictures[static_cast<size_t>(index)].logits = std::move(answer->logits);
      call->queue = std::max(call->queue, answer->queue);
      call->forward = std::max(call->forward, answer->forward);
    } else if (absl::IsInvalidArgument(answer.status())) {
      call->metrics->CountRejection(Rejection::kDecode, 1);
      call->pictures[static_cast<size_t>(index)].status = answer.status();
    } else {
      call->failure.Update(answer.status());
    }
    last = --call->unanswered == 0;
  }
  if (last) Finish(*call);
}

// All pictures are done. Ranks them on the thread that finished last: 3 µs a picture of 1,000
// classes.
void ClassifyPipeline::Finish(Call& call) {
  const absl::Time started = clock_.Now();
  const v1::Manifest& manifest = call.model->manifest();
  const int top_k = call.request.top_k() == 0 ? kDefaultTopK : call.request.top_k();
  v1::ClassifyResponse response;
  absl::Status failure;
  {
    absl::MutexLock lock(&call.mutex);
    failure = call.failure;
    for (size_t i = 0; failure.ok() && i < call.pictures.size(); ++i) {
      Call::Picture& picture = call.pictures[i];
      v1::PictureResult& result = *response.add_results();
      if (!picture.status.ok()) {
        result.set_code(static_cast<int>(picture.status.code()));
        result.set_message(std::string(picture.status.message()));
        continue;
      }
      std::vector<float> ordered;
      if (!options_.refuse_non_finite) ordered = Ordered(picture.logits);
      auto predictions =
          Rank(options_.refuse_non_finite ? picture.logits : ordered, manifest.labels(), top_k);
      if (!predictions.ok()) {
        failure = Annotate(predictions.status(), absl::StrCat("pictures[", i, "]"));
        break;
      }
      if (!predictions->empty()) {
        const v1::Prediction& best = predictions->front();
        call.model->ObserveAnswer(best.index(), static_cast<int>(picture.logits.size()),
                                  best.probability());
      }
      for (v1::Prediction& prediction : *predictions) {
        *result.add_predictions() = std::move(prediction);
      }
      if (call.request.return_logits()) {
        result.mutable_logits()->Assign(picture.logits.begin(), picture.logits.end());
      }
    }
    *response.mutable_timings()->mutable_decode() = ToProto(call.decode);
    *response.mutable_timings()->mutable_queue() = ToProto(call.queue);
    *response.mutable_timings()->mutable_forward() = ToProto(call.forward);
  }
  if (!failure.ok()) return End(call, std::move(failure));
  response.set_model(call.model->name());
  response.set_version(call.model->version());
  response.set_digest(manifest.digest());
  response.set_request_id(call.request.request_id());
  call.rank = clock_.Now() - started;
  call.metrics->ObserveStage(Stage::kRank, call.rank);
  *response.mutable_timings()->mutable_total() = ToProto(clock_.Now() - call.started);
  End(call, std::move(response));
}

void ClassifyPipeline::End(Call& call, absl::StatusOr<v1::ClassifyResponse> result) {
  const absl::Time ended = clock_.Now();
  if (result.ok() && call.deadline < ended) {
    result = absl::DeadlineExceededError(absl::StrCat(
        "the answer came ", absl::FormatDuration(ended - call.deadline), " after the deadline"));
  }
  const absl::StatusCode code = result.status().code();
  bool refused = false;  // before its pictures started
  InferenceStatistics::Times times{.total = ended - call.started, .output = call.rank};
  {
    absl::MutexLock lock(&call.mutex);
    refused = call.pictures.empty() || call.undecoded > 0;
    call.room = Batcher::Room();
    times.input = call.decode;
    times.queue = call.queue;
    times.infer = call.forward;
  }
  if (call.model != nullptr) {
    if (result.ok()) {
      call.model->statistics().AddAnswer(call.count(), times, ended);
    } else {
      call.model->statistics().AddFailure(times.total);
    }
  }
  if (call.metrics != nullptr) {
    call.metrics->CountRequest(call.model == nullptr ? 0 : call.model->version(), code);
    call.metrics->ObserveRequest(ended - call.started);
    if (refused && !result.ok()) {
      call.metrics->CountRejection(ReasonOf(result.status()), call.count());
    }
  }
  metrics_.AddInflight(-1);
  call.model = nullptr;
  Done done = std::move(call.done);
  std::move(done)(std::move(result));
  done = nullptr;

  absl::MutexLock lock(&mutex_);
  --in_progress_;  // the last touch of this object: it may go at once
}

}  // namespace pyramid
