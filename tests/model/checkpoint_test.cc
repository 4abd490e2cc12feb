#include "model/checkpoint.h"

#include <sys/mount.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/time/clock.h"
#include "model/formats/safetensors.h"
#include "model/recipe.h"
#include "proto/base/file.h"
#include "proto/base/hash.h"
#include "proto/base/time.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::_;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

v1::Manifest ExampleManifest() {
  Recipe recipe;
  v1::Manifest manifest;
  *manifest.mutable_network() = NetworkOf(recipe, 3);
  *manifest.mutable_preprocessing() = EvalPreprocessingOf(recipe);
  manifest.set_origin("pyramid");
  for (const char* label : {"cat", "Größe", "control \x1f \"quoted\""}) manifest.add_labels(label);
  v1::TrainingRecord& training = *manifest.mutable_training();
  training.set_job_id("j-1");
  training.set_attempt_epoch((int64_t{1} << 60) + 1);  // more than a double holds
  training.set_step(1880);
  training.set_recipe("lr: 0.001\n");
  training.set_val_top1(1.0 / 3.0);
  return manifest;
}

std::string Tensor(absl::string_view name, size_t bytes) {
  const std::string data(bytes, 'w');
  auto file =
      SerializeSafetensors({{std::string(name), "U8", {static_cast<int64_t>(bytes)}, data}});
  EXPECT_OK(file);
  return file.ok() ? *file : "";
}

absl::StatusOr<v1::Manifest> WriteExample(const fs::path& folder, size_t weight_bytes = 100) {
  const std::string weights = Tensor("head.weight", weight_bytes);
  const std::string self_test = Tensor("pixels", 40);
  const std::string state = Tensor("moment", 60);
  return WriteCheckpoint(folder, ExampleManifest(),
                         {{std::string(kWeightsFile), weights},
                          {std::string(kSelfTestFile), self_test},
                          {std::string(kStateFile), state}});
}

std::string Slurp(const fs::path& path) {
  auto bytes = ReadFile(path);
  EXPECT_OK(bytes);
  return bytes.ok() ? *bytes : "";
}

// Without sync: these tests write thousands of times.
void Spill(const fs::path& path, absl::string_view bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::vector<std::string> NamesIn(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

// What an editor of manifests has to do by docs/formats.md.
void RewriteManifest(const fs::path& folder, const std::function<void(nlohmann::json&)>& edit) {
  const fs::path path = folder / std::string(kManifestFile);
  nlohmann::json tree = nlohmann::json::parse(Slurp(path));
  edit(tree);
  tree.erase("checksum");
  tree["checksum"] = Sha256Hex(tree.dump());
  Spill(path, tree.dump(2) + "\n");
}

TEST(CheckpointTest, AManifestThatCouldNotBeReadBackIsNotWritten) {
  TempFolder folder;
  v1::Manifest manifest = ExampleManifest();
  manifest.mutable_training()->set_recipe(std::string(2 << 20, 'x'));
  const std::string weights = Tensor("head.weight", 40);
  EXPECT_THAT(WriteCheckpoint(folder / "step", manifest, {{std::string(kWeightsFile), weights}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("use shorter labels")));
  EXPECT_THAT(NamesIn(folder.path()), ::testing::IsEmpty());
  EXPECT_EQ(ManifestToJson(manifest), "");
}

TEST(CheckpointTest, AnOverlongManifestIsDataLoss) {
  TempFolder folder;
  ASSERT_OK(WriteExample(folder / "step"));
  RewriteManifest(folder / "step", [](nlohmann::json& tree) {
    tree["later"] = std::vector<int>(300'000);  // seven bytes each
  });
  const auto names_the_limit = StatusIs(absl::StatusCode::kDataLoss, HasSubstr("at most 1572864"));
  EXPECT_THAT(ReadManifest(folder / "step"), names_the_limit);
  EXPECT_THAT(ManifestFromJson(Slurp(folder / "step" / std::string(kManifestFile))),
              names_the_limit);
}

TEST(CheckpointTest, ReadsBackWhatItWrote) {
  TempFolder folder;
  const absl::Time before = absl::Now();
  ASSERT_OK_AND_ASSIGN(const v1::Manifest written, WriteExample(folder / "a/step-00001880"));
  EXPECT_EQ(written.format_version(), kManifestVersion);
  EXPECT_THAT(written.created_by(), StartsWith("pyramid "));
  EXPECT_THAT(written.digest(), ::testing::MatchesRegex("sha256:[0-9a-f]{64}"));
  EXPECT_GE(FromProto(written.created()), before - absl::Seconds(1));
  EXPECT_LE(FromProto(written.created()), absl::Now() + absl::Seconds(1));

  const fs::path checkpoint = folder / "a/step-00001880";
  EXPECT_THAT(NamesIn(checkpoint), ElementsAre("manifest.json", "self_test.safetensors",
                                               "state.safetensors", "weights.safetensors"));
  EXPECT_THAT(NamesIn(folder / "a"), ElementsAre("step-00001880"));
  ASSERT_OK_AND_ASSIGN(const v1::Manifest read, ReadManifest(checkpoint));
  EXPECT_EQ(read.SerializeAsString(), written.SerializeAsString());
  ASSERT_OK_AND_ASSIGN(const v1::Manifest verified, VerifyCheckpoint(checkpoint));
  EXPECT_EQ(verified.SerializeAsString(), written.SerializeAsString());
  ASSERT_OK_AND_ASSIGN(const std::string weights,
                       ReadCheckpointFile(checkpoint, read, kWeightsFile));
  EXPECT_EQ(weights, Tensor("head.weight", 100));
  EXPECT_THAT(ReadCheckpointFile(checkpoint, read, "other"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("lists no other")));
}

TEST(CheckpointTest, ManifestsUseTheProtosFieldNames) {
  TempFolder folder;
  ASSERT_OK(WriteExample(folder / "c"));
  const auto tree = nlohmann::json::parse(Slurp(folder / "c/manifest.json"));
  EXPECT_EQ(tree["format_version"], 1);
  EXPECT_EQ(tree["network"]["num_classes"], 3);
  EXPECT_EQ(tree["network"]["numerics"]["eps_outer"], 1e-5);
  EXPECT_EQ(tree["training"]["attempt_epoch"], "1152921504606846977");
  EXPECT_EQ(tree["training"]["validated"], false);  // defaults are written too
  EXPECT_EQ(tree["files"][0]["name"], "weights.safetensors");
  EXPECT_EQ(tree["labels"][1], "Größe");
}

TEST(CheckpointTest, TheDigestFollowsWhatTheModelIs) {
  TempFolder folder;
  const std::string weights = Tensor("w", 8);
  const auto digest_of = [&](const std::string& name,
                             const std::function<void(v1::Manifest&)>& edit,
                             const std::string& bytes) {
    v1::Manifest manifest = ExampleManifest();
    edit(manifest);
    auto written = WriteCheckpoint(folder / name, manifest, {{std::string(kWeightsFile), bytes}});
    EXPECT_OK(written);
    return written.ok() ? written->digest() : "";
  };
  const auto same = [](v1::Manifest&) {};
  const std::string digest = digest_of("0", same, weights);
  EXPECT_EQ(digest, digest_of("1", same, weights));
  EXPECT_EQ(digest, digest_of(
                        "2", [](v1::Manifest& m) { m.mutable_training()->set_step(7); }, weights));
  EXPECT_NE(digest, digest_of("3", same, Tensor("w", 9)));
  EXPECT_NE(digest, digest_of(
                        "4", [](v1::Manifest& m) { m.set_labels(0, "dog"); }, weights));
  EXPECT_NE(digest,
            digest_of(
                "5", [](v1::Manifest& m) { m.mutable_preprocessing()->set_crop(192); }, weights));
  EXPECT_NE(digest, digest_of(
                        "6", [](v1::Manifest& m) { m.mutable_network()->set_variant("pvt_v2_b1"); },
                        weights));
  EXPECT_NE(digest, digest_of(
                        "7", [](v1::Manifest& m) { m.set_origin("timm"); }, weights));
}

TEST(CheckpointTest, EveryDamagedByteOfTheManifestIsDataLoss) {
  TempFolder folder;
  ASSERT_OK(WriteExample(folder / "c"));
  const std::string good = Slurp(folder / "c/manifest.json");
  ASSERT_OK(ManifestFromJson(good));
  for (size_t at = 0; at < good.size(); ++at) {
    // Bit 5 turns small letters into capitals: 1e-05 into 1E-05, which is the same number.
    for (const size_t bit : {size_t{5}, at % 8}) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << bit));
      ASSERT_THAT(ManifestFromJson(bad), StatusIs(absl::StatusCode::kDataLoss, _))
          << "bit " << bit << " of byte " << at << ", '" << good[at] << "' to '" << bad[at] << "'";
    }
  }
}

TEST(CheckpointTest, EveryFlippedByteOfAFileIsDataLoss) {
  TempFolder folder;
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, WriteExample(folder / "c"));
  for (const char* name :
       {"weights.safetensors", "self_test.safetensors", "state.safetensors", "manifest.json"}) {
    const fs::path path = folder / "c" / name;
    const std::string good = Slurp(path);
    for (size_t at = 0; at < good.size(); ++at) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << (at % 8)));
      Spill(path, bad);
      ASSERT_THAT(VerifyCheckpoint(folder / "c"),
                  StatusIs(absl::StatusCode::kDataLoss, HasSubstr(name)))
          << at;
      if (absl::string_view(name) != kManifestFile) {
        ASSERT_THAT(ReadCheckpointFile(folder / "c", manifest, name),
                    StatusIs(absl::StatusCode::kDataLoss, HasSubstr("SHA-256")));
      }
    }
    Spill(path, good);
    ASSERT_OK(VerifyCheckpoint(folder / "c"));
  }
}

TEST(CheckpointTest, TruncatedGrownAndMissingFilesAreDataLoss) {
  TempFolder folder;
  ASSERT_OK_AND_ASSIGN(const v1::Manifest manifest, WriteExample(folder / "c"));
  for (const char* name : {"weights.safetensors", "self_test.safetensors", "state.safetensors"}) {
    const fs::path path = folder / "c" / name;
    const std::string good = Slurp(path);
    for (const std::string& bad : {good.substr(0, good.size() - 1), std::string(), good + "x"}) {
      Spill(path, bad);
      EXPECT_THAT(VerifyCheckpoint(folder / "c"),
                  StatusIs(absl::StatusCode::kDataLoss, HasSubstr("bytes")));
      EXPECT_THAT(ReadCheckpointFile(folder / "c", manifest, name),
                  StatusIs(absl::StatusCode::kDataLoss, HasSubstr("bytes")));
    }
    fs::remove(path);
    EXPECT_THAT(VerifyCheckpoint(folder / "c"),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(name)));
    EXPECT_THAT(ReadCheckpointFile(folder / "c", manifest, name),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(name)));
    Spill(path, good);
  }
  const std::string good = Slurp(folder / "c/manifest.json");
  for (const size_t size : {size_t{0}, size_t{1}, good.size() / 2, good.size() - 1}) {
    Spill(folder / "c/manifest.json", good.substr(0, size));
    EXPECT_THAT(ReadManifest(folder / "c"),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("manifest.json")));
  }
}

TEST(CheckpointTest, NoFolderAndNoManifestAreNotFound) {
  TempFolder folder;
  EXPECT_THAT(ReadManifest(folder / "none"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  fs::create_directory(folder / "empty");
  EXPECT_THAT(ReadManifest(folder / "empty"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("manifest.json")));
  EXPECT_THAT(VerifyCheckpoint(folder / "empty"), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(CopyForServing(folder / "empty", folder / "to"),
              StatusIs(absl::StatusCode::kNotFound, _));
}

TEST(CheckpointTest, ANewerFormatIsRefusedNamingBothVersions) {
  TempFolder folder;
  ASSERT_OK(WriteExample(folder / "c"));
  RewriteManifest(folder / "c", [](nlohmann::json& tree) { tree["format_version"] = 7; });
  EXPECT_THAT(ReadManifest(folder / "c"),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("format_version is 7"), HasSubstr("up to 1"))));
}

TEST(CheckpointTest, ManifestsThatLieAreRefused) {
  TempFolder folder;
  ASSERT_OK(WriteExample(folder / "c"));
  const std::string good = Slurp(folder / "c/manifest.json");
  const auto expect_loss = [&](const char* message,
                               const std::function<void(nlohmann::json&)>& edit) {
    RewriteManifest(folder / "c", edit);
    EXPECT_THAT(VerifyCheckpoint(folder / "c"),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(message)));
    Spill(folder / "c/manifest.json", good);
  };
  expect_loss("digest", [](nlohmann::json& tree) { tree["labels"][0] = "dog"; });
  expect_loss("digest", [](nlohmann::json& tree) { tree["network"]["variant"] = "pvt_v2_b5"; });
  expect_loss("../../etc/passwd",
              [](nlohmann::json& tree) { tree["files"][0]["name"] = "../../etc/passwd"; });
  expect_loss("can't be", [](nlohmann::json& tree) { tree["files"][1] = tree["files"][0]; });
  expect_loss("not a manifest", [](nlohmann::json& tree) { tree["network"] = 5; });
  expect_loss("no format_version", [](nlohmann::json& tree) { tree.erase("format_version"); });
  EXPECT_THAT(ManifestFromJson("[]"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("not a JSON object")));
  EXPECT_THAT(ManifestFromJson("{}"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("no checksum")));
  EXPECT_THAT(ManifestFromJson(std::string(1 << 20, '[')),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("nested")));
}

TEST(CheckpointTest, ManifestToJsonComesBackTheSame) {
  const v1::Manifest manifest = [] {
    v1::Manifest m = ExampleManifest();
    m.set_format_version(1);
    return m;
  }();
  const std::string text = ManifestToJson(manifest);
  ASSERT_OK_AND_ASSIGN(const v1::Manifest back, ManifestFromJson(text));
  EXPECT_EQ(back.SerializeAsString(), manifest.SerializeAsString());
  EXPECT_EQ(ManifestToJson(back), text);
}

TEST(CheckpointTest, ADivergedRunCanBeSaved) {
  TempFolder folder;
  v1::Manifest manifest = ExampleManifest();
  manifest.mutable_training()->set_val_loss(-std::numeric_limits<double>::quiet_NaN());
  manifest.mutable_training()->set_val_top1(std::numeric_limits<double>::infinity());
  const std::string weights = Tensor("w", 8);
  ASSERT_OK(WriteCheckpoint(folder / "c", manifest, {{std::string(kWeightsFile), weights}}));
  ASSERT_OK_AND_ASSIGN(const v1::Manifest read, VerifyCheckpoint(folder / "c"));
  EXPECT_TRUE(std::isnan(read.training().val_loss()));
  EXPECT_TRUE(std::isinf(read.training().val_top1()));
}

TEST(CheckpointTest, AnExistingFolderIsLeftAlone) {
  TempFolder folder;
  ASSERT_OK_AND_ASSIGN(const v1::Manifest first, WriteExample(folder / "c"));
  EXPECT_THAT(WriteExample(folder / "c", 5),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("exists")));
  ASSERT_OK_AND_ASSIGN(const v1::Manifest now, VerifyCheckpoint(folder / "c"));
  EXPECT_EQ(now.digest(), first.digest());
}

TEST(CheckpointTest, OddFileNamesAreRefused) {
  TempFolder folder;
  const std::string weights = Tensor("w", 8);
  const std::string name(kWeightsFile);
  for (const std::string& bad : {std::string("../x"), std::string(""), std::string(".."),
                                 std::string("a/b"), std::string(kManifestFile), name}) {
    EXPECT_THAT(
        WriteCheckpoint(folder / "c", ExampleManifest(), {{name, weights}, {bad, weights}}),
        StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("can't be a checkpoint's file")))
        << bad;
  }
  EXPECT_THAT(WriteCheckpoint(folder / "c", ExampleManifest(), {}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("needs weights.safetensors")));
  v1::Manifest manifest = ExampleManifest();
  manifest.set_origin("\xff");
  EXPECT_THAT(WriteCheckpoint(folder / "c", manifest, {{name, weights}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("UTF-8")));
  EXPECT_EQ(ManifestToJson(manifest), "");
  EXPECT_THAT(NamesIn(folder.path()), IsEmpty());
}

TEST(CheckpointTest, ListsFinishedCheckpointsOldestFirst) {
  TempFolder folder;
  EXPECT_THAT(ListCheckpoints(folder / "none"), IsEmpty());
  for (const int64_t step : {int64_t{300}, int64_t{20}, int64_t{123456789}}) {
    ASSERT_OK(WriteExample(folder / CheckpointName(step)));
  }
  // An interrupted write, one that lost its manifest, and strangers.
  fs::copy(folder / CheckpointName(20), folder / "step-00000400.tmp");
  fs::create_directory(folder / "step-00000500");
  Spill(folder / "step-00000500/weights.safetensors", "half");
  fs::create_directory(folder / "step-7");
  Spill(folder / "step-7/manifest.json", "{}");
  Spill(folder / "step-00000600", "a file");
  EXPECT_THAT(
      ListCheckpoints(folder.path()),
      ElementsAre(folder / "step-00000020", folder / "step-00000300", folder / "step-123456789"));
  EXPECT_EQ(CheckpointName(1880), "step-00001880");
}

TEST(CheckpointTest, ALeftoverOfAnInterruptedWriteIsReplaced) {
  TempFolder folder;
  fs::create_directory(folder / "c.tmp");
  Spill(folder / "c.tmp/garbage", "left over");
  ASSERT_OK(WriteExample(folder / "c"));
  EXPECT_THAT(NamesIn(folder.path()), ElementsAre("c"));
  EXPECT_THAT(NamesIn(folder / "c"), ElementsAre("manifest.json", "self_test.safetensors",
                                                 "state.safetensors", "weights.safetensors"));
}

TEST(CheckpointTest, CopyForServingLeavesTheTrainingStateAndKeepsUnknownFields) {
  TempFolder folder;
  ASSERT_OK_AND_ASSIGN(const v1::Manifest original, WriteExample(folder / "from"));
  RewriteManifest(folder / "from", [](nlohmann::json& tree) {
    tree["future"] = {{"temperature", 1.25}, {"list", {1, 2, 3}}};
    tree["training"]["carbon_grams"] = 12;
  });
  ASSERT_OK_AND_ASSIGN(const v1::Manifest copied,
                       CopyForServing(folder / "from", folder / "models/m/1"));
  EXPECT_EQ(copied.digest(), original.digest());
  EXPECT_THAT(NamesIn(folder / "models/m/1"),
              ElementsAre("manifest.json", "self_test.safetensors", "weights.safetensors"));
  ASSERT_OK(VerifyCheckpoint(folder / "models/m/1"));
  const auto tree = nlohmann::json::parse(Slurp(folder / "models/m/1/manifest.json"));
  EXPECT_EQ(tree["future"]["temperature"], 1.25);
  EXPECT_EQ(tree["future"]["list"].size(), 3u);
  EXPECT_EQ(tree["training"]["carbon_grams"], 12);
  EXPECT_EQ(tree["files"].size(), 2u);
  EXPECT_THAT(CopyForServing(folder / "from", folder / "models/m/1"),
              StatusIs(absl::StatusCode::kAlreadyExists, _));
}

TEST(CheckpointTest, CopyForServingRefusesADamagedCheckpoint) {
  TempFolder folder;
  ASSERT_OK(WriteExample(folder / "from"));
  std::string weights = Slurp(folder / "from/weights.safetensors");
  weights.back() = static_cast<char>(weights.back() ^ 1);
  Spill(folder / "from/weights.safetensors", weights);
  EXPECT_THAT(CopyForServing(folder / "from", folder / "to"),
              StatusIs(absl::StatusCode::kDataLoss, _));
  EXPECT_THAT(NamesIn(folder.path()), ElementsAre("from"));
}

// A file system of its own in memory.
class SmallDisk {
 public:
  SmallDisk(const fs::path& at, const char* options) : at_(at) {
    fs::create_directories(at);
    mounted_ = mount("tmpfs", at.c_str(), "tmpfs", 0, options) == 0;
    if (!mounted_) error_ = std::strerror(errno);
  }
  ~SmallDisk() {
    if (mounted_) umount2(at_.c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }
  const std::string& error() const { return error_; }

 private:
  fs::path at_;
  bool mounted_ = false;
  std::string error_;
};

TEST(CheckpointTest, AFullDiskIsToldBeforeWritingAndTheOldCheckpointStays) {
  TempFolder folder;
  const SmallDisk disk(folder / "disk", "size=256k");
  if (!disk.mounted()) GTEST_SKIP() << "this user can't mount a tmpfs: " << disk.error();
  ASSERT_OK(WriteExample(folder / "disk/step-00000001", 100'000));
  EXPECT_THAT(WriteExample(folder / "disk/step-00000002", 400'000),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("disk full"), HasSubstr("needs 4"), HasSubstr(" free"))));
  EXPECT_THAT(NamesIn(folder / "disk"), ElementsAre("step-00000001"));
  EXPECT_OK(VerifyCheckpoint(folder / "disk/step-00000001"));
  ASSERT_OK(WriteExample(folder / "big", 400'000));
  EXPECT_THAT(CopyForServing(folder / "big", folder / "disk/copy"),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("disk full")));
  EXPECT_THAT(NamesIn(folder / "disk"), ElementsAre("step-00000001"));
}

TEST(CheckpointTest, ADiskThatFillsUpWhileWritingLeavesNothingBehind) {
  TempFolder folder;
  // Room enough, but so few inodes that a later file of the checkpoint can't be made.
  const SmallDisk disk(folder / "disk", "size=10m,nr_inodes=9");
  if (!disk.mounted()) GTEST_SKIP() << "this user can't mount a tmpfs: " << disk.error();
  ASSERT_OK(WriteExample(folder / "disk/step-00000001"));
  EXPECT_THAT(WriteExample(folder / "disk/step-00000002"),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("step-00000002")));
  EXPECT_THAT(NamesIn(folder / "disk"), ElementsAre("step-00000001"));
  EXPECT_OK(VerifyCheckpoint(folder / "disk/step-00000001"));
}

}  // namespace
}  // namespace pyramid
