// The Open Inference Protocol v2 over HTTP: paths, bodies and status codes. No sockets here;
// server/http.h has them. Thread-safe.
#ifndef PYRAMID_SERVER_RPC_REST_V2_H_
#define PYRAMID_SERVER_RPC_REST_V2_H_

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/rpc/open_inference.h"

namespace pyramid {

struct RestRequest {
  absl::string_view method;  // "GET", "POST"
  absl::string_view path;    // "/v2/models/fashion/infer"; decoded, without the query
  absl::string_view body;
  absl::Duration received;  // what reading the body took
  // A header's value, empty if it isn't there; names in any case.
  absl::FunctionRef<std::string(absl::string_view name)> header;
  std::string actor;  // who asks, for the record of changes
  // As OpenInference::Caller::charge.
  absl::AnyInvocable<absl::Status(int pictures)> charge;
  // Whether the client has hung up; asked by the answering thread while it waits. Null: never.
  absl::AnyInvocable<bool()> gone;
};

struct RestReply {
  int status = 200;
  std::string content_type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers;
  std::string body;
};

class RestV2 {
 public:
  explicit RestV2(OpenInference& protocol) : protocol_(protocol) {}

  // Blocks until the answer is there. 404 for paths that aren't the protocol's.
  RestReply Answer(RestRequest& request) const;

 private:
  RestReply Get(const std::vector<absl::string_view>& path) const;
  RestReply Post(const std::vector<absl::string_view>& path, RestRequest& request) const;
  RestReply Infer(absl::string_view name, absl::string_view version, RestRequest& request) const;
  RestReply Repository(const std::vector<absl::string_view>& path,
                       const RestRequest& request) const;

  OpenInference& protocol_;
};

// The HTTP status of an error: Triton's, except that overload (429), deadlines (504) and callers
// that have gone (499) have their own.
int HttpStatusOf(absl::StatusCode code);

// {"error": …} with the status; Retry-After where the status has a hint.
RestReply ErrorReply(const absl::Status& status);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_REST_V2_H_
