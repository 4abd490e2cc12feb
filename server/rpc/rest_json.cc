#include "server/rpc/rest_json.h"

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/status.h"
#include "server/rpc/infer_request.h"

namespace pyramid {
namespace {

// With 32-bit floats 0.1 is written as 0.1, not as 0.10000000149011612. Members keep their order.
using Json = nlohmann::basic_json<nlohmann::ordered_map, std::vector, std::string, bool,
                                  std::int64_t, std::uint64_t, float>;

using Parameters = google::protobuf::Map<std::string, inference::InferParameter>;

// More than any request needs, and small enough that a few bytes of JSON don't become much memory.
constexpr size_t kMaxDepth = 32;
constexpr int kMaxTensors = 64;
constexpr size_t kMaxParameters = 64;
constexpr int kMaxDimensions = 16;
constexpr int kMaxElements = 65'536;  // of BYTES, in all inputs

constexpr size_t kMaxRepositoryBody = 64 << 10;

constexpr char kBinarySize[] = "binary_data_size";

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Builds the message while the text is read: a document in between would take 16 bytes a number.
class InferReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit InferReader(inference::ModelInferRequest& request) : request_(request) {}

  const absl::Status& status() const { return status_; }

  bool null() override { return Ignore("null"); }
  bool boolean(bool value) override {
    if (Where() == Place::kParameters) {
      if (auto* parameter = NewParameter()) parameter->set_bool_param(value);
      return status_.ok();
    }
    return Ignore("a boolean");
  }
  bool number_integer(number_integer_t value) override {
    return Integer(value, static_cast<float>(value));
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      if (Where() == Place::kParameters) {
        if (auto* parameter = NewParameter()) parameter->set_uint64_param(value);
        return status_.ok();
      }
      if (Where() == Place::kShape) return Fail("a dimension is larger than 2^63");
    }
    return Integer(static_cast<int64_t>(value), static_cast<float>(value));
  }
  bool number_float(number_float_t value, const string_t& /*text*/) override {
    switch (Where()) {
      case Place::kParameters:
        if (auto* parameter = NewParameter()) parameter->set_double_param(value);
        return status_.ok();
      case Place::kData:
        return Number(static_cast<float>(value));
      default:
        return Ignore("a number with a fraction");
    }
  }
  bool string(string_t& value) override {
    switch (Where()) {
      case Place::kTop:
        if (key_ == "id") request_.set_id(value);
        return Ignore("a string");
      case Place::kInput:
        if (key_ == "name") input_->set_name(value);
        if (key_ == "datatype") input_->set_datatype(value);
        return Ignore("a string");
      case Place::kOutput:
        if (key_ == "name") output_->set_name(value);
        return true;
      case Place::kParameters:
        if (auto* parameter = NewParameter()) parameter->set_string_param(std::move(value));
        return status_.ok();
      case Place::kData: {
        if (texts_ == kMaxElements) {
          return Fail(absl::StrCat("the inputs' data has more than ", kMaxElements, " texts"));
        }
        ++texts_;
        *input_->mutable_contents()->add_bytes_contents() = std::move(value);
        return true;
      }
      default:
        return Ignore("a string");
    }
  }
  bool binary(binary_t& /*value*/) override { return Fail("binary JSON isn't taken"); }

  bool start_object(size_t /*count*/) override {
    switch (Where()) {
      case Place::kOutside:
        return Enter(Place::kTop);
      case Place::kInputs:
        if (request_.inputs_size() == kMaxTensors) return TooManyTensors();
        input_ = request_.add_inputs();
        return Enter(Place::kInput);
      case Place::kOutputs:
        if (request_.outputs_size() == kMaxTensors) return TooManyTensors();
        output_ = request_.add_outputs();
        return Enter(Place::kOutput);
      case Place::kTop:
      case Place::kInput:
      case Place::kOutput:
        if (key_ == "parameters") {
          parameters_ = Where() == Place::kTop     ? request_.mutable_parameters()
                        : Where() == Place::kInput ? input_->mutable_parameters()
                                                   : output_->mutable_parameters();
          return Enter(Place::kParameters);
        }
        return Ignore("an object") && Enter(Place::kElsewhere);
      default:
        return Ignore("an object") && Enter(Place::kElsewhere);
    }
  }
  bool key(string_t& name) override {
    // Keys of what is skipped don't matter, and those around it are needed no more.
    key_ = std::move(name);
    return true;
  }
  bool end_object() override { return Leave(); }
  bool start_array(size_t /*count*/) override {
    switch (Where()) {
      case Place::kOutside:
        return Fail("the body isn't a JSON object");
      case Place::kTop:
        if (key_ == "inputs") return Enter(Place::kInputs);
        if (key_ == "outputs") return Enter(Place::kOutputs);
        return Ignore("an array") && Enter(Place::kElsewhere);
      case Place::kInput:
        if (key_ == "shape") return Enter(Place::kShape);
        if (key_ == "data") return Enter(Place::kData);
        return Ignore("an array") && Enter(Place::kElsewhere);
      case Place::kData:
        return Enter(Place::kData);  // rows may be arrays of their own
      default:
        return Ignore("an array") && Enter(Place::kElsewhere);
    }
  }
  bool end_array() override { return Leave(); }
  bool parse_error(size_t position, const std::string& /*token*/,
                   const nlohmann::detail::exception& /*error*/) override {
    if (status_.ok()) Fail(absl::StrCat("the body isn't JSON, at byte ", position));
    return false;
  }

 private:
  enum class Place {
    kOutside,
    kTop,
    kInputs,
    kInput,
    kShape,
    kData,
    kParameters,
    kOutputs,
    kOutput,
    kElsewhere,  // in something that the protocol doesn't know
  };

  Place Where() const { return places_.empty() ? Place::kOutside : places_.back(); }

  bool Fail(absl::string_view why) {
    status_ = absl::InvalidArgumentError(why);
    return false;
  }
  bool TooManyTensors() {
    return Fail(absl::StrCat("there are more than ", kMaxTensors, " inputs or outputs"));
  }
  bool Enter(Place place) {
    if (places_.size() == kMaxDepth) {
      return Fail(absl::StrCat("the JSON is nested more than ", kMaxDepth, " deep"));
    }
    places_.push_back(place);
    return true;
  }
  bool Leave() {
    places_.pop_back();
    return true;
  }

  // A value that means nothing here: tolerated where the protocol may grow, an error where
  // something else has to stand.
  bool Ignore(absl::string_view what) {
    switch (Where()) {
      case Place::kOutside:
        return Fail("the body isn't a JSON object");
      case Place::kInputs:
      case Place::kOutputs:
        return Fail(absl::StrCat(what, " stands among the inputs or outputs; they are objects"));
      case Place::kShape:
        return Fail(absl::StrCat("shape holds ", what, "; it is an array of whole numbers"));
      case Place::kData:
        return Fail(absl::StrCat("data holds ", what, "; it is an array of numbers or texts"));
      case Place::kTop:
        if (key_ == "inputs" || key_ == "outputs" || key_ == "parameters") break;
        return true;
      case Place::kInput:
        if (key_ == "shape" || key_ == "data" || key_ == "parameters") break;
        return true;
      default:
        return true;
    }
    return Fail(absl::StrCat(key_, " is ", what));
  }

  bool Integer(int64_t value, float as_float) {
    switch (Where()) {
      case Place::kShape:
        if (input_->shape_size() == kMaxDimensions) {
          return Fail(absl::StrCat("shape has more than ", kMaxDimensions, " dimensions"));
        }
        input_->add_shape(value);
        return true;
      case Place::kData:
        return Number(as_float);
      case Place::kParameters:
        if (auto* parameter = NewParameter()) parameter->set_int64_param(value);
        return status_.ok();
      default:
        return Ignore("a number");
    }
  }
  bool Number(float value) {
    input_->mutable_contents()->add_fp32_contents(value);
    return true;
  }
  inference::InferParameter* NewParameter() {
    if (parameters_->size() == kMaxParameters) {
      Fail(absl::StrCat("there are more than ", kMaxParameters, " parameters"));
      return nullptr;
    }
    return &(*parameters_)[key_];
  }

  inference::ModelInferRequest& request_;
  absl::Status status_;
  std::vector<Place> places_;
  std::string key_;
  int texts_ = 0;  // of all inputs
  inference::ModelInferRequest::InferInputTensor* input_ = nullptr;
  inference::ModelInferRequest::InferRequestedOutputTensor* output_ = nullptr;
  Parameters* parameters_ = nullptr;
};

// Hands the bytes behind the JSON to the inputs that declare them.
absl::Status TakeTensors(absl::string_view tensors, inference::ModelInferRequest& request) {
  for (const auto& input : request.inputs()) {
    const auto declared = input.parameters().find(kBinarySize);
    if (declared == input.parameters().end()) continue;
    const int64_t size =
        declared->second.has_int64_param() ? declared->second.int64_param() : int64_t{-1};
    if (size < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(kBinarySize, " of an input isn't a number of bytes"));
    }
    if (static_cast<uint64_t>(size) > tensors.size()) {
      return absl::InvalidArgumentError(absl::StrCat(kBinarySize, " of an input is ", size, "; ",
                                                     tensors.size(),
                                                     " bytes are left of the body"));
    }
    request.add_raw_input_contents(tensors.data(), static_cast<size_t>(size));
    tensors.remove_prefix(static_cast<size_t>(size));
  }
  if (!tensors.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        tensors.size(), " bytes are left behind the JSON and the tensors that it declares"));
  }
  return absl::OkStatus();
}

bool WantsBinary(const inference::ModelInferRequest& request, const std::string& output) {
  const auto said = [](const Parameters& parameters, const char* name, bool otherwise) {
    const auto found = parameters.find(name);
    return found == parameters.end() ? otherwise : found->second.bool_param();
  };
  const bool all = said(request.parameters(), "binary_data_output", false);
  for (const auto& wanted : request.outputs()) {
    if (wanted.name() == output) return said(wanted.parameters(), "binary_data", all);
  }
  return all;
}

Json DataOf(const std::string& datatype, const std::string& raw) {
  Json data = Json::array();
  if (datatype == "BYTES") {
    const auto elements = SplitBytesElements(raw, raw.size());
    for (const absl::string_view element : elements.value()) data.push_back(std::string(element));
    return data;
  }
  for (size_t at = 0; at < raw.size(); at += sizeof(float)) {
    float value = 0;
    std::memcpy(&value, &raw[at], sizeof(value));
    data.push_back(value);
  }
  return data;
}

Json JsonOf(const google::protobuf::Message& message);

// One value of a field: of index `index` if it is repeated.
Json ValueOf(const google::protobuf::Message& message,
             const google::protobuf::FieldDescriptor& field, int index) {
  using google::protobuf::FieldDescriptor;
  const google::protobuf::Reflection& r = *message.GetReflection();
  const FieldDescriptor* f = &field;
  const bool many = field.is_repeated();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return many ? r.GetRepeatedInt32(message, f, index) : r.GetInt32(message, f);
    case FieldDescriptor::CPPTYPE_INT64:
      return many ? r.GetRepeatedInt64(message, f, index) : r.GetInt64(message, f);
    case FieldDescriptor::CPPTYPE_UINT32:
      return many ? r.GetRepeatedUInt32(message, f, index) : r.GetUInt32(message, f);
    case FieldDescriptor::CPPTYPE_UINT64:
      return many ? r.GetRepeatedUInt64(message, f, index) : r.GetUInt64(message, f);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return many ? r.GetRepeatedDouble(message, f, index) : r.GetDouble(message, f);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return many ? r.GetRepeatedFloat(message, f, index) : r.GetFloat(message, f);
    case FieldDescriptor::CPPTYPE_BOOL:
      return many ? r.GetRepeatedBool(message, f, index) : r.GetBool(message, f);
    case FieldDescriptor::CPPTYPE_ENUM:
      return (many ? r.GetRepeatedEnum(message, f, index) : r.GetEnum(message, f))->name();
    case FieldDescriptor::CPPTYPE_STRING:
      return many ? r.GetRepeatedString(message, f, index) : r.GetString(message, f);
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return JsonOf(many ? r.GetRepeatedMessage(message, f, index) : r.GetMessage(message, f));
  }
  return nullptr;
}

Json MapOf(const google::protobuf::Message& message,
           const google::protobuf::FieldDescriptor& field) {
  const google::protobuf::Reflection& r = *message.GetReflection();
  Json object = Json::object();
  for (int i = 0; i < r.FieldSize(message, &field); ++i) {
    const google::protobuf::Message& entry = r.GetRepeatedMessage(message, &field, i);
    const Json key = ValueOf(entry, *entry.GetDescriptor()->map_key(), 0);
    object[key.is_string() ? key.get<std::string>() : Dump(key)] =
        ValueOf(entry, *entry.GetDescriptor()->map_value(), 0);
  }
  return object;
}

Json JsonOf(const google::protobuf::Message& message) {
  using google::protobuf::FieldDescriptor;
  const google::protobuf::Descriptor& type = *message.GetDescriptor();
  const google::protobuf::Reflection& r = *message.GetReflection();
  if (&type == inference::InferParameter::descriptor()) {  // the bare value
    const FieldDescriptor* chosen = r.GetOneofFieldDescriptor(message, type.oneof_decl(0));
    return chosen == nullptr ? Json() : ValueOf(message, *chosen, 0);
  }
  Json object = Json::object();
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor& field = *type.field(i);
    if (field.is_map()) {
      object[field.name()] = MapOf(message, field);
    } else if (field.is_repeated()) {
      Json& array = object[field.name()] = Json::array();
      for (int k = 0; k < r.FieldSize(message, &field); ++k) {
        array.push_back(ValueOf(message, field, k));
      }
    } else if ((field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE &&
                field.containing_oneof() == nullptr) ||
               r.HasField(message, &field)) {
      object[field.name()] = ValueOf(message, field, 0);
    }
  }
  return object;
}

}  // namespace

absl::StatusOr<inference::ModelInferRequest> ParseInferBody(absl::string_view body,
                                                            size_t json_bytes) {
  if (json_bytes > body.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the JSON should have ", json_bytes, " bytes, the body has ", body.size()));
  }
  inference::ModelInferRequest request;
  InferReader reader(request);
  const char* start = body.data();
  nlohmann::json::sax_parse(start, start + json_bytes, &reader);
  RETURN_IF_ERROR(reader.status());
  RETURN_IF_ERROR(TakeTensors(body.substr(json_bytes), request));
  return request;
}

InferBody WriteInferBody(const inference::ModelInferRequest& request,
                         const inference::ModelInferResponse& response) {
  Json json = {{"model_name", response.model_name()}, {"model_version", response.model_version()}};
  if (!response.id().empty()) json["id"] = response.id();
  Json& parameters = json["parameters"] = Json::object();
  for (const auto& [name, value] : response.parameters()) parameters[name] = JsonOf(value);
  Json& outputs = json["outputs"] = Json::array();
  std::string tensors;
  bool binary = false;
  for (int i = 0; i < response.outputs_size(); ++i) {
    const auto& output = response.outputs(i);
    const std::string& raw = response.raw_output_contents(i);
    Json entry = {{"name", output.name()}, {"datatype", output.datatype()}};
    Json& shape = entry["shape"] = Json::array();
    for (const int64_t dimension : output.shape()) shape.push_back(dimension);
    if (WantsBinary(request, output.name())) {
      binary = true;
      entry["parameters"][kBinarySize] = raw.size();
      tensors += raw;
    } else {
      entry["data"] = DataOf(output.datatype(), raw);
    }
    outputs.push_back(std::move(entry));
  }
  InferBody written{.body = Dump(json)};
  if (binary) {
    written.json_bytes = static_cast<int64_t>(written.body.size());
    written.body += tensors;
  }
  return written;
}

absl::Status ParseRepositoryBody(
    absl::string_view body, bool& ready,
    google::protobuf::Map<std::string, inference::ModelRepositoryParameter>& parameters) {
  if (body.size() > kMaxRepositoryBody) {
    return absl::InvalidArgumentError(
        absl::StrCat("the body has ", body.size(), " bytes; at most ", kMaxRepositoryBody));
  }
  if (body.find_first_not_of(" \t\r\n") == absl::string_view::npos) return absl::OkStatus();
  const Json json = Json::parse(body.begin(), body.end(), nullptr, false);
  if (!json.is_object()) return absl::InvalidArgumentError("the body isn't a JSON object");
  if (const auto found = json.find("ready"); found != json.end()) {
    if (!found->is_boolean()) return absl::InvalidArgumentError("ready isn't true or false");
    ready = found->get<bool>();
  }
  const auto found = json.find("parameters");
  if (found == json.end()) return absl::OkStatus();
  if (!found->is_object()) return absl::InvalidArgumentError("parameters isn't an object");
  for (const auto& [name, value] : found->items()) {
    inference::ModelRepositoryParameter& parameter = parameters[name];
    if (value.is_boolean()) parameter.set_bool_param(value.get<bool>());
    if (value.is_number_integer()) parameter.set_int64_param(value.get<int64_t>());
    if (value.is_string()) parameter.set_string_param(value.get<std::string>());
  }
  return absl::OkStatus();
}

std::string MessageToJson(const google::protobuf::Message& message) {
  return Dump(JsonOf(message));
}

std::string ErrorJson(absl::string_view text) { return Dump(Json{{"error", std::string(text)}}); }

}  // namespace pyramid
