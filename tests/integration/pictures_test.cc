// Pictures of every kind through a real server: answered or refused one by one, as offline, and
// without more memory than its decode threads may take.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "proto/base/file.h"
#include "tests/integration/cluster.h"
#include "tests/testing/png.h"
#include "tests/testing/raw_call.h"
#include "tests/testing/sanitized.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/weight_file.h"

namespace pyramid {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr int kInvalidArgument = 3;  // google.rpc.Code

std::string PictureFile(const std::string& name) {
  return absl::StrCat(PYRAMID_SOURCE_DIR, "/tests/golden/images/", name);
}

// A server whose only model has formula weights.
class PicturesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(testing::WriteFormulaFile(cluster_.folder() / "in.safetensors"));
    std::filesystem::create_directories(cluster_.data() / "models/formula");
    model_ = (cluster_.data() / "models/formula/1").string();
    const testing::RunResult convert =
        cluster_.Cli({"convert", (cluster_.folder() / "in.safetensors").string(), model_});
    ASSERT_EQ(convert.exit_code, 0) << convert.err;
    cluster_.Start();
  }

  v1::ClassifyResponse Classify(const std::vector<std::string>& pictures) {
    v1::ClassifyRequest request;
    for (const std::string& picture : pictures) request.add_pictures()->set_encoded(picture);
    request.set_return_logits(true);
    grpc::ClientContext context;
    v1::ClassifyResponse response;
    const grpc::Status status = cluster_.classification().Classify(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(response.results_size(), static_cast<int>(pictures.size()));
    return response;
  }

  // Memory of the server, MB: the most since Forget, or what it has now.
  double Memory(const std::string& field) {
    std::ifstream status(absl::StrCat("/proc/", Pid(), "/status"));
    for (std::string word; status >> word;) {
      double kb = 0;
      if (word == field && status >> kb) return kb / 1024;
    }
    ADD_FAILURE() << field << " of the server isn't known";
    return 0;
  }
  bool ForgetPeak() {
    std::ofstream reset(absl::StrCat("/proc/", Pid(), "/clear_refs"));
    reset << "5" << std::flush;
    return reset.good();
  }

  testing::Cluster cluster_;
  std::string model_;

 private:
  int Pid() {
    const auto text = ReadFile(cluster_.data() / "server.json");
    return text.ok() ? nlohmann::json::parse(*text).at("pid").get<int>() : 0;
  }
};

TEST_F(PicturesTest, EveryGoldenFileIsAnsweredOrRefusedByItsIndex) {
  nlohmann::json expected = nlohmann::json::parse(*ReadFile(PictureFile("decoded.json")));
  expected.update(nlohmann::json::parse(*ReadFile(PictureFile("decoded_more.json"))));
  std::vector<std::string> pictures;
  for (const auto& [name, what] : expected.items()) {
    pictures.push_back(*ReadFile(PictureFile(name)));
  }
  ASSERT_LE(pictures.size(), 64u) << "the limit of a request";
  const v1::ClassifyResponse response = Classify(pictures);
  int index = 0;
  int refused = 0;
  for (const auto& [name, what] : expected.items()) {
    const v1::PictureResult& result = response.results(index++);
    if (what.contains("error")) {
      ++refused;
      EXPECT_EQ(result.code(), kInvalidArgument) << name;
      EXPECT_THAT(result.message(), HasSubstr("picture: ")) << name;
      EXPECT_EQ(result.predictions_size(), 0) << name;
    } else {
      EXPECT_EQ(result.code(), 0) << name << ": " << result.message();
      EXPECT_EQ(result.predictions_size(), 5) << name;
    }
  }
  EXPECT_EQ(refused, 8);
}

TEST_F(PicturesTest, TheServersMemoryStaysBoundedUnderMessagesThatGrow) {
  if (testing::kSanitized) GTEST_SKIP() << "a sanitizer's memory isn't the server's";
  const auto channel = cluster_.Channel({});
  const std::string unknown(1, static_cast<char>(15 << 3 | 2));        // a field of bytes
  const std::string zeros(size_t{64} << 20, '\0');                     // 64 kB compressed
  const std::string one_field = unknown + "\x80\x80\x80\x20" + zeros;  // its length: 64 << 20
  std::string empty_inputs;
  for (int i = 0; i < 20'000'000; ++i) empty_inputs += std::string("\x2a\x00", 2);
  ASSERT_EQ(Classify({*ReadFile(PictureFile("scene.jpg"))}).results(0).code(), 0);
  if (!ForgetPeak()) GTEST_SKIP() << "/proc/PID/clear_refs can't be written";
  const double before = Memory("VmRSS:");
  const auto send = [&](const std::string& path, const std::string& message,
                        grpc_compression_algorithm compression) {
    return testing::RawCall(channel, path, message, nullptr, std::chrono::seconds(60), compression);
  };
  for (const char* path :
       {testing::kHealthCheck, "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ModelInfer", "/pyramid.v1.ClassificationService/Classify",
        "/pyramid.v1.TrainingService/SubmitJob", "/pyramid.v1.ClassificationService/ListModels"}) {
    for (const auto compression : {GRPC_COMPRESS_GZIP, GRPC_COMPRESS_DEFLATE}) {
      EXPECT_FALSE(send(path, one_field, compression).ok()) << path;
    }
  }
  const double unpacked = Memory("VmHWM:") - before;
  const grpc::Status many =
      send("/inference.GRPCInferenceService/ModelInfer", empty_inputs, GRPC_COMPRESS_NONE);
  EXPECT_EQ(many.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(many.error_message(), HasSubstr("fields and numbers"));
  const double parsed = Memory("VmHWM:") - before;
  std::printf("64 MB of zeros, compressed: %.1f MB; 20 million empty inputs: %.1f MB\n", unpacked,
              parsed);
  EXPECT_LT(unpacked, 48) << "twice what may be unpacked as the text grows, and no more";
  EXPECT_LT(parsed, 96) << "the message of 40 MB, and not its 20 million objects";
}

TEST_F(PicturesTest, OfflineGivesTheSameLogits) {
  const std::vector<std::string> names = {"scene.jpg", "exif_6.jpg", "ycck.jpg", "rgb16.png",
                                          "animated.gif"};
  std::vector<std::string> command = {"classify", "--ckpt_path", model_, "--logits", "--json"};
  std::vector<std::string> pictures;
  for (const std::string& name : names) {
    command.push_back(PictureFile(name));
    pictures.push_back(*ReadFile(PictureFile(name)));
  }
  const testing::RunResult offline = cluster_.Cli(command);
  ASSERT_EQ(offline.exit_code, 0) << offline.err;
  const auto rows =
      nlohmann::json::parse(offline.out).at("logits").get<std::vector<std::vector<float>>>();
  const v1::ClassifyResponse served = Classify(pictures);
  ASSERT_EQ(rows.size(), names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    const auto& logits = served.results(static_cast<int>(i)).logits();
    ASSERT_EQ(logits.size(), static_cast<int>(rows[i].size())) << names[i];
    for (int c = 0; c < logits.size(); ++c) {
      EXPECT_NEAR(logits[c], rows[i][static_cast<size_t>(c)], 1e-5) << names[i];
    }
  }
}

TEST_F(PicturesTest, TheServersMemoryStaysBoundedUnderBombs) {
  if (testing::kSanitized) GTEST_SKIP() << "a sanitizer's memory isn't the server's";
  constexpr double kMega = 1 << 20;
  // The largest batch that it will see, so that what the network needs isn't counted below.
  Classify(std::vector<std::string>(64, *ReadFile(PictureFile("scene.jpg"))));

  std::vector<std::string> bombs;
  for (int i = 0; i < 8; ++i) {
    bombs.push_back(testing::BlankPng(30000, 30000, 1, 0, 1));  // over the limit of pixels
    bombs.push_back(testing::BlankPng(7000, 7000, 1, 0, 1));    // of pixels per byte
    for (const char* kind : {"png", "jpg", "gif", "bmp"}) {
      bombs.push_back(*ReadFile(PictureFile(absl::StrCat("claims_65535.", kind))));
    }
  }
  if (!ForgetPeak()) GTEST_SKIP() << "/proc/PID/clear_refs can't be written";
  double before = Memory("VmRSS:");
  const v1::ClassifyResponse refused = Classify(bombs);
  for (const v1::PictureResult& result : refused.results()) {
    EXPECT_EQ(result.code(), kInvalidArgument);
    EXPECT_THAT(result.message(), AnyOf(HasSubstr("at most"), HasSubstr("65500 pixels")));
  }
  double growth = Memory("VmHWM:") - before;
  std::printf("48 bombs: %.1f MB\n", growth);
  EXPECT_LT(growth, 32) << "the request itself and nothing more";

  // Within the limits: two decode threads hold a picture each, whatever waits.
  constexpr int kSide = 5000;
  constexpr int kPictures = 12;
  const std::vector<std::string> large(kPictures, testing::BlankPng(kSide, kSide, 8, 0, 1));
  ASSERT_TRUE(ForgetPeak());
  before = Memory("VmRSS:");
  const v1::ClassifyResponse answered = Classify(large);
  for (const v1::PictureResult& result : answered.results()) {
    EXPECT_EQ(result.code(), 0) << result.message();
  }
  growth = Memory("VmHWM:") - before;
  std::printf("%d pictures of %dx%d: %.1f MB\n", kPictures, kSide, kSide, growth);
  EXPECT_GT(growth, kSide * kSide / kMega) << "the measurement works";
  EXPECT_LT(growth, 2 * 12 * kSide * kSide / kMega) << "two threads of 12 bytes a pixel";
}

}  // namespace
}  // namespace pyramid
