// ModelInfer's messages: from a request to pictures where they lie, and from the pipeline's answer
// to tensors. Pure.
#ifndef PYRAMID_SERVER_RPC_INFER_REQUEST_H_
#define PYRAMID_SERVER_RPC_INFER_REQUEST_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "proto/classification.pb.h"
#include "proto/open_inference.pb.h"
#include "server/rpc/large_field.h"
#include "server/serving/classify.h"

namespace pyramid {

// A checked request as the pipeline takes it. `pictures` point into the message.
struct InferPlan {
  struct Output {
    std::string name;
    int classes = 0;  // so many best classes as text; 0: the vector
  };
  v1::ClassifyRequest classify;
  std::vector<PictureView> pictures;
  std::vector<Output> outputs;
  absl::Duration timeout = absl::InfiniteDuration();
};

// Metadata can name one type for an input: "fashion:files" is the model "fashion", described as one
// that takes files. Requests to either may hold either.
inline constexpr absl::string_view kFilesView = ":files";
struct ModelView {
  absl::string_view model;  // of the name
  bool files = false;
};
inline ModelView ViewOf(absl::string_view name) {
  const bool files = absl::ConsumeSuffix(&name, kFilesView);
  return {.model = name, .files = files};
}

// What version a text means: a number, an alias, or neither for the stable one.
struct VersionText {
  int64_t number = 0;
  absl::string_view alias;  // of the text
};

// InvalidArgument: it is neither a number from 1 nor looks like an alias.
absl::StatusOr<VersionText> ParseVersionText(absl::string_view text);

// What a name, perhaps of a view, and a version mean together, as a native request says it:
// `version` beside "fashion", "fashion:3" or "fashion@canary" (ParseModelReference).
struct NativeModel {
  std::string model;
  int64_t version = 0;
};
// As ParseVersionText.
absl::StatusOr<NativeModel> NativeModelOf(absl::string_view name, absl::string_view version);

// A caller's text in a message: printable, and not for ever.
std::string Quoted(absl::string_view text);

// InvalidArgument names input or output, value and limit.
// `large`: entries of raw_input_contents that lie outside the message, where they are empty; none
// of a BYTES input, whose files must be whole (PutBack).
absl::StatusOr<InferPlan> PlanInfer(const inference::ModelInferRequest& request,
                                    const std::vector<LargeField>& large, int max_pictures);

// Where entries of raw_input_contents are found in a ModelInferRequest.
inline constexpr std::array<int, 1> kRawInputContents = {
    inference::ModelInferRequest::kRawInputContentsFieldNumber};

// Copies into the message what FindLargeFields left outside and PlanInfer wants inside.
void PutBack(std::vector<LargeField>& large, inference::ModelInferRequest& request);

// The answer in raw tensors. The first picture's error, with its index, if one has any.
absl::StatusOr<inference::ModelInferResponse> AnswerInfer(
    const inference::ModelInferRequest& request, const InferPlan& plan,
    v1::ClassifyResponse classified);

// An element of a BYTES tensor: its length in 4 little-endian bytes, then itself.
void AppendBytesElement(absl::string_view element, std::string& raw);

// The elements of a BYTES tensor; where there are more than `most`, the first `most` + 1. They may
// be as small as 4 bytes, which a view takes four times. InvalidArgument: `raw` ends within one.
absl::StatusOr<std::vector<absl::string_view>> SplitBytesElements(absl::string_view raw,
                                                                  size_t most);

}  // namespace pyramid

#endif  // PYRAMID_SERVER_RPC_INFER_REQUEST_H_
