#include "server/rpc/infer_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/server/rpc/inference_fixture.h"

namespace pyramid {
namespace {

using ::testing::ElementsAre;
using testing::FilesRequest;
using testing::FloatsOf;
using ::testing::HasSubstr;
using testing::kMaxPictures;
using testing::RawFloats;
using testing::StatusIs;
using testing::TensorRequest;
using testing::TextsOf;
using testing::WantOutput;

using Request = inference::ModelInferRequest;

absl::Status Plan(const Request& request) { return PlanInfer(request, {}, kMaxPictures).status(); }

TEST(PlanInferTest, RawFloatsAreNotCopied) {
  const Request request = TensorRequest(2);
  ASSERT_OK_AND_ASSIGN(const InferPlan plan, PlanInfer(request, {}, kMaxPictures));
  ASSERT_EQ(plan.pictures.size(), 2u);
  EXPECT_EQ(plan.pictures[0].bytes.Whole().data(), request.raw_input_contents(0).data());
  EXPECT_EQ(plan.pictures[1].bytes.Whole().data(), request.raw_input_contents(0).data() + 4096);
  EXPECT_EQ(plan.pictures[1].bytes.size(), 4096u);
  EXPECT_EQ(plan.pictures[1].kind, PictureView::Kind::kFloats);
  EXPECT_EQ(plan.pictures[1].channels, 1);
  EXPECT_EQ(plan.pictures[1].height, 32);
  EXPECT_EQ(plan.pictures[1].width, 32);
  ASSERT_EQ(plan.outputs.size(), 1u);
  EXPECT_EQ(plan.outputs[0].name, "probabilities");
  EXPECT_EQ(plan.classify.request_id(), "r-7");
  EXPECT_EQ(plan.timeout, absl::InfiniteDuration());
}

TEST(PlanInferTest, TypedContentsDoAsWell) {
  Request request = TensorRequest(1);
  request.clear_raw_input_contents();
  auto& floats = *request.mutable_inputs(0)->mutable_contents()->mutable_fp32_contents();
  floats.Resize(1024, 0.25F);
  ASSERT_OK_AND_ASSIGN(const InferPlan plan, PlanInfer(request, {}, kMaxPictures));
  EXPECT_EQ(static_cast<const void*>(plan.pictures[0].bytes.Whole().data()), floats.data());

  Request files = FilesRequest({"a", ""});
  files.clear_raw_input_contents();
  files.mutable_inputs(0)->mutable_contents()->add_bytes_contents("a");
  files.mutable_inputs(0)->mutable_contents()->add_bytes_contents("");
  ASSERT_OK_AND_ASSIGN(const InferPlan two, PlanInfer(files, {}, kMaxPictures));
  ASSERT_EQ(two.pictures.size(), 2u);
  EXPECT_EQ(two.pictures[0].bytes.Whole(), "a");
  EXPECT_EQ(two.pictures[0].kind, PictureView::Kind::kEncoded);
}

TEST(PlanInferTest, RawFilesAreFoundBehindTheirLengths) {
  const Request request = FilesRequest({"one", "", "three"});
  ASSERT_OK_AND_ASSIGN(const InferPlan plan, PlanInfer(request, {}, kMaxPictures));
  ASSERT_EQ(plan.pictures.size(), 3u);
  EXPECT_EQ(plan.pictures[0].bytes.Whole(), "one");
  EXPECT_EQ(plan.pictures[1].bytes.Whole(), "");
  EXPECT_EQ(plan.pictures[2].bytes.Whole(), "three");
}

TEST(PlanInferTest, PriorityAndTimeoutComeInEitherInteger) {
  Request request = TensorRequest(1);
  auto& parameters = *request.mutable_parameters();
  parameters["priority"].set_uint64_param(2);
  parameters["timeout"].set_int64_param(1500);
  parameters["sticky_key"].set_string_param("user 7");
  ASSERT_OK_AND_ASSIGN(InferPlan plan, PlanInfer(request, {}, kMaxPictures));
  EXPECT_EQ(plan.classify.priority(), 2u);
  EXPECT_EQ(plan.timeout, absl::Microseconds(1500));
  EXPECT_EQ(plan.classify.sticky_key(), "user 7");
  parameters["priority"].set_int64_param(0);
  parameters["timeout"].set_uint64_param(0);
  ASSERT_OK_AND_ASSIGN(plan, PlanInfer(request, {}, kMaxPictures));
  EXPECT_EQ(plan.classify.priority(), 0u) << "the model's default";
  EXPECT_EQ(plan.timeout, absl::InfiniteDuration()) << "0 is none";
}

TEST(PlanInferTest, UnknownParametersAreTolerated) {
  Request request = TensorRequest(1);
  (*request.mutable_parameters())["triton_enable_empty_final_response"].set_bool_param(true);
  (*request.mutable_parameters())["sequence_id"].set_int64_param(3);
  (*request.mutable_inputs(0)->mutable_parameters())["whatever"].set_double_param(1);
  WantOutput(request, "logits");
  (*request.mutable_outputs(0)->mutable_parameters())["binary_data"].set_bool_param(true);
  EXPECT_OK(Plan(request));
}

TEST(PlanInferTest, VersionsAreNumbersOrAliases) {
  Request request = TensorRequest(1);
  request.set_model_version("12");
  ASSERT_OK_AND_ASSIGN(InferPlan plan, PlanInfer(request, {}, kMaxPictures));
  EXPECT_EQ(plan.classify.version(), 12);
  EXPECT_EQ(plan.classify.model(), "fashion");
  request.set_model_version("canary");
  ASSERT_OK_AND_ASSIGN(plan, PlanInfer(request, {}, kMaxPictures));
  EXPECT_EQ(plan.classify.version(), 0);
  EXPECT_EQ(plan.classify.model(), "fashion@canary");
  for (const char* garbage : {"0", "-1", "1.5", " 1", "99999999999999999999", "a b", "a@b", "@"}) {
    request.set_model_version(garbage);
    EXPECT_THAT(Plan(request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("version")))
        << garbage;
  }
}

// A good request, one change that makes it bad, and what the answer says. serving.md's rows.
struct Bad {
  const char* row;
  std::function<void(Request&)> spoil;
  const char* text;
};

class BadInferTest : public ::testing::TestWithParam<Bad> {};

TEST_P(BadInferTest, IsInvalidArgumentAndSaysWhy) {
  Request request = TensorRequest(2);
  ASSERT_OK(Plan(request));
  GetParam().spoil(request);
  EXPECT_THAT(Plan(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(GetParam().text)));
}

void SetShape(Request& request, const std::vector<int64_t>& shape) {
  request.mutable_inputs(0)->mutable_shape()->Assign(shape.begin(), shape.end());
}

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

const Bad kBad[] = {
    {"NoInput", [](Request& r) { r.clear_inputs(); }, "input image is missing"},
    {"TwoInputs", [](Request& r) { *r.add_inputs() = r.inputs(0); }, "image comes twice"},
    {"UnknownInput", [](Request& r) { r.mutable_inputs(0)->set_name("data\n"); },
     R"(input "data\n" isn't known; the model takes one, image)"},
    {"UnknownBesideKnown", [](Request& r) { r.add_inputs()->set_name("mask"); }, R"("mask")"},
    {"UnknownOutput", [](Request& r) { WantOutput(r, "scores"); },
     R"(output "scores": it isn't known; there are probabilities and logits)"},
    {"OutputTwice",
     [](Request& r) {
       WantOutput(r, "logits");
       WantOutput(r, "logits");
     },
     "output logits comes twice"},
    {"Datatype", [](Request& r) { r.mutable_inputs(0)->set_datatype("UINT8"); },
     R"(datatype is "UINT8"; use FP32)"},
    {"NoDatatype", [](Request& r) { r.mutable_inputs(0)->clear_datatype(); }, "datatype is"},
    {"ThreeDimensions",
     [](Request& r) {
       SetShape(r, {1, 32, 32});
     },
     "has 3 dimensions"},
    {"ManyDimensions", [](Request& r) { SetShape(r, std::vector<int64_t>(5000, kHuge)); },
     "9223372036854775807,9223372036854775807,…] has 5000 dimensions"},
    {"NegativeDimension",
     [](Request& r) {
       SetShape(r, {2, 1, -32, -32});
     },
     "dimension of -32"},
    {"ZeroDimension",
     [](Request& r) {
       SetShape(r, {2, 0, 32, 32});
     },
     "dimension of 0"},
    {"ZeroBatch",
     [](Request& r) {
       SetShape(r, {0, 1, 32, 32});
     },
     "dimension of 0"},
    {"Overflow",
     [](Request& r) {
       SetShape(r, {2, kHuge, kHuge, 2});
     },
     "dimension of 9223"},
    {"OverflowByProduct",
     [](Request& r) {
       SetShape(r, {4, 1 << 20, 1 << 20, 1 << 20});
     },
     "bytes of data; shape"},
    {"BatchTooLarge",
     [](Request& r) {
       SetShape(r, {5, 1, 32, 32});
     },
     "is a batch of 5; at most 4 pictures"},
    {"TooFewBytes", [](Request& r) { r.mutable_raw_input_contents(0)->pop_back(); },
     "there are 8191 bytes of data; shape [2,1,32,32] of FP32 is 2 times 4096"},
    {"TooManyBytes", [](Request& r) { r.mutable_raw_input_contents(0)->append(2, '\0'); },
     "8194 bytes"},
    {"WholePictureTooMuch", [](Request& r) { r.mutable_raw_input_contents(0)->append(4096, '\0'); },
     "12288 bytes"},
    {"RawAndTyped",
     [](Request& r) { r.mutable_inputs(0)->mutable_contents()->add_fp32_contents(1); },
     "are both there"},
    {"NoData", [](Request& r) { r.clear_raw_input_contents(); }, "there are 0 bytes of data"},
    {"ExtraRaw", [](Request& r) { r.add_raw_input_contents(); },
     "raw_input_contents has 2 entries for 1 input"},
    {"TypedTooShort",
     [](Request& r) {
       r.clear_raw_input_contents();
       r.mutable_inputs(0)->mutable_contents()->add_fp32_contents(1);
     },
     "there are 4 bytes of data"},
    {"TypedOfAnotherType",
     [](Request& r) {
       r.clear_raw_input_contents();
       r.mutable_inputs(0)->mutable_contents()->mutable_fp64_contents()->Resize(2048, 1.0);
     },
     "fp32_contents"},
    {"BytesInAnotherField",
     [](Request& r) {
       r = FilesRequest({"x"});
       r.clear_raw_input_contents();
       r.mutable_inputs(0)->mutable_contents()->add_fp32_contents(1);
     },
     "bytes_contents"},
    {"BytesTruncated",
     [](Request& r) {
       r = FilesRequest({"picture"});
       r.mutable_raw_input_contents(0)->pop_back();
     },
     "element 0 should have 7 bytes, 6 are left"},
    {"BytesTruncatedInALength",
     [](Request& r) {
       r = FilesRequest({"one", "two"});
       r.mutable_raw_input_contents(0)->resize(10);
     },
     "ends within the length of element 1"},
    {"BytesLengthOverflow",
     [](Request& r) {
       r = FilesRequest({"one"});
       r.mutable_raw_input_contents(0)->replace(0, 4, "\xff\xff\xff\xff");
     },
     "4294967295 bytes"},
    {"BytesCount",
     [](Request& r) {
       r = FilesRequest({"one", "two"});
       SetShape(r, {3, 1});
     },
     "there are 2 elements of data; shape [3,1] of BYTES is 3"},
    {"BytesTooMany",
     [](Request& r) {
       r = FilesRequest({"one", "two", "three"});
       SetShape(r, {2, 1});
     },
     "there are more than 2 elements of data; shape [2,1] of BYTES is 2"},
    {"BytesTooManyTyped",
     [](Request& r) {
       r = FilesRequest({"one"});
       r.clear_raw_input_contents();
       for (int i = 0; i < 3; ++i) r.mutable_inputs(0)->mutable_contents()->add_bytes_contents("x");
     },
     "there are more than 1 elements of data; shape [1,1]"},
    {"BytesShape",
     [](Request& r) {
       r = FilesRequest({"one", "two"});
       SetShape(r, {1, 2});
     },
     "BYTES wants [batch, 1]"},
    {"BytesDimensions",
     [](Request& r) {
       r = FilesRequest({"one"});
       SetShape(r, {1});
     },
     "BYTES wants [batch, 1]"},
    {"BytesBatch",
     [](Request& r) {
       r = FilesRequest({"1", "2", "3", "4", "5"});
     },
     "at most 4"},
    {"SharedMemoryIn",
     [](Request& r) {
       (*r.mutable_inputs(0)->mutable_parameters())["shared_memory_region"].set_string_param("x");
     },
     "shared memory"},
    {"SharedMemoryOut",
     [](Request& r) {
       WantOutput(r, "logits");
       (*r.mutable_outputs(0)->mutable_parameters())["shared_memory_region"].set_string_param("x");
     },
     "shared memory"},
    {"ClassificationZero",
     [](Request& r) {
       WantOutput(r, "logits", 1);
       (*r.mutable_outputs(0)->mutable_parameters())["classification"].set_int64_param(0);
     },
     "classification is 0; use 1 or more"},
    {"ClassificationNegative",
     [](Request& r) {
       WantOutput(r, "logits", 1);
       (*r.mutable_outputs(0)->mutable_parameters())["classification"].set_int64_param(-3);
     },
     "classification is -3"},
    {"ClassificationText",
     [](Request& r) {
       WantOutput(r, "logits", 1);
       (*r.mutable_outputs(0)->mutable_parameters())["classification"].set_string_param("3");
     },
     "classification isn't an int64"},
    {"PriorityTooLow",
     [](Request& r) { (*r.mutable_parameters())["priority"].set_uint64_param(11); },
     "priority is 11; use 1, the highest, to 10"},
    {"PriorityText",
     [](Request& r) { (*r.mutable_parameters())["priority"].set_string_param("high"); },
     "priority isn't a whole number"},
    {"TimeoutNegative",
     [](Request& r) { (*r.mutable_parameters())["timeout"].set_int64_param(-1); },
     "timeout is -1; use 0 or more"},
    {"StickyKeyNumber",
     [](Request& r) { (*r.mutable_parameters())["sticky_key"].set_int64_param(1); },
     "sticky_key isn't a string"},
};

INSTANTIATE_TEST_SUITE_P(Rows, BadInferTest, ::testing::ValuesIn(kBad),
                         [](const auto& row) { return std::string(row.param.row); });

TEST(PlanInferTest, ATextIsBoundedWhateverTheShape) {
  Request request = TensorRequest(2);
  SetShape(request, std::vector<int64_t>(5000, kHuge));
  EXPECT_LT(Plan(request).message().size(), 1000u);
}

// 64 MiB of zeros are 16 million elements without a byte.
TEST(SplitBytesElementsTest, StopsBehindOneMoreThanIsWanted) {
  const std::string zeros(64 << 20, '\0');
  ASSERT_OK_AND_ASSIGN(const auto elements, SplitBytesElements(zeros, 2));
  EXPECT_EQ(elements.size(), 3u);
  ASSERT_OK_AND_ASSIGN(const auto all,
                       SplitBytesElements(absl::string_view(zeros).substr(0, 8), 2));
  EXPECT_EQ(all.size(), 2u);
}

v1::ClassifyResponse Classified() {
  v1::ClassifyResponse classified;
  classified.set_model("fashion");
  classified.set_version(3);
  classified.set_digest("sha256:ab");
  for (int i = 0; i < 2; ++i) {
    v1::PictureResult& result = *classified.add_results();
    for (const float logit : {0.0F, 2.0F, 1.0F}) result.add_logits(logit);
    for (const auto& [index, label] :
         {std::pair(1, "bag"), std::pair(2, "a:b"), std::pair(0, "0")}) {
      v1::Prediction& prediction = *result.add_predictions();
      prediction.set_index(index);
      prediction.set_label(label);
      prediction.set_probability(0.5F);
    }
  }
  return classified;
}

TEST(AnswerInferTest, AnswersRawAndEchoesTheId) {
  Request request = TensorRequest(2);
  WantOutput(request, "logits");
  WantOutput(request, "probabilities");
  ASSERT_OK_AND_ASSIGN(const InferPlan plan, PlanInfer(request, {}, kMaxPictures));
  ASSERT_OK_AND_ASSIGN(const auto answer, AnswerInfer(request, plan, Classified()));
  EXPECT_EQ(answer.model_name(), "fashion");
  EXPECT_EQ(answer.model_version(), "3");
  EXPECT_EQ(answer.id(), "r-7");
  EXPECT_EQ(answer.parameters().at("digest").string_param(), "sha256:ab");
  ASSERT_EQ(answer.outputs_size(), 2);
  EXPECT_EQ(answer.outputs(0).name(), "logits");
  EXPECT_EQ(answer.outputs(0).datatype(), "FP32");
  EXPECT_THAT(answer.outputs(0).shape(), ElementsAre(2, 3));
  EXPECT_FALSE(answer.outputs(0).has_contents());
  EXPECT_THAT(FloatsOf(answer.raw_output_contents(0)), ElementsAre(0, 2, 1, 0, 2, 1));
  const std::vector<float> shares = FloatsOf(answer.raw_output_contents(1));
  ASSERT_EQ(shares.size(), 6u);
  const double sum = 1 + std::exp(1.0) + std::exp(2.0);
  EXPECT_FLOAT_EQ(shares[1], static_cast<float>(std::exp(2.0) / sum));
  EXPECT_FLOAT_EQ(shares[3], static_cast<float>(1 / sum));
}

TEST(AnswerInferTest, ClassificationIsSortedTextOfAtMostAllClasses) {
  Request request = TensorRequest(2);
  WantOutput(request, "logits", 2);
  WantOutput(request, "probabilities", 1000);
  ASSERT_OK_AND_ASSIGN(const InferPlan plan, PlanInfer(request, {}, kMaxPictures));
  EXPECT_EQ(plan.classify.top_k(), 1000);
  ASSERT_OK_AND_ASSIGN(const auto answer, AnswerInfer(request, plan, Classified()));
  EXPECT_EQ(answer.outputs(0).datatype(), "BYTES");
  EXPECT_THAT(answer.outputs(0).shape(), ElementsAre(2, 2));
  EXPECT_THAT(TextsOf(answer.raw_output_contents(0)),
              ElementsAre("2:1:bag", "1:2:a:b", "2:1:bag", "1:2:a:b"));
  EXPECT_THAT(answer.outputs(1).shape(), ElementsAre(2, 3));
  EXPECT_THAT(
      TextsOf(answer.raw_output_contents(1)),
      ElementsAre("0.5:1:bag", "0.5:2:a:b", "0.5:0:0", "0.5:1:bag", "0.5:2:a:b", "0.5:0:0"));
}

TEST(AnswerInferTest, APicturesErrorIsTheRequestsWithItsIndex) {
  const Request request = TensorRequest(2);
  ASSERT_OK_AND_ASSIGN(const InferPlan plan, PlanInfer(request, {}, kMaxPictures));
  v1::ClassifyResponse classified = Classified();
  classified.mutable_results(1)->Clear();
  classified.mutable_results(1)->set_code(3);
  classified.mutable_results(1)->set_message("picture: no");
  EXPECT_THAT(
      AnswerInfer(request, plan, classified),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("input image[1]: picture: no")));
}

}  // namespace
}  // namespace pyramid
