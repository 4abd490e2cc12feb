// Where classifications come from: a server's endpoint, or a checkpoint loaded into this process.
// Both give the same results.
#ifndef PYRAMID_CLIENT_ANSWERER_H_
#define PYRAMID_CLIENT_ANSWERER_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/connection.h"
#include "client/environment.h"
#include "model/preprocess.h"
#include "proto/classification.pb.h"

namespace pyramid {

struct AnswerOptions {
  int top_k = 5;
  bool logits = false;
  DecodeLimits decode;  // of a picture that is decoded here; a server has its own
};

// Not thread-safe.
class Answerer {
 public:
  virtual ~Answerer() = default;
  // One result a picture, in order; a picture's own error is in its result.
  virtual absl::StatusOr<v1::ClassifyResponse> Classify(std::vector<v1::Picture> pictures) = 0;
};

struct ModelName {
  std::string name;
  int64_t version = 0;  // 0: the server decides
  std::string alias;    // empty: none
};

// "NAME", "NAME:VERSION" or "NAME@ALIAS"; a usage error otherwise.
absl::StatusOr<ModelName> ParseModelName(absl::string_view text);

// The model behind the endpoint. After the first answer it stays with that answer's version, so
// that one command's results are one model's. `connection` must outlive it. Errors as
// ClassificationService.Classify.
std::unique_ptr<Answerer> AnswerFromServer(Connection& connection, const ModelName& model,
                                           const AnswerOptions& options, absl::Duration timeout);

// A checkpoint's folder or a file of weights. Errors as LoadClassifier; FailedPrecondition if this
// build has no LibTorch.
absl::StatusOr<std::unique_ptr<Answerer>> AnswerFromCheckpoint(const Environment& environment,
                                                               const std::filesystem::path& path,
                                                               const ClassifierOptions& classifier,
                                                               const AnswerOptions& options);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_ANSWERER_H_
