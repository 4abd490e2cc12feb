#include "server/rpc/open_inference.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <limits>
#include <thread>

#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "server/serving/pushback.h"
#include "tests/server/rpc/inference_fixture.h"

namespace pyramid {
namespace {

using ::testing::_;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using testing::FilesRequest;
using testing::FloatsOf;
using testing::GreyPng;
using ::testing::HasSubstr;
using testing::InferenceTest;
using testing::kQueue;
using testing::kSide;
using testing::Sample;
using testing::StatusIs;
using testing::TensorRequest;
using testing::TextsOf;
using ::testing::UnorderedElementsAre;
using testing::WantOutput;

class OpenInferenceTest : public InferenceTest {
 protected:
  // A forward pass that waits, with a picture in it; joined by Release.
  void Occupy() {
    network_.Shut();
    occupier_ = std::thread([this] { EXPECT_OK(Infer(TensorRequest(1)).status()); });
    ASSERT_TRUE(network_.AwaitBatches(1));
  }
  void Release() {
    network_.Open();
    occupier_.join();
  }
  double Rejected(const std::string& reason) {
    return Sample(metrics_,
                  absl::StrCat(R"(pyramid_serving_rejected_images_total{model="fashion",reason=")",
                               reason, R"("})"));
  }

  std::thread occupier_;
};

TEST_F(OpenInferenceTest, FloatsAndFilesGetTheSameAnswer) {
  inference::ModelInferRequest tensors = TensorRequest(2, 51.0F / 255);
  WantOutput(tensors, "logits");
  inference::ModelInferRequest files = FilesRequest({GreyPng(kSide, 51), GreyPng(kSide, 51)});
  WantOutput(files, "logits");
  ASSERT_OK_AND_ASSIGN(const auto of_tensors, Infer(tensors));
  ASSERT_OK_AND_ASSIGN(const auto of_files, Infer(files));
  EXPECT_THAT(of_tensors.outputs(0).shape(), ElementsAre(2, 3));
  const std::vector<float> logits = FloatsOf(of_tensors.raw_output_contents(0));
  ASSERT_EQ(logits.size(), 6u);
  EXPECT_FLOAT_EQ(logits[0], 0.2F);
  EXPECT_FLOAT_EQ(logits[4], -0.8F);
  const std::vector<float> again = FloatsOf(of_files.raw_output_contents(0));
  for (size_t i = 0; i < logits.size(); ++i) EXPECT_NEAR(again[i], logits[i], 1e-6);
  EXPECT_EQ(of_tensors.id(), "r-7");
  EXPECT_EQ(of_files.id(), "") << "none is invented";
  EXPECT_EQ(of_files.model_version(), "1");
}

TEST_F(OpenInferenceTest, AnAnswerThatOverflowsNamesTheInput) {
  v1::Manifest manifest = testing::FakeManifest();
  manifest.mutable_preprocessing()->set_std(0, 1e-39F);
  ASSERT_OK(testing::WriteFakeCheckpoint(folder_ / "tiny", 0, manifest).status());
  ASSERT_OK(registry_->Promote(folder_ / "tiny", "fashion", "").status());
  EXPECT_THAT(Infer(FilesRequest({GreyPng(kSide, 0), GreyPng(kSide, 255)})),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("input image[1]: the network's")));
}

TEST_F(OpenInferenceTest, ClassesHaveLabelsAndTheirProbability) {
  inference::ModelInferRequest request = TensorRequest(1);
  WantOutput(request, "probabilities", 2);
  ASSERT_OK_AND_ASSIGN(const auto answer, Infer(request));
  EXPECT_THAT(TextsOf(answer.raw_output_contents(0)),
              ElementsAre("0.665241:0:ankle boot", "0.244728:1:bag"));
}

// serving.md 1.5, the rows that need a server. infer_request_test.cc has the others.
TEST_F(OpenInferenceTest, UnknownModelIsNotFoundWhateverElseIsWrong) {
  inference::ModelInferRequest request = TensorRequest(1);
  request.set_model_name("nosuch");
  EXPECT_THAT(Infer(request), StatusIs(absl::StatusCode::kNotFound, HasSubstr("fashion")));
  request.clear_inputs();
  EXPECT_THAT(Infer(request), StatusIs(absl::StatusCode::kNotFound, HasSubstr("nosuch")));
}

TEST_F(OpenInferenceTest, UnknownVersionAndAliasAreNotFound) {
  inference::ModelInferRequest request = TensorRequest(1);
  request.set_model_version("9");
  EXPECT_THAT(Infer(request), StatusIs(absl::StatusCode::kNotFound, HasSubstr("9")));
  request.set_model_version("canary");
  EXPECT_THAT(Infer(request), StatusIs(absl::StatusCode::kNotFound, HasSubstr("canary")));
}

TEST_F(OpenInferenceTest, NumbersAndAliasesChooseTheVersion) {
  Promote("fashion", 1);
  inference::ModelInferRequest request = TensorRequest(1);
  for (const auto& [version, answered] :
       {std::pair("", "2"), std::pair("1", "1"), std::pair("2", "2"), std::pair("stable", "2")}) {
    request.set_model_version(version);
    ASSERT_OK_AND_ASSIGN(const auto answer, Infer(request));
    EXPECT_EQ(answer.model_version(), answered) << version;
  }
}

TEST_F(OpenInferenceTest, AVersionThatCanNoLongerBeLoadedIsUnavailable) {
  Promote("fashion", 1);
  ASSERT_OK(registry_->Unload("fashion", "test").status());
  ASSERT_OK(registry_->Load("fashion", "test").status());  // version 1 isn't loaded any more
  ASSERT_OK(WriteFileAtomically(folder_ / "models/fashion/1/weights.safetensors", "damaged"));
  inference::ModelInferRequest request = TensorRequest(1);
  request.set_model_version("1");
  for (int i = 0; i < 2; ++i) {
    EXPECT_THAT(Infer(request), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("version 1")));
  }
  EXPECT_FALSE(protocol_->ModelReady("fashion", "1"));
  ASSERT_OK_AND_ASSIGN(const auto index, protocol_->RepositoryIndex({}));
  ASSERT_EQ(index.models_size(), 2);
  EXPECT_EQ(index.models(1).version(), "1");
  EXPECT_EQ(index.models(1).state(), "UNAVAILABLE");
  EXPECT_THAT(index.models(1).reason(), HasSubstr("weights"));
}

// What perf_analyzer needs to send files: it prepares what the metadata names.
TEST_F(OpenInferenceTest, AViewOfTheModelIsDescribedAsTakingFiles) {
  ASSERT_OK_AND_ASSIGN(const auto metadata, protocol_->ModelMetadata("fashion:files", ""));
  EXPECT_EQ(metadata.name(), "fashion:files");
  EXPECT_EQ(metadata.inputs(0).datatype(), "BYTES");
  EXPECT_THAT(metadata.inputs(0).shape(), ElementsAre(-1, 1));
  ASSERT_OK_AND_ASSIGN(const auto config, protocol_->ModelConfig("fashion:files", "1"));
  EXPECT_EQ(config.config().name(), "fashion:files");
  EXPECT_EQ(config.config().input(0).data_type(), inference::TYPE_STRING);
  EXPECT_THAT(config.config().input(0).dims(), ElementsAre(1));
  EXPECT_TRUE(protocol_->ModelReady("fashion:files", ""));
  inference::ModelInferRequest request = FilesRequest({GreyPng(kSide, 1)});
  request.set_model_name("fashion:files");
  ASSERT_OK_AND_ASSIGN(const auto answer, Infer(request));
  EXPECT_EQ(answer.model_name(), "fashion:files");
  ASSERT_OK_AND_ASSIGN(const auto statistics, protocol_->ModelStatistics("fashion:files", "1"));
  EXPECT_EQ(statistics.model_stats(0).name(), "fashion:files");
  EXPECT_EQ(statistics.model_stats(0).inference_count(), 1U);
  EXPECT_THAT(protocol_->ModelMetadata("nosuch:files", ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nosuch")));
  request.set_model_name("nosuch:files");
  EXPECT_THAT(Infer(request), StatusIs(absl::StatusCode::kNotFound, HasSubstr("nosuch")));
}

TEST_F(OpenInferenceTest, WhatIsInvalidIsCounted) {
  inference::ModelInferRequest request = TensorRequest(1);
  request.mutable_inputs(0)->set_datatype("FP64");
  EXPECT_THAT(Infer(request), StatusIs(absl::StatusCode::kInvalidArgument, _));
  EXPECT_EQ(
      Sample(
          metrics_,
          R"(pyramid_serving_requests_total{code="InvalidArgument",model="fashion",version="0"})"),
      1);
  EXPECT_EQ(Sample(metrics_,
                   R"(pyramid_serving_rejected_images_total{model="fashion",reason="invalid"})"),
            1);
}

TEST_F(OpenInferenceTest, TheBestClassesOfAnswersAreCounted) {
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_predictions_total{class="0",model="fashion"})"), 0);
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_predictions_total{class="2",model="fashion"})"), 0);
  ASSERT_OK(Infer(TensorRequest(2)).status());
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_predictions_total{class="0",model="fashion"})"), 2);
  EXPECT_EQ(Sample(metrics_, R"(pyramid_serving_confidence_ratio_count{model="fashion"})"), 2);
}

TEST_F(OpenInferenceTest, AnUndecodablePictureFailsTheRequestWithItsIndex) {
  EXPECT_THAT(Infer(FilesRequest({GreyPng(kSide, 1), "text", GreyPng(kSide, 1)})),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("input image[1]: picture: ")));
  // Its batch mates from other requests aren't touched.
  EXPECT_OK(Infer(FilesRequest({GreyPng(kSide, 1)})).status());
}

TEST_F(OpenInferenceTest, APictureTooLargeByItsHeaderIsInvalid) {
  EXPECT_THAT(Infer(FilesRequest({testing::GoldenImage("claims_65535.png")})),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("image[0]"), HasSubstr("at most"))));
}

TEST_F(OpenInferenceTest, ChannelsAndSidesAreTheModels) {
  inference::ModelInferRequest request = TensorRequest(1);
  request.mutable_inputs(0)->set_shape(1, 4);
  request.mutable_inputs(0)->set_shape(3, 8);
  EXPECT_THAT(Infer(request),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("input image[0]"), HasSubstr("the model takes 1"))));
  request.mutable_inputs(0)->set_shape(1, 1);
  request.mutable_inputs(0)->set_shape(2, 128);
  EXPECT_THAT(Infer(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at least 29")));
}

TEST_F(OpenInferenceTest, NotANumberIsInvalidAndCounted) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    inference::ModelInferRequest request = TensorRequest(1);
    std::memcpy(request.mutable_raw_input_contents(0)->data() + 400, &bad, sizeof(bad));
    EXPECT_THAT(Infer(request),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("image[0]"), HasSubstr("[100] isn't finite"))));
  }
  EXPECT_EQ(Rejected("decode"), 2);
  EXPECT_EQ(network_.pictures(), 2) << "who reads them sees it";
}

TEST_F(OpenInferenceTest, AFullQueueIsResourceExhaustedWithAHint) {
  Occupy();
  std::thread waiting([&] { EXPECT_OK(Infer(TensorRequest(kQueue)).status()); });
  while (Sample(metrics_, R"(pyramid_serving_queue_images{model="fashion"})") < kQueue) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  const auto refused = Infer(TensorRequest(1));
  Release();
  waiting.join();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("queue is full")));
  EXPECT_GT(PushbackMillis(refused.status()), 0);
}

TEST_F(OpenInferenceTest, TheCallsDeadlineAndTheTimeoutBothHold) {
  Occupy();
  inference::ModelInferRequest request = TensorRequest(2);
  (*request.mutable_parameters())["timeout"].set_int64_param(30'000);  // µs
  absl::StatusOr<inference::ModelInferResponse> by_timeout;
  absl::StatusOr<inference::ModelInferResponse> by_deadline;
  std::thread first([&] { by_timeout = Infer(request); });
  std::thread second([&] {
    by_deadline = Infer(TensorRequest(2), {.deadline = absl::Now() + absl::Milliseconds(30)});
  });
  absl::SleepFor(absl::Milliseconds(60));
  Release();
  first.join();
  second.join();
  EXPECT_THAT(by_timeout, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("deadline")));
  EXPECT_THAT(by_deadline, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("deadline")));
  EXPECT_EQ(network_.pictures(), 1) << "nothing was computed for them";
  EXPECT_EQ(Rejected("expired"), 4);
}

TEST_F(OpenInferenceTest, ATimeoutDoesNotLengthenTheDeadline) {
  inference::ModelInferRequest request = TensorRequest(1);
  (*request.mutable_parameters())["timeout"].set_int64_param(60'000'000);
  EXPECT_THAT(Infer(request, {.deadline = absl::Now() - absl::Seconds(1)}),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("deadline")));
}

TEST_F(OpenInferenceTest, APriorityGoesFirst) {
  Occupy();
  std::vector<std::string> order;
  absl::Mutex mutex;
  std::vector<std::thread> threads;
  for (const char* id : {"late", "early"}) {
    threads.emplace_back([&, id] {
      inference::ModelInferRequest request = TensorRequest(1);
      (*request.mutable_parameters())["priority"].set_uint64_param(*id == 'e' ? 1 : 10);
      EXPECT_OK(Infer(request).status());
      absl::MutexLock lock(&mutex);
      order.emplace_back(id);
    });
    const double waiting = static_cast<double>(threads.size());
    while (Sample(metrics_, R"(pyramid_serving_queue_images{model="fashion"})") < waiting) {
      absl::SleepFor(absl::Milliseconds(1));
    }
  }
  network_.OnForward([] { absl::SleepFor(absl::Milliseconds(50)); });
  Release();
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(order, ElementsAre("early", "late"));
}

TEST_F(OpenInferenceTest, ACancelledCallIsCancelled) {
  EXPECT_THAT(Infer(TensorRequest(1), {.cancelled = std::make_shared<std::atomic<bool>>(true)}),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("left")));
}

TEST_F(OpenInferenceTest, DrainingIsUnavailable) {
  EXPECT_TRUE(pipeline_->Drain(absl::Now() + absl::Seconds(10)));
  EXPECT_THAT(Infer(TensorRequest(1)),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("shutting down")));
}

TEST_F(OpenInferenceTest, AFailedForwardIsInternal) {
  network_.Fail(absl::InternalError("the network failed"));
  EXPECT_THAT(Infer(TensorRequest(1)), StatusIs(absl::StatusCode::kInternal, HasSubstr("failed")));
}

TEST_F(OpenInferenceTest, AChargeThatIsRefusedIsTheAnswer) {
  int charged = 0;
  OpenInference::Caller caller;
  caller.charge = [&](int pictures) {
    charged += pictures;
    return absl::ResourceExhaustedError("over the rate");
  };
  EXPECT_THAT(Infer(TensorRequest(3), std::move(caller)),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("rate")));
  EXPECT_EQ(charged, 3);
  EXPECT_EQ(network_.pictures(), 0);
}

// What perf_analyzer and image_client.py build on (serving.md 1.6).
TEST_F(OpenInferenceTest, MetadataAndConfigDescribeOneImageAndOneVector) {
  ASSERT_OK_AND_ASSIGN(const auto metadata, protocol_->ModelMetadata("fashion", ""));
  EXPECT_EQ(metadata.properties().at("max_message_bytes"), "1048576");
  EXPECT_EQ(metadata.name(), "fashion");
  EXPECT_THAT(metadata.versions(), ElementsAre("1"));
  ASSERT_EQ(metadata.inputs_size(), 1);
  EXPECT_EQ(metadata.inputs(0).name(), "image");
  EXPECT_EQ(metadata.inputs(0).datatype(), "FP32");
  EXPECT_THAT(metadata.inputs(0).shape(), ElementsAre(-1, 1, 32, 32));
  ASSERT_EQ(metadata.outputs_size(), 1);
  EXPECT_EQ(metadata.outputs(0).name(), "probabilities");
  EXPECT_THAT(metadata.outputs(0).shape(), ElementsAre(-1, 3));

  ASSERT_OK_AND_ASSIGN(const auto response, protocol_->ModelConfig("fashion", "stable"));
  const inference::ModelConfig& config = response.config();
  EXPECT_EQ(config.name(), "fashion");
  EXPECT_EQ(config.max_batch_size(), testing::kMaxPictures);
  ASSERT_EQ(config.input_size(), 1);
  EXPECT_EQ(config.input(0).name(), "image");
  EXPECT_EQ(config.input(0).data_type(), inference::TYPE_FP32);
  EXPECT_EQ(config.input(0).format(), inference::ModelInput::FORMAT_NCHW);
  EXPECT_THAT(config.input(0).dims(), ElementsAre(1, 32, 32)) << "without the batch dimension";
  ASSERT_EQ(config.output_size(), 1);
  EXPECT_THAT(config.output(0).dims(), ElementsAre(3));
  EXPECT_EQ(config.dynamic_batching().default_queue_policy().max_queue_size(),
            static_cast<uint32_t>(kQueue));
  EXPECT_TRUE(config.dynamic_batching().default_queue_policy().allow_timeout_override());
  EXPECT_EQ(config.dynamic_batching().default_queue_policy().default_timeout_microseconds(), 0);
  EXPECT_THAT(config.dynamic_batching().preferred_batch_size(), ElementsAre(1));
  EXPECT_EQ(config.parameters().at("variant").string_value(), "pvt_v2_b0");
}

TEST_F(OpenInferenceTest, MetadataOfAVersionOnDiskNeedsNoLoading) {
  Promote("fashion", 1);
  ASSERT_OK_AND_ASSIGN(const auto metadata, protocol_->ModelMetadata("fashion", "1"));
  EXPECT_THAT(metadata.versions(), ElementsAre("1", "2"));
}

TEST_F(OpenInferenceTest, DescriptionsHaveTheCodesOfRequests) {
  EXPECT_THAT(protocol_->ModelMetadata("nosuch", ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nosuch")));
  EXPECT_THAT(protocol_->ModelConfig("fashion", "9"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no version 9")));
  EXPECT_THAT(protocol_->ModelConfig("fashion", "canary"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("canary")));
  EXPECT_THAT(protocol_->ModelStatistics("fashion", "-1"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("version")));
  EXPECT_THAT(protocol_->ModelStatistics("nosuch", ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nosuch")));
  EXPECT_THAT(protocol_->ModelStatistics("", "1"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("name is empty")));

  // A version that is damaged, by number and by an alias.
  Promote("fashion", 1);
  inference::ModelInferRequest request = TensorRequest(1);
  request.set_model_version("1");
  ASSERT_OK(WriteFileAtomically(folder_ / "models/fashion/1/weights.safetensors", "damaged"));
  const auto unavailable = [](absl::string_view text) {
    return StatusIs(absl::StatusCode::kUnavailable, HasSubstr(std::string(text)));
  };
  EXPECT_THAT(Infer(request), unavailable("version 1"));  // which sees it
  for (const auto& [name, version] : {std::pair("fashion", "1"), std::pair("fashion:1", "")}) {
    EXPECT_THAT(protocol_->ModelMetadata(name, version), unavailable("version 1 of fashion"));
    EXPECT_THAT(protocol_->ModelConfig(name, version), unavailable("version 1 of fashion"));
    EXPECT_THAT(protocol_->ModelStatistics(name, version), unavailable("version 1 of fashion"));
    EXPECT_FALSE(protocol_->ModelReady(name, version));
  }
}

TEST_F(OpenInferenceTest, AModelWithoutAUsableVersionIsUnavailableHoweverItIsAskedFor) {
  std::ofstream(folder_ / "models/fashion/1" / std::string(kManifestFile)) << "garbage";
  protocol_ = nullptr;
  pipeline_ = nullptr;
  registry_ = nullptr;
  ModelRegistry::Options options;
  options.folder = folder_ / "models";
  registry_ = std::make_unique<ModelRegistry>(options, testing::FakeLoader(network_),
                                              testing::PassingSelfTest, metrics_);
  ASSERT_OK(registry_->Start());
  pipeline_ = std::make_unique<ClassifyPipeline>(ClassifyPipeline::Options{}, *registry_, metrics_);
  protocol_ = std::make_unique<OpenInference>(OpenInference::Options{}, *pipeline_, *registry_);
  for (const char* version : {"", "1"}) {
    inference::ModelInferRequest request = TensorRequest(1);
    request.set_model_version(version);
    EXPECT_THAT(Infer(request), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("fashion")));
    EXPECT_THAT(protocol_->ModelMetadata("fashion", version),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr("fashion")));
    EXPECT_THAT(protocol_->ModelStatistics("fashion", version),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr("fashion")));
  }
  ASSERT_OK_AND_ASSIGN(const auto index, protocol_->RepositoryIndex({}));
  ASSERT_EQ(index.models_size(), 1);
  EXPECT_EQ(index.models(0).state(), "UNAVAILABLE");
}

// The rule is ModelInfer's.
TEST_F(OpenInferenceTest, AVersionMayStandInTheNameInEveryCallAboutAModel) {
  Promote("fashion", 1);
  ASSERT_OK(registry_->SetAlias("fashion", "canary", 1, "").status());
  for (const char* name : {"fashion@canary", "fashion:1", "fashion@canary:files"}) {
    inference::ModelInferRequest request = TensorRequest(1);
    request.set_model_name(name);
    ASSERT_OK_AND_ASSIGN(const auto answer, Infer(request));
    EXPECT_EQ(answer.model_version(), "1") << name;
    ASSERT_OK_AND_ASSIGN(const auto metadata, protocol_->ModelMetadata(name, ""));
    EXPECT_EQ(metadata.name(), name);
    EXPECT_EQ(metadata.properties().at("digest"), answer.parameters().at("digest").string_param());
    ASSERT_OK_AND_ASSIGN(const auto config, protocol_->ModelConfig(name, ""));
    EXPECT_EQ(config.config().name(), name);
    EXPECT_EQ(config.config().parameters().at("digest").string_value(),
              metadata.properties().at("digest"));
    ASSERT_OK_AND_ASSIGN(const auto statistics, protocol_->ModelStatistics(name, ""));
    ASSERT_EQ(statistics.model_stats_size(), 1);
    EXPECT_EQ(statistics.model_stats(0).name(), name);
    EXPECT_EQ(statistics.model_stats(0).version(), "1");
    EXPECT_TRUE(protocol_->ModelReady(name, ""));
  }
  struct Case {
    const char* name;
    const char* version;
    absl::StatusCode code;
  };
  for (const auto& [name, version, code] : {
           Case{"fashion@canary", "2", absl::StatusCode::kInvalidArgument},
           Case{"fashion@canary", "1", absl::StatusCode::kInvalidArgument},
           Case{"fashion:1", "2", absl::StatusCode::kInvalidArgument},
           Case{"fashion:1", "1", absl::StatusCode::kOk},
           Case{"fashion:x", "", absl::StatusCode::kInvalidArgument},
           Case{"fashion@", "", absl::StatusCode::kInvalidArgument},
           Case{"fashion@canary", "stable", absl::StatusCode::kNotFound},
           Case{"fashion@nosuch", "", absl::StatusCode::kNotFound},
           Case{"fashion:9", "", absl::StatusCode::kNotFound},
           Case{"nosuch@canary", "", absl::StatusCode::kNotFound},
       }) {
    SCOPED_TRACE(absl::StrCat(name, " ", version));
    inference::ModelInferRequest request = TensorRequest(1);
    request.set_model_name(name);
    request.set_model_version(version);
    EXPECT_EQ(Infer(request).status().code(), code);
    EXPECT_EQ(protocol_->ModelMetadata(name, version).status().code(), code);
    EXPECT_EQ(protocol_->ModelConfig(name, version).status().code(), code);
    EXPECT_EQ(protocol_->ModelStatistics(name, version).status().code(), code);
    EXPECT_EQ(protocol_->ModelReady(name, version), code == absl::StatusCode::kOk);
  }
}

TEST_F(OpenInferenceTest, ServerMetadataNamesOnlyWhatWorks) {
  const auto metadata = protocol_->ServerMetadata();
  EXPECT_EQ(metadata.name(), "pyramid");
  EXPECT_EQ(metadata.version(), "1.2.3");
  EXPECT_THAT(metadata.extensions(),
              UnorderedElementsAre("classification", "model_repository", "schedule_policy",
                                   "model_configuration", "parameters", "binary_tensor_data",
                                   "statistics"));
}

TEST_F(OpenInferenceTest, ReadinessFollowsModelAndServer) {
  EXPECT_TRUE(protocol_->ModelReady("fashion", ""));
  EXPECT_TRUE(protocol_->ModelReady("fashion", "1"));
  EXPECT_FALSE(protocol_->ModelReady("fashion", "2"));
  EXPECT_FALSE(protocol_->ModelReady("fashion", "garbage!"));
  EXPECT_FALSE(protocol_->ModelReady("nosuch", ""));
  ready_ = false;
  EXPECT_FALSE(protocol_->ServerReady());
  EXPECT_FALSE(protocol_->ModelReady("fashion", ""));
}

TEST_F(OpenInferenceTest, StatisticsCountRequestsPicturesAndPasses) {
  ASSERT_OK_AND_ASSIGN(auto response, protocol_->ModelStatistics("fashion", ""));
  ASSERT_EQ(response.model_stats_size(), 1);
  EXPECT_EQ(response.model_stats(0).version(), "1") << "a decimal number";
  EXPECT_EQ(response.model_stats(0).inference_count(), 0u);
  EXPECT_EQ(response.model_stats(0).last_inference(), 0u);

  EXPECT_OK(Infer(TensorRequest(3)).status());
  EXPECT_OK(Infer(TensorRequest(1)).status());
  EXPECT_FALSE(Infer(TensorRequest(1), {.deadline = absl::InfinitePast()}).ok());
  inference::ModelInferRequest bad = TensorRequest(1);
  bad.mutable_inputs(0)->set_shape(2, 16);
  bad.mutable_inputs(0)->set_shape(3, 64);
  EXPECT_FALSE(Infer(bad).ok());
  ASSERT_OK_AND_ASSIGN(response, protocol_->ModelStatistics("fashion", "1"));
  const inference::ModelStatistics& stats = response.model_stats(0);
  EXPECT_EQ(stats.inference_count(), 4u);
  EXPECT_EQ(stats.execution_count(), 4u) << "batches of one";
  EXPECT_EQ(stats.inference_stats().success().count(), 2u);
  EXPECT_GE(stats.inference_stats().fail().count(), 1u);
  EXPECT_EQ(stats.inference_stats().queue().count(), 2u);
  EXPECT_GT(stats.inference_stats().compute_infer().ns(), 0u);
  EXPECT_GE(stats.inference_stats().success().ns(), stats.inference_stats().compute_infer().ns());
  ASSERT_EQ(stats.batch_stats_size(), 1);
  EXPECT_EQ(stats.batch_stats(0).batch_size(), 1u);
  EXPECT_EQ(stats.batch_stats(0).compute_infer().count(), 4u);
  EXPECT_EQ(stats.batch_stats(0).compute_input().count(), 4u);
  EXPECT_NEAR(static_cast<double>(stats.last_inference()),
              static_cast<double>(absl::ToUnixMillis(absl::Now())), 20'000);
}

// perf_analyzer ends itself over counts that differ in one snapshot.
TEST_F(OpenInferenceTest, ASnapshotIsOneMomentsNumbersUnderLoad) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> load;
  for (int i = 0; i < 3; ++i) {
    load.emplace_back([&] {
      while (!stop) (void)Infer(TensorRequest(1));
    });
  }
  uint64_t last = 0;
  const absl::Time until = absl::Now() + absl::Seconds(1);
  while (absl::Now() < until) {
    ASSERT_OK_AND_ASSIGN(const auto response, protocol_->ModelStatistics("fashion", ""));
    const inference::InferStatistics& stats = response.model_stats(0).inference_stats();
    const uint64_t count = stats.success().count();
    ASSERT_EQ(stats.queue().count(), count);
    ASSERT_EQ(stats.compute_input().count(), count);
    ASSERT_EQ(stats.compute_infer().count(), count);
    ASSERT_EQ(stats.compute_output().count(), count);
    ASSERT_GE(count, last);
    last = count;
  }
  stop = true;
  for (std::thread& thread : load) thread.join();
  EXPECT_GT(last, 0u);
}

TEST_F(OpenInferenceTest, StatisticsOfAllModelsAndVersions) {
  Promote("bags", 2);
  Promote("fashion", 1);
  inference::ModelInferRequest request = TensorRequest(1);
  request.set_model_version("1");
  ASSERT_OK(Infer(request).status());  // loads it
  ASSERT_OK_AND_ASSIGN(const auto all, protocol_->ModelStatistics("", ""));
  std::vector<std::string> names;
  for (const auto& stats : all.model_stats()) {
    names.push_back(absl::StrCat(stats.name(), ":", stats.version()));
  }
  EXPECT_THAT(names, UnorderedElementsAre("bags:1", "fashion:1", "fashion:2"));
}

TEST_F(OpenInferenceTest, StatisticsOfAModelNeedNoStableVersion) {
  const auto checkpoint = folder_ / "bags";
  ASSERT_OK(testing::WriteFakeCheckpoint(checkpoint, 7));
  ASSERT_OK(registry_->Promote(checkpoint, "bags", {.alias = "canary"}).status());
  ASSERT_OK_AND_ASSIGN(const auto response, protocol_->ModelStatistics("bags", ""));
  ASSERT_EQ(response.model_stats_size(), 1);
  EXPECT_EQ(response.model_stats(0).name(), "bags");
  EXPECT_EQ(response.model_stats(0).version(), "1");
  ASSERT_OK(registry_->RemoveAlias("bags", "canary", "").status());
  EXPECT_THAT(protocol_->ModelStatistics("bags", ""),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("isn't loaded")));
}

TEST_F(OpenInferenceTest, UnloadAndLoadTakeAModelOutOfServiceAndBack) {
  inference::RepositoryModelUnloadRequest unload;
  unload.set_model_name("fashion");
  (*unload.mutable_parameters())["unload_dependents"].set_bool_param(false);
  ASSERT_OK(protocol_->Unload(unload, "tester"));
  EXPECT_FALSE(protocol_->ModelReady("fashion", ""));
  EXPECT_THAT(Infer(TensorRequest(1)),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("fashion")));
  EXPECT_THAT(protocol_->ModelMetadata("fashion", ""),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("unloaded")));
  EXPECT_THAT(protocol_->ModelStatistics("fashion", ""),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("unloaded")));
  ASSERT_OK_AND_ASSIGN(auto index, protocol_->RepositoryIndex({}));
  ASSERT_EQ(index.models_size(), 1);
  EXPECT_EQ(index.models(0).state(), "UNAVAILABLE");
  EXPECT_EQ(index.models(0).reason(), "unloaded");

  inference::RepositoryModelLoadRequest load;
  load.set_model_name("fashion");
  ASSERT_OK(protocol_->Load(load, "tester"));
  EXPECT_TRUE(protocol_->ModelReady("fashion", ""));
  EXPECT_OK(Infer(TensorRequest(1)).status());
  ASSERT_OK_AND_ASSIGN(index, protocol_->RepositoryIndex({}));
  EXPECT_EQ(index.models(0).name(), "fashion");
  EXPECT_EQ(index.models(0).version(), "1");
  EXPECT_EQ(index.models(0).state(), "READY");
}

TEST_F(OpenInferenceTest, TheIndexCanShowOnlyWhatIsReady) {
  Promote("fashion", 1);
  ASSERT_OK(registry_->Unload("fashion", "").status());
  ASSERT_OK(registry_->Load("fashion", "").status());
  ASSERT_OK_AND_ASSIGN(auto index, protocol_->RepositoryIndex({}));
  EXPECT_EQ(index.models_size(), 2);
  inference::RepositoryIndexRequest ready;
  ready.set_ready(true);
  ASSERT_OK_AND_ASSIGN(index, protocol_->RepositoryIndex(ready));
  ASSERT_EQ(index.models_size(), 1);
  EXPECT_EQ(index.models(0).version(), "2");
  ready.set_repository_name("s3");
  EXPECT_THAT(protocol_->RepositoryIndex(ready),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("repository")));
}

TEST_F(OpenInferenceTest, RepositoryRequestsAreChecked) {
  inference::RepositoryModelLoadRequest load;
  EXPECT_THAT(protocol_->Load(load, ""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("model_name is empty")));
  load.set_repository_name("fashion");  // what a KServe client's model_name becomes
  EXPECT_THAT(protocol_->Load(load, ""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("KServe's")));
  load.set_repository_name(std::string(5000, '\n'));
  const absl::Status endless = protocol_->Load(load, "");
  EXPECT_THAT(endless, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"\\n\\n")));
  EXPECT_LT(endless.message().size(), 500u);
  load.set_model_name("fashion");
  EXPECT_THAT(protocol_->Load(load, ""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("one repository")));
  load.clear_repository_name();
  for (const char* name : {"config", "file:1/model.onnx"}) {
    load.clear_parameters();
    (*load.mutable_parameters())[name].set_string_param("{}");
    EXPECT_THAT(protocol_->Load(load, ""),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("promotion")));
  }
  load.clear_parameters();
  load.set_model_name("nosuch");
  EXPECT_THAT(protocol_->Load(load, ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nosuch")));
  inference::RepositoryModelUnloadRequest unload;
  unload.set_model_name("nosuch");
  EXPECT_THAT(protocol_->Unload(unload, ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nosuch")));
}

}  // namespace
}  // namespace pyramid
