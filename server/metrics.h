// Every metric of the server, as a typed member: nobody else types a name. Thread-safe.
// docs/metrics.md lists them.
//
// Units are in the names. Label values are bounded: models in service, jobs not ended, gRPC codes,
// stages, reasons.
#ifndef PYRAMID_SERVER_METRICS_H_
#define PYRAMID_SERVER_METRICS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "proto/lifecycle.pb.h"
#include "proto/model.pb.h"
#include "proto/training.pb.h"

namespace prometheus {
class Registry;
}

namespace pyramid {

// Serving metrics of one model name; made once, lives as long as Metrics. Several versions of it
// may be loaded at once.
class ModelMetrics {
 public:
  enum class Stage { kReceive, kDecode, kPreprocess, kQueue, kForward, kRank };
  enum class Drift { kClasses, kConfidence };
  enum class Rejection {
    kQueueFull,
    kPredictedLate,
    kExpired,
    kCancelled,
    kDraining,
    kInvalid,
    kDecode,
    kRate
  };

  virtual ~ModelMetrics() = default;
  virtual void CountRequest(
      int64_t version,
      absl::StatusCode code) = 0;  // pyramid_serving_requests_total{model,version,code};
                                   // version 0: refused before one was chosen
  virtual void CountRejection(
      Rejection reason, int pictures) = 0;  // pyramid_serving_rejected_images_total{model,reason}
  virtual void ObserveRequest(
      absl::Duration duration) = 0;  // pyramid_serving_request_duration_seconds{model}
  virtual void ObserveStage(
      Stage stage,
      absl::Duration duration) = 0;  // pyramid_serving_stage_duration_seconds{model,stage}
  virtual void ObserveBatch(
      int64_t version,
      int images) = 0;  // …batch_size_images{model}, …images_total, …batches_total{model,version}
  // Lets …predictions_total{model,class} of a model with few classes start at 0.
  virtual void StartClasses(int classes) = 0;
  // …confidence_ratio{model}, and …predictions_total{model,class} of a model with few classes. The
  // best class of a picture.
  virtual void ObserveAnswer(int index, int classes, double probability) = 0;
  // Changes …queue_images and …queue_capacity_images{model}, which are sums over the loaded
  // versions.
  virtual void AddQueue(int images, int capacity) = 0;
  // pyramid_serving_predicted_wait_seconds{model}: of a picture that comes now, the longest of the
  // loaded versions.
  virtual void SetPredictedWait(int64_t version, absl::Duration wait) = 0;
  // The series of a version start at 0 when it is loaded and go when it is unloaded. Calls are
  // paired; a version may be loaded twice. `weight_bytes` are added to and taken from
  // pyramid_serving_model_memory_bytes{model,version}.
  virtual void StartVersion(int64_t version, int64_t weight_bytes) = 0;
  virtual void DropVersion(int64_t version, int64_t weight_bytes) = 0;
  // pyramid_serving_drift_index{model,version,kind}; goes with the version.
  virtual void SetDrift(int64_t version, Drift kind, double index) = 0;
};

// What a request of the HTTP port is about.
enum class HttpKind { kHealth, kInfer, kModel, kRepository, kOther };

class Metrics {
 public:
  // `objective`: request durations get a bucket bound there, so that the share of requests within
  // it is exact; 0: none.
  explicit Metrics(absl::Duration objective = absl::ZeroDuration());
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // For prometheus::Exposer; owned here.
  std::shared_ptr<prometheus::Registry> registry() const;

  // Serving.
  ModelMetrics& ForModel(absl::string_view model);
  void AddInflight(int requests);  // pyramid_serving_inflight_requests
  // pyramid_serving_model_info{model,version,digest,job,variant,dtype} = 1; drops the old version's
  void SetModelInfo(absl::string_view model, int64_t version, const v1::Manifest& manifest,
                    absl::string_view dtype);
  void SetModelReady(absl::string_view model, bool ready);  // pyramid_serving_model_ready{model}
  void DropModelInfo(absl::string_view model);              // nothing of it is stable or loaded
  // pyramid_serving_alias_version{model,alias}, pyramid_serving_traffic_ratio{model,alias} of the
  // alias that shares traffic; aliases that are gone lose theirs.
  void SetAliases(const v1::ModelState& state);
  void ObserveModelLoad(absl::string_view model, absl::Duration duration,
                        bool ok);  // pyramid_serving_model_load_duration_seconds, …failures_total
  struct Rpc;                      // one method's series; lives as long as Metrics
  // grpc_server_started_total{grpc_type,grpc_service,grpc_method}
  const Rpc& StartRpc(absl::string_view service, absl::string_view method);
  static void CountReceived(const Rpc& rpc);  // grpc_server_msg_received_total
  static void CountSent(const Rpc& rpc);      // grpc_server_msg_sent_total
  // grpc_server_handled_total, grpc_server_handling_seconds
  // {grpc_type,grpc_service,grpc_method[,grpc_code]}
  static void EndRpc(const Rpc& rpc, absl::StatusCode code, absl::Duration duration);
  void CountHttp(HttpKind kind, int status);  // pyramid_http_requests_total{kind,status}
  // Calls refused before their message was read.
  enum class Refusal {
    kAuth,  // no key, or one that isn't known or has expired
    kScope  // the key is good, but not for this
  };
  void CountRefusedCall(Refusal reason);  // pyramid_refused_calls_total{reason}

  // Training.
  void SetJobs(
      const std::map<v1::JobState, int>& jobs);  // pyramid_jobs{state}; every state is present
  void CountAttemptEnd(
      v1::FailureClass failure);               // pyramid_attempts_total{class}; "none": no failure
  void CountRestart();                         // pyramid_job_restarts_total
  void ObserveQueueWait(absl::Duration wait);  // pyramid_queue_wait_seconds
  // Gauges labelled {job}: pyramid_job_step, _job_epoch_ratio, _train_loss, _learning_rate,
  // _train_images_per_second, _val_top1_ratio, _grad_norm, _data_wait_seconds. Counter
  // pyramid_train_images_total{job}, histogram pyramid_step_duration_seconds. `images_before` is
  // progress.images of the previous report of the job.
  void ObserveProgress(absl::string_view job, const v1::Progress& progress, int64_t images_before);
  void ObserveCheckpoint(
      absl::Duration duration,
      int64_t bytes);  // pyramid_checkpoint_duration_seconds, pyramid_checkpoint_bytes
  void CountCheckpointFailure(v1::FailureClass cause);  // pyramid_checkpoint_failures_total{cause}
  void DropJob(absl::string_view job);                  // its series go when it ends

 private:
  struct Families;
  std::unique_ptr<Families> families_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_METRICS_H_
