#include "server/rpc/infer_request.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <span>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/status.h"
#include "server/rpc/open_inference.h"
#include "server/serving/order.h"

namespace pyramid {
namespace {

using inference::InferParameter;
using InferInput = inference::ModelInferRequest::InferInputTensor;
using InferOutput = inference::ModelInferRequest::InferRequestedOutputTensor;
using Parameters = google::protobuf::Map<std::string, InferParameter>;

constexpr size_t kMaxAliasLength = 64;
constexpr size_t kLengthBytes = 4;      // before each element of BYTES
constexpr int64_t kMostSide = 1 << 20;  // more is refused by ClassifyPipeline, and fits an int
constexpr int kMostDimensionsShown = 16;
constexpr int kMostClasses = 1'000'000;  // more than any model has

std::string ShapeText(const InferInput& input) {
  const int shown = std::min(input.shape_size(), kMostDimensionsShown);
  return absl::StrCat("[", absl::StrJoin(input.shape().begin(), input.shape().begin() + shown, ","),
                      shown < input.shape_size() ? ",…]" : "]");
}

const InferParameter* Find(const Parameters& parameters, absl::string_view name) {
  const auto found = parameters.find(std::string(name));
  return found == parameters.end() ? nullptr : &found->second;
}

// A whole number from 0, whichever of the two integers the client chose.
absl::StatusOr<int64_t> NumberOf(const InferParameter& parameter, absl::string_view name) {
  if (parameter.parameter_choice_case() == InferParameter::kUint64Param) {
    return static_cast<int64_t>(
        std::min<uint64_t>(parameter.uint64_param(), std::numeric_limits<int64_t>::max()));
  }
  if (parameter.parameter_choice_case() != InferParameter::kInt64Param) {
    return absl::InvalidArgumentError(absl::StrCat("parameter ", name, " isn't a whole number"));
  }
  if (parameter.int64_param() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("parameter ", name, " is ", parameter.int64_param(), "; use 0 or more"));
  }
  return parameter.int64_param();
}

absl::Status NoSharedMemory(const Parameters& parameters) {
  if (Find(parameters, "shared_memory_region") == nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "it lies in shared memory, which this server doesn't read or write; send it along");
}

absl::Status ReadParameters(const inference::ModelInferRequest& request, InferPlan& plan) {
  if (const InferParameter* priority = Find(request.parameters(), "priority")) {
    ASSIGN_OR_RETURN(const int64_t value, NumberOf(*priority, "priority"));
    if (value > kLowestPriority) {
      return absl::InvalidArgumentError(
          absl::StrCat("parameter priority is ", value, "; use 1, the highest, to ",
                       kLowestPriority, ", or 0 for the model's default, ", kDefaultPriority));
    }
    plan.classify.set_priority(static_cast<uint32_t>(value));
  }
  if (const InferParameter* timeout = Find(request.parameters(), "timeout")) {
    ASSIGN_OR_RETURN(const int64_t micros, NumberOf(*timeout, "timeout"));
    if (micros > 0) plan.timeout = absl::Microseconds(micros);
  }
  if (const InferParameter* key = Find(request.parameters(), "sticky_key")) {
    if (!key->has_string_param()) {
      return absl::InvalidArgumentError("parameter sticky_key isn't a string");
    }
    plan.classify.set_sticky_key(key->string_param());
  }
  return absl::OkStatus();
}

// The one input, whatever its contents.
absl::StatusOr<const InferInput*> OnlyInput(const inference::ModelInferRequest& request) {
  const InferInput* image = nullptr;
  for (const InferInput& input : request.inputs()) {
    if (input.name() != kImageInput) {
      return absl::InvalidArgumentError(absl::StrCat(
          "input ", Quoted(input.name()), " isn't known; the model takes one, ", kImageInput));
    }
    if (image != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("input ", kImageInput, " comes twice"));
    }
    image = &input;
  }
  if (image == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("input ", kImageInput, " is missing; the model takes this one"));
  }
  return image;
}

bool HasContents(const InferInput& input) {
  const inference::InferTensorContents& c = input.contents();
  return c.bool_contents_size() + c.int_contents_size() + c.int64_contents_size() +
             c.uint_contents_size() + c.uint64_contents_size() + c.fp32_contents_size() +
             c.fp64_contents_size() + c.bytes_contents_size() >
         0;
}

// Nothing: typed contents.
absl::StatusOr<std::optional<Pieces>> RawOf(const inference::ModelInferRequest& request,
                                            const std::vector<LargeField>& large,
                                            const InferInput& input) {
  if (request.raw_input_contents_size() == 0) return std::nullopt;
  if (HasContents(input)) {
    return absl::InvalidArgumentError(
        "raw_input_contents and the contents of input image are both there; send one of them");
  }
  if (request.raw_input_contents_size() != request.inputs_size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("raw_input_contents has ", request.raw_input_contents_size(), " entries for ",
                     request.inputs_size(), " input"));
  }
  return large.empty() ? Pieces(absl::string_view(request.raw_input_contents(0)))
                       : large.front().bytes;
}

// Pictures of the shape's first dimension.
absl::StatusOr<int> BatchOf(const InferInput& input, int dimensions, absl::string_view wanted,
                            int max_pictures) {
  if (input.shape_size() != dimensions) {
    return absl::InvalidArgumentError(absl::StrCat("shape ", ShapeText(input), " has ",
                                                   input.shape_size(), " dimensions; ", wanted));
  }
  for (const int64_t dimension : input.shape()) {
    if (dimension < 1) {
      return absl::InvalidArgumentError(absl::StrCat(
          "shape ", ShapeText(input), " has a dimension of ", dimension, "; ", wanted));
    }
  }
  if (input.shape(0) > max_pictures) {
    return absl::InvalidArgumentError(absl::StrCat("shape ", ShapeText(input), " is a batch of ",
                                                   input.shape(0), "; at most ", max_pictures,
                                                   " pictures are taken per request"));
  }
  return static_cast<int>(input.shape(0));
}

absl::Status ReadFloats(const InferInput& input, const std::optional<Pieces>& raw, int max_pictures,
                        std::vector<PictureView>& pictures) {
  ASSIGN_OR_RETURN(const int batch,
                   BatchOf(input, 4, "FP32 wants [batch, channels, height, width]", max_pictures));
  for (int i = 1; i < 4; ++i) {
    if (input.shape(i) > kMostSide) {
      return absl::InvalidArgumentError(absl::StrCat("shape ", ShapeText(input),
                                                     " has a dimension of ", input.shape(i),
                                                     "; at most ", kMostSide, " is taken"));
    }
  }
  const int64_t floats = input.shape(1) * input.shape(2) * input.shape(3);  // < 2^60
  const auto bytes = static_cast<size_t>(floats) * sizeof(float);
  const google::protobuf::RepeatedField<float>& typed = input.contents().fp32_contents();
  if (!raw.has_value() && HasContents(input) && typed.empty()) {
    return absl::InvalidArgumentError("datatype FP32 is sent in fp32_contents, or raw");
  }
  const Pieces all =
      raw.value_or(absl::string_view(reinterpret_cast<const char*>(typed.data()),
                                     static_cast<size_t>(typed.size()) * sizeof(float)));
  // Compared so that nothing overflows: a batch is small.
  if (all.size() / static_cast<size_t>(batch) != bytes || all.size() % static_cast<size_t>(batch)) {
    return absl::InvalidArgumentError(absl::StrCat("there are ", all.size(),
                                                   " bytes of data; shape ", ShapeText(input),
                                                   " of FP32 is ", batch, " times ", bytes));
  }
  for (int i = 0; i < batch; ++i) {
    pictures.push_back({.kind = PictureView::Kind::kFloats,
                        .bytes = all.Sub(static_cast<size_t>(i) * bytes, bytes),
                        .channels = static_cast<int>(input.shape(1)),
                        .height = static_cast<int>(input.shape(2)),
                        .width = static_cast<int>(input.shape(3))});
  }
  return absl::OkStatus();
}

absl::Status ReadFiles(const InferInput& input, const std::optional<Pieces>& raw, int max_pictures,
                       std::vector<PictureView>& pictures) {
  ASSIGN_OR_RETURN(const int batch,
                   BatchOf(input, 2, "BYTES wants [batch, 1]: a file each", max_pictures));
  if (input.shape(1) != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("shape ", ShapeText(input), "; BYTES wants [batch, 1]: a file each"));
  }
  const auto& typed = input.contents().bytes_contents();
  if (!raw.has_value() && HasContents(input) && typed.empty()) {
    return absl::InvalidArgumentError("datatype BYTES is sent in bytes_contents, or raw");
  }
  const auto wanted = static_cast<size_t>(batch);
  std::vector<absl::string_view> files;
  if (raw.has_value()) {
    ASSIGN_OR_RETURN(files, SplitBytesElements(raw->Whole(), wanted));
  } else {
    const int taken = std::min(typed.size(), batch + 1);
    files.assign(typed.begin(), typed.begin() + taken);
  }
  if (files.size() != wanted) {
    const bool more = files.size() > wanted;
    return absl::InvalidArgumentError(
        absl::StrCat("there are ", more ? "more than " : "", more ? wanted : files.size(),
                     " elements of data; shape ", ShapeText(input), " of BYTES is ", batch));
  }
  for (const absl::string_view file : files) {
    pictures.push_back({.kind = PictureView::Kind::kEncoded, .bytes = file});
  }
  return absl::OkStatus();
}

absl::Status ReadInput(const InferInput& input, const std::optional<Pieces>& raw, int max_pictures,
                       std::vector<PictureView>& pictures) {
  RETURN_IF_ERROR(NoSharedMemory(input.parameters()));
  if (input.datatype() == "FP32") return ReadFloats(input, raw, max_pictures, pictures);
  if (input.datatype() == "BYTES") return ReadFiles(input, raw, max_pictures, pictures);
  return absl::InvalidArgumentError(
      absl::StrCat("datatype is ", Quoted(input.datatype()),
                   "; use FP32 [batch, channels, height, width], or BYTES [batch, 1] with a JPEG, "
                   "PNG … file each"));
}

absl::StatusOr<InferPlan::Output> ReadOutput(const InferOutput& output) {
  InferPlan::Output wanted{.name = output.name()};
  if (output.name() != kProbabilitiesOutput && output.name() != kLogitsOutput) {
    return absl::InvalidArgumentError(
        absl::StrCat("it isn't known; there are ", kProbabilitiesOutput, " and ", kLogitsOutput));
  }
  RETURN_IF_ERROR(NoSharedMemory(output.parameters()));
  if (const InferParameter* classes = Find(output.parameters(), kClassificationParameter)) {
    if (!classes->has_int64_param()) {
      return absl::InvalidArgumentError("parameter classification isn't an int64");
    }
    if (classes->int64_param() < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("parameter classification is ", classes->int64_param(), "; use 1 or more"));
    }
    wanted.classes = static_cast<int>(std::min<int64_t>(classes->int64_param(), kMostClasses));
  }
  return wanted;
}

absl::Status ReadOutputs(const inference::ModelInferRequest& request, InferPlan& plan) {
  for (const InferOutput& output : request.outputs()) {
    absl::StatusOr<InferPlan::Output> wanted = ReadOutput(output);
    if (!wanted.ok()) {
      return Annotate(wanted.status(), absl::StrCat("output ", Quoted(output.name())));
    }
    for (const InferPlan::Output& other : plan.outputs) {
      if (other.name == wanted->name) {
        return absl::InvalidArgumentError(absl::StrCat("output ", other.name, " comes twice"));
      }
    }
    plan.outputs.push_back(*std::move(wanted));
  }
  if (plan.outputs.empty()) plan.outputs.push_back({.name = std::string(kProbabilitiesOutput)});
  return absl::OkStatus();
}

// As Rank in classify.cc, for every class.
void AppendProbabilities(std::span<const float> logits, std::string& raw) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> shares(logits.size());
  double sum = 0;
  for (size_t i = 0; i < logits.size(); ++i) sum += shares[i] = std::exp(logits[i] - largest);
  const size_t start = raw.size();
  raw.resize(start + logits.size() * sizeof(float));
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto probability = static_cast<float>(shares[i] / sum);
    std::memcpy(&raw[start + i * sizeof(float)], &probability, sizeof(float));
  }
}

// "value:index:label", best first. Clients split at the first two colons.
void AppendClasses(const v1::PictureResult& result, bool logits, int classes, std::string& raw) {
  for (int i = 0; i < classes; ++i) {
    const v1::Prediction& prediction = result.predictions(i);
    const float value = logits ? result.logits(prediction.index()) : prediction.probability();
    AppendBytesElement(absl::StrCat(value, ":", prediction.index(), ":", prediction.label()), raw);
  }
}

}  // namespace

absl::StatusOr<VersionText> ParseVersionText(absl::string_view text) {
  VersionText version;
  if (text.empty()) return version;
  if (std::all_of(text.begin(), text.end(), absl::ascii_isdigit)) {
    if (absl::SimpleAtoi(text, &version.number) && version.number > 0) return version;
  } else if (text.size() <= kMaxAliasLength &&
             absl::ascii_isalpha(static_cast<unsigned char>(text[0])) &&
             std::all_of(text.begin(), text.end(), [](char c) {
               return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' ||
                      c == '-';
             })) {
    version.alias = text;
    return version;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("model version is ", Quoted(text),
                   "; use a number from 1, an alias, or nothing for the stable version"));
}

absl::StatusOr<NativeModel> NativeModelOf(absl::string_view name, absl::string_view version) {
  ASSIGN_OR_RETURN(const VersionText text, ParseVersionText(version));
  NativeModel native{.model = std::string(ViewOf(name).model), .version = text.number};
  if (!text.alias.empty()) absl::StrAppend(&native.model, "@", text.alias);
  return native;
}

std::string Quoted(absl::string_view text) {
  return absl::StrCat("\"", absl::CHexEscape(text.substr(0, 100)), "\"");
}

void PutBack(std::vector<LargeField>& large, inference::ModelInferRequest& request) {
  for (const LargeField& field : large) {
    std::string& entry = *request.mutable_raw_input_contents(field.index);
    entry.clear();
    field.bytes.AppendTo(entry);
  }
  large.clear();
}

absl::StatusOr<InferPlan> PlanInfer(const inference::ModelInferRequest& request,
                                    const std::vector<LargeField>& large, int max_pictures) {
  InferPlan plan;
  ASSIGN_OR_RETURN(NativeModel model, NativeModelOf(request.model_name(), request.model_version()));
  plan.classify.set_model(std::move(model.model));
  plan.classify.set_version(model.version);
  plan.classify.set_request_id(request.id());
  RETURN_IF_ERROR(ReadParameters(request, plan));

  ASSIGN_OR_RETURN(const InferInput* const input, OnlyInput(request));
  ASSIGN_OR_RETURN(const std::optional<Pieces> raw, RawOf(request, large, *input));
  const absl::Status read = ReadInput(*input, raw, max_pictures, plan.pictures);
  if (!read.ok()) return Annotate(read, absl::StrCat("input ", kImageInput));

  RETURN_IF_ERROR(ReadOutputs(request, plan));
  int classes = 1;
  for (const InferPlan::Output& output : plan.outputs) classes = std::max(classes, output.classes);
  plan.classify.set_top_k(classes);
  plan.classify.set_return_logits(true);
  return plan;
}

absl::StatusOr<inference::ModelInferResponse> AnswerInfer(
    const inference::ModelInferRequest& request, const InferPlan& plan,
    v1::ClassifyResponse classified) {
  const int batch = classified.results_size();
  for (int i = 0; i < batch; ++i) {
    const v1::PictureResult& result = classified.results(i);
    if (result.code() != 0) {
      return absl::Status(static_cast<absl::StatusCode>(result.code()),
                          absl::StrCat("input ", kImageInput, "[", i, "]: ", result.message()));
    }
  }
  inference::ModelInferResponse response;
  const bool files = ViewOf(request.model_name()).files;
  response.set_model_name(absl::StrCat(classified.model(), files ? kFilesView : ""));
  response.set_model_version(absl::StrCat(classified.version()));
  response.set_id(request.id());
  (*response.mutable_parameters())["digest"].set_string_param(classified.digest());
  for (const InferPlan::Output& wanted : plan.outputs) {
    inference::ModelInferResponse::InferOutputTensor& output = *response.add_outputs();
    std::string& raw = *response.add_raw_output_contents();
    output.set_name(wanted.name);
    output.set_datatype(wanted.classes > 0 ? "BYTES" : "FP32");
    output.add_shape(batch);
    const bool logits = wanted.name == kLogitsOutput;
    const int all = batch == 0 ? 0 : classified.results(0).logits_size();
    const int each = wanted.classes > 0 ? std::min(wanted.classes, all) : all;
    output.add_shape(each);
    if (wanted.classes == 0) {
      raw.reserve(static_cast<size_t>(batch) * static_cast<size_t>(each) * sizeof(float));
    }
    for (const v1::PictureResult& result : classified.results()) {
      const std::span<const float> values(result.logits().data(),
                                          static_cast<size_t>(result.logits_size()));
      if (wanted.classes > 0) {
        AppendClasses(result, logits, each, raw);
      } else if (logits) {
        raw.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
      } else {
        AppendProbabilities(values, raw);
      }
    }
  }
  return response;
}

void AppendBytesElement(absl::string_view element, std::string& raw) {
  const auto length = static_cast<uint32_t>(element.size());
  for (size_t i = 0; i < kLengthBytes; ++i) raw.push_back(static_cast<char>(length >> (8 * i)));
  raw.append(element.data(), element.size());
}

absl::StatusOr<std::vector<absl::string_view>> SplitBytesElements(absl::string_view raw,
                                                                  size_t most) {
  std::vector<absl::string_view> elements;
  while (!raw.empty() && elements.size() <= most) {
    if (raw.size() < kLengthBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("the data ends within the length of element ", elements.size()));
    }
    uint32_t length = 0;
    for (size_t i = 0; i < kLengthBytes; ++i) {
      length |= static_cast<uint32_t>(static_cast<uint8_t>(raw[i])) << (8 * i);
    }
    raw.remove_prefix(kLengthBytes);
    if (length > raw.size()) {
      return absl::InvalidArgumentError(absl::StrCat("element ", elements.size(), " should have ",
                                                     length, " bytes, ", raw.size(),
                                                     " are left of the data"));
    }
    elements.push_back(raw.substr(0, length));
    raw.remove_prefix(length);
  }
  return elements;
}

}  // namespace pyramid
