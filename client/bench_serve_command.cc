#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/answerer.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "client/format.h"
#include "client/load.h"
#include "client/load_schedule.h"
#include "client/npy.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "proto/open_inference.grpc.pb.h"

namespace pyramid {
namespace {

constexpr int kMadeUp = 4;  // different tensors, sent in turns
constexpr int64_t kMostPictureBytes = 64 << 20;

struct Options {
  std::string model;
  std::vector<std::string> pictures;
  int size = 0;  // of made-up tensors; 0: the model's
  int per_request = 1;
  std::string protocol = "native";
  double rate = 0;
  int closed = 0;
  double seconds = 10;
  double warm_up = 1;
  double deadline_ms = 0;         // 0: none
  std::vector<double> within_ms;  // empty: the deadline, if there is one
  uint64_t seed = 1;
  bool json = false;
};

// What `text` asks the server for, as the server lists it.
absl::StatusOr<v1::ModelVersion> FindModel(Connection& connection, const ModelName& wanted) {
  grpc::ClientContext context;
  SetDeadline(context, kCallTimeout);
  v1::ListModelsResponse listed;
  const grpc::Status status =
      connection.classification()->ListModels(&context, v1::ListModelsRequest(), &listed);
  if (!status.ok()) return connection.ToStatus(status);
  const v1::ModelVersion* found = nullptr;
  for (const v1::ModelVersion& model : listed.models()) {
    if (!wanted.name.empty() && model.name() != wanted.name) continue;
    const bool meant =
        !wanted.alias.empty()
            ? std::find(model.aliases().begin(), model.aliases().end(), wanted.alias) !=
                  model.aliases().end()
            : (wanted.version != 0 ? model.version() == wanted.version : model.serving());
    if (!meant) continue;
    if (found != nullptr) {
      return UsageError("the server has several models in service; name one with --model");
    }
    found = &model;
  }
  if (found == nullptr) {
    return absl::NotFoundError(
        "the server has no such model in service; pyramid models lists them");
  }
  return *found;
}

// The same from any server of the Open Inference Protocol, as far as it tells.
absl::StatusOr<v1::ModelVersion> AskMetadata(Connection& connection, const ModelName& wanted,
                                             std::string& input) {
  if (wanted.name.empty()) return UsageError("--protocol v2 needs --model NAME");
  grpc::ClientContext context;
  SetDeadline(context, kCallTimeout);
  inference::ModelMetadataRequest request;
  request.set_name(wanted.name);
  if (wanted.version != 0) request.set_version(absl::StrCat(wanted.version));
  if (!wanted.alias.empty()) request.set_version(wanted.alias);
  inference::ModelMetadataResponse metadata;
  const grpc::Status status = inference::GRPCInferenceService::NewStub(connection.channel())
                                  ->ModelMetadata(&context, request, &metadata);
  if (!status.ok()) return connection.ToStatus(status);
  if (metadata.inputs().empty()) {
    return absl::FailedPreconditionError(absl::StrCat(wanted.name, " has no inputs"));
  }
  input = metadata.inputs(0).name();
  v1::ModelVersion model;
  model.set_name(wanted.name);
  model.set_version(wanted.version);
  model.set_serving(wanted.version == 0);
  const auto& shape = metadata.inputs(0).shape();
  const auto side = [&shape](int index, int otherwise) {
    return shape.size() == 4 && shape[index] > 0 ? static_cast<int32_t>(shape[index]) : otherwise;
  };
  model.mutable_network()->set_in_channels(side(1, 3));
  model.mutable_preprocessing()->set_crop(side(3, 224));
  return model;
}

v1::Picture TensorPicture(int channels, int height, int width, std::span<const float> values) {
  v1::Picture picture;
  v1::ImageTensor& tensor = *picture.mutable_tensor();
  tensor.set_channels(channels);
  tensor.set_height(height);
  tensor.set_width(width);
  tensor.mutable_values()->Add(values.begin(), values.end());
  return picture;
}

// Tensors of the model's size, or of --size.
std::vector<v1::Picture> MakeUpPictures(const Options& options, const v1::ModelVersion& model) {
  const int channels = model.network().in_channels();
  const int size = options.size > 0 ? options.size : std::max(1, model.preprocessing().crop());
  std::mt19937 random(1);
  std::vector<float> values(static_cast<size_t>(channels) * static_cast<size_t>(size) *
                            static_cast<size_t>(size));
  std::vector<v1::Picture> pictures;
  for (int i = 0; i < kMadeUp; ++i) {
    for (float& value : values) value = static_cast<float>(random() % 4096) / 1024.0f - 2;
    pictures.push_back(TensorPicture(channels, size, size, values));
  }
  return pictures;
}

absl::StatusOr<std::vector<v1::Picture>> ReadPictures(const Environment& environment,
                                                      const std::vector<std::string>& names) {
  std::vector<v1::Picture> pictures;
  for (const std::string& name : names) {
    ASSIGN_OR_RETURN(std::string bytes, ReadFile(environment.folder / name, kMostPictureBytes));
    if (!absl::EndsWith(name, ".npy")) {
      pictures.emplace_back().set_encoded(std::move(bytes));
      continue;
    }
    absl::StatusOr<NpyTensor> array = ParseNpy(bytes);
    if (!array.ok()) return Annotate(array.status(), name);
    for (int i = 0; i < array->batch; ++i) {
      pictures.push_back(
          TensorPicture(array->channels, array->height, array->width, array->picture(i)));
    }
  }
  return pictures;
}

grpc::ByteBuffer Serialise(const google::protobuf::Message& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

v1::ClassifyRequest NativeRequest(const v1::ModelVersion& model,
                                  const std::vector<v1::Picture>& pictures) {
  v1::ClassifyRequest request;
  request.set_model(model.name());
  request.set_version(model.serving() ? 0 : model.version());
  for (const v1::Picture& picture : pictures) *request.add_pictures() = picture;
  return request;
}

// All pictures of the request alike: tensors of one size, or files.
absl::StatusOr<inference::ModelInferRequest> OpenInferenceRequest(
    const v1::ModelVersion& model, const std::string& input_name,
    const std::vector<v1::Picture>& pictures) {
  inference::ModelInferRequest request;
  request.set_model_name(model.name());
  if (!model.serving()) request.set_model_version(absl::StrCat(model.version()));
  auto& input = *request.add_inputs();
  input.set_name(input_name);
  input.add_shape(static_cast<int64_t>(pictures.size()));
  const bool files = pictures.front().has_encoded();
  const v1::ImageTensor& first = pictures.front().tensor();
  input.set_datatype(files ? "BYTES" : "FP32");
  if (files) {
    input.add_shape(1);
  } else {
    for (const int side : {first.channels(), first.height(), first.width()}) input.add_shape(side);
  }
  std::string& raw = *request.add_raw_input_contents();
  for (const v1::Picture& picture : pictures) {
    const v1::ImageTensor& tensor = picture.tensor();
    if (picture.has_encoded() != files || tensor.values_size() != first.values_size()) {
      return UsageError(
          "--protocol v2 with --per-request takes files alone, or arrays of one size");
    }
    if (files) {
      const auto size = static_cast<uint32_t>(picture.encoded().size());
      for (int byte = 0; byte < 4; ++byte) raw += static_cast<char>(size >> (8 * byte) & 0xff);
      raw += picture.encoded();
    } else {
      raw.append(reinterpret_cast<const char*>(tensor.values().data()),
                 static_cast<size_t>(tensor.values_size()) * sizeof(float));
    }
  }
  return request;
}

// As many requests as it takes until the pictures come round, at most 64.
absl::StatusOr<LoadRequests> MakeRequests(const Options& options, const v1::ModelVersion& model,
                                          const std::string& input,
                                          const std::vector<v1::Picture>& pictures) {
  const bool native = options.protocol == "native";
  LoadRequests requests;
  requests.method = native ? "/pyramid.v1.ClassificationService/Classify"
                           : "/inference.GRPCInferenceService/ModelInfer";
  requests.pictures = options.per_request;
  requests.timings = native;
  const size_t count = std::min<size_t>(pictures.size(), 64);
  size_t next = 0;
  for (size_t i = 0; i < count; ++i) {
    std::vector<v1::Picture> chosen;
    for (int k = 0; k < options.per_request; ++k) {
      chosen.push_back(pictures[next++ % pictures.size()]);
    }
    if (native) {
      requests.bodies.push_back(Serialise(NativeRequest(model, chosen)));
    } else {
      ASSIGN_OR_RETURN(const inference::ModelInferRequest request,
                       OpenInferenceRequest(model, input, chosen));
      requests.bodies.push_back(Serialise(request));
    }
  }
  return requests;
}

nlohmann::json Quantiles(std::vector<double>& values) {
  if (values.empty()) return nullptr;
  return {{"p50", Quantile(values, 0.5)},
          {"p90", Quantile(values, 0.9)},
          {"p99", Quantile(values, 0.99)},
          {"max", Quantile(values, 1)},
          {"count", values.size()}};
}

struct Goodput {
  double within_ms = 0;
  double per_second = 0;
  double share = 0;  // of the requests that were due
};

std::vector<Goodput> GoodputOf(const Options& options, LoadResult& result) {
  std::vector<double> bounds = options.within_ms;
  if (bounds.empty() && options.deadline_ms > 0) bounds.push_back(options.deadline_ms);
  std::sort(result.answered.begin(), result.answered.end());
  std::vector<Goodput> goodput;
  for (const double bound : bounds) {
    const auto count = static_cast<double>(
        std::upper_bound(result.answered.begin(), result.answered.end(), bound) -
        result.answered.begin());
    goodput.push_back({bound, count / options.seconds,
                       count / static_cast<double>(std::max<int64_t>(1, result.due))});
  }
  return goodput;
}

nlohmann::json ToJson(const Options& options, const v1::ModelVersion& model,
                      const LoadRequests& requests, LoadResult& result) {
  const double answers = static_cast<double>(result.answered.size()) / options.seconds;
  nlohmann::json errors = nlohmann::json::object();
  for (const auto& [code, count] : result.errors) errors[absl::StatusCodeToString(code)] = count;
  nlohmann::json goodput = nlohmann::json::array();
  for (const Goodput& one : GoodputOf(options, result)) {
    goodput.push_back(
        {{"within_ms", one.within_ms}, {"per_second", one.per_second}, {"share", one.share}});
  }
  nlohmann::json json = {{"model", model.name()},
                         {"protocol", options.protocol},
                         {"loop", options.rate > 0 ? "open" : "closed"},
                         {"rate", options.rate},
                         {"in_flight", options.rate > 0 ? 0 : options.closed},
                         {"seconds", options.seconds},
                         {"pictures_per_request", requests.pictures},
                         {"bytes_per_request", requests.bodies.front().Length()},
                         {"due", result.due},
                         {"unsent", result.unsent},
                         {"answered", result.answered.size()},
                         {"answers_per_second", answers},
                         {"images_per_second", answers * requests.pictures},
                         {"failed", result.failed()},
                         {"errors", std::move(errors)},
                         {"late", result.late},
                         {"bad_pictures", result.bad_pictures},
                         {"latency_ms", Quantiles(result.answered)},
                         {"failed_ms", Quantiles(result.refused)},
                         {"send_delay_ms", Quantiles(result.send_delay)},
                         {"goodput", std::move(goodput)},
                         {"client_cpu_seconds", result.client_cpu_seconds}};
  if (requests.timings) {
    json["server_ms"] = {{"decode", Quantiles(result.decode)},
                         {"queue", Quantiles(result.queue)},
                         {"forward", Quantiles(result.forward)},
                         {"total", Quantiles(result.total)},
                         {"overhead", Quantiles(result.overhead)}};
  }
  return json;
}

void AddRow(Table& table, const std::string& name, std::vector<double>& values) {
  if (values.empty()) return;
  std::vector<std::string> row = {name};
  for (const double quantile : {0.5, 0.9, 0.99, 1.0}) {
    row.push_back(absl::StrFormat("%.3f", Quantile(values, quantile)));
  }
  row.push_back(FormatCount(static_cast<int64_t>(values.size())));
  table.Add(std::move(row));
}

std::string ToText(const Options& options, const LoadRequests& requests, LoadResult& result) {
  const double answers = static_cast<double>(result.answered.size()) / options.seconds;
  std::string text =
      absl::StrCat("answered ", FormatCount(static_cast<int64_t>(result.answered.size())), " of ",
                   FormatCount(result.due), " requests, ", FormatRate(answers * requests.pictures),
                   " images/s\n");
  if (result.late > 0) absl::StrAppend(&text, "late ", FormatCount(result.late), "\n");
  for (const auto& [code, count] : result.errors) {
    absl::StrAppend(&text, absl::StatusCodeToString(code), " ", FormatCount(count), "\n");
  }
  if (result.unsent > 0) absl::StrAppend(&text, "not sent ", FormatCount(result.unsent), "\n");
  for (const Goodput& one : GoodputOf(options, result)) {
    absl::StrAppend(&text, absl::StrFormat("within %g ms: %s requests/s, %.1f %%\n", one.within_ms,
                                           FormatRate(one.per_second), one.share * 100));
  }
  Table table({"milliseconds", "p50", "p90", "p99", "max", "count"});
  for (size_t column = 1; column <= 5; ++column) table.Right(column);
  AddRow(table, "answered", result.answered);
  AddRow(table, "failed", result.refused);
  if (options.rate > 0) AddRow(table, "sent too late by", result.send_delay);
  AddRow(table, "server: decode", result.decode);
  AddRow(table, "server: queue", result.queue);
  AddRow(table, "server: forward", result.forward);
  AddRow(table, "server: all else", result.overhead);
  return text + table.Text();
}

absl::Status Check(const Options& options) {
  if ((options.rate > 0) == (options.closed > 0)) {
    return UsageError(
        "say how much load: --rate REQUESTS a second, or --closed N requests in flight");
  }
  if (!options.pictures.empty() && options.size > 0) {
    return UsageError("--size is for made-up tensors, without --pictures");
  }
  return absl::OkStatus();
}

absl::StatusOr<LoadResult> Measure(const Environment& environment, const Options& options,
                                   v1::ModelVersion& model, LoadRequests& requests) {
  RETURN_IF_ERROR(Check(options));
  ModelName wanted;
  if (!options.model.empty()) {
    ASSIGN_OR_RETURN(wanted, ParseModelName(options.model));
  }
  std::vector<v1::Picture> pictures;
  if (!options.pictures.empty()) {
    ASSIGN_OR_RETURN(pictures, ReadPictures(environment, options.pictures));
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<Connection> connection, Connection::Open(environment));
  std::string input;
  if (options.protocol == "v2") {
    ASSIGN_OR_RETURN(model, AskMetadata(*connection, wanted, input));
  } else {
    ASSIGN_OR_RETURN(model, FindModel(*connection, wanted));
  }
  if (pictures.empty()) pictures = MakeUpPictures(options, model);
  ASSIGN_OR_RETURN(requests, MakeRequests(options, model, input, pictures));

  LoadOptions load;
  load.rate = options.rate;
  load.closed = options.closed;
  load.warm_up = absl::Seconds(options.warm_up);
  load.duration = absl::Seconds(options.seconds);
  if (options.deadline_ms > 0) load.deadline = absl::Milliseconds(options.deadline_ms);
  load.seed = options.seed;
  return RunLoad(connection->channel(), requests, load);
}

int BenchServe(Environment& environment, const Options& options) {
  v1::ModelVersion model;
  LoadRequests requests;
  absl::StatusOr<LoadResult> result = Measure(environment, options, model, requests);
  if (!result.ok()) return Fail(environment, result.status());
  if (options.json) {
    *environment.out << ToJson(options, model, requests, *result).dump() << "\n";
  } else {
    *environment.out << ToText(options, requests, *result);
  }
  if (result->bad_pictures > 0) {
    *environment.err << absl::StrCat(
        "warning: ", FormatCount(result->bad_pictures),
        " pictures couldn't be used, the first: ", OneLine(result->first_bad_picture), "\n");
  }
  if (!result->answered.empty()) return kDone;
  if (!result->first_error.ok()) {
    return Fail(environment, Annotate(result->first_error, "no request was answered"));
  }
  return Fail(environment, absl::InternalError("no request was due in this time; ask for more"));
}

}  // namespace

void AddBenchServeCommand(CommandLine line, CLI::App& bench) {
  auto options = std::make_shared<Options>();
  CLI::App* command = bench.add_subcommand(
      "serve", "Put a server under load; latency counts from when a request was due");
  command
      ->add_option("--rate", options->rate,
                   "Requests a second, at random times that don't depend on the answers (Poisson)")
      ->type_name("REQUESTS")
      ->check(CLI::Range(0.001, 1e6));
  command->add_option("--closed", options->closed, "Or: so many requests in flight all the time")
      ->type_name("N")
      ->check(CLI::Range(1, kMostInFlight));
  command->add_option("--seconds,--duration", options->seconds, "That are counted (10)")
      ->type_name("SECONDS")
      ->check(CLI::Range(0.1, 86400.0));
  command->add_option("--warm-up", options->warm_up, "Seconds before those (1)")
      ->type_name("SECONDS")
      ->check(CLI::Range(0.0, 3600.0));
  command->add_option("--deadline", options->deadline_ms, "Of each request, milliseconds (none)")
      ->type_name("MS")
      ->check(CLI::Range(0.1, 1e7));
  command
      ->add_option("--within", options->within_ms,
                   "Counts the answers that came in so many milliseconds (the deadline)")
      ->type_name("MS …")
      ->check(CLI::Range(0.001, 1e7));
  command->add_option("--model", options->model, "The server's model; default: the only one")
      ->type_name("NAME[:VERSION|@ALIAS]");
  command
      ->add_option("--pictures", options->pictures,
                   "Files to send in turns: pictures, or .npy arrays as classify takes them; "
                   "default: made-up tensors")
      ->type_name("PICTURE|ARRAY.npy …");
  command->add_option("--size", options->size, "Side of made-up tensors (the model's)")
      ->type_name("PIXELS")
      ->check(CLI::Range(1, 4096));
  command->add_option("--per-request", options->per_request, "Pictures a request (1)")
      ->type_name("N")
      ->check(CLI::Range(1, 1024));
  command
      ->add_option("--protocol", options->protocol,
                   "native (default), or v2: the Open Inference Protocol, of any server")
      ->type_name("PROTOCOL")
      ->check(CLI::IsMember({"native", "v2"}));
  command->add_option("--seed", options->seed, "Of the times (1)")->type_name("N");
  command->add_flag("--json", options->json, "Print one JSON object");
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return BenchServe(line.environment, *options); };
  });
}

}  // namespace pyramid
