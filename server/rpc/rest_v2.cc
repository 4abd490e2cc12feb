#include "server/rpc/rest_v2.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "proto/base/status.h"
#include "server/rpc/infer_request.h"
#include "server/rpc/rest_json.h"
#include "server/serving/pushback.h"

namespace pyramid {
namespace {

constexpr char kHeaderLength[] = "Inference-Header-Content-Length";
constexpr absl::Duration kLookAtClient = absl::Milliseconds(50);
constexpr int kPictureClasses = 5;  // told of a picture that is posted as it is

template <typename Message>
RestReply JsonReply(const absl::StatusOr<Message>& message) {
  if (!message.ok()) return ErrorReply(message.status());
  return {.body = MessageToJson(*message)};
}

RestReply NoSuchPath(absl::string_view path) {
  return ErrorReply(absl::NotFoundError(
      absl::StrCat("there is nothing at ", path.substr(0, 200), "; see docs/open-inference.md")));
}

// "1" of ["versions", "1"]; nothing of what begins otherwise.
absl::string_view TakeVersion(std::vector<absl::string_view>& path) {
  if (path.size() < 2 || path[0] != "versions") return "";
  const absl::string_view version = path[1];
  path.erase(path.begin(), path.begin() + 2);
  return version;
}

// A body that is one file, as Triton's short form and as a plain `curl --data-binary @cat.jpg`.
inference::ModelInferRequest RequestOfFile(absl::string_view file) {
  inference::ModelInferRequest request;
  auto& input = *request.add_inputs();
  input.set_name(std::string(kImageInput));
  input.set_datatype("BYTES");
  input.add_shape(1);
  input.add_shape(1);
  AppendBytesElement(file, *request.add_raw_input_contents());
  return request;
}

// Whether a body without a header length is a file rather than JSON.
bool IsFile(absl::string_view content_type, absl::string_view body) {
  if (absl::StartsWithIgnoreCase(content_type, "image/")) return true;
  if (absl::StartsWithIgnoreCase(content_type, "application/json")) return false;
  const absl::string_view text = absl::StripLeadingAsciiWhitespace(body);
  return !text.empty() && text[0] != '{';
}

absl::StatusOr<inference::ModelInferRequest> ReadInfer(const RestRequest& request) {
  const std::string header_length = request.header(kHeaderLength);
  if (header_length.empty()) {
    if (!IsFile(request.header("Content-Type"), request.body)) {
      return ParseInferBody(request.body, request.body.size());
    }
    inference::ModelInferRequest file = RequestOfFile(request.body);
    auto& output = *file.add_outputs();
    output.set_name(std::string(kProbabilitiesOutput));
    (*output.mutable_parameters())[std::string(kClassificationParameter)].set_int64_param(
        kPictureClasses);
    return file;
  }
  uint64_t json_bytes = 0;
  if (!absl::SimpleAtoi(header_length, &json_bytes)) {
    return absl::InvalidArgumentError(absl::StrCat(kHeaderLength, " isn't a number"));
  }
  if (json_bytes > 0) return ParseInferBody(request.body, json_bytes);
  inference::ModelInferRequest file = RequestOfFile(request.body);
  (*file.mutable_parameters())["binary_data_output"].set_bool_param(true);  // as Triton answers
  return file;
}

}  // namespace

int HttpStatusOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kPermissionDenied:
      return 403;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kResourceExhausted:
      return 429;
    case absl::StatusCode::kCancelled:
      return 499;
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDataLoss:
      return 500;
    case absl::StatusCode::kUnimplemented:
      return 501;
    case absl::StatusCode::kUnavailable:
      return 503;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 400;
  }
}

RestReply ErrorReply(const absl::Status& status) {
  RestReply reply{.status = HttpStatusOf(status.code()), .body = ErrorJson(status.message())};
  const int64_t millis = PushbackMillis(status);
  if (millis >= 0) {
    // In whole seconds, and never too early.
    const int64_t seconds = std::max<int64_t>(1, (millis + 999) / 1000);
    reply.headers.emplace_back("Retry-After", absl::StrCat(seconds));
    reply.headers.emplace_back("retry-after-ms", absl::StrCat(millis));
  }
  return reply;
}

RestReply RestV2::Answer(RestRequest& request) const {
  std::vector<absl::string_view> path = absl::StrSplit(absl::StripPrefix(request.path, "/"), '/');
  if (path.size() > 1 && path.back().empty()) path.pop_back();  // "/v2/"
  if (path[0] != "v2") return NoSuchPath(request.path);
  path.erase(path.begin());
  std::optional<RestReply> reply;
  if (request.method == "GET") reply = Get(path);
  if (request.method == "POST") reply = Post(path, request);
  if (!reply.has_value()) {
    return {
        .status = 405, .headers = {{"Allow", "GET, POST"}}, .body = ErrorJson("use GET or POST")};
  }
  return reply->status == 0 ? NoSuchPath(request.path) : *std::move(reply);
}

// Status 0: there is no such path.
RestReply RestV2::Get(const std::vector<absl::string_view>& path) const {
  using Path = std::vector<absl::string_view>;
  if (path.empty()) return {.body = MessageToJson(protocol_.ServerMetadata())};
  if (path == Path{"health", "live"}) {
    inference::ServerLiveResponse live;
    live.set_live(true);
    return {.body = MessageToJson(live)};
  }
  if (path == Path{"health", "ready"}) {
    inference::ServerReadyResponse ready;
    ready.set_ready(protocol_.ServerReady());
    return {.status = ready.ready() ? 200 : 503, .body = MessageToJson(ready)};
  }
  if (path == Path{"models", "stats"}) return JsonReply(protocol_.ModelStatistics("", ""));
  if (path.size() < 2 || path[0] != "models") return {.status = 0};
  const absl::string_view name = path[1];
  Path rest(path.begin() + 2, path.end());
  const absl::string_view version = TakeVersion(rest);
  if (rest.empty()) return JsonReply(protocol_.ModelMetadata(name, version));
  if (rest == Path{"config"}) {
    const auto response = protocol_.ModelConfig(name, version);
    if (!response.ok()) return ErrorReply(response.status());
    return {.body = MessageToJson(response->config())};
  }
  if (rest == Path{"stats"}) return JsonReply(protocol_.ModelStatistics(name, version));
  if (rest == Path{"ready"}) {
    const absl::Status known = protocol_.ModelMetadata(name, version).status();
    // Answered without a key: the names of what there is are for those who have one.
    if (absl::IsNotFound(known)) {
      return ErrorReply(absl::NotFoundError("there is no such model, version or alias"));
    }
    if (!known.ok()) return ErrorReply(known);
    inference::ModelReadyResponse ready;
    ready.set_ready(protocol_.ModelReady(name, version));
    return {.status = ready.ready() ? 200 : 503, .body = MessageToJson(ready)};
  }
  return {.status = 0};
}

RestReply RestV2::Post(const std::vector<absl::string_view>& path, RestRequest& request) const {
  if (path.empty()) return {.status = 0};
  if (path[0] == "repository") return Repository(path, request);
  if (path.size() < 3 || path[0] != "models") return {.status = 0};
  std::vector<absl::string_view> rest(path.begin() + 2, path.end());
  const absl::string_view version = TakeVersion(rest);
  if (rest.size() != 1 || rest[0] != "infer") return {.status = 0};
  return Infer(path[1], version, request);
}

RestReply RestV2::Infer(absl::string_view name, absl::string_view version,
                        RestRequest& request) const {
  absl::StatusOr<inference::ModelInferRequest> read = ReadInfer(request);
  if (!read.ok()) {
    protocol_.CountInvalid(name, read.status());
    return ErrorReply(read.status());
  }
  read->set_model_name(std::string(name));
  read->set_model_version(std::string(version));

  absl::StatusOr<inference::ModelInferResponse> answer;
  absl::Notification done;
  const auto cancelled = std::make_shared<std::atomic<bool>>(false);
  protocol_.Infer(
      *read,
      {.cancelled = cancelled, .received = request.received, .charge = std::move(request.charge)},
      [&](absl::StatusOr<inference::ModelInferResponse> result) {
        answer = std::move(result);
        done.Notify();
      });
  while (!done.WaitForNotificationWithTimeout(kLookAtClient)) {
    if (request.gone != nullptr && request.gone()) cancelled->store(true);
  }
  if (!answer.ok()) return ErrorReply(answer.status());

  InferBody written = WriteInferBody(*read, *answer);
  RestReply reply{.body = std::move(written.body)};
  if (written.json_bytes >= 0) {
    reply.content_type = "application/octet-stream";
    reply.headers.emplace_back(kHeaderLength, absl::StrCat(written.json_bytes));
  }
  return reply;
}

RestReply RestV2::Repository(const std::vector<absl::string_view>& path,
                             const RestRequest& request) const {
  inference::RepositoryIndexRequest index;
  bool ready = false;
  google::protobuf::Map<std::string, inference::ModelRepositoryParameter> parameters;
  const absl::Status read = ParseRepositoryBody(request.body, ready, parameters);
  if (!read.ok()) return ErrorReply(read);
  if (path == std::vector<absl::string_view>{"repository", "index"}) {
    index.set_ready(ready);
    const auto response = protocol_.RepositoryIndex(index);
    if (!response.ok()) return ErrorReply(response.status());
    std::vector<std::string> entries;  // the answer is the bare array
    for (const auto& model : response->models()) entries.push_back(MessageToJson(model));
    return {.body = absl::StrCat("[", absl::StrJoin(entries, ","), "]")};
  }
  if (path.size() != 4 || path[1] != "models") return {.status = 0};
  absl::Status changed;
  if (path[3] == "load") {
    inference::RepositoryModelLoadRequest load;
    load.set_model_name(std::string(path[2]));
    *load.mutable_parameters() = std::move(parameters);
    changed = protocol_.Load(load, request.actor);
  } else if (path[3] == "unload") {
    inference::RepositoryModelUnloadRequest unload;
    unload.set_model_name(std::string(path[2]));
    *unload.mutable_parameters() = std::move(parameters);
    changed = protocol_.Unload(unload, request.actor);
  } else {
    return {.status = 0};
  }
  return changed.ok() ? RestReply{.body = "{}"} : ErrorReply(changed);
}

}  // namespace pyramid
