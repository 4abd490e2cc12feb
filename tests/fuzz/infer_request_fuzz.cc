// An Open Inference request from its bytes to pictures: REST bodies, JSON with tensors behind it,
// and gRPC messages; and the way back for what is accepted. The first two bytes say how many of the
// rest are JSON; 0xffff: the rest is a message.
#include <string>

#include "absl/strings/string_view.h"
#include "server/rpc/infer_request.h"
#include "server/rpc/rest_json.h"
#include "tests/fuzz/fuzz_target.h"

namespace pyramid {
namespace {

using fuzz::Require;

constexpr int kMaxPictures = 8;
constexpr int kClasses = 3;

bool Within(absl::string_view part, absl::string_view whole) {
  return part.empty() ||
         (part.data() >= whole.data() && part.data() + part.size() <= whole.data() + whole.size());
}

void Check(const inference::ModelInferRequest& request) {
  const absl::StatusOr<InferPlan> plan = PlanInfer(request, {}, kMaxPictures);
  if (!plan.ok()) {
    Require(!plan.status().message().empty(), "a refusal says why");
    return;
  }
  Require(!plan->pictures.empty() && plan->pictures.size() <= size_t{kMaxPictures},
          "one to eight pictures");
  Require(!plan->outputs.empty(), "an output");
  for (const PictureView& picture : plan->pictures) {
    if (request.raw_input_contents_size() > 0) {
      Require(Within(picture.bytes.Whole(), request.raw_input_contents(0)),
              "pictures lie in the message");
    }
    if (picture.kind == PictureView::Kind::kFloats) {
      Require(picture.bytes.size() == sizeof(float) * static_cast<size_t>(picture.channels) *
                                          static_cast<size_t>(picture.height) *
                                          static_cast<size_t>(picture.width),
              "a tensor has the size of its shape");
    }
  }
  v1::ClassifyResponse classified;
  for (size_t i = 0; i < plan->pictures.size(); ++i) {
    v1::PictureResult& result = *classified.add_results();
    for (int c = 0; c < kClasses; ++c) {
      result.add_logits(static_cast<float>(-c));
      result.add_predictions()->set_index(c);
    }
  }
  const auto answer = AnswerInfer(request, *plan, std::move(classified));
  Require(answer.ok(), "an answer can be made");
  Require(answer->id() == request.id(), "the id comes back");
  const InferBody body = WriteInferBody(request, *answer);
  Require(!body.body.empty() && body.json_bytes <= static_cast<int64_t>(body.body.size()),
          "a body is written");
}

}  // namespace
}  // namespace pyramid

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const size_t json_bytes = static_cast<size_t>(data[0]) | static_cast<size_t>(data[1]) << 8;
  const absl::string_view rest(reinterpret_cast<const char*>(data) + 2, size - 2);
  if (json_bytes == 0xffff) {
    google::protobuf::SetLogHandler(nullptr);
    inference::ModelInferRequest request;
    if (request.ParseFromArray(rest.data(), static_cast<int>(rest.size()))) pyramid::Check(request);
    return 0;
  }
  const auto request =
      pyramid::ParseInferBody(rest, json_bytes < rest.size() ? json_bytes : rest.size());
  if (request.ok()) pyramid::Check(*request);
  bool ready = false;
  google::protobuf::Map<std::string, inference::ModelRepositoryParameter> parameters;
  (void)pyramid::ParseRepositoryBody(rest, ready, parameters);
  return 0;
}
