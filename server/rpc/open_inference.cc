#include "server/rpc/open_inference.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/status.h"
#include "server/rpc/infer_request.h"
#include "server/serving/order.h"
#include "server/serving/route.h"

namespace pyramid {
namespace {

constexpr absl::string_view kPlatform = "pyramid";
// Only what works.
constexpr absl::string_view kExtensions[] = {
    "classification", "model_repository",   "schedule_policy", "model_configuration",
    "parameters",     "binary_tensor_data", "statistics"};

// What was asked for in the words of this protocol: there is no "pictures[2]" in it.
absl::Status InItsWords(const absl::Status& status) {
  const absl::string_view message = status.message();
  constexpr absl::string_view kPictures = "pictures[";
  if (!absl::StartsWith(message, kPictures)) return status;
  return absl::Status(status.code(),
                      absl::StrCat("input ", kImageInput, "[", message.substr(kPictures.size())));
}

// A version that is known but damaged isn't the caller's fault, and not for ever.
absl::Status NotReady(const absl::Status& status) {
  if (!absl::IsDataLoss(status)) return status;
  return absl::UnavailableError(status.message());
}

void Set(const InferenceStatistics::Sum& sum, inference::StatisticDuration* out) {
  out->set_count(static_cast<uint64_t>(sum.count));
  out->set_ns(static_cast<uint64_t>(absl::ToInt64Nanoseconds(sum.time)));
}

inference::ModelStatistics ToProto(const ModelVersion& version) {
  const InferenceStatistics::Snapshot now = version.statistics().Get();
  inference::ModelStatistics out;
  out.set_name(version.name());
  out.set_version(absl::StrCat(version.version()));
  if (now.last != absl::InfinitePast()) {
    out.set_last_inference(static_cast<uint64_t>(absl::ToUnixMillis(now.last)));
  }
  out.set_inference_count(static_cast<uint64_t>(now.pictures));
  out.set_execution_count(static_cast<uint64_t>(now.executions));
  inference::InferStatistics& requests = *out.mutable_inference_stats();
  Set(now.success, requests.mutable_success());
  Set(now.fail, requests.mutable_fail());
  Set(now.queue, requests.mutable_queue());
  Set(now.input, requests.mutable_compute_input());
  Set(now.infer, requests.mutable_compute_infer());
  Set(now.output, requests.mutable_compute_output());
  requests.mutable_cache_hit();
  requests.mutable_cache_miss();
  for (const auto& [size, sum] : now.batches) {
    inference::InferBatchStatistics& batch = *out.add_batch_stats();
    batch.set_batch_size(static_cast<uint64_t>(size));
    Set(sum, batch.mutable_compute_infer());
    // Pictures are decoded one by one before, and ranked one by one after.
    batch.mutable_compute_input()->set_count(static_cast<uint64_t>(sum.count));
    batch.mutable_compute_output()->set_count(static_cast<uint64_t>(sum.count));
  }
  return out;
}

// Of the input, batch first.
std::vector<int64_t> ShapeOf(const v1::ModelVersion& model, bool files) {
  if (files) return {-1, 1};
  const int crop = model.preprocessing().crop();
  return {-1, model.network().in_channels(), crop, crop};
}

template <typename Request>
absl::Status CheckRepositoryRequest(const Request& request) {
  if (request.model_name().empty() && !request.repository_name().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "model_name is empty and repository_name is ", Quoted(request.repository_name()),
        ": this server has Triton's field numbers (1 repository_name, 2 model_name); KServe's "
        "have model_name at 1"));
  }
  if (request.model_name().empty()) return absl::InvalidArgumentError("model_name is empty");
  if (!request.repository_name().empty()) {
    return absl::InvalidArgumentError(
        "repository_name is set; there is one repository, without a "
        "name");
  }
  for (const auto& [name, value] : request.parameters()) {
    if (name == "config" || absl::StartsWith(name, "file:")) {
      return absl::InvalidArgumentError(
          absl::StrCat("parameter ", Quoted(name),
                       " isn't taken; models come from training jobs, by promotion"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

OpenInference::OpenInference(Options options, ClassifyPipeline& pipeline, ModelRegistry& registry)
    : options_(std::move(options)), pipeline_(pipeline), registry_(registry) {}

void OpenInference::Infer(const inference::ModelInferRequest& request, Caller caller,
                          Done done) const {
  // An unknown model first, whatever else is wrong.
  const absl::string_view model = ViewOf(request.model_name()).model;
  ModelMetrics* const metrics = registry_.MetricsOf(model);
  if (metrics != nullptr) {
    metrics->ObserveStage(ModelMetrics::Stage::kReceive, caller.received);
  } else {
    const auto unknown = registry_.Find(model, 0);
    if (!unknown.ok()) return std::move(done)(unknown.status());
  }
  absl::StatusOr<InferPlan> planned =
      PlanInfer(request, caller.large, pipeline_.options().max_pictures);
  if (!planned.ok()) {
    CountInvalid(model, planned.status());
    return std::move(done)(planned.status());
  }
  if (caller.charge != nullptr) {
    absl::Status charged = caller.charge(static_cast<int>(planned->pictures.size()));
    if (!charged.ok()) return std::move(done)(std::move(charged));
  }
  auto plan = std::make_shared<InferPlan>(*std::move(planned));
  if (plan->timeout < absl::InfiniteDuration()) {
    caller.deadline = std::min(caller.deadline, absl::Now() + plan->timeout);
  }
  pipeline_.Classify(
      plan->classify, std::move(plan->pictures), caller.deadline, std::move(caller.cancelled),
      [&request, plan,
       done = std::move(done)](absl::StatusOr<v1::ClassifyResponse> classified) mutable {
        if (!classified.ok()) return std::move(done)(NotReady(InItsWords(classified.status())));
        std::move(done)(AnswerInfer(request, *plan, *std::move(classified)));
      });
}

void OpenInference::CountInvalid(absl::string_view model, const absl::Status& status) const {
  ModelMetrics* const metrics = registry_.MetricsOf(ViewOf(model).model);
  if (metrics == nullptr) return;
  metrics->CountRequest(0, status.code());
  metrics->CountRejection(ModelMetrics::Rejection::kInvalid, 1);
}

inference::ServerMetadataResponse OpenInference::ServerMetadata() const {
  inference::ServerMetadataResponse response;
  response.set_name("pyramid");
  response.set_version(options_.server_version);
  for (const absl::string_view extension : kExtensions) {
    response.add_extensions(std::string(extension));
  }
  return response;
}

absl::StatusOr<v1::ModelVersion> OpenInference::Describe(absl::string_view view,
                                                         absl::string_view version) const {
  const absl::string_view name = ModelNameOf(ViewOf(view).model);
  if (registry_.MetricsOf(name) == nullptr) {  // an unknown model first, whatever else is wrong
    const auto unknown = registry_.Find(name, 0);
    if (!unknown.ok()) return unknown.status();
  }
  ASSIGN_OR_RETURN(const NativeModel native, NativeModelOf(view, version));
  ASSIGN_OR_RETURN(const ModelReference wanted, ParseModelReference(native.model, native.version));
  for (v1::ModelVersion& one : registry_.List()) {
    if (one.name() != name) continue;
    if (one.unloaded()) {
      return absl::UnavailableError(
          absl::StrCat(name, " is unloaded; RepositoryModelLoad puts it back into service"));
    }
    const bool is_it =
        wanted.version > 0 ? one.version() == wanted.version
        : wanted.alias.empty()
            ? one.serving()
            : std::count(one.aliases().begin(), one.aliases().end(), std::string(wanted.alias)) > 0;
    if (is_it) return std::move(one);
  }
  // Unknown or damaged: as a request hears it.
  const auto missing = registry_.Find(native.model, native.version);
  if (!missing.ok()) return missing.status();
  return absl::NotFoundError(absl::StrCat("no model ", Quoted(name)));
}

bool OpenInference::ModelReady(absl::string_view name, absl::string_view version) const {
  const absl::StatusOr<v1::ModelVersion> model = Describe(name, version);
  return model.ok() && model->loaded() && options_.ready();
}

absl::StatusOr<inference::ModelMetadataResponse> OpenInference::ModelMetadata(
    absl::string_view name, absl::string_view version) const {
  ASSIGN_OR_RETURN(const v1::ModelVersion model, Describe(name, version));
  inference::ModelMetadataResponse response;
  response.set_name(std::string(name));
  for (const v1::ModelVersion& one : registry_.List()) {
    if (one.name() == model.name()) response.add_versions(absl::StrCat(one.version()));
  }
  response.set_platform(std::string(kPlatform));
  auto& input = *response.add_inputs();
  input.set_name(std::string(kImageInput));
  const bool files = ViewOf(name).files;
  input.set_datatype(files ? "BYTES" : "FP32");
  for (const int64_t dimension : ShapeOf(model, files)) input.add_shape(dimension);
  auto& output = *response.add_outputs();
  output.set_name(std::string(kProbabilitiesOutput));
  output.set_datatype("FP32");
  output.add_shape(-1);
  output.add_shape(model.network().num_classes());
  auto& properties = *response.mutable_properties();
  properties["image"] =
      "FP32 [-1,channels,height,width], normalised; or BYTES [-1,1]: a JPEG, PNG … file each, "
      "which "
      "the server decodes, resizes and normalises";
  properties["outputs"] = "probabilities (the default), logits; classification for both";
  properties["digest"] = model.digest();
  if (options_.max_message_bytes > 0) {
    properties["max_message_bytes"] = absl::StrCat(options_.max_message_bytes);
  }
  return response;
}

absl::StatusOr<inference::ModelConfigResponse> OpenInference::ModelConfig(
    absl::string_view name, absl::string_view version) const {
  ASSIGN_OR_RETURN(const v1::ModelVersion model, Describe(name, version));
  inference::ModelConfigResponse response;
  inference::ModelConfig& config = *response.mutable_config();
  config.set_name(std::string(name));
  config.set_platform(std::string(kPlatform));
  config.set_backend(std::string(kPlatform));
  config.mutable_version_policy()->mutable_all();
  config.set_max_batch_size(pipeline_.options().max_pictures);
  inference::ModelInput& input = *config.add_input();
  input.set_name(std::string(kImageInput));
  const bool files = ViewOf(name).files;
  input.set_data_type(files ? inference::TYPE_STRING : inference::TYPE_FP32);
  if (!files) input.set_format(inference::ModelInput::FORMAT_NCHW);
  const std::vector<int64_t> shape = ShapeOf(model, files);
  input.mutable_dims()->Add(shape.begin() + 1, shape.end());  // without the batch
  inference::ModelOutput& output = *config.add_output();
  output.set_name(std::string(kProbabilitiesOutput));
  output.set_data_type(inference::TYPE_FP32);
  output.add_dims(model.network().num_classes());
  inference::ModelInstanceGroup& instances = *config.add_instance_group();
  instances.set_name(absl::StrCat(model.name(), "_", options_.device));
  instances.set_count(options_.batching.device == nullptr ? 1
                                                          : options_.batching.device->instances());
  instances.set_kind(options_.device == "cpu" ? inference::ModelInstanceGroup::KIND_CPU
                                              : inference::ModelInstanceGroup::KIND_GPU);
  inference::ModelDynamicBatching& batching = *config.mutable_dynamic_batching();
  batching.add_preferred_batch_size(options_.batching.max_batch);
  batching.set_max_queue_delay_microseconds(
      static_cast<uint64_t>(absl::ToInt64Microseconds(options_.batching.max_delay)));
  batching.set_priority_levels(kLowestPriority);
  batching.set_default_priority_level(kDefaultPriority);
  inference::ModelQueuePolicy& policy = *batching.mutable_default_queue_policy();
  policy.set_timeout_action(inference::ModelQueuePolicy::REJECT);
  policy.set_allow_timeout_override(true);
  policy.set_default_timeout_microseconds(
      static_cast<uint64_t>(absl::ToInt64Microseconds(pipeline_.options().default_timeout)));
  policy.set_max_queue_size(static_cast<uint32_t>(options_.batching.max_queue));
  auto& parameters = *config.mutable_parameters();
  parameters["digest"].set_string_value(model.digest());
  parameters["variant"].set_string_value(model.network().variant());
  parameters["dtype"].set_string_value(model.dtype());
  parameters["max_execution_batch_size"].set_string_value(
      absl::StrCat(options_.batching.max_batch));
  return response;
}

absl::StatusOr<inference::ModelStatisticsResponse> OpenInference::ModelStatistics(
    absl::string_view name, absl::string_view version) const {
  std::vector<v1::ModelVersion> wanted;
  if (name.empty()) {
    if (!version.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("version is ", Quoted(version), " and name is empty"));
    }
    wanted = registry_.List();
  } else if (const absl::string_view model = ViewOf(name).model;
             version.empty() && ModelNameOf(model) == model) {
    for (v1::ModelVersion& one : registry_.List()) {
      if (one.name() == model) wanted.push_back(std::move(one));
    }
    if (wanted.empty() || wanted.front().unloaded()) {
      const auto missing = Describe(name, "");
      if (!missing.ok()) return missing.status();
    }
  } else {
    ASSIGN_OR_RETURN(v1::ModelVersion one, Describe(name, version));
    wanted.push_back(std::move(one));
  }
  inference::ModelStatisticsResponse response;
  for (const v1::ModelVersion& one : wanted) {
    if (!one.loaded()) continue;
    const auto loaded = registry_.Find(one.name(), one.version());
    if (!loaded.ok() || *loaded == nullptr) continue;
    inference::ModelStatistics& statistics = *response.add_model_stats();
    statistics = ToProto(**loaded);
    if (!name.empty()) statistics.set_name(std::string(name));
  }
  if (!name.empty() && response.model_stats().empty()) {
    return absl::UnavailableError(absl::StrCat(
        "no statistics of ", name, version.empty() ? "" : ":", version, ": it isn't loaded"));
  }
  return response;
}

absl::StatusOr<inference::RepositoryIndexResponse> OpenInference::RepositoryIndex(
    const inference::RepositoryIndexRequest& request) const {
  if (!request.repository_name().empty()) {
    return absl::NotFoundError("no such repository; there is one, without a name");
  }
  inference::RepositoryIndexResponse response;
  for (const v1::ModelVersion& one : registry_.List()) {
    const bool ready = one.loaded() && !one.unloaded();
    if (request.ready() && !ready) continue;
    auto& entry = *response.add_models();
    entry.set_name(one.name());
    entry.set_version(absl::StrCat(one.version()));
    entry.set_state(ready ? "READY" : "UNAVAILABLE");
    if (one.unloaded()) {
      entry.set_reason("unloaded");
    } else if (!ready) {
      entry.set_reason("not loaded; the first request that names it loads it");
    }
  }
  if (request.ready()) return response;
  for (const ModelRegistry::Damaged& one : registry_.ListDamaged()) {
    auto& entry = *response.add_models();
    entry.set_name(one.name);
    entry.set_version(absl::StrCat(one.version));
    entry.set_state("UNAVAILABLE");
    entry.set_reason(options_.public_text(one.why));
  }
  return response;
}

absl::Status OpenInference::Load(const inference::RepositoryModelLoadRequest& request,
                                 absl::string_view actor) {
  RETURN_IF_ERROR(CheckRepositoryRequest(request));
  return registry_.Load(request.model_name(), actor).status();
}

absl::Status OpenInference::Unload(const inference::RepositoryModelUnloadRequest& request,
                                   absl::string_view actor) {
  RETURN_IF_ERROR(CheckRepositoryRequest(request));
  return registry_.Unload(request.model_name(), actor).status();
}

}  // namespace pyramid
