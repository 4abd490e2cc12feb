#include <gmock/gmock.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "model/preprocess.h"
#include "tests/client/client_fixture.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using testing::CommandResult;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string NpyFile(int batch, int channels, int height, int width) {
  std::string header = absl::StrCat("{'descr': '<f4', 'fortran_order': False, 'shape': (", batch,
                                    ", ", channels, ", ", height, ", ", width, "), }\n");
  std::vector<float> values(static_cast<size_t>(batch * channels * height * width));
  const size_t one = values.size() / static_cast<size_t>(batch);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i / one);
  std::string file("\x93NUMPY\x01\x00", 8);
  file += static_cast<char>(header.size());
  file += '\0';
  file += header;
  file.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  return file;
}

class ClassifyCommandTest : public testing::ClientFixture {
 protected:
  ClassifyCommandTest() {
    server_.classify = [this](grpc::ServerContext& context, const v1::ClassifyRequest& request,
                              v1::ClassifyResponse& response) {
      requests_.push_back(request);
      deadline_ = absl::FromChrono(context.deadline());
      response.set_model(request.model().empty() ? "fashion" : request.model());
      response.set_version(request.version() == 0 ? 3 : request.version());
      response.set_digest("sha256:abc");
      for (const v1::Picture& picture : request.pictures()) {
        v1::PictureResult& result = *response.add_results();
        if (picture.encoded() == "broken") {
          result.set_code(3);
          result.set_message("not a picture: its first bytes are unknown");
          continue;
        }
        v1::Prediction& best = *result.add_predictions();
        best.set_index(9);
        best.set_label("Ankle boot");
        best.set_probability(0.983f);
        v1::Prediction& second = *result.add_predictions();
        second.set_index(7);
        second.set_label("Sneaker");
        second.set_probability(0.012f);
        if (request.return_logits()) {
          result.add_logits(0.1f);
          result.add_logits(-2.5f);
        }
      }
      return grpc::Status::OK;
    };
    Write("one.png", "first");
    Write("two.png", "second");
    Write("broken.png", "broken");
  }

  std::vector<v1::ClassifyRequest> requests_;
  absl::Time deadline_;
};

TEST_F(ClassifyCommandTest, PrintsTheBestClassesOfEachPicture) {
  const CommandResult result = Pyramid({"classify", "--model", "fashion:2", "one.png", "two.png"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.out,
            "one.png  Ankle boot  98.30 %\n"
            "         Sneaker      1.20 %\n"
            "two.png  Ankle boot  98.30 %\n"
            "         Sneaker      1.20 %\n");
  EXPECT_THAT(result.err, HasSubstr("model fashion version 2"));
  ASSERT_EQ(requests_.size(), 1u);
  EXPECT_EQ(requests_[0].model(), "fashion");
  EXPECT_EQ(requests_[0].version(), 2);
  EXPECT_EQ(requests_[0].top_k(), 5);
  EXPECT_EQ(requests_[0].pictures(1).encoded(), "second");
}

TEST_F(ClassifyCommandTest, JsonHasAResultAPicture) {
  const CommandResult result =
      Pyramid({"classify", "one.png", "broken.png", "--json", "--top_k", "2"});
  EXPECT_EQ(result.code, 1);
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json.at("model"), "fashion");
  EXPECT_EQ(json.at("version"), 3);
  EXPECT_EQ(json.at("digest"), "sha256:abc");
  EXPECT_EQ(json.at("results").at(0).at("picture"), "one.png");
  EXPECT_EQ(json.at("results").at(0).at("predictions").at(0).at("label"), "Ankle boot");
  EXPECT_EQ(json.at("results").at(1).at("error").at("code"), "INVALID_ARGUMENT");
  EXPECT_EQ(requests_.at(0).top_k(), 2);
}

TEST_F(ClassifyCommandTest, LogitsJsonIsARowAPicture) {
  const CommandResult result = Pyramid({"classify", "--logits", "--json", "one.png", "two.png"});
  EXPECT_EQ(result.code, 0);
  const nlohmann::json json = nlohmann::json::parse(result.out);
  ASSERT_EQ(json.size(), 1u);
  ASSERT_EQ(json.at("logits").size(), 2u);
  EXPECT_EQ(json.at("logits").at(1).at(0).get<float>(), 0.1f);
  EXPECT_EQ(json.at("logits").at(1).at(1).get<float>(), -2.5f);
  EXPECT_EQ(Pyramid({"classify", "--logits", "one.png"}).out, "one.png  0.1 -2.5\n");
}

TEST_F(ClassifyCommandTest, LogitsJsonKeepsTheRowOfAPictureThatFailed) {
  const CommandResult result = Pyramid({"classify", "--logits", "--json", "broken.png", "two.png"});
  EXPECT_EQ(result.code, 1);
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_TRUE(json.at("logits").at(0).is_null());
  EXPECT_EQ(json.at("errors").at(0).at("picture"), "broken.png");
}

TEST_F(ClassifyCommandTest, OnePictureThatFailsDoesNotHideTheOthers) {
  const CommandResult result = Pyramid({"classify", "broken.png", "missing.png", "two.png"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.out, HasSubstr("two.png  Ankle boot"));
  EXPECT_THAT(result.err,
              AllOf(HasSubstr("pyramid: broken.png: not a picture: its first bytes are unknown\n"),
                    HasSubstr("pyramid: missing.png: can't open")));
  ASSERT_EQ(requests_.size(), 1u);
  EXPECT_EQ(requests_[0].pictures_size(), 2);
}

TEST_F(ClassifyCommandTest, ArraysAreSentAsTensors) {
  Write("batch.npy", NpyFile(2, 1, 3, 4));
  const CommandResult result = Pyramid({"classify", "batch.npy"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("batch.npy[0]"), HasSubstr("batch.npy[1]")));
  ASSERT_EQ(requests_.size(), 1u);
  ASSERT_EQ(requests_[0].pictures_size(), 2);
  const v1::ImageTensor& second = requests_[0].pictures(1).tensor();
  EXPECT_EQ(second.channels(), 1);
  EXPECT_EQ(second.height(), 3);
  EXPECT_EQ(second.width(), 4);
  EXPECT_EQ(second.values_size(), 12);
  EXPECT_EQ(second.values(11), 1.0f);
}

TEST_F(ClassifyCommandTest, BadArrayIsThatFilesError) {
  Write("bad.npy", "not an array");
  const CommandResult result = Pyramid({"classify", "bad.npy", "one.png"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("pyramid: bad.npy: .npy: not a NumPy array file"));
  EXPECT_THAT(result.out, HasSubstr("one.png"));
}

TEST_F(ClassifyCommandTest, ManyPicturesBecomeSeveralRequestsToOneVersion) {
  std::vector<std::string> words = {"classify", "--json"};
  words.resize(72, "one.png");
  const CommandResult result = Pyramid(words);
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(nlohmann::json::parse(result.out).at("results").size(), 70u);
  ASSERT_EQ(requests_.size(), 3u);
  EXPECT_EQ(requests_[0].version(), 0);
  EXPECT_EQ(requests_[1].version(), 3);
  EXPECT_EQ(requests_[2].pictures_size(), 6);
}

TEST_F(ClassifyCommandTest, LargePicturesAreSentApart) {
  const std::string large(2 << 20, 'x');
  Write("a.png", large);
  Write("b.png", large);
  EXPECT_EQ(Pyramid({"classify", "a.png", "b.png"}).code, 0);
  EXPECT_EQ(requests_.size(), 2u);
}

TEST_F(ClassifyCommandTest, TimeoutIsTheDeadline) {
  EXPECT_EQ(Pyramid({"classify", "one.png", "--timeout", "500"}).code, 0);
  const absl::Duration left = deadline_ - absl::Now();
  EXPECT_GT(left, absl::Seconds(400));
  EXPECT_LT(left, absl::Seconds(510));
  server_.classify = [](grpc::ServerContext&, const v1::ClassifyRequest&, v1::ClassifyResponse&) {
    absl::SleepFor(absl::Milliseconds(400));
    return grpc::Status::OK;
  };
  const CommandResult late = Pyramid({"classify", "one.png", "--timeout", "0.1"});
  EXPECT_EQ(late.code, 1);
  EXPECT_THAT(late.err, HasSubstr("Deadline"));
}

TEST_F(ClassifyCommandTest, RefusalsHaveTheirExitCodes) {
  const auto refuse = [this](grpc::StatusCode code) {
    server_.classify = [code](grpc::ServerContext&, const v1::ClassifyRequest&,
                              v1::ClassifyResponse&) { return grpc::Status(code, "no"); };
    return Pyramid({"classify", "one.png"}).code;
  };
  EXPECT_EQ(refuse(grpc::StatusCode::NOT_FOUND), 3);
  EXPECT_EQ(refuse(grpc::StatusCode::RESOURCE_EXHAUSTED), 4);
  EXPECT_EQ(refuse(grpc::StatusCode::INVALID_ARGUMENT), 1);
  EXPECT_EQ(refuse(grpc::StatusCode::UNAVAILABLE), 5);
}

TEST_F(ClassifyCommandTest, AnswersThatDoNotFitTheRequestAreAnError) {
  server_.classify = [](grpc::ServerContext&, const v1::ClassifyRequest&, v1::ClassifyResponse&) {
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"classify", "one.png"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("0 results for 1 pictures"));
}

TEST_F(ClassifyCommandTest, BadModelNameIsWrongUsage) {
  EXPECT_EQ(Pyramid({"classify", "one.png", "--model", "fashion:0"}).code, 2);
  EXPECT_EQ(Pyramid({"classify", "one.png", "--model", "fashion:new"}).code, 2);
  EXPECT_EQ(Pyramid({"classify", "one.png", "--model", ":1"}).code, 2);
  EXPECT_EQ(Pyramid({"classify", "one.png", "--model", "a", "--ckpt", "b"}).code, 2);
  EXPECT_EQ(Pyramid({"classify", "one.png", "--dtype", "bf16"}).code, 2);
  EXPECT_EQ(Pyramid({"classify"}).code, 2);
}

// Logits (mean, 2 * mean, NaN if the mean is over 100) of each picture.
class FakeClassifier : public Classifier {
 public:
  FakeClassifier() {
    manifest_.set_digest("sha256:fake");
    manifest_.mutable_network()->set_num_classes(3);
    manifest_.mutable_network()->set_in_channels(1);
    v1::Preprocessing& p = *manifest_.mutable_preprocessing();
    p.set_channels(1);
    p.set_exif("apply");
    p.mutable_pad()->set_to(32);
    p.set_crop(32);
    p.add_mean(0);
    p.add_std(1);
    manifest_.add_labels("low");
    manifest_.add_labels("high");
    manifest_.add_labels("other");
  }

  absl::StatusOr<std::vector<float>> Forward(std::span<const float> pixels, int batch, int height,
                                             int width) override {
    if (height < 29) return absl::InvalidArgumentError("height is under 29");
    batches_.push_back(batch);
    const size_t one = pixels.size() / static_cast<size_t>(batch);
    EXPECT_EQ(one, static_cast<size_t>(height * width));
    std::vector<float> logits;
    for (int i = 0; i < batch; ++i) {
      const float first = pixels[static_cast<size_t>(i) * one];
      logits.push_back(first);
      logits.push_back(2 * first);
      logits.push_back(first > 100 ? NAN : 0);
    }
    return logits;
  }
  const v1::Manifest& manifest() const override { return manifest_; }

  static inline std::vector<int> batches_;

 private:
  v1::Manifest manifest_;
};

class OfflineClassifyTest : public ClassifyCommandTest {
 protected:
  OfflineClassifyTest() {
    FakeClassifier::batches_.clear();
    environment_.load_classifier =
        [this](const std::filesystem::path& folder,
               const ClassifierOptions& options) -> absl::StatusOr<std::unique_ptr<Classifier>> {
      options_ = options;
      if (folder != folder_ / "ckpt") return absl::NotFoundError("no manifest");
      return std::make_unique<FakeClassifier>();
    };
  }

  ClassifierOptions options_;
};

TEST_F(OfflineClassifyTest, RanksASoftmaxOverTheLogits) {
  Write("batch.npy", NpyFile(2, 1, 32, 32));
  const CommandResult result = Pyramid({"classify", "--ckpt", "ckpt", "batch.npy", "--json"});
  EXPECT_EQ(result.code, 0) << result.err;
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json.at("digest"), "sha256:fake");
  const nlohmann::json& equal = json.at("results").at(0).at("predictions");
  ASSERT_EQ(equal.size(), 3u);
  EXPECT_EQ(equal.at(0).at("index"), 0);  // of equals the first
  EXPECT_NEAR(equal.at(0).at("probability").get<double>(), 1.0 / 3, 1e-6);
  const nlohmann::json& ranked = json.at("results").at(1).at("predictions");
  EXPECT_EQ(ranked.at(0).at("label"), "high");
  EXPECT_EQ(ranked.at(2).at("label"), "other");
  const double sum = 1 + std::exp(1) + std::exp(2);
  EXPECT_NEAR(ranked.at(0).at("probability").get<double>(), std::exp(2) / sum, 1e-6);
  EXPECT_THAT(FakeClassifier::batches_, ElementsAre(2));
  EXPECT_TRUE(requests_.empty());
}

TEST_F(OfflineClassifyTest, PicturesGoThroughTheCheckpointsPreprocessing) {
  RgbImage image{
      .width = 32, .height = 32, .channels = 1, .pixels = std::vector<uint8_t>(1024, 255)};
  const absl::StatusOr<std::string> png = EncodePng(image);
  ASSERT_TRUE(png.ok());
  Write("white.png", *png);
  const CommandResult result =
      Pyramid({"classify", "--ckpt_path", "ckpt", "white.png", "broken.png", "--logits", "--json"});
  EXPECT_EQ(result.code, 1);
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json.at("logits").at(0), (std::vector<float>{1, 2, 0}));
  EXPECT_TRUE(json.at("logits").at(1).is_null());
}

TEST_F(OfflineClassifyTest, LimitsOfPicturesAreFlags) {
  const absl::StatusOr<std::string> png = EncodePng(BlankImage(32, 20, 1));
  ASSERT_TRUE(png.ok());
  Write("blank.png", *png);
  const auto classify = [&](const std::string& flag, const std::string& value) {
    return Pyramid({"classify", "--ckpt", "ckpt", "blank.png", flag, value});
  };
  EXPECT_EQ(classify("--max-picture-pixels", "640").code, 0);
  const CommandResult pixels = classify("--max-picture-pixels", "639");
  EXPECT_EQ(pixels.code, 1);
  EXPECT_THAT(pixels.err, HasSubstr("32x20 is 640 pixels; at most 639"));
  const CommandResult side = classify("--max_picture_side", "31");
  EXPECT_EQ(side.code, 1);
  EXPECT_THAT(side.err, HasSubstr("a side may have at most 31 pixels"));
  const CommandResult bytes = classify("--max-picture-bytes", "40");
  EXPECT_EQ(bytes.code, 1);
  EXPECT_THAT(bytes.err, AllOf(HasSubstr("blank.png"), HasSubstr("40")));
  const absl::StatusOr<std::string> large = EncodePng(BlankImage(1025, 1024, 1));
  ASSERT_TRUE(large.ok());
  Write("blank.png", *large);
  const CommandResult ratio = classify("--max-pixels-per-byte", "1");
  EXPECT_EQ(ratio.code, 1);
  EXPECT_THAT(ratio.err, HasSubstr("at most 1 pixels a byte"));
  EXPECT_EQ(classify("--max-picture-side", "0").code, 2);
  EXPECT_EQ(Pyramid({"classify", "blank.png", "--max-picture-side", "31"}).code, 2)
      << "a server has limits of its own";
}

TEST_F(OfflineClassifyTest, DeviceAndDtypeReachTheClassifier) {
  Write("batch.npy", NpyFile(1, 1, 32, 32));
  EXPECT_EQ(Pyramid({"classify", "--ckpt", "ckpt", "batch.npy"}).code, 0);
  EXPECT_EQ(options_.device, "cpu");
  EXPECT_EQ(options_.dtype, "fp32");
  EXPECT_EQ(
      Pyramid({"classify", "--ckpt", "ckpt", "batch.npy", "--dtype", "bf16", "--device", "cuda:1"})
          .code,
      0);
  EXPECT_EQ(options_.device, "cuda:1");
  EXPECT_EQ(options_.dtype, "bf16");
}

TEST_F(OfflineClassifyTest, WhoseWeightsTheyAreReachesTheClassifier) {
  Write("batch.npy", NpyFile(1, 1, 32, 32));
  EXPECT_EQ(
      Pyramid({"classify", "--ckpt", "ckpt", "batch.npy", "--origin", "mindcv", "--ema"}).code, 0);
  EXPECT_EQ(options_.weights.origin, "mindcv");
  EXPECT_TRUE(options_.weights.ema);
  EXPECT_EQ(
      Pyramid({"classify", "--ckpt", "ckpt", "batch.npy", "--head", "new", "--num-classes", "7"})
          .code,
      0);
  EXPECT_EQ(options_.weights.head, "new");
  EXPECT_EQ(options_.weights.num_classes, 7);
  EXPECT_EQ(Pyramid({"classify", "--ckpt", "ckpt", "batch.npy", "--head", "old"}).code, 2);
  EXPECT_EQ(Pyramid({"classify", "--ckpt", "ckpt", "batch.npy", "--origin", "keras"}).code, 2);
  EXPECT_EQ(Pyramid({"classify", "batch.npy", "--origin", "mindcv"}).code, 2);
}

TEST_F(OfflineClassifyTest, TensorsThatDoNotFitAreErrors) {
  Write("rgb.npy", NpyFile(1, 3, 32, 32));
  const CommandResult channels = Pyramid({"classify", "--ckpt", "ckpt", "rgb.npy"});
  EXPECT_EQ(channels.code, 1);
  EXPECT_THAT(channels.err, HasSubstr("rgb.npy[0]: the tensor has 3 channels; the model takes 1"));
  Write("small.npy", NpyFile(1, 1, 8, 8));
  const CommandResult small = Pyramid({"classify", "--ckpt", "ckpt", "small.npy"});
  EXPECT_EQ(small.code, 1);
  EXPECT_THAT(small.err, HasSubstr("height is under 29"));
}

TEST_F(OfflineClassifyTest, LogitsThatAreNoNumbersAreAnError) {
  Write("batch.npy", NpyFile(102, 1, 32, 32));
  const CommandResult result = Pyramid({"classify", "--ckpt", "ckpt", "batch.npy"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("batch.npy[101]: the network gave a logit"));
}

TEST_F(OfflineClassifyTest, MissingCheckpointIsExitCode3) {
  const CommandResult result = Pyramid({"classify", "--ckpt", "nowhere", "one.png"});
  EXPECT_EQ(result.code, 3);
  EXPECT_THAT(result.err, HasSubstr("nowhere: no manifest"));
}

TEST_F(OfflineClassifyTest, MissingDeviceIsNoUnreachableServer) {
  environment_.load_classifier =
      [](const std::filesystem::path&,
         const ClassifierOptions&) -> absl::StatusOr<std::unique_ptr<Classifier>> {
    return absl::UnavailableError("cuda:0 isn't there; usable: cpu");
  };
  EXPECT_EQ(Pyramid({"classify", "--ckpt", "ckpt", "one.png"}).code, 1);
}

TEST_F(OfflineClassifyTest, BuildWithoutLibTorchSaysSo) {
  environment_.load_classifier = nullptr;
  const CommandResult result = Pyramid({"classify", "--ckpt", "ckpt", "one.png"});
  EXPECT_EQ(result.code, 4);
  EXPECT_THAT(result.err, HasSubstr("built without LibTorch"));
}

}  // namespace
}  // namespace pyramid
