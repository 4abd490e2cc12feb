#include <gmock/gmock.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "client/machine.h"
#include "model/checkpoint.h"
#include "model/formats/safetensors.h"
#include "model/kernels/cpu_kernels.h"
#include "tests/client/client_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/weight_file.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using testing::CommandResult;
using ::testing::ContainsRegex;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class InspectCommandTest : public testing::ClientFixture {
 protected:
  InspectCommandTest() {
    const std::string data(2 * 3 * 4, '\0');
    const absl::StatusOr<std::string> weights =
        SerializeSafetensors({{"head.weight", "F32", {2, 3}, data},
                              {"head.bias", "F32", {2}, absl::string_view(data).substr(0, 8)}},
                             {{"format", "pt"}});
    EXPECT_OK(weights);
    Write("weights.safetensors", *weights);
    v1::Manifest manifest;
    manifest.mutable_network()->set_variant("pvt_v2_b0");
    manifest.mutable_network()->set_num_classes(2);
    manifest.mutable_network()->set_in_channels(1);
    manifest.set_origin("pyramid");
    manifest.mutable_preprocessing()->mutable_pad()->set_to(32);
    manifest.mutable_preprocessing()->set_crop(32);
    manifest.mutable_training()->set_validated(true);
    manifest.mutable_training()->set_val_top1(0.9123);
    const absl::StatusOr<v1::Manifest> written = WriteCheckpoint(
        folder_ / "ckpt", manifest,
        {{std::string(kWeightsFile), *weights}, {std::string(kStateFile), "state"}});
    EXPECT_OK(written);
  }
};

TEST_F(InspectCommandTest, ShowsAndVerifiesACheckpoint) {
  const CommandResult result = Pyramid({"inspect", "ckpt"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("pvt_v2_b0, 2 classes, 1 channels"), HasSubstr("pad to 32"),
                    HasSubstr("top-1 0.9123"), HasSubstr("parameters  8\n"),
                    HasSubstr("head.weight  F32    [2, 3]         6"), HasSubstr("sha256:")));
  EXPECT_THAT(result.out, HasSubstr("verified"));
}

TEST_F(InspectCommandTest, JsonHasManifestFilesAndTensors) {
  const CommandResult result = Pyramid({"inspect", "ckpt", "--json"});
  EXPECT_EQ(result.code, 0);
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json.at("kind"), "checkpoint");
  EXPECT_EQ(json.at("verified"), true);
  EXPECT_EQ(json.at("parameters"), 8);
  EXPECT_EQ(json.at("manifest").at("network").at("variant"), "pvt_v2_b0");
  EXPECT_EQ(json.at("files").size(), 2u);
  EXPECT_EQ(json.at("tensors").at(0).at("name"), "head.weight");
  EXPECT_EQ(json.at("digest"), json.at("manifest").at("digest"));
}

TEST_F(InspectCommandTest, NamesWhatIsDamaged) {
  std::fstream file(folder_ / "ckpt" / "state.safetensors",
                    std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(2);
  file.put('X');
  file.close();
  const CommandResult result = Pyramid({"inspect", "ckpt", "--json"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("pyramid: ckpt is damaged: "));
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json.at("verified"), false);
  for (const nlohmann::json& one : json.at("files")) {
    EXPECT_EQ(one.at("ok"), one.at("name") != "state.safetensors");
  }
  EXPECT_THAT(Pyramid({"inspect", "ckpt"}).out, HasSubstr("verified"));
}

TEST_F(InspectCommandTest, MissingFileOfACheckpointIsDamage) {
  std::filesystem::remove(folder_ / "ckpt" / "weights.safetensors");
  EXPECT_NE(Pyramid({"inspect", "ckpt"}).code, 0);
}

TEST_F(InspectCommandTest, ShowsWhatAFileOfWeightsIs) {
  ASSERT_OK(testing::WriteFormulaFile(folder_ / "timm.safetensors", {.naming = Naming::kTimm}));
  const CommandResult result = Pyramid({"inspect", "timm.safetensors"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("format      safetensors\n"),
                    HasSubstr("network     pvt_v2_b0, 10 classes, 3 channels\n"),
                    HasSubstr("numerics    padding torch, GELU erf, outer eps 1e-05\n"),
                    HasSubstr("origin      timm\n"), HasSubstr("naming      timm\n"),
                    HasSubstr("resize to 248"), HasSubstr("parameters  3,412,330\n"),
                    HasSubstr("dtype       F32\n"), HasSubstr("checksum    none in the file\n")));
  const nlohmann::json json =
      nlohmann::json::parse(Pyramid({"inspect", "timm.safetensors", "--json"}).out);
  EXPECT_EQ(json.at("kind"), "weights");
  EXPECT_EQ(json.at("pvt_v2"), true);
  EXPECT_EQ(json.at("format"), "safetensors");
  EXPECT_EQ(json.at("facts").at("naming"), "timm");
  EXPECT_EQ(json.at("parameters"), 3'412'330);
  EXPECT_EQ(json.at("manifest").at("network").at("num_classes"), 10);
  EXPECT_THAT(json.at("digest").get<std::string>(), HasSubstr("sha256:"));
  const nlohmann::json mindcv = nlohmann::json::parse(
      Pyramid({"inspect", "timm.safetensors", "--origin", "mindcv", "--json"}).out);
  EXPECT_EQ(mindcv.at("origin"), "mindcv");
  EXPECT_NE(mindcv.at("digest"), json.at("digest"));
}

TEST_F(InspectCommandTest, ABackboneIsAPvtV2OnlyWithANewHead) {
  ASSERT_OK(testing::WriteFormulaFile(folder_ / "backbone.safetensors", {.classes = 0}));
  const auto inspect = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"inspect", "backbone.safetensors", "--json"});
    return nlohmann::json::parse(Pyramid(more).out);
  };
  EXPECT_EQ(inspect({}).at("pvt_v2"), false);
  EXPECT_THAT(inspect({}).at("reason").get<std::string>(), HasSubstr("with head new"));
  const nlohmann::json headed = inspect({"--head", "new", "--num-classes", "7"});
  EXPECT_EQ(headed.at("pvt_v2"), true);
  EXPECT_EQ(headed.at("manifest").at("network").at("num_classes"), 7);
}

TEST_F(InspectCommandTest, AveragedWeightsAreTakenOnlyWhenAskedFor) {
  // As MindCV keeps them.
  std::vector<std::vector<float>> values;
  std::vector<TensorBytes> tensors;
  for (const char* prefix : {"", "ema."}) {
    for (const ParameterShape& parameter : ParametersOf(*FindVariant("pvt_v2_b0"), 3, 10)) {
      values.push_back(testing::FormulaParameter(parameter.name, parameter.shape));
      tensors.push_back({prefix + FromOfficial(parameter.name, Naming::kMindCv),
                         "F32",
                         parameter.shape,
                         {reinterpret_cast<const char*>(values.back().data()),
                          values.back().size() * sizeof(float)}});
    }
  }
  ASSERT_OK(WriteFileAtomically(folder_ / "both.safetensors", *SerializeSafetensors(tensors)));
  const auto facts = [&](const std::vector<std::string>& more) {
    std::vector<std::string> command = {"inspect", "both.safetensors", "--json"};
    command.insert(command.end(), more.begin(), more.end());
    const nlohmann::json json = nlohmann::json::parse(Pyramid(command).out);
    return json.value("facts", nlohmann::json::object());
  };
  EXPECT_EQ(facts({}).value("weights", ""), "plain");
  EXPECT_EQ(facts({}).value("set aside", ""), "178 averaged tensors");
  EXPECT_EQ(facts({"--ema"}).value("weights", ""), "averaged");
  EXPECT_EQ(facts({"--ema"}).value("set aside", ""), "178 plain tensors");
}

TEST_F(InspectCommandTest, AnotherNetworksFileShowsItsTensorsAndWhy) {
  const CommandResult result = Pyramid({"inspect", "weights.safetensors"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("not a PVT v2"), HasSubstr("parameters  8\n"),
                    HasSubstr("format  pt\n"), HasSubstr("head.bias    F32    [2]            2")));
  const nlohmann::json json =
      nlohmann::json::parse(Pyramid({"inspect", "weights.safetensors", "--json"}).out);
  EXPECT_EQ(json.at("pvt_v2"), false);
  EXPECT_THAT(json.at("reason").get<std::string>(), HasSubstr("not a PVT v2"));
  EXPECT_EQ(json.at("notes").at("format"), "pt");
  EXPECT_EQ(json.at("tensors").at(1).at("shape"), nlohmann::json({2}));
  EXPECT_EQ(Pyramid({"inspect", "weights.safetensors", "--ema"}).code, 1);
}

TEST_F(InspectCommandTest, AFileThatIsNotWhatItsNameSaysIsDamaged) {
  ASSERT_OK(testing::WriteFormulaFile(folder_ / "pvt_v2_b0-01234567.safetensors"));
  const CommandResult result = Pyramid({"inspect", "pvt_v2_b0-01234567.safetensors"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("begins with 01234567"));
  EXPECT_THAT(result.out, HasSubstr("patch_embed1.proj.weight"));
}

// What PyTorch and MindSpore themselves wrote; tests/golden/README.md.
TEST_F(InspectCommandTest, ReadsTheFilesOfOtherPrograms) {
  struct Case {
    const char* name;
    int code;
    const char* format;    // where it is read
    const char* checksum;  // "verified", "none"
    const char* why;       // where it isn't
  };
  const Case cases[] = {
      {"small.safetensors", 0, "safetensors", "none", ""},
      {"mindspore_small.safetensors", 0, "safetensors", "none", ""},
      {"torch_small.pth", 0, "PyTorch zip", "verified", ""},
      {"torch_small_strided_shared.pth", 0, "PyTorch zip", "verified", ""},
      {"torch_small_official_train.pth", 0, "PyTorch zip", "verified", ""},
      {"torch_small_timm_train.pth.tar", 0, "PyTorch zip", "verified", ""},
      {"torch_small_legacy.pth", 0, "PyTorch legacy pickle", "none", ""},
      {"mindspore_small.ckpt", 0, "MindSpore ckpt", "none", ""},
      {"mindspore_small_crc.ckpt", 0, "MindSpore ckpt", "verified", ""},
      {"mindspore_traincell.ckpt", 0, "MindSpore ckpt", "none", ""},
      {"mindspore_bf16.ckpt", 0, "MindSpore ckpt", "none", ""},
      {"mindspore_small_aes.ckpt", 1, "", "", "encrypted"},
      {"torch_malicious.pth", 1, "", "", "system"},
  };
  for (const Case& c : cases) {
    const CommandResult result = Pyramid(
        {"inspect", std::string(PYRAMID_SOURCE_DIR) + "/tests/golden/files/" + c.name, "--json"});
    EXPECT_EQ(result.code, c.code) << c.name << ": " << result.err;
    EXPECT_THAT(result.err, HasSubstr(c.why)) << c.name;
    if (c.code != 0) continue;
    const nlohmann::json json = nlohmann::json::parse(result.out);
    EXPECT_EQ(json.at("format"), c.format) << c.name;
    EXPECT_EQ(json.at("checksum"), c.checksum) << c.name;
    EXPECT_GT(json.at("tensors").size(), 0u) << c.name;
  }
}

TEST_F(InspectCommandTest, AFlippedBitInAZipIsDamage) {
  std::string bytes =
      *ReadFile(std::string(PYRAMID_SOURCE_DIR) + "/tests/golden/files/torch_small.pth");
  const size_t data = bytes.find("/data/0");
  ASSERT_NE(data, std::string::npos);
  // Values begin at the next multiple of 64.
  const size_t values = (data + 8 + 63) / 64 * 64;
  bytes[values] = static_cast<char>(bytes[values] ^ 1);
  Write("flipped.pth", bytes);
  const CommandResult result = Pyramid({"inspect", "flipped.pth", "--json"});
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(nlohmann::json::parse(result.out).at("checksum"), "wrong");
  EXPECT_THAT(result.err, AllOf(HasSubstr("flipped.pth"), HasSubstr("CRC-32")));
}

TEST_F(InspectCommandTest, OtherFilesAreErrors) {
  Write("text.safetensors", "hello, this is no tensor file");
  EXPECT_EQ(Pyramid({"inspect", "text.safetensors"}).code, 1);
  EXPECT_EQ(Pyramid({"inspect", "missing.safetensors"}).code, 3);
  std::filesystem::create_directory(folder_ / "empty");
  EXPECT_EQ(Pyramid({"inspect", "empty"}).code, 3);
}

TEST_F(InspectCommandTest, WantsOneThingToInspect) {
  EXPECT_EQ(Pyramid({"inspect"}).code, 2);
  EXPECT_EQ(Pyramid({"inspect", "ckpt", "--machine"}).code, 2);
  EXPECT_EQ(Pyramid({"inspect", "ckpt", "--origin", "timm"}).code, 2);
}

TEST_F(InspectCommandTest, ShowsTheMachine) {
  const CommandResult result = Pyramid({"inspect", "--machine"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, AllOf(HasSubstr("cores"), HasSubstr("devices"), HasSubstr("gRPC ")));
  const nlohmann::json json =
      nlohmann::json::parse(Pyramid({"inspect", "--machine", "--json"}).out);
  EXPECT_GE(json.at("cores").get<int>(), 1);
  EXPECT_GT(json.at("memory_bytes").get<int64_t>(), 0);
  EXPECT_EQ(json.at("devices").at(0).at("kind"), "cpu");
  EXPECT_TRUE(json.at("versions").contains("grpc"));
}

// PYRAMID_KERNELS for as long as one lives.
class ForcedKernels {
 public:
  explicit ForcedKernels(const char* name) : before_(kernels::ForcedCpuKernels()) {
    setenv("PYRAMID_KERNELS", name, 1);
  }
  ~ForcedKernels() { setenv("PYRAMID_KERNELS", before_.c_str(), 1); }

 private:
  const std::string before_;
};

TEST_F(InspectCommandTest, TheMachinesKernelsAndThoseChosenAreNamed) {
  const ForcedKernels none("");
  const nlohmann::json json =
      nlohmann::json::parse(Pyramid({"inspect", "--machine", "--json"}).out).at("kernels");
  EXPECT_TRUE(json.at("forced").is_null());
  EXPECT_EQ(json.at("sets").back().at("name"), "portable");
  EXPECT_EQ(json.at("sets").back().at("runs"), true);
  const std::string text = Pyramid({"inspect", "--machine"}).out;
  for (const std::string dtype : {"fp32", "bf16"}) {
    const auto chosen = kernels::ChooseCpuKernels(kernels::DetectCpu(), dtype, "");
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ(json.at("chosen").at(dtype), (*chosen)->name);
    EXPECT_THAT(text, ContainsRegex(absl::StrCat(dtype, " computed by +", (*chosen)->name)));
  }
}

TEST_F(InspectCommandTest, ForcedKernelsAreToldAndSoIsWhyTheyCannotBe) {
  {
    const ForcedKernels forced("portable");
    EXPECT_THAT(Pyramid({"inspect", "--machine"}).out,
                AllOf(ContainsRegex("fp32 computed by +portable, forced by PYRAMID_KERNELS"),
                      ContainsRegex("bf16 computed by +portable .bf16 computed in f32., forced")));
    const auto json =
        nlohmann::json::parse(Pyramid({"inspect", "--machine", "--json"}).out).at("kernels");
    EXPECT_EQ(json.at("forced"), "portable");
    EXPECT_EQ(json.at("chosen").at("bf16"), "portable");
  }
  const ForcedKernels forced("amx");
  const CommandResult result = Pyramid({"inspect", "--machine"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, ContainsRegex("fp32 computed by +none: PYRAMID_KERNELS is \"amx\""));
  const auto json =
      nlohmann::json::parse(Pyramid({"inspect", "--machine", "--json"}).out).at("kernels");
  EXPECT_TRUE(json.at("chosen").at("fp32").is_null());
  EXPECT_THAT(json.at("refused").at("fp32").get<std::string>(), HasSubstr("bf16"));
}

TEST_F(InspectCommandTest, MachineReadsWhatLinuxSays) {
  Write("cpuinfo",
        "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu avx2 fma amx_tile\n\n"
        "processor\t: 1\nmodel name\t: Slow CPU\n");
  Write("meminfo", "MemTotal:        8000000 kB\nMemFree: 1 kB\nMemAvailable:    4000000 kB\n");
  const Machine machine = ReadMachine(folder_.path());
  EXPECT_EQ(machine.processor, "Fast CPU");
  EXPECT_THAT(machine.instruction_sets, ElementsAre("fma", "avx2", "amx_tile"));
  EXPECT_EQ(machine.memory_bytes, 8'000'000 * int64_t{1024});
  EXPECT_EQ(machine.memory_available_bytes, 4'000'000 * int64_t{1024});
  const Machine nothing = ReadMachine(folder_ / "nowhere");
  EXPECT_EQ(nothing.memory_bytes, 0);
  EXPECT_GE(nothing.cores, 1);
}

}  // namespace
}  // namespace pyramid
