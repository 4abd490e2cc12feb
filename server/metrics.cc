#include "server/metrics.h"

#include <google/protobuf/descriptor.h>
#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "proto/base/answer_mix.h"
#include "proto/base/grpc_status.h"
#include "proto/classification.pb.h"
#include "proto/open_inference.pb.h"
#include "proto/worker.pb.h"

namespace pyramid {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Labels;

// 0.1 ms … 10 s, 1.65 apart: a quantile read from the buckets is good to about 25 %.
const Histogram::BucketBoundaries& LatencyBounds() {
  static const Histogram::BucketBoundaries bounds{
      0.0001, 0.00016, 0.00025, 0.0004, 0.00064, 0.001, 0.0016, 0.0025, 0.004,
      0.0064, 0.01,    0.016,   0.025,  0.04,    0.064, 0.1,    0.16,   0.25,
      0.4,    0.64,    1.0,     1.6,    2.5,     4.0,   6.4,    10.0};
  return bounds;
}

Histogram::BucketBoundaries BoundsWith(absl::Duration objective) {
  Histogram::BucketBoundaries bounds = LatencyBounds();
  const double bound = absl::ToDoubleSeconds(objective);
  const auto after = std::lower_bound(bounds.begin(), bounds.end(), bound);
  if (bound > 0 && (after == bounds.end() || *after != bound)) bounds.insert(after, bound);
  return bounds;
}

// 10 ms … 5 min: loading a model, writing a checkpoint.
const Histogram::BucketBoundaries& FileBounds() {
  static const Histogram::BucketBoundaries bounds{0.01, 0.025, 0.05, 0.1, 0.25, 0.5,  1.0,
                                                  2.5,  5.0,   10.0, 30., 60.,  120., 300.};
  return bounds;
}

// 0.1 s … 1 day: a job in the queue.
const Histogram::BucketBoundaries& WaitBounds() {
  static const Histogram::BucketBoundaries bounds{0.1,  0.5,   1.0,   5.0,    15.,   60.,
                                                  300., 1800., 3600., 21600., 86400.};
  return bounds;
}

const Histogram::BucketBoundaries& ConfidenceBounds() {
  static const Histogram::BucketBoundaries bounds(kConfidenceBounds.begin(),
                                                  kConfidenceBounds.end());
  return bounds;
}

const Histogram::BucketBoundaries& BatchBounds() {
  static const Histogram::BucketBoundaries bounds{1, 2, 4, 8, 16, 32, 64, 128, 256};
  return bounds;
}

constexpr std::array<std::pair<ModelMetrics::Stage, absl::string_view>, 6> kStages{{
    {ModelMetrics::Stage::kReceive, "receive"},
    {ModelMetrics::Stage::kDecode, "decode"},
    {ModelMetrics::Stage::kPreprocess, "preprocess"},
    {ModelMetrics::Stage::kQueue, "queue"},
    {ModelMetrics::Stage::kForward, "forward"},
    {ModelMetrics::Stage::kRank, "rank"},
}};

constexpr std::array<std::pair<ModelMetrics::Rejection, absl::string_view>, 8> kRejections{{
    {ModelMetrics::Rejection::kQueueFull, "queue_full"},
    {ModelMetrics::Rejection::kPredictedLate, "predicted_late"},
    {ModelMetrics::Rejection::kExpired, "expired"},
    {ModelMetrics::Rejection::kCancelled, "cancelled"},
    {ModelMetrics::Rejection::kDraining, "draining"},
    {ModelMetrics::Rejection::kInvalid, "invalid"},
    {ModelMetrics::Rejection::kDecode, "decode"},
    {ModelMetrics::Rejection::kRate, "rate"},
}};

// What Classify promises to answer with.
constexpr std::array<absl::StatusCode, 8> kClassifyCodes{
    absl::StatusCode::kOk,
    absl::StatusCode::kCancelled,
    absl::StatusCode::kInvalidArgument,
    absl::StatusCode::kDeadlineExceeded,
    absl::StatusCode::kNotFound,
    absl::StatusCode::kResourceExhausted,
    absl::StatusCode::kUnavailable,
    absl::StatusCode::kInternal,
};

constexpr std::array<std::pair<HttpKind, absl::string_view>, 5> kHttpKinds{{
    {HttpKind::kHealth, "health"},
    {HttpKind::kInfer, "infer"},
    {HttpKind::kModel, "model"},
    {HttpKind::kRepository, "repository"},
    {HttpKind::kOther, "other"},
}};

std::string HttpKindLabel(HttpKind kind) {
  for (const auto& [known, text] : kHttpKinds) {
    if (known == kind) return std::string(text);
  }
  return "other";
}

constexpr int kMostClasses = 100;  // with a series each

constexpr int kGrpcCodes = 17;  // OK … Unauthenticated

std::string StateLabel(v1::JobState state) {
  return absl::AsciiStrToLower(v1::JobState_Name(state));
}

std::string FailureLabel(v1::FailureClass failure) {
  if (failure == v1::FAILURE_CLASS_UNSPECIFIED) return "none";
  return absl::AsciiStrToLower(v1::FailureClass_Name(failure));
}

// The services of this server, from their descriptors.
std::vector<const google::protobuf::MethodDescriptor*> KnownMethods() {
  std::vector<const google::protobuf::MethodDescriptor*> methods;
  for (const google::protobuf::FileDescriptor* file :
       {v1::ClassifyRequest::descriptor()->file(), v1::SubmitJobRequest::descriptor()->file(),
        v1::ReportRequest::descriptor()->file(), inference::ModelInferRequest::descriptor()->file(),
        v1::ModelState::descriptor()->file()}) {
    for (int s = 0; s < file->service_count(); ++s) {
      for (int m = 0; m < file->service(s)->method_count(); ++m) {
        methods.push_back(file->service(s)->method(m));
      }
    }
  }
  return methods;
}

absl::string_view GrpcType(const google::protobuf::MethodDescriptor& method) {
  if (method.client_streaming()) return method.server_streaming() ? "bidi_stream" : "client_stream";
  return method.server_streaming() ? "server_stream" : "unary";
}

// The series of one family that have been made, by labels, so that they can be found again and
// dropped. The owner's mutex guards it.
template <typename T>
class SeriesMap {
 public:
  // `bounds` only for histograms.
  template <typename... Bounds>
  T& At(Family<T>& family, const Labels& labels, const Bounds&... bounds) {
    auto [it, added] = series_.try_emplace(labels, nullptr);
    if (added) it->second = &family.Add(labels, bounds...);
    return *it->second;
  }
  void DropWhere(Family<T>& family, const std::string& label, const std::string& value) {
    for (auto it = series_.begin(); it != series_.end();) {
      const auto found = it->first.find(label);
      if (found != it->first.end() && found->second == value) {
        family.Remove(it->second);
        it = series_.erase(it);
      } else {
        ++it;
      }
    }
  }

 private:
  std::map<Labels, T*> series_;
};

}  // namespace

struct Metrics::Rpc {
  Counter* started = nullptr;
  Counter* received = nullptr;
  Counter* sent = nullptr;
  Histogram* seconds = nullptr;
  std::array<Counter*, kGrpcCodes> handled{};
};

struct Metrics::Families {
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();

  Family<Counter>& NewCounter(const std::string& name, const std::string& help) {
    return BuildCounter().Name(name).Help(help).Register(*registry);
  }
  Family<Gauge>& NewGauge(const std::string& name, const std::string& help) {
    return BuildGauge().Name(name).Help(help).Register(*registry);
  }
  Family<Histogram>& NewHistogram(const std::string& name, const std::string& help) {
    return BuildHistogram().Name(name).Help(help).Register(*registry);
  }

  // Process.
  Family<Gauge>& build_info =
      NewGauge("pyramid_build_info", "Version of the program; the value is 1.");

  // Serving.
  Family<Counter>& requests = NewCounter(
      "pyramid_serving_requests_total",
      "Classify requests ended, by code. Version 0: refused before a version was chosen.");
  Family<Counter>& rejected =
      NewCounter("pyramid_serving_rejected_images_total", "Pictures refused, by reason.");
  Family<Histogram>& request_seconds = NewHistogram("pyramid_serving_request_duration_seconds",
                                                    "Time of a Classify request in its handler.");
  Family<Histogram>& stage_seconds = NewHistogram(
      "pyramid_serving_stage_duration_seconds",
      "Time by stage: receive and rank per request; decode, preprocess and queue per picture; "
      "forward per batch.");
  Family<Histogram>& batch_size =
      NewHistogram("pyramid_serving_batch_size_images", "Pictures in a batch.");
  Family<Counter>& images =
      NewCounter("pyramid_serving_images_total", "Pictures that went through the network.");
  Family<Counter>& batches = NewCounter("pyramid_serving_batches_total", "Forward passes.");
  Family<Gauge>& queue =
      NewGauge("pyramid_serving_queue_images", "Pictures accepted and not yet in a batch.");
  Family<Gauge>& queue_capacity = NewGauge("pyramid_serving_queue_capacity_images",
                                           "Pictures that may be accepted and not yet in a batch.");
  Family<Gauge>& predicted_wait = NewGauge(
      "pyramid_serving_predicted_wait_seconds",
      "Wait for a batch of a picture that comes now, as admission predicts it; the longest of "
      "the loaded versions.");
  Family<Gauge>& inflight =
      NewGauge("pyramid_serving_inflight_requests", "Classify requests being answered.");
  Family<Gauge>& model_info = NewGauge("pyramid_serving_model_info",
                                       "The version in service of each model; the value is 1.");
  Family<Gauge>& model_ready =
      NewGauge("pyramid_serving_model_ready",
               "1 while the model answers requests that name it alone, otherwise 0.");
  Family<Gauge>& model_memory =
      NewGauge("pyramid_serving_model_memory_bytes", "Memory of the weights of a loaded version.");
  Family<Gauge>& drift =
      NewGauge("pyramid_serving_drift_index",
               "Population stability index of the newest answers against the validation; NaN: too "
               "few answers yet.");
  Family<Histogram>& confidence = NewHistogram("pyramid_serving_confidence_ratio",
                                               "Probability of the best class of a picture, 0..1.");
  Family<Counter>& predictions = NewCounter(
      "pyramid_serving_predictions_total",
      "Pictures answered by their best class's index; of models with at most 100 classes.");
  Family<Counter>& http_requests = NewCounter(
      "pyramid_http_requests_total", "Requests of the HTTP port ended, by kind and status.");
  Family<Gauge>& alias_version =
      NewGauge("pyramid_serving_alias_version", "The version that an alias of a model names.");
  Family<Gauge>& traffic_ratio =
      NewGauge("pyramid_serving_traffic_ratio",
               "Share of the requests naming neither version nor alias that goes to an alias "
               "other than stable, 0..1.");
  Family<Histogram>& load_seconds = NewHistogram(
      "pyramid_serving_model_load_duration_seconds",
      "Time to load a model version: read, self-test, warm up. Failed loads included.");
  Family<Counter>& load_failures = NewCounter("pyramid_serving_model_load_failures_total",
                                              "Model versions that couldn't be put into service.");
  Family<Counter>& rpc_handled =
      NewCounter("grpc_server_handled_total", "RPCs ended on the server, by code.");
  Family<Counter>& rpc_started =
      NewCounter("grpc_server_started_total", "RPCs begun on the server.");
  Family<Counter>& rpc_received =
      NewCounter("grpc_server_msg_received_total", "Messages of RPCs received by the server.");
  Family<Counter>& rpc_sent =
      NewCounter("grpc_server_msg_sent_total", "Messages of RPCs sent by the server.");
  Family<Histogram>& rpc_seconds =
      NewHistogram("grpc_server_handling_seconds", "Time of an RPC on the server.");
  Family<Counter>& refused_calls = NewCounter(
      "pyramid_refused_calls_total",
      "Calls refused by their key before their message was read. auth: no good key; scope: not for "
      "this method.");
  Counter& refused_auth = refused_calls.Add({{"reason", "auth"}});
  Counter& refused_scope = refused_calls.Add({{"reason", "scope"}});

  // Training.
  Family<Gauge>& jobs = NewGauge("pyramid_jobs", "Jobs by state.");
  Family<Counter>& attempts = NewCounter("pyramid_attempts_total",
                                         "Attempts ended, by class of failure; none: no failure.");
  Family<Counter>& restarts =
      NewCounter("pyramid_job_restarts_total", "Attempts started after a failed one.");
  Family<Histogram>& queue_wait =
      NewHistogram("pyramid_queue_wait_seconds", "Time from submission to the first launch.");
  Family<Histogram>& step_seconds = NewHistogram(
      "pyramid_step_duration_seconds", "Mean time of an optimizer step, one sample a report.");
  Family<Counter>& train_images =
      NewCounter("pyramid_train_images_total", "Pictures trained, all workers of the job.");
  Family<Gauge>& step = NewGauge("pyramid_job_step", "Optimizer steps done.");
  Family<Gauge>& epoch =
      NewGauge("pyramid_job_epoch_ratio", "Passes over the data done, of those to do.");
  Family<Gauge>& loss = NewGauge("pyramid_train_loss", "Mean training loss since the last report.");
  Family<Gauge>& learning_rate = NewGauge("pyramid_learning_rate", "Learning rate.");
  Family<Gauge>& train_speed = NewGauge("pyramid_train_images_per_second",
                                        "Pictures trained per second, all workers of the job.");
  Family<Gauge>& val_top1 =
      NewGauge("pyramid_val_top1_ratio", "Top-1 accuracy of the newest validation.");
  Family<Gauge>& grad_norm = NewGauge("pyramid_grad_norm", "Global norm of the gradient.");
  Family<Gauge>& data_wait = NewGauge("pyramid_data_wait_seconds",
                                      "Mean wait for pictures per step since the last report.");
  Family<Histogram>& checkpoint_seconds =
      NewHistogram("pyramid_checkpoint_duration_seconds", "Time to write a checkpoint.");
  Family<Gauge>& checkpoint_bytes =
      NewGauge("pyramid_checkpoint_bytes", "Size of the newest checkpoint.");
  Family<Counter>& checkpoint_failures = NewCounter(
      "pyramid_checkpoint_failures_total", "Checkpoints that couldn't be written, by cause.");

  // Series without labels.
  Gauge& inflight_requests = inflight.Add({});
  Counter& all_restarts = restarts.Add({});
  Histogram& all_queue_wait = queue_wait.Add({}, WaitBounds());
  Histogram& all_step_seconds = step_seconds.Add({}, LatencyBounds());
  Histogram& all_checkpoint_seconds = checkpoint_seconds.Add({}, FileBounds());
  Gauge& newest_checkpoint_bytes = checkpoint_bytes.Add({});

  Histogram::BucketBoundaries request_bounds;  // set once, before anything is observed

  absl::Mutex mutex;
  std::map<std::string, std::unique_ptr<ModelMetrics>, std::less<>> models ABSL_GUARDED_BY(mutex);
  std::map<std::string, Gauge*, std::less<>> model_infos ABSL_GUARDED_BY(mutex);
  SeriesMap<Counter> http_counters ABSL_GUARDED_BY(mutex);
  SeriesMap<Gauge> alias_gauges ABSL_GUARDED_BY(mutex);
  SeriesMap<Gauge> traffic_gauges ABSL_GUARDED_BY(mutex);
  // By service and method, made at the start.
  std::map<std::string, std::map<std::string, Rpc, std::less<>>, std::less<>> rpcs
      ABSL_GUARDED_BY(mutex);
  SeriesMap<Gauge> state_gauges ABSL_GUARDED_BY(mutex);
  SeriesMap<Counter> attempt_counters ABSL_GUARDED_BY(mutex);
  SeriesMap<Counter> checkpoint_failure_counters ABSL_GUARDED_BY(mutex);
  SeriesMap<Counter> job_images ABSL_GUARDED_BY(mutex);
  std::array<std::pair<Family<Gauge>*, SeriesMap<Gauge>>, 8> job_gauges ABSL_GUARDED_BY(mutex){{
      {&step, {}},
      {&epoch, {}},
      {&loss, {}},
      {&learning_rate, {}},
      {&train_speed, {}},
      {&val_top1, {}},
      {&grad_norm, {}},
      {&data_wait, {}},
  }};

  const Rpc& AddRpc(const std::string& service, const std::string& method, const std::string& type)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    Rpc& series = rpcs[service][method];
    Labels labels{{"grpc_type", type}, {"grpc_service", service}, {"grpc_method", method}};
    series.started = &rpc_started.Add(labels);
    series.received = &rpc_received.Add(labels);
    series.sent = &rpc_sent.Add(labels);
    series.seconds = &rpc_seconds.Add(labels, LatencyBounds());
    for (int code = 0; code < kGrpcCodes; ++code) {
      labels["grpc_code"] = std::string(GrpcCodeName(static_cast<absl::StatusCode>(code)));
      series.handled[static_cast<size_t>(code)] = &rpc_handled.Add(labels);
    }
    return series;
  }
  const Rpc& FindRpc(absl::string_view service, absl::string_view method)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    const auto known = rpcs.find(service);
    if (known != rpcs.end()) {
      const auto found = known->second.find(method);
      if (found != known->second.end()) return found->second;
    }
    return AddRpc(std::string(service), std::string(method), "unary");
  }
  void SetJobGauge(Family<Gauge>& family, const std::string& job, double value)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    for (auto& [known, series] : job_gauges) {
      if (known == &family) series.At(family, {{"job", job}}).Set(value);
    }
  }
};

namespace {

class ModelMetricsImpl final : public ModelMetrics {
 public:
  struct Families {
    Family<Counter>& requests;
    Family<Counter>& images;
    Family<Counter>& batches;
    Family<Counter>& predictions;
    Family<Gauge>& memory;
    Family<Gauge>& drift;
  };
  struct Series {
    std::map<Rejection, Counter*> rejected;
    std::map<Stage, Histogram*> stages;
    Histogram& request_seconds;
    Histogram& batch_size;
    Histogram& confidence;
    Gauge& queue;
    Gauge& queue_capacity;
    Gauge& predicted_wait;
  };

  ModelMetricsImpl(std::string model, const Families& families, Series series)
      : model_(std::move(model)), families_(families), series_(std::move(series)) {
    StartVersion(0, 0);
  }

  void CountRequest(int64_t version, absl::StatusCode code) override {
    absl::MutexLock lock(&mutex_);
    Request(versions_[version], version, code).Increment();
  }
  void CountRejection(Rejection reason, int pictures) override {
    series_.rejected.at(reason)->Increment(pictures);
  }
  void ObserveRequest(absl::Duration duration) override {
    series_.request_seconds.Observe(absl::ToDoubleSeconds(duration));
  }
  void ObserveStage(Stage stage, absl::Duration duration) override {
    series_.stages.at(stage)->Observe(absl::ToDoubleSeconds(duration));
  }
  void ObserveBatch(int64_t version, int images) override {
    series_.batch_size.Observe(images);
    absl::MutexLock lock(&mutex_);
    VersionSeries& series = versions_[version];
    MakeBatchSeries(series, version);
    series.images->Increment(images);
    series.batches->Increment();
  }
  void StartClasses(int classes) override {
    if (classes > kMostClasses) return;
    absl::MutexLock lock(&mutex_);
    MakeClassSeries(classes);
  }
  void ObserveAnswer(int index, int classes, double probability) override {
    series_.confidence.Observe(probability);
    if (classes > kMostClasses) return;
    absl::MutexLock lock(&mutex_);
    MakeClassSeries(classes);
    predictions_.at(static_cast<size_t>(index))->Increment();
  }
  void AddQueue(int images, int capacity) override {
    series_.queue.Increment(images);
    series_.queue_capacity.Increment(capacity);
  }
  void SetPredictedWait(int64_t version, absl::Duration wait) override {
    absl::MutexLock lock(&mutex_);
    versions_[version].predicted_wait = wait;
    ShowPredictedWait();
  }
  void StartVersion(int64_t version, int64_t weight_bytes) override {
    absl::MutexLock lock(&mutex_);
    VersionSeries& series = versions_[version];
    ++series.loaded;
    for (const absl::StatusCode code : kClassifyCodes) Request(series, version, code);
    if (version == 0) return;  // nothing of it goes through a network
    MakeBatchSeries(series, version);
    if (series.memory == nullptr) series.memory = &families_.memory.Add(VersionLabels(version));
    series.memory->Increment(static_cast<double>(weight_bytes));
  }
  void DropVersion(int64_t version, int64_t weight_bytes) override {
    absl::MutexLock lock(&mutex_);
    VersionSeries& series = versions_[version];
    series.memory->Decrement(static_cast<double>(weight_bytes));
    if (--series.loaded > 0) return;
    for (Counter* counter : series.requests) {
      if (counter != nullptr) families_.requests.Remove(counter);
    }
    families_.images.Remove(series.images);
    families_.batches.Remove(series.batches);
    families_.memory.Remove(series.memory);
    for (Gauge* gauge : series.drift) {
      if (gauge != nullptr) families_.drift.Remove(gauge);
    }
    versions_.erase(version);
    ShowPredictedWait();
  }
  void SetDrift(int64_t version, Drift kind, double index) override {
    absl::MutexLock lock(&mutex_);
    const auto found = versions_.find(version);
    if (found == versions_.end()) return;
    Gauge*& gauge = found->second.drift.at(static_cast<size_t>(kind));
    if (gauge == nullptr) {
      Labels labels = VersionLabels(version);
      labels["kind"] = kind == Drift::kClasses ? "classes" : "confidence";
      gauge = &families_.drift.Add(labels);
    }
    gauge->Set(index);
  }

 private:
  // Kept, as finding a series by its labels takes a microsecond.
  struct VersionSeries {
    int loaded = 0;
    std::array<Counter*, kGrpcCodes> requests{};  // null: not seen yet
    Counter* images = nullptr;
    Counter* batches = nullptr;
    Gauge* memory = nullptr;
    absl::Duration predicted_wait;
    std::array<Gauge*, 2> drift{};  // null: the version has nothing to compare with
  };

  Labels VersionLabels(int64_t version) const {
    return {{"model", model_}, {"version", absl::StrCat(version)}};
  }
  void ShowPredictedWait() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    absl::Duration longest;
    for (const auto& [version, series] : versions_) {
      longest = std::max(longest, series.predicted_wait);
    }
    series_.predicted_wait.Set(absl::ToDoubleSeconds(longest));
  }
  Counter& Request(VersionSeries& series, int64_t version, absl::StatusCode code)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    Counter*& counter = series.requests.at(static_cast<size_t>(code));
    if (counter == nullptr) {
      Labels labels = VersionLabels(version);
      labels["code"] = std::string(GrpcCodeName(code));
      counter = &families_.requests.Add(labels);
    }
    return *counter;
  }
  void MakeClassSeries(int classes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    while (static_cast<int>(predictions_.size()) < classes) {
      predictions_.push_back(&families_.predictions.Add(
          {{"model", model_}, {"class", absl::StrCat(predictions_.size())}}));
    }
  }
  void MakeBatchSeries(VersionSeries& series, int64_t version)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (series.images != nullptr) return;
    series.images = &families_.images.Add(VersionLabels(version));
    series.batches = &families_.batches.Add(VersionLabels(version));
  }

  const std::string model_;
  const Families families_;
  const Series series_;
  absl::Mutex mutex_;
  std::map<int64_t, VersionSeries> versions_ ABSL_GUARDED_BY(mutex_);
  std::vector<Counter*> predictions_ ABSL_GUARDED_BY(mutex_);  // by class
};

}  // namespace

Metrics::Metrics(absl::Duration objective) : families_(std::make_unique<Families>()) {
  Families& f = *families_;
  f.request_bounds = BoundsWith(objective);
  f.build_info.Add({{"version", PYRAMID_VERSION}}).Set(1);
  absl::MutexLock lock(&f.mutex);
  for (int state = v1::QUEUED; state <= v1::JobState_MAX; ++state) {
    f.state_gauges.At(f.jobs, {{"state", StateLabel(static_cast<v1::JobState>(state))}});
  }
  for (int failure = 0; failure <= v1::FailureClass_MAX; ++failure) {
    const std::string label = FailureLabel(static_cast<v1::FailureClass>(failure));
    f.attempt_counters.At(f.attempts, {{"class", label}});
    if (failure != v1::FAILURE_CLASS_UNSPECIFIED) {
      f.checkpoint_failure_counters.At(f.checkpoint_failures, {{"cause", label}});
    }
  }
  for (const auto& [kind, text] : kHttpKinds) {
    f.http_counters.At(f.http_requests, {{"kind", std::string(text)}, {"status", "200"}});
  }
  for (const google::protobuf::MethodDescriptor* method : KnownMethods()) {
    f.AddRpc(method->service()->full_name(), method->name(), std::string(GrpcType(*method)));
  }
}

Metrics::~Metrics() = default;

std::shared_ptr<prometheus::Registry> Metrics::registry() const { return families_->registry; }

ModelMetrics& Metrics::ForModel(absl::string_view model) {
  Families& f = *families_;
  const std::string name(model);
  absl::MutexLock lock(&f.mutex);
  std::unique_ptr<ModelMetrics>& made = f.models[name];
  if (made == nullptr) {
    const Labels labels{{"model", name}};
    ModelMetricsImpl::Series series{
        .rejected = {},
        .stages = {},
        .request_seconds = f.request_seconds.Add(labels, f.request_bounds),
        .batch_size = f.batch_size.Add(labels, BatchBounds()),
        .confidence = f.confidence.Add(labels, ConfidenceBounds()),
        .queue = f.queue.Add(labels),
        .queue_capacity = f.queue_capacity.Add(labels),
        .predicted_wait = f.predicted_wait.Add(labels)};
    for (const auto& [reason, text] : kRejections) {
      series.rejected[reason] = &f.rejected.Add({{"model", name}, {"reason", std::string(text)}});
    }
    for (const auto& [stage, text] : kStages) {
      series.stages[stage] =
          &f.stage_seconds.Add({{"model", name}, {"stage", std::string(text)}}, LatencyBounds());
    }
    f.load_seconds.Add(labels, FileBounds());
    f.load_failures.Add(labels);
    f.model_ready.Add(labels);
    made = std::make_unique<ModelMetricsImpl>(
        name,
        ModelMetricsImpl::Families{f.requests, f.images, f.batches, f.predictions, f.model_memory,
                                   f.drift},
        std::move(series));
  }
  return *made;
}

void Metrics::AddInflight(int requests) { families_->inflight_requests.Increment(requests); }

void Metrics::SetModelInfo(absl::string_view model, int64_t version, const v1::Manifest& manifest,
                           absl::string_view dtype) {
  Families& f = *families_;
  const std::string name(model);
  absl::MutexLock lock(&f.mutex);
  Gauge*& info = f.model_infos[name];
  if (info != nullptr) f.model_info.Remove(info);
  info = &f.model_info.Add({{"model", name},
                            {"version", absl::StrCat(version)},
                            {"digest", manifest.digest()},
                            {"job", manifest.training().job_id()},
                            {"variant", manifest.network().variant()},
                            {"dtype", std::string(dtype)}});
  info->Set(1);
}

void Metrics::SetModelReady(absl::string_view model, bool ready) {
  families_->model_ready.Add({{"model", std::string(model)}}).Set(ready ? 1 : 0);
}

void Metrics::DropModelInfo(absl::string_view model) {
  Families& f = *families_;
  absl::MutexLock lock(&f.mutex);
  const auto info = f.model_infos.find(model);
  if (info == f.model_infos.end()) return;
  f.model_info.Remove(info->second);
  f.model_infos.erase(info);
}

void Metrics::SetAliases(const v1::ModelState& state) {
  Families& f = *families_;
  absl::MutexLock lock(&f.mutex);
  f.alias_gauges.DropWhere(f.alias_version, "model", state.name());
  f.traffic_gauges.DropWhere(f.traffic_ratio, "model", state.name());
  for (const auto& [alias, version] : state.aliases()) {
    f.alias_gauges.At(f.alias_version, {{"model", state.name()}, {"alias", alias}})
        .Set(static_cast<double>(version));
  }
  if (state.traffic_percent() > 0) {
    f.traffic_gauges
        .At(f.traffic_ratio, {{"model", state.name()}, {"alias", state.traffic_alias()}})
        .Set(state.traffic_percent() / 100);
  }
}

void Metrics::ObserveModelLoad(absl::string_view model, absl::Duration duration, bool ok) {
  ForModel(model);  // makes the series at 0
  const Labels labels{{"model", std::string(model)}};
  // Add gives the series that is there.
  families_->load_seconds.Add(labels, FileBounds()).Observe(absl::ToDoubleSeconds(duration));
  if (!ok) families_->load_failures.Add(labels).Increment();
}

const Metrics::Rpc& Metrics::StartRpc(absl::string_view service, absl::string_view method) {
  Families& f = *families_;
  absl::MutexLock lock(&f.mutex);
  const Rpc& rpc = f.FindRpc(service, method);
  rpc.started->Increment();
  return rpc;
}

void Metrics::CountReceived(const Rpc& rpc) { rpc.received->Increment(); }

void Metrics::CountSent(const Rpc& rpc) { rpc.sent->Increment(); }

void Metrics::EndRpc(const Rpc& rpc, absl::StatusCode code, absl::Duration duration) {
  rpc.seconds->Observe(absl::ToDoubleSeconds(duration));
  rpc.handled.at(static_cast<size_t>(code))->Increment();
}

void Metrics::CountHttp(HttpKind kind, int status) {
  Families& f = *families_;
  absl::MutexLock lock(&f.mutex);
  f.http_counters
      .At(f.http_requests, {{"kind", HttpKindLabel(kind)}, {"status", absl::StrCat(status)}})
      .Increment();
}

void Metrics::CountRefusedCall(Refusal reason) {
  (reason == Refusal::kAuth ? families_->refused_auth : families_->refused_scope).Increment();
}

void Metrics::SetJobs(const std::map<v1::JobState, int>& jobs) {
  Families& f = *families_;
  absl::MutexLock lock(&f.mutex);
  for (int state = v1::QUEUED; state <= v1::JobState_MAX; ++state) {
    const auto found = jobs.find(static_cast<v1::JobState>(state));
    f.state_gauges.At(f.jobs, {{"state", StateLabel(static_cast<v1::JobState>(state))}})
        .Set(found == jobs.end() ? 0 : found->second);
  }
}

void Metrics::CountAttemptEnd(v1::FailureClass failure) {
  Families& f = *families_;
  absl::MutexLock lock(&f.mutex);
  f.attempt_counters.At(f.attempts, {{"class", FailureLabel(failure)}}).Increment();
}

void Metrics::CountRestart() { families_->all_restarts.Increment(); }

void Metrics::ObserveQueueWait(absl::Duration wait) {
  families_->all_queue_wait.Observe(absl::ToDoubleSeconds(wait));
}

void Metrics::ObserveProgress(absl::string_view job, const v1::Progress& progress,
                              int64_t images_before) {
  Families& f = *families_;
  const std::string id(job);
  absl::MutexLock lock(&f.mutex);
  f.SetJobGauge(f.step, id, static_cast<double>(progress.step()));
  f.SetJobGauge(f.epoch, id, progress.epochs() > 0 ? progress.epoch() / progress.epochs() : 0);
  f.SetJobGauge(f.loss, id, progress.loss());
  f.SetJobGauge(f.learning_rate, id, progress.learning_rate());
  f.SetJobGauge(f.train_speed, id, progress.images_per_second());
  f.SetJobGauge(f.grad_norm, id, progress.grad_norm());
  f.SetJobGauge(f.data_wait, id, progress.data_wait_seconds());
  if (progress.validated()) f.SetJobGauge(f.val_top1, id, progress.val_top1());
  Counter& images = f.job_images.At(f.train_images, {{"job", id}});
  // After a restart from a checkpoint the job's count may step back; a counter doesn't.
  if (progress.images() > images_before) {
    images.Increment(static_cast<double>(progress.images() - images_before));
    if (progress.step_seconds() > 0) f.all_step_seconds.Observe(progress.step_seconds());
  }
}

void Metrics::ObserveCheckpoint(absl::Duration duration, int64_t bytes) {
  families_->all_checkpoint_seconds.Observe(absl::ToDoubleSeconds(duration));
  families_->newest_checkpoint_bytes.Set(static_cast<double>(bytes));
}

void Metrics::CountCheckpointFailure(v1::FailureClass cause) {
  Families& f = *families_;
  absl::MutexLock lock(&f.mutex);
  f.checkpoint_failure_counters.At(f.checkpoint_failures, {{"cause", FailureLabel(cause)}})
      .Increment();
}

void Metrics::DropJob(absl::string_view job) {
  Families& f = *families_;
  const std::string id(job);
  absl::MutexLock lock(&f.mutex);
  for (auto& [family, series] : f.job_gauges) series.DropWhere(*family, "job", id);
  f.job_images.DropWhere(f.train_images, "job", id);
}

}  // namespace pyramid
