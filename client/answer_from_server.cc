#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/answerer.h"
#include "client/exit_code.h"

namespace pyramid {
namespace {

class ServerAnswerer : public Answerer {
 public:
  ServerAnswerer(Connection& connection, const ModelName& model, const AnswerOptions& options,
                 absl::Duration timeout)
      : connection_(connection), model_(model), options_(options), timeout_(timeout) {}

  absl::StatusOr<v1::ClassifyResponse> Classify(std::vector<v1::Picture> pictures) override {
    v1::ClassifyRequest request;
    request.set_model(model_.alias.empty() ? model_.name
                                           : absl::StrCat(model_.name, "@", model_.alias));
    request.set_version(model_.version);
    request.set_top_k(options_.top_k);
    request.set_return_logits(options_.logits);
    for (v1::Picture& picture : pictures) *request.add_pictures() = std::move(picture);
    grpc::ClientContext context;
    SetDeadline(context, timeout_);
    v1::ClassifyResponse response;
    const grpc::Status status =
        connection_.classification()->Classify(&context, request, &response);
    if (!status.ok()) return connection_.ToStatus(status);
    if (response.results_size() != request.pictures_size()) {
      return absl::InternalError(absl::StrCat("the server gave ", response.results_size(),
                                              " results for ", request.pictures_size(),
                                              " pictures"));
    }
    model_ = {response.model(), response.version(), ""};
    return response;
  }

 private:
  Connection& connection_;
  ModelName model_;
  const AnswerOptions options_;
  const absl::Duration timeout_;
};

}  // namespace

absl::StatusOr<ModelName> ParseModelName(absl::string_view text) {
  ModelName model;
  const size_t end = text.find_first_of(":@");
  const bool plain = end == absl::string_view::npos;
  const absl::string_view rest = plain ? "" : text.substr(end + 1);
  model.name = std::string(text.substr(0, end));
  if (model.name.empty() || (!plain && rest.empty())) {
    return UsageError(
        absl::StrCat("--model is \"", text, "\"; use NAME, NAME:VERSION or NAME@ALIAS"));
  }
  if (plain) return model;
  if (text[end] == '@') {
    model.alias = std::string(rest);
  } else if (!absl::SimpleAtoi(rest, &model.version) || model.version < 1) {
    return UsageError(absl::StrCat("the version in \"", text, "\" is not a number from 1"));
  }
  return model;
}

std::unique_ptr<Answerer> AnswerFromServer(Connection& connection, const ModelName& model,
                                           const AnswerOptions& options, absl::Duration timeout) {
  return std::make_unique<ServerAnswerer>(connection, model, options, timeout);
}

}  // namespace pyramid
