#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "model/checkpoint.h"
#include "model/weights.h"
#include "tests/client/client_fixture.h"
#include "tests/testing/fake_classifier.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/weight_file.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using testing::CommandResult;
using testing::FormulaFile;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::WriteFormulaFile;

class ConvertCommandTest : public testing::ClientFixture {
 protected:
  ConvertCommandTest() { EXPECT_OK(WriteFormulaFile(folder_ / "in.safetensors")); }

  nlohmann::json Convert(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "convert");
    arguments.push_back("--json");
    const CommandResult result = Pyramid(arguments);
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out, nullptr, false);
  }
  std::string Bytes(const std::string& name) {
    absl::StatusOr<std::string> bytes = ReadFile(folder_ / name);
    EXPECT_OK(bytes);
    return bytes.value_or("");
  }
  // Loads weights as LibTorch would, and answers as a fake network.
  void LearnToClassify() {
    environment_.load_classifier =
        [this](const std::filesystem::path& path,
               const ClassifierOptions& options) -> absl::StatusOr<std::unique_ptr<Classifier>> {
      ASSIGN_OR_RETURN(const std::unique_ptr<Weights> weights, OpenWeights(path, options.weights));
      return std::make_unique<testing::FakeClassifier>(network_, weights->manifest());
    };
    environment_.make_self_test = [](Classifier& classifier,
                                     int pictures) -> absl::StatusOr<std::string> {
      return absl::StrCat(pictures, " of ", classifier.manifest().origin());
    };
  }

  testing::FakeNetwork network_;
};

TEST_F(ConvertCommandTest, ARoundTripThroughEveryFormatKeepsEveryBit) {
  EXPECT_EQ(Convert({"in.safetensors", "a.safetensors"}).at("naming"), "official");
  const nlohmann::json ckpt = Convert({"a.safetensors", "b.ckpt"});
  EXPECT_EQ(ckpt.at("format"), "MindSpore ckpt");
  EXPECT_EQ(ckpt.at("naming"), "mindcv");
  EXPECT_EQ(ckpt.at("origin"), "official");
  EXPECT_EQ(ckpt.at("from").at("format"), "safetensors");
  const nlohmann::json zip = Convert({"b.ckpt", "c.pth", "--naming", "timm"});
  EXPECT_EQ(zip.at("format"), "PyTorch zip");
  EXPECT_EQ(zip.at("from").at("naming"), "mindcv");
  EXPECT_EQ(Convert({"c.pth", "d.pt"}).at("naming"), "timm");  // the source's
  const nlohmann::json back = Convert({"d.pt", "d.safetensors", "--naming", "official"});
  EXPECT_EQ(back.at("parameters"), 3'412'330);
  EXPECT_EQ(back.at("network").at("variant"), "pvt_v2_b0");
  EXPECT_EQ(Bytes("a.safetensors"), Bytes("d.safetensors"));
  EXPECT_EQ(back.at("bytes"), Bytes("d.safetensors").size());
}

TEST_F(ConvertCommandTest, TellsWhatWasWritten) {
  const CommandResult result = Pyramid({"convert", "in.safetensors", "out.pth"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("from        in.safetensors (safetensors, official naming)\n"),
                    HasSubstr("to          out.pth (PyTorch zip, official naming)\n"),
                    HasSubstr("network     pvt_v2_b0, 10 classes, 3 channels\n"),
                    HasSubstr("parameters  3,412,330\n"), HasSubstr("sha256      ")));
  EXPECT_EQ(result.err, "");
}

TEST_F(ConvertCommandTest, WarnsWhereTheNamesHomeComputesOtherwise) {
  const CommandResult foreign = Pyramid({"convert", "in.safetensors", "out.ckpt"});
  EXPECT_EQ(foreign.code, 0);
  EXPECT_THAT(foreign.err,
              AllOf(HasSubstr("warning: out.ckpt has the names of MindCV"),
                    HasSubstr("computes with padding same, GELU tanh, outer eps 1e-07"),
                    HasSubstr("trained with padding torch, GELU erf, outer eps 1e-05")));
  const CommandResult home =
      Pyramid({"convert", "in.safetensors", "home.ckpt", "--origin", "mindcv"});
  EXPECT_EQ(home.code, 0);
  EXPECT_EQ(home.err, "");
  EXPECT_THAT(Pyramid({"convert", "home.ckpt", "away.pth", "--naming", "timm"}).err,
              HasSubstr("the names of timm, which computes with padding torch"));
}

TEST_F(ConvertCommandTest, NumericsCanBeOverridden) {
  const nlohmann::json json = Convert({"in.safetensors", "out.pth", "--pad_style", "same", "--gelu",
                                       "tanh", "--eps-outer", "1e-7"});
  const nlohmann::json& numerics = json.at("network").at("numerics");
  EXPECT_EQ(numerics.at("pad_style"), "same");
  EXPECT_EQ(numerics.at("gelu"), "tanh");
  EXPECT_EQ(numerics.at("eps_outer"), 1e-7);
  EXPECT_THAT(json.at("warning").get<std::string>(), HasSubstr("the official code"));
  // The file says so itself.
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Weights> weights, OpenWeights(folder_ / "out.pth"));
  EXPECT_EQ(weights->manifest().network().numerics().pad_style(), "same");
}

TEST_F(ConvertCommandTest, AnotherNameBecomesACheckpointWithASelfTest) {
  LearnToClassify();
  const nlohmann::json json = Convert({"in.safetensors", "ckpt", "--origin", "timm"});
  EXPECT_EQ(json.at("format"), "checkpoint");
  EXPECT_EQ(json.at("self_test"), true);
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, VerifyCheckpoint(folder_ / "ckpt"));
  EXPECT_EQ(manifest.origin(), "timm");
  EXPECT_EQ(manifest.digest(), json.at("digest"));
  EXPECT_EQ(*ReadCheckpointFile(folder_ / "ckpt", manifest, kSelfTestFile), "16 of timm");
  // And back.
  EXPECT_EQ(Convert({"ckpt", "back.safetensors"}).at("origin"), "timm");
}

TEST_F(ConvertCommandTest, WithoutLibTorchThereIsNoSelfTest) {
  const CommandResult result = Pyramid({"convert", "in.safetensors", "ckpt"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("built without LibTorch"));
  EXPECT_THAT(result.out, HasSubstr("self-test   none\n"));
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, VerifyCheckpoint(folder_ / "ckpt"));
  EXPECT_EQ(manifest.files_size(), 1);
}

TEST_F(ConvertCommandTest, WhatIsThereStaysUnlessForced) {
  Write("out.pth", "precious");
  const CommandResult refused = Pyramid({"convert", "in.safetensors", "out.pth"});
  EXPECT_EQ(refused.code, 4);
  EXPECT_THAT(refused.err, AllOf(HasSubstr("out.pth exists"), HasSubstr("--force")));
  EXPECT_EQ(Bytes("out.pth"), "precious");
  EXPECT_EQ(Pyramid({"convert", "in.safetensors", "out.pth", "--force"}).code, 0);
  EXPECT_NE(Bytes("out.pth"), "precious");
}

TEST_F(ConvertCommandTest, OnlyACheckpointGivesWayToACheckpoint) {
  std::filesystem::create_directory(folder_ / "photos");
  Write("photos/one.png", "precious");
  const CommandResult refused = Pyramid({"convert", "in.safetensors", "photos", "--force"});
  EXPECT_EQ(refused.code, 4);
  EXPECT_THAT(refused.err, HasSubstr("isn't a checkpoint's folder"));
  EXPECT_EQ(Bytes("photos/one.png"), "precious");
  std::filesystem::create_directory(folder_ / "folder.pth");
  EXPECT_EQ(Pyramid({"convert", "in.safetensors", "folder.pth", "--force"}).code, 4);

  LearnToClassify();
  Convert({"in.safetensors", "ckpt"});
  Convert({"in.safetensors", "ckpt", "--force", "--origin", "mindcv"});
  EXPECT_EQ(ReadManifest(folder_ / "ckpt")->origin(), "mindcv");
  Convert({"ckpt", "ckpt", "--force"});  // in place
  EXPECT_EQ(ReadManifest(folder_ / "ckpt")->origin(), "mindcv");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "ckpt.replaced"));
}

TEST_F(ConvertCommandTest, MistakesHaveTheirExitCodes) {
  EXPECT_EQ(Pyramid({"convert", "in.safetensors"}).code, 2);
  EXPECT_EQ(Pyramid({"convert", "in.safetensors", "a.pth", "--naming", "keras"}).code, 2);
  EXPECT_EQ(Pyramid({"convert", "in.safetensors", "a.pth", "--origin", "keras"}).code, 2);
  EXPECT_EQ(Pyramid({"convert", "in.safetensors", "a.pth", "--gelu", "relu"}).code, 2);
  const CommandResult folder =
      Pyramid({"convert", "in.safetensors", "folder", "--naming", "mindcv"});
  EXPECT_EQ(folder.code, 2);
  EXPECT_THAT(folder.err, HasSubstr(".safetensors, .pth, .pt or .ckpt"));
  const CommandResult missing = Pyramid({"convert", "nowhere.pth", "a.pth"});
  EXPECT_EQ(missing.code, 3);
  EXPECT_THAT(missing.err, HasSubstr("nowhere.pth"));
  Write("text.pth", "hello, these are no weights");
  EXPECT_EQ(Pyramid({"convert", "text.pth", "a.pth"}).code, 1);
  const CommandResult ema = Pyramid({"convert", "in.safetensors", "a.pth", "--ema"});
  EXPECT_EQ(ema.code, 1);
  EXPECT_THAT(ema.err, HasSubstr("no averaged weights"));
  const CommandResult head =
      Pyramid({"convert", "in.safetensors", "a.pth", "--head", "new", "--num-classes", "7"});
  EXPECT_EQ(head.code, 1);
  EXPECT_THAT(head.err, HasSubstr("head.weight is new and untrained"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "a.pth"));
}

}  // namespace
}  // namespace pyramid
