// The Open Inference Protocol v2 without a transport: what its messages ask is checked, and
// answered from the registry and the pipeline. gRPC (inference_service.h) and REST (rest_v2.h) hand
// their messages in. docs/open-inference.md says what a model takes and answers.
//
// Thread-safe. Only Load blocks for long.
#ifndef PYRAMID_SERVER_RPC_OPEN_INFERENCE_H_
#define PYRAMID_SERVER_RPC_OPEN_INFERENCE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "proto/open_inference.pb.h"
#include "server/rpc/large_field.h"
#include "server/serving/classify.h"
#include "server/serving/model_registry.h"

namespace pyramid {

inline constexpr absl::string_view kImageInput = "image";
inline constexpr absl::string_view kProbabilitiesOutput = "probabilities";  // if none is asked for
inline constexpr absl::string_view kLogitsOutput = "logits";
inline constexpr absl::string_view kClassificationParameter = "classification";

class OpenInference {
 public:
  struct Options {
    std::string server_version;
    std::string device = "cpu";
    int64_t max_message_bytes = 0;                                 // as the metadata tell it
    Batcher::Options batching;                                     // as ModelConfig tells it
    absl::AnyInvocable<bool() const> ready = [] { return true; };  // asked from any thread
    // A text for the log as clients may read it.
    absl::AnyInvocable<std::string(absl::string_view) const> public_text =
        [](absl::string_view text) { return std::string(text); };
  };
  using Done = absl::AnyInvocable<void(absl::StatusOr<inference::ModelInferResponse>) &&>;

  // `pipeline` and `registry` must outlive it.
  OpenInference(Options options, ClassifyPipeline& pipeline, ModelRegistry& registry);

  struct Caller {
    absl::Time deadline = absl::InfiniteFuture();  // the parameter timeout may shorten it
    CancelFlag cancelled;
    absl::Duration received;        // what reading the request took
    std::vector<LargeField> large;  // as PlanInfer takes them
    // Asked once the request is known to be good, with its pictures; an error is the answer.
    absl::AnyInvocable<absl::Status(int pictures)> charge;
  };

  // Calls `done` exactly once, from any thread, perhaps before this returns. `request` and what
  // caller.large points at must live until then. Errors: as ModelInfer in
  // proto/open_inference.proto, and what ClassifyPipeline::Classify returns.
  void Infer(const inference::ModelInferRequest& request, Caller caller, Done done) const;

  // Counts a request to `model` that was refused before Infer.
  void CountInvalid(absl::string_view model, const absl::Status& status) const;

  // As ClassifyPipeline has them.
  void Sent(absl::Duration time) const { pipeline_.Sent(time); }
  absl::StatusOr<Door::Pass> EnterDoor(absl::Time deadline) const {
    return pipeline_.EnterDoor(deadline);
  }

  bool ServerReady() const { return options_.ready(); }
  inference::ServerMetadataResponse ServerMetadata() const;
  // A version is a number, an alias, or empty for the stable one; a name may hold it as
  // ParseModelReference takes it, and may be that of a view (infer_request.h). Answers name what
  // was asked for.
  bool ModelReady(absl::string_view name, absl::string_view version) const;
  //   NotFound         no such model, version or alias
  //   InvalidArgument  the version is neither, or the name holds another
  //   Unavailable      the model is unloaded, or the version damaged; and it isn't loaded, or none
  //                    is (statistics)
  absl::StatusOr<inference::ModelMetadataResponse> ModelMetadata(absl::string_view name,
                                                                 absl::string_view version) const;
  absl::StatusOr<inference::ModelConfigResponse> ModelConfig(absl::string_view name,
                                                             absl::string_view version) const;
  // No name: all models. No version: all that are loaded.
  absl::StatusOr<inference::ModelStatisticsResponse> ModelStatistics(
      absl::string_view name, absl::string_view version) const;
  // NotFound: a repository is named.
  absl::StatusOr<inference::RepositoryIndexResponse> RepositoryIndex(
      const inference::RepositoryIndexRequest& request) const;
  // `actor` is for the record. NotFound; InvalidArgument: no model name, a repository, a
  // configuration or files; and what ModelRegistry::Load returns.
  absl::Status Load(const inference::RepositoryModelLoadRequest& request, absl::string_view actor);
  absl::Status Unload(const inference::RepositoryModelUnloadRequest& request,
                      absl::string_view actor);

 private:
  absl::StatusOr<v1::ModelVersion> Describe(absl::string_view view,
                                            absl::string_view version) const;

  const Options options_;
  ClassifyPipeline& pipeline_;
  ModelRegistry& registry_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_OPEN_INFERENCE_H_
