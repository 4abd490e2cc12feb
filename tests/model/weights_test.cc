#include "model/weights.h"

#include <zlib.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/checkpoint.h"
#include "model/formats/safetensors.h"
#include "model/formats/weight_writer.h"
#include "model/imagenet_labels.h"
#include "model/recipe.h"
#include "model/variants.h"
#include "model/weight_notes.h"
#include "proto/base/file.h"
#include "proto/base/hash.h"
#include "tests/testing/formula_weights.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;
using ::pyramid::testing::FormulaParameter;
using ::pyramid::testing::FormulaWeights;
using ::pyramid::testing::StatusIs;
using ::pyramid::testing::TempFolder;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kClasses = 10;
constexpr auto kInvalidArgument = absl::StatusCode::kInvalidArgument;
constexpr auto kDataLoss = absl::StatusCode::kDataLoss;

// ---- Files as others write them ----

struct Blob {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;
};

std::vector<Blob> FormulaBlobs(const std::string& variant = "pvt_v2_b0", int classes = kClasses,
                               int channels = 3) {
  std::vector<Blob> blobs;
  for (ParameterShape& shape : ParametersOf(*FindVariant(variant), channels, classes)) {
    std::vector<float> values = FormulaParameter(shape.name, shape.shape);
    blobs.push_back({std::move(shape.name), std::move(shape.shape), std::move(values)});
  }
  return blobs;
}

// Under another naming; transformers' kv is taken apart.
std::vector<Blob> Renamed(const std::vector<Blob>& blobs, Naming naming) {
  std::vector<Blob> renamed;
  for (const Blob& blob : blobs) {
    const std::string name = FromOfficial(blob.name, naming);
    if (!name.empty()) {
      renamed.push_back({name, blob.shape, blob.values});
      continue;
    }
    const size_t stage = blob.name[5] - '1';  // "block1.0.attn.kv.weight"
    const size_t at = blob.name.find(".attn.kv.");
    const size_t half = blob.values.size() / 2;
    for (const char* part : {"key", "value"}) {
      Blob own{
          absl::StrCat("pvt_v2.encoder.layers.", stage, ".blocks.", blob.name.substr(7, at - 7),
                       ".attention.", part, ".", blob.name.substr(at + 9)),
          blob.shape,
          {}};
      own.shape[0] /= 2;
      const auto begin = blob.values.begin() + (part[0] == 'k' ? 0 : half);
      own.values.assign(begin, begin + half);
      renamed.push_back(std::move(own));
    }
  }
  return renamed;
}

std::vector<Blob> Scaled(std::vector<Blob> blobs, float factor) {
  for (Blob& blob : blobs) {
    for (float& value : blob.values) value *= factor;
  }
  return blobs;
}

std::vector<Blob> Prefixed(std::vector<Blob> blobs, const std::string& prefix) {
  for (Blob& blob : blobs) blob.name = prefix + blob.name;
  return blobs;
}

uint16_t Half(float value) {  // of a number that it can hold, not denormal
  if (value == 0) return 0;
  int exponent = 0;
  const float mantissa = std::frexp(std::abs(value), &exponent);  // [0.5, 1)
  return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | (exponent + 14) << 10 |
                               static_cast<int>((mantissa * 2 - 1) * 1024));
}

std::string BytesAs(const std::vector<float>& values, const std::string& dtype) {
  std::string bytes;
  const auto append = [&bytes](const auto& number) {
    bytes.append(reinterpret_cast<const char*>(&number), sizeof(number));
  };
  for (const float value : values) {
    if (dtype == "F32") append(value);
    if (dtype == "F64") append(double{value});
    if (dtype == "F16") append(Half(value));
    if (dtype == "BF16") append(static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16));
  }
  return bytes;
}

void WriteSafetensors(const fs::path& path, const std::vector<Blob>& blobs,
                      const std::string& dtype = "F32",
                      const std::map<std::string, std::string>& metadata = {}) {
  std::vector<std::string> bytes;
  for (const Blob& blob : blobs) bytes.push_back(BytesAs(blob.values, dtype));
  std::vector<TensorBytes> tensors;
  for (size_t i = 0; i < blobs.size(); ++i) {
    tensors.push_back({blobs[i].name, dtype, blobs[i].shape, bytes[i]});
  }
  ASSERT_OK_AND_ASSIGN(const std::string file, SerializeSafetensors(tensors, metadata));
  ASSERT_OK(WriteFileSynced(path, file));
}

// MindSpore's format, float32 throughout.
void WriteMindSpore(const fs::path& path, const std::vector<Blob>& blobs) {
  std::vector<TensorHeader> headers;
  for (const Blob& blob : blobs) headers.push_back({blob.name, blob.shape});
  const auto fill = [&](size_t index, std::span<float> out) {
    std::copy(blobs[index].values.begin(), blobs[index].values.end(), out.begin());
    return absl::OkStatus();
  };
  ASSERT_OK(
      WriteAside(path, [&](ByteSink sink) { return StreamMindSpore(headers, {}, fill, sink); }));
}

std::string LittleEndian(uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i)
    text.push_back(i < 8 ? static_cast<char>(value >> (8 * i)) : '\0');
  return text;
}

// A zip of stored records.
std::string Zip(const std::vector<std::pair<std::string, std::string>>& records) {
  std::string file, directory;
  for (const auto& [name, content] : records) {
    const uint32_t crc = static_cast<uint32_t>(
        crc32_z(0, reinterpret_cast<const Bytef*>(content.data()), content.size()));
    const std::string common =
        absl::StrCat(LittleEndian(0, 8), LittleEndian(crc, 4), LittleEndian(content.size(), 4),
                     LittleEndian(content.size(), 4), LittleEndian(name.size(), 2));
    absl::StrAppend(&directory, "PK\x01\x02", LittleEndian(20, 2), LittleEndian(20, 2), common,
                    LittleEndian(0, 12), LittleEndian(file.size(), 4), name);
    absl::StrAppend(&file, "PK\x03\x04", LittleEndian(20, 2), common, LittleEndian(0, 2), name,
                    content);
  }
  const size_t start = file.size();
  absl::StrAppend(&file, directory, "PK\x05\x06", LittleEndian(0, 4),
                  LittleEndian(records.size(), 2), LittleEndian(records.size(), 2),
                  LittleEndian(directory.size(), 4), LittleEndian(start, 4), LittleEndian(0, 2));
  return file;
}

// torch.save of {group: {name: tensor}, …, "epoch": 7}.
void WriteTorchTraining(const fs::path& path,
                        const std::vector<std::pair<std::string, std::vector<Blob>>>& groups) {
  const auto text = [](const std::string& t) {
    return absl::StrCat("X", LittleEndian(t.size(), 4), t);
  };
  const auto number = [](int64_t n) { return absl::StrCat("J", LittleEndian(n, 4)); };
  std::string pickle = "\x80\x02}(";
  std::vector<std::pair<std::string, std::string>> records;
  for (const auto& [group, blobs] : groups) {
    absl::StrAppend(&pickle, text(group), "}(");
    for (const Blob& blob : blobs) {
      const std::string key = absl::StrCat(records.size());
      absl::StrAppend(&pickle, text(blob.name), "ctorch._utils\n_rebuild_tensor_v2\n((",
                      text("storage"), "ctorch\nFloatStorage\n", text(key), text("cpu"),
                      number(static_cast<int64_t>(blob.values.size())), "tQ", number(0), "(");
      for (const int64_t dimension : blob.shape) pickle += number(dimension);
      pickle += "t(";
      int64_t stride = static_cast<int64_t>(blob.values.size());
      for (const int64_t dimension : blob.shape) pickle += number(stride /= dimension);
      pickle +=
          "t\x89"
          "ccollections\nOrderedDict\n)RtR";
      records.emplace_back("archive/data/" + key, BytesAs(blob.values, "F32"));
    }
    pickle += "u";
  }
  absl::StrAppend(&pickle, text("epoch"), "K\x07u.");
  records.insert(records.begin(), {"archive/data.pkl", pickle});
  records.emplace_back("archive/version", "3\n");
  ASSERT_OK(WriteFileSynced(path, Zip(records)));
}

// ---- Looking at weights ----

std::vector<float> Values(const Weights& weights, const std::string& name) {
  for (const WeightParameter& parameter : weights.parameters()) {
    if (parameter.name != name) continue;
    int64_t elements = 1;
    for (const int64_t dimension : parameter.shape) elements *= dimension;
    std::vector<float> values(static_cast<size_t>(elements));
    EXPECT_OK(weights.Read(parameter, values));
    return values;
  }
  ADD_FAILURE() << "no parameter " << name;
  return {};
}

// Every parameter bit by bit; the first difference is enough.
void ExpectValues(const Weights& weights, const std::vector<Blob>& blobs) {
  ASSERT_EQ(weights.parameters().size(), blobs.size());
  for (size_t i = 0; i < blobs.size(); ++i) {
    const WeightParameter& parameter = weights.parameters()[i];
    ASSERT_EQ(parameter.name, blobs[i].name);
    ASSERT_EQ(parameter.shape, blobs[i].shape);
    ASSERT_FALSE(parameter.fresh);
    std::vector<float> values(blobs[i].values.size());
    ASSERT_OK(weights.Read(parameter, values));
    ASSERT_EQ(std::memcmp(values.data(), blobs[i].values.data(), values.size() * 4), 0)
        << parameter.name;
  }
}

std::string Fact(const Weights& weights, const std::string& name) {
  for (const auto& [key, value] : weights.facts()) {
    if (key == name) return value;
  }
  return "";
}

std::vector<std::string> NamesIn(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class WeightsTest : public ::testing::Test {
 protected:
  TempFolder folder_;
  const fs::path file_ = folder_ / "weights.safetensors";
};

// ---- Whose they are ----

struct Origin {
  Naming naming;
  const char* origin;
  const char* pad_style;
  const char* gelu;
  double eps_outer;
  int side;
  const char* antialias;
};

class OriginTest : public WeightsTest, public ::testing::WithParamInterface<Origin> {};

TEST_P(OriginTest, FollowsFromTheNaming) {
  const Origin& expected = GetParam();
  const std::vector<Blob> blobs = FormulaBlobs("pvt_v2_b0", 1000);
  WriteSafetensors(file_, Renamed(blobs, expected.naming));
  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_));
  ExpectValues(*weights, blobs);
  const v1::Manifest& manifest = weights->manifest();
  EXPECT_EQ(manifest.origin(), expected.origin);
  EXPECT_EQ(manifest.network().variant(), "pvt_v2_b0");
  EXPECT_EQ(manifest.network().num_classes(), 1000);
  EXPECT_EQ(manifest.network().in_channels(), 3);
  const v1::Numerics& numerics = manifest.network().numerics();
  EXPECT_EQ(numerics.pad_style(), expected.pad_style);
  EXPECT_EQ(numerics.gelu(), expected.gelu);
  EXPECT_EQ(numerics.eps_outer(), expected.eps_outer);
  EXPECT_EQ(numerics.eps_block(), 1e-6);
  const v1::Preprocessing& p = manifest.preprocessing();
  EXPECT_EQ(p.channels(), 3);
  EXPECT_EQ(p.exif(), "apply");
  EXPECT_EQ(p.resize().side(), expected.side);
  EXPECT_EQ(p.resize().kernel(), "bicubic");
  EXPECT_EQ(p.resize().antialias(), expected.antialias);
  EXPECT_EQ(p.resize().other_side(), "floor");
  EXPECT_EQ(p.crop(), 224);
  EXPECT_THAT(p.mean(), ElementsAre(0.485, 0.456, 0.406));
  EXPECT_THAT(p.std(), ElementsAre(0.229, 0.224, 0.225));
  ASSERT_EQ(manifest.labels_size(), 1000);
  EXPECT_EQ(manifest.labels(281), "tabby, tabby cat");
  EXPECT_TRUE(absl::StartsWith(manifest.created_by(), "pyramid "));
  const std::string sha256 = *Sha256HexOfFile(file_);
  EXPECT_EQ(manifest.digest(), ManifestDigest(manifest, sha256));
  EXPECT_EQ(Fact(*weights, "format"), "safetensors");
  EXPECT_EQ(Fact(*weights, "naming"), NamingName(expected.naming));
  EXPECT_EQ(Fact(*weights, "wrapper"), "none");
  EXPECT_EQ(Fact(*weights, "dtype"), "F32");
  EXPECT_EQ(Fact(*weights, "parameters"), "3666760");
  EXPECT_EQ(Fact(*weights, "sha256"), sha256);
}

INSTANTIATE_TEST_SUITE_P(
    All, OriginTest,
    ::testing::Values(Origin{Naming::kOfficial, "official", "torch", "erf", 1e-5, 256, "pillow"},
                      Origin{Naming::kTimm, "timm", "torch", "erf", 1e-5, 248, "pillow"},
                      Origin{Naming::kMindCv, "mindcv", "same", "tanh", 1e-7, 248, "none"},
                      Origin{Naming::kTransformers, "transformers", "torch", "erf", 1e-6, 256,
                             "pillow"}),
    [](const auto& test) { return NamingName(test.param.naming); });

TEST_F(WeightsTest, OriginAndNumericsCanBeOverridden) {
  WriteSafetensors(file_, FormulaBlobs());
  ASSERT_OK_AND_ASSIGN(const auto plain, OpenWeights(file_));
  ASSERT_OK_AND_ASSIGN(const auto mindcv, OpenWeights(file_, {.origin = "mindcv"}));
  EXPECT_EQ(mindcv->manifest().origin(), "mindcv");
  EXPECT_EQ(mindcv->manifest().network().numerics().pad_style(), "same");
  EXPECT_EQ(mindcv->manifest().preprocessing().resize().antialias(), "none");
  EXPECT_NE(mindcv->manifest().digest(), plain->manifest().digest());
  EXPECT_EQ(mindcv->manifest().labels_size(), 0);
  ASSERT_OK_AND_ASSIGN(
      const auto mixed,
      OpenWeights(file_, {.pad_style = "same", .gelu = "tanh", .eps_outer = 1e-6}));
  EXPECT_EQ(mixed->manifest().origin(), "official");
  EXPECT_EQ(mixed->manifest().network().numerics().pad_style(), "same");
  EXPECT_EQ(mixed->manifest().network().numerics().gelu(), "tanh");
  EXPECT_EQ(mixed->manifest().network().numerics().eps_outer(), 1e-6);
  EXPECT_EQ(mixed->manifest().preprocessing().resize().side(), 256);
  ASSERT_OK_AND_ASSIGN(const auto own, OpenWeights(file_, {.origin = "pyramid"}));
  EXPECT_EQ(own->manifest().preprocessing().resize().side(), 248);
}

TEST_F(WeightsTest, OptionsThatCantWorkAreRefusedByName) {
  WriteSafetensors(file_, FormulaBlobs());
  const std::pair<WeightOptions, const char*> cases[] = {
      {{.origin = "torch"},
       "origin is \"torch\"; use official, timm, transformers, mindcv or pyramid"},
      {{.naming = "keras"}, "naming is \"keras\""},
      {{.pad_style = "valid"}, "pad_style is \"valid\"; use torch or same"},
      {{.gelu = "relu"}, "gelu is \"relu\"; use erf or tanh"},
      {{.eps_outer = -1}, "eps_outer is -1"},
      {{.eps_outer = NAN}, "eps_outer is nan"},
      {{.head = "drop"}, "head is \"drop\""},
      {{.head = "new"}, "num_classes is 0; use 1 or more with head new"},
      {{.num_classes = -1}, "num_classes is -1"},
      {{.in_channels = -1}, "in_channels is -1"},
      {{.naming = "timm"}, "none with a name of the naming timm"},
  };
  for (const auto& [options, message] : cases) {
    if (options.naming == "timm") {
      // head.* are names of both; without them nothing of timm's is left.
      auto blobs = FormulaBlobs();
      blobs.resize(blobs.size() - 2);
      WriteSafetensors(file_, blobs);
    }
    EXPECT_THAT(OpenWeights(file_, options), StatusIs(kInvalidArgument, HasSubstr(message)));
  }
}

// ---- Types, prefixes, wrappers ----

TEST_F(WeightsTest, HalvesAndDoublesAreReadExactly) {
  std::vector<Blob> blobs = FormulaBlobs();
  for (Blob& blob : blobs) {
    for (float& value : blob.values)
      value = std::round(value * 64) / 64 + 0.0f;  // fits every type; no -0
  }
  for (const char* dtype : {"F16", "BF16", "F64"}) {
    WriteSafetensors(file_, Renamed(blobs, Naming::kTimm), dtype);
    ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_));
    ExpectValues(*weights, blobs);
    EXPECT_EQ(Fact(*weights, "dtype"), dtype);
  }
}

TEST_F(WeightsTest, PrefixesOfTrainingWrappersAreTakenOff) {
  const std::vector<Blob> blobs = FormulaBlobs();
  for (const char* prefix : {"module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."}) {
    WriteSafetensors(file_, Prefixed(blobs, prefix));
    ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_));
    ExpectValues(*weights, blobs);
  }
  std::vector<Blob> twice = blobs;
  twice.push_back({"module.head.bias", {kClasses}, std::vector<float>(kClasses)});
  WriteSafetensors(file_, twice);
  EXPECT_THAT(OpenWeights(file_), StatusIs(kInvalidArgument, HasSubstr("1 twice (head.bias)")));
}

TEST_F(WeightsTest, TrainingFilesGiveTheNetworkAndSetTheRestAside) {
  const std::vector<Blob> blobs = FormulaBlobs();
  const std::vector<Blob> state = {{"exp_avg", {2, 2}, {1, 2, 3, 4}}, {"exp_avg_sq", {1}, {5}}};
  const fs::path path = folder_ / "train.pth";
  WriteTorchTraining(path, {{"optimizer", state}, {"model", Prefixed(blobs, "module.")}});
  {
    ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(path));
    ExpectValues(*weights, blobs);
    EXPECT_EQ(Fact(*weights, "format"), "PyTorch zip");
    EXPECT_EQ(Fact(*weights, "wrapper"), "model");
    EXPECT_EQ(Fact(*weights, "set aside"), "2 tensors outside the wrapper");
    EXPECT_THAT(OpenWeights(path, {.ema = true}),
                StatusIs(kInvalidArgument, HasSubstr("no averaged weights")));
  }
  const std::vector<Blob> averaged = Scaled(blobs, 0.5f);
  for (const char* ema : {"state_dict_ema", "model_ema", "ema"}) {
    WriteTorchTraining(path, {{"state_dict", Renamed(blobs, Naming::kTimm)},
                              {ema, Prefixed(Renamed(averaged, Naming::kTimm), "module.")}});
    ASSERT_OK_AND_ASSIGN(const auto plain, OpenWeights(path));
    ExpectValues(*plain, blobs);
    EXPECT_EQ(Fact(*plain, "wrapper"), "state_dict");
    EXPECT_EQ(Fact(*plain, "weights"), "plain");
    ASSERT_OK_AND_ASSIGN(const auto smooth, OpenWeights(path, {.ema = true}));
    ExpectValues(*smooth, averaged);
    EXPECT_EQ(Fact(*smooth, "wrapper"), ema);
    EXPECT_EQ(Fact(*smooth, "weights"), "averaged");
  }
  WriteTorchTraining(path, {{"model_ema", blobs}});
  EXPECT_THAT(
      OpenWeights(path),
      StatusIs(kInvalidArgument, HasSubstr("averaged weights only; ask for them with ema")));
}

TEST_F(WeightsTest, MindSporeTrainCellsGiveTheNetworkAndSetTheRestAside) {
  const std::vector<Blob> blobs = FormulaBlobs();
  const std::vector<Blob> own = Renamed(blobs, Naming::kMindCv);
  std::vector<Blob> all = own;
  for (const char* prefix : {"adam_m.", "adam_v."}) {
    for (const Blob& blob : Prefixed(Scaled(own, 3), prefix)) all.push_back(blob);
  }
  all.push_back({"beta1_power", {}, {0.9f}});
  all.push_back({"beta2_power", {}, {0.99f}});
  all.push_back({"global_step", {1}, {5}});
  all.push_back({"learning_rate", {4}, {1, 2, 3, 4}});
  all.push_back({"scale_sense", {}, {1024}});
  all.push_back({"current_iterator_step", {}, {3}});
  const fs::path path = folder_ / "train.ckpt";
  WriteMindSpore(path, all);
  {
    ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(path));
    ExpectValues(*weights, blobs);
    EXPECT_EQ(weights->manifest().origin(), "mindcv");
    EXPECT_EQ(Fact(*weights, "format"), "MindSpore ckpt");
    EXPECT_EQ(Fact(*weights, "set aside"), "362 optimizer tensors");
    EXPECT_THAT(OpenWeights(path, {.ema = true}),
                StatusIs(kInvalidArgument, HasSubstr("no averaged weights")));
  }
  const std::vector<Blob> averaged = Scaled(blobs, 0.25f);
  for (const Blob& blob : Prefixed(Scaled(own, 0.25f), "ema.")) all.push_back(blob);
  WriteMindSpore(path, all);
  ASSERT_OK_AND_ASSIGN(const auto plain, OpenWeights(path));
  ExpectValues(*plain, blobs);
  EXPECT_EQ(Fact(*plain, "set aside"), "362 optimizer tensors, 178 averaged tensors");
  ASSERT_OK_AND_ASSIGN(const auto smooth, OpenWeights(path, {.ema = true}));
  ExpectValues(*smooth, averaged);
  EXPECT_EQ(Fact(*smooth, "set aside"), "362 optimizer tensors, 178 plain tensors");
  // What isn't a parameter's and isn't training's either is no part of a PVT v2.
  all.push_back({"neck.weight", {2, 2}, {1, 2, 3, 4}});
  WriteMindSpore(path, all);
  EXPECT_THAT(OpenWeights(path), StatusIs(kInvalidArgument, HasSubstr("1 unused (neck.weight)")));
}

// ---- Strictness ----

TEST_F(WeightsTest, MissingUnusedAndMisshapenTensorsAreListed) {
  std::vector<Blob> blobs = Renamed(FormulaBlobs(), Naming::kTimm);
  std::vector<Blob> wrong;
  for (Blob& blob : blobs) {
    if (blob.name == "stages.0.blocks.1.norm1.weight") continue;
    if (blob.name == "stages.3.norm.bias") blob.shape = {2, 128};
    if (blob.name == "stages.1.norm.bias") blob.name = "neck.bias";
    wrong.push_back(blob);
  }
  WriteSafetensors(file_, wrong);
  EXPECT_THAT(
      OpenWeights(file_),
      StatusIs(kInvalidArgument,
               AllOf(HasSubstr("2 missing (stages.0.blocks.1.norm1.weight, stages.1.norm.bias)"),
                     HasSubstr("1 unused (neck.bias)"),
                     HasSubstr("1 misshapen (stages.3.norm.bias is [2, 128], not [256])"),
                     HasSubstr("pvt_v2_b0 in timm naming"), HasSubstr(file_.string()))));
}

TEST_F(WeightsTest, OfManyMissingTensorsEightAreNamed) {
  std::vector<Blob> blobs = FormulaBlobs();
  std::erase_if(blobs, [](const Blob& blob) { return absl::StartsWith(blob.name, "block4.1."); });
  WriteSafetensors(file_, blobs);
  EXPECT_THAT(
      OpenWeights(file_),
      StatusIs(kInvalidArgument, AllOf(HasSubstr("16 missing (block4.1.norm1.weight, "),
                                       HasSubstr("block4.1.attn.proj.bias and 8 more)"),
                                       HasSubstr("must hold exactly that network's parameters"))));
}

TEST_F(WeightsTest, HalfOfTransformersKvIsMissed) {
  std::vector<Blob> blobs = Renamed(FormulaBlobs(), Naming::kTransformers);
  std::erase_if(blobs, [](const Blob& blob) {
    return blob.name == "pvt_v2.encoder.layers.1.blocks.0.attention.value.weight";
  });
  WriteSafetensors(file_, blobs);
  EXPECT_THAT(OpenWeights(file_),
              StatusIs(kInvalidArgument, HasSubstr("a part of block2.0.attn.kv.weight")));
}

TEST_F(WeightsTest, OtherNetworksAreRefusedWithWhatTheyLookLike) {
  WriteSafetensors(file_, {{"conv1.weight", {2}, {1, 2}}, {"fc.bias", {1}, {3}}});
  EXPECT_THAT(OpenWeights(file_),
              StatusIs(kInvalidArgument, AllOf(HasSubstr("not a PVT v2: 2 tensors (conv1.weight, "
                                                         "fc.bias)"),
                                               HasSubstr("patch_embed1.proj.weight"))));
  WriteSafetensors(file_, {});
  EXPECT_THAT(OpenWeights(file_), StatusIs(kInvalidArgument, HasSubstr("holds no tensors")));
  WriteSafetensors(file_, {{"patch_embed1.proj.weight", {8, 3, 7, 7}, std::vector<float>(1176)}});
  EXPECT_THAT(
      OpenWeights(file_),
      StatusIs(kInvalidArgument,
               AllOf(HasSubstr("no variant that is known"), HasSubstr("8, 0, 0, 0 channels"),
                     HasSubstr("0, 0, 0, 0 blocks"), HasSubstr("pvt_v2_b2_li"))));
  EXPECT_THAT(OpenWeights(folder_ / "nothing.pth"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nothing.pth")));
  ASSERT_OK(WriteFileSynced(file_, "a text"));
  EXPECT_THAT(OpenWeights(file_), StatusIs(kInvalidArgument, HasSubstr("none of the formats")));
  EXPECT_THAT(OpenWeights(folder_.path()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("manifest.json")));
}

// Headers decide, so the data may be a hole in the file, a byte an element.
TEST_F(WeightsTest, EveryVariantIsTold) {
  for (const Variant& variant : Variants()) {
    std::string header = "{";
    int64_t offset = 0;
    for (const ParameterShape& parameter : ParametersOf(variant, 1, 7)) {
      int64_t elements = 1;
      for (const int64_t dimension : parameter.shape) elements *= dimension;
      absl::StrAppend(&header, header.size() > 1 ? "," : "", "\"", parameter.name,
                      "\":{\"dtype\":\"I8\",\"shape\":[", absl::StrJoin(parameter.shape, ","),
                      "],\"data_offsets\":[", offset, ",", offset + elements, "]}");
      offset += elements;
    }
    header += "}";
    ASSERT_OK(WriteFileSynced(file_, LittleEndian(header.size(), 8) + header));
    fs::resize_file(file_, 8 + header.size() + static_cast<size_t>(offset));
    ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_));
    EXPECT_EQ(weights->manifest().network().variant(), std::string(variant.name));
    EXPECT_EQ(weights->manifest().network().num_classes(), 7);
    EXPECT_EQ(weights->manifest().network().in_channels(), 1);
  }
}

// ---- Heads and channels ----

TEST_F(WeightsTest, AClassifierOfAnotherSizeIsLeftOutOnlyWhenAsked) {
  const std::vector<Blob> blobs = FormulaBlobs("pvt_v2_b0", 1000);
  WriteSafetensors(file_, blobs);
  EXPECT_OK(OpenWeights(file_, {.num_classes = 1000}));
  EXPECT_THAT(OpenWeights(file_, {.num_classes = 7}),
              StatusIs(kInvalidArgument,
                       AllOf(HasSubstr("has 1000 classes, asked are 7"), HasSubstr("head new"))));
  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_, {.head = "new", .num_classes = 7}));
  EXPECT_EQ(weights->manifest().network().num_classes(), 7);
  EXPECT_EQ(weights->manifest().labels_size(), 0);
  EXPECT_EQ(Fact(*weights, "set aside"), "head.weight, head.bias");
  const WeightParameter& head = weights->parameters()[weights->parameters().size() - 2];
  EXPECT_EQ(head.name, "head.weight");
  EXPECT_TRUE(head.fresh);
  EXPECT_THAT(head.shape, ElementsAre(7, 256));
  std::vector<float> values(7 * 256);
  EXPECT_THAT(weights->Read(head, values),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("head.weight is new")));
  EXPECT_EQ(Values(*weights, "norm4.bias"), FormulaParameter("norm4.bias", {256}));
}

TEST_F(WeightsTest, ABackboneWithoutClassifierNeedsANewHead) {
  std::vector<Blob> blobs = Renamed(FormulaBlobs(), Naming::kTransformers);
  std::erase_if(blobs, [](const Blob& blob) { return absl::StartsWith(blob.name, "classifier."); });
  for (Blob& blob : blobs) blob.name = blob.name.substr(7);  // as PvtV2Backbone saves them
  WriteSafetensors(file_, blobs);
  EXPECT_THAT(
      OpenWeights(file_),
      StatusIs(kInvalidArgument, AllOf(HasSubstr("2 missing (classifier.weight, classifier.bias)"),
                                       HasSubstr("with head new"))));
  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_, {.head = "new", .num_classes = 3}));
  EXPECT_EQ(weights->manifest().network().num_classes(), 3);
}

TEST_F(WeightsTest, OtherChannelCountsAdaptTheFirstConvolutionAsTimmDoes) {
  const std::vector<int64_t> shape = {32, 3, 7, 7};
  const std::vector<float> stored = FormulaParameter("patch_embed1.proj.weight", shape);
  WriteSafetensors(file_, FormulaBlobs());
  for (const int channels : {1, 3, 4, 7}) {
    ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_, {.in_channels = channels}));
    EXPECT_EQ(weights->manifest().network().in_channels(), channels);
    const std::vector<float> values = Values(*weights, "patch_embed1.proj.weight");
    ASSERT_EQ(values.size(), static_cast<size_t>(32 * channels * 49));
    for (int o = 0; o < 32; ++o) {
      for (int c = 0; c < channels; ++c) {
        for (int i = 0; i < 49; ++i) {
          const auto at = [&](int channel) { return stored[(o * 3 + channel) * 49 + i]; };
          const float expected =
              channels == 1 ? at(0) + at(1) + at(2) : at(c % 3) * (3.0f / channels);
          ASSERT_FLOAT_EQ(values[(o * channels + c) * 49 + i], expected);
        }
      }
    }
    const v1::Preprocessing& p = weights->manifest().preprocessing();
    EXPECT_EQ(p.channels(), channels == 1 || channels == 3 ? channels : 0);
    if (channels == 1) {
      ASSERT_EQ(p.mean_size(), 1);
      EXPECT_NEAR(p.mean(0), 0.449, 1e-9);
      EXPECT_NEAR(p.std(0), 0.226, 1e-9);
      EXPECT_EQ(p.resize().side(), 256);
    }
  }
}

TEST_F(WeightsTest, GreyNetworksBecomeColouredOnes) {
  WriteSafetensors(file_, FormulaBlobs("pvt_v2_b0", kClasses, 1));
  ASSERT_OK_AND_ASSIGN(const auto grey, OpenWeights(file_));
  EXPECT_EQ(grey->manifest().preprocessing().channels(), 1);
  ASSERT_OK_AND_ASSIGN(const auto coloured, OpenWeights(file_, {.in_channels = 3}));
  EXPECT_EQ(coloured->manifest().preprocessing().mean_size(), 3);
  const std::vector<float> one = Values(*grey, "patch_embed1.proj.weight");
  const std::vector<float> three = Values(*coloured, "patch_embed1.proj.weight");
  for (int i = 0; i < 49; ++i) EXPECT_FLOAT_EQ(3 * three[49 + i], one[i]);
}

// ---- Hashes in names ----

TEST_F(WeightsTest, AHashInTheNameIsChecked) {
  WriteSafetensors(file_, FormulaBlobs());
  const std::string sha256 = *Sha256HexOfFile(file_);
  const auto open = [&](const std::string& name) {
    fs::copy_file(file_, folder_ / name, fs::copy_options::overwrite_existing);
    return OpenWeights(folder_ / name);
  };
  EXPECT_OK(open(absl::StrCat("pvt_v2_b0-", sha256.substr(0, 8), ".ckpt")));
  EXPECT_OK(open(absl::StrCat("pvt_v2_b0-", sha256.substr(0, 8), "-910v2.ckpt")));
  for (const char* name : {"pvt_v2_b0-1c4f6683.ckpt", "pvt_v2_b0-D9CD9D6A-910v2.ckpt"}) {
    EXPECT_THAT(open(name), StatusIs(kDataLoss, AllOf(HasSubstr(sha256), HasSubstr(name))));
  }
  // A step, a date, another word: no hashes.
  for (const char* name : {"pvt_v2_b0-1_1251.ckpt", "run-20240101.ckpt", "pvt_v2_b0-12345678",
                           "pvt_v2_b0-123456789.ckpt", "pvt_v2_b0-finetune.ckpt"}) {
    EXPECT_OK(open(name)) << name;
  }
}

// ---- Writing ----

struct Output {
  OutputFormat format;
  Naming naming;
  const char* origin;
  const char* file;
};

class WriteWeightsTest : public WeightsTest, public ::testing::WithParamInterface<Output> {};

TEST_P(WriteWeightsTest, TheWayBackGivesTheSameModelBitByBit) {
  const Output& output = GetParam();
  FormulaWeights weights("pvt_v2_b0", output.origin, 3);
  v1::Manifest& manifest = weights.mutable_manifest();
  for (const char* label : {"Straße", "\"quoted\", and [more]", "日本"}) manifest.add_labels(label);
  manifest.mutable_preprocessing()->mutable_resize()->set_side(300);
  ASSERT_OK(WriteWeights(weights, folder_ / output.file, output.format, output.naming));
  EXPECT_THAT(NamesIn(folder_.path()), ElementsAre(output.file));
  ASSERT_OK_AND_ASSIGN(const auto back, OpenWeights(folder_ / output.file));
  ExpectValues(*back, FormulaBlobs("pvt_v2_b0", 3));
  EXPECT_EQ(back->manifest().network().DebugString(), manifest.network().DebugString());
  EXPECT_EQ(back->manifest().origin(), output.origin);
  EXPECT_EQ(back->manifest().preprocessing().DebugString(), manifest.preprocessing().DebugString());
  EXPECT_THAT(back->manifest().labels(), ElementsAre("Straße", "\"quoted\", and [more]", "日本"));
  EXPECT_EQ(Fact(*back, "naming"), NamingName(output.naming));

  // And once more: the second file is the first, byte by byte.
  const fs::path again = folder_ / absl::StrCat("again-", output.file);
  ASSERT_OK(WriteWeights(*back, again, output.format, output.naming));
  EXPECT_EQ(*Sha256HexOfFile(again), *Sha256HexOfFile(folder_ / output.file));
}

std::vector<Output> Outputs() {
  std::vector<Output> outputs;
  for (const char* origin : {"official", "timm", "transformers", "mindcv", "pyramid"}) {
    for (const Naming naming : {Naming::kOfficial, Naming::kTimm, Naming::kMindCv}) {
      outputs.push_back({OutputFormat::kSafetensors, naming, origin, "w.safetensors"});
      outputs.push_back({OutputFormat::kTorchZip, naming, origin, "w.pth"});
      outputs.push_back({OutputFormat::kMindSpore, naming, origin, "w.ckpt"});
    }
  }
  return outputs;
}

INSTANTIATE_TEST_SUITE_P(All, WriteWeightsTest, ::testing::ValuesIn(Outputs()),
                         [](const auto& test) {
                           return absl::StrCat(NamingName(test.param.naming), "_",
                                               fs::path(test.param.file).extension().c_str() + 1,
                                               "_of_", test.param.origin);
                         });

TEST_F(WeightsTest, AMindCvCheckpointIsWrittenAsMindSporeWouldWriteIt) {
  const fs::path path = folder_ / "w.ckpt";
  ASSERT_OK(WriteWeights(FormulaWeights("pvt_v2_b0", "mindcv"), path, OutputFormat::kMindSpore,
                         Naming::kMindCv));
  ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightFile(path));
  EXPECT_TRUE(file.notes.empty());
  ASSERT_EQ(file.tensors.size(), 178u);
  EXPECT_EQ(file.tensors[2].name, "patch_embed_list.0.norm.gamma");
  ASSERT_OK_AND_ASSIGN(const auto back, OpenWeights(path));
  EXPECT_EQ(back->manifest().origin(), "mindcv");
  EXPECT_EQ(back->manifest().labels_size(), 1000);
}

TEST_F(WeightsTest, WritingRefusesWhatCantBeRead) {
  FormulaWeights weights("pvt_v2_b0", "timm", kClasses);
  EXPECT_THAT(WriteWeights(weights, file_, OutputFormat::kSafetensors, Naming::kTransformers),
              StatusIs(kInvalidArgument, HasSubstr("use official, timm or mindcv")));
  EXPECT_THAT(WriteWeights(weights, folder_ / "w.bin", OutputFormat::kMindSpore, Naming::kMindCv),
              StatusIs(kInvalidArgument, AllOf(HasSubstr("w.bin"), HasSubstr(".ckpt"))));
  weights.mutable_parameters().back().fresh = true;
  EXPECT_THAT(WriteWeights(weights, file_, OutputFormat::kSafetensors, Naming::kOfficial),
              StatusIs(kInvalidArgument, HasSubstr("head.bias is new and untrained")));
  EXPECT_THAT(WriteWeightsAsCheckpoint(weights, folder_ / "checkpoint", ""),
              StatusIs(kInvalidArgument, HasSubstr("head.bias is new and untrained")));
  EXPECT_TRUE(NamesIn(folder_.path()).empty());
}

TEST_F(WeightsTest, AFullDiskLeavesTheOldFileAndNothingElse) {
  const FormulaWeights weights("pvt_v2_b0", "timm", kClasses);
  ASSERT_OK(WriteFileSynced(file_, "old"));
  fs::create_symlink("/dev/full", file_.string() + ".tmp");
  EXPECT_THAT(WriteWeights(weights, file_, OutputFormat::kSafetensors, Naming::kTimm),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("No space left")));
  EXPECT_THAT(NamesIn(folder_.path()), ElementsAre("weights.safetensors"));
  EXPECT_EQ(*ReadFile(file_), "old");
  EXPECT_THAT(
      WriteWeights(weights, folder_ / "no/such.pth", OutputFormat::kTorchZip, Naming::kTimm),
      StatusIs(absl::StatusCode::kNotFound, HasSubstr("no/such.pth")));
}

// ---- Checkpoint folders ----

class CheckpointWeightsTest : public WeightsTest {
 protected:
  CheckpointWeightsTest() {
    EXPECT_OK(WriteWeightsAsCheckpoint(FormulaWeights("pvt_v2_b0", "mindcv", kClasses), path_, ""));
  }
  const fs::path path_ = folder_ / "step-00000001";
};

TEST_F(CheckpointWeightsTest, AreWhatWasWritten) {
  ASSERT_OK_AND_ASSIGN(const v1::Manifest written, VerifyCheckpoint(path_));
  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(path_));
  ExpectValues(*weights, FormulaBlobs());
  EXPECT_EQ(weights->manifest().DebugString(), written.DebugString());
  EXPECT_EQ(written.origin(), "mindcv");
  EXPECT_EQ(written.network().numerics().pad_style(), "same");
  EXPECT_EQ(written.preprocessing().resize().antialias(), "none");
  EXPECT_EQ(Fact(*weights, "sha256"), written.files(0).sha256());
}

TEST_F(CheckpointWeightsTest, TakeASelfTestAlong) {
  const fs::path other = folder_ / "other";
  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(path_));
  ASSERT_OK_AND_ASSIGN(const v1::Manifest written,
                       WriteWeightsAsCheckpoint(*weights, other, "arrays"));
  EXPECT_EQ(written.files_size(), 2);
  EXPECT_EQ(*ReadCheckpointFile(other, written, kSelfTestFile), "arrays");
  EXPECT_EQ(written.digest(), weights->manifest().digest());  // the same model
  EXPECT_THAT(WriteWeightsAsCheckpoint(*weights, other, ""),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("other")));
}

TEST_F(CheckpointWeightsTest, OverridesMakeAnotherModel) {
  ASSERT_OK_AND_ASSIGN(const auto plain, OpenWeights(path_));
  ASSERT_OK_AND_ASSIGN(const auto erf, OpenWeights(path_, {.gelu = "erf"}));
  EXPECT_EQ(erf->manifest().network().numerics().gelu(), "erf");
  EXPECT_EQ(erf->manifest().network().numerics().pad_style(), "same");
  EXPECT_NE(erf->manifest().digest(), plain->manifest().digest());
  ASSERT_OK_AND_ASSIGN(const auto grey, OpenWeights(path_, {.in_channels = 1}));
  EXPECT_EQ(grey->manifest().preprocessing().channels(), 1);
  ASSERT_OK_AND_ASSIGN(const auto fresh, OpenWeights(path_, {.head = "new", .num_classes = 5}));
  EXPECT_TRUE(fresh->parameters().back().fresh);
  EXPECT_THAT(OpenWeights(path_, {.num_classes = 5}),
              StatusIs(kInvalidArgument, HasSubstr("has 10 classes, asked are 5")));
}

TEST_F(CheckpointWeightsTest, DamageIsFoundBeforeAnythingIsRead) {
  {
    std::fstream file(path_ / std::string(kWeightsFile),
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(1'000'000);
    file.put('\x55');
  }
  EXPECT_THAT(OpenWeights(path_), StatusIs(kDataLoss, HasSubstr("SHA-256")));
}

TEST_F(CheckpointWeightsTest, AManifestThatDoesntFitItsWeightsIsRefused) {
  for (const char* variant : {"pvt_v2_b1", "pvt_v2_b9"}) {
    const fs::path other = folder_ / variant;
    ASSERT_OK_AND_ASSIGN(v1::Manifest manifest, ReadManifest(path_));
    ASSERT_OK_AND_ASSIGN(const std::string bytes,
                         ReadCheckpointFile(path_, manifest, kWeightsFile));
    manifest.mutable_network()->set_variant(variant);
    ASSERT_OK(WriteCheckpoint(other, manifest, {{std::string(kWeightsFile), bytes}}));
    EXPECT_THAT(OpenWeights(other),
                StatusIs(kInvalidArgument,
                         HasSubstr(variant[8] == '1' ? "misshapen" : "\"pvt_v2_b9\"; use one of")));
  }
}

// ---- Reading ----

TEST_F(WeightsTest, ReadingChecksTheResultAndTheFile) {
  WriteSafetensors(file_, FormulaBlobs());
  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_));
  std::vector<float> few(9), right(kClasses);
  EXPECT_THAT(weights->Read({"head.bias", {kClasses}}, few),
              StatusIs(kInvalidArgument, HasSubstr("head.bias has 10 numbers, the result 9")));
  EXPECT_THAT(weights->Read({"neck.bias", {kClasses}}, right),
              StatusIs(kInvalidArgument, HasSubstr("no parameter neck.bias")));
  fs::resize_file(file_, 100'000);
  EXPECT_THAT(weights->Read({"head.bias", {kClasses}}, right), StatusIs(kDataLoss, HasSubstr("")));
}

TEST_F(WeightsTest, TensorsThatArentNumbersAreRefusedWhenRead) {
  std::string bytes(4, '\1');
  std::vector<Blob> blobs = FormulaBlobs();
  std::vector<std::string> data;
  std::vector<TensorBytes> tensors;
  for (const Blob& blob : blobs) {
    data.push_back(blob.name == "head.bias" ? std::string(kClasses, '\1')
                                            : BytesAs(blob.values, "F32"));
  }
  for (size_t i = 0; i < blobs.size(); ++i) {
    tensors.push_back(
        {blobs[i].name, blobs[i].name == "head.bias" ? "BOOL" : "F32", blobs[i].shape, data[i]});
  }
  ASSERT_OK(WriteFileSynced(file_, *SerializeSafetensors(tensors)));
  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_));
  std::vector<float> values(kClasses);
  EXPECT_THAT(weights->Read({"head.bias", {kClasses}}, values),
              StatusIs(kInvalidArgument, HasSubstr("BOOL")));
}

// ---- Notes ----

TEST(WeightNotesTest, LongListsOfLabelsAreCutInPiecesThatFit) {
  v1::Manifest manifest;
  manifest.set_origin("pyramid");
  for (int i = 0; i < 1000; ++i) manifest.add_labels(absl::StrCat("class number ", i, " é"));
  const WeightNotes notes = WeightNotesOf(manifest);
  EXPECT_GT(notes.size(), 20u);
  for (const auto& [name, text] : notes) {
    EXPECT_LE(text.size(), 1024u) << name;
    for (const char c : text) ASSERT_LT(static_cast<unsigned char>(c), 0x80) << name;
  }
  v1::Manifest back;
  ASSERT_OK(ReadWeightNotes(notes, back));
  ASSERT_EQ(back.labels_size(), 1000);
  EXPECT_EQ(back.labels(999), "class number 999 é");
  manifest.set_labels(5, std::string(1500, 'x'));
  v1::Manifest without;
  ASSERT_OK(ReadWeightNotes(WeightNotesOf(manifest), without));
  EXPECT_EQ(without.labels_size(), 0);
}

TEST_F(WeightsTest, NotesThatCantBeReadAreDamage) {
  const std::vector<Blob> blobs = FormulaBlobs();
  for (const auto& [name, text] : {std::pair("pyramid.numerics", "{\"gelu\":"),
                                   {"pyramid.preprocessing", "no"},
                                   {"pyramid.labels.0", "[1, 2]"},
                                   {"pyramid.labels.0", "\"a\""}}) {
    WriteSafetensors(file_, blobs, "F32", {{name, text}});
    EXPECT_THAT(OpenWeights(file_), StatusIs(kDataLoss, HasSubstr(name)));
  }
  WriteSafetensors(file_, blobs, "F32", {{"pyramid.origin", "keras"}});
  EXPECT_THAT(OpenWeights(file_), StatusIs(kInvalidArgument, HasSubstr("origin \"keras\"")));
  WriteSafetensors(file_, blobs, "F32", {{"format", "pt"}, {"author", "someone"}});
  EXPECT_OK(OpenWeights(file_));
}

TEST_F(WeightsTest, LabelsOfAnotherCountThanTheClassesAreLeftOut) {
  WriteSafetensors(file_, FormulaBlobs(), "F32", {{"pyramid.labels.0", "[\"a\",\"b\"]"}});
  ASSERT_OK_AND_ASSIGN(const auto weights, OpenWeights(file_));
  EXPECT_EQ(weights->manifest().labels_size(), 0);
}

TEST(ImageNetLabelsTest, AreTheThousandInTheirOrder) {
  const std::span<const std::string> labels = ImageNetLabels();
  ASSERT_EQ(labels.size(), 1000u);
  EXPECT_EQ(labels[0], "tench, Tinca tinca");
  EXPECT_EQ(labels[281], "tabby, tabby cat");
  EXPECT_EQ(labels[999], "toilet tissue, toilet paper, bathroom tissue");
  for (const std::string& label : labels) EXPECT_FALSE(label.empty());
}

// ---- Where published weights lie ----

class PretrainedTest : public ::testing::Test {
 protected:
  PretrainedTest() { setenv("PYRAMID_WEIGHTS", folder_.path().c_str(), 1); }
  ~PretrainedTest() override { unsetenv("PYRAMID_WEIGHTS"); }
  void Touch(const fs::path& name) {
    fs::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name) << "x";
  }
  TempFolder folder_;
};

TEST_F(PretrainedTest, PrefersThePublishedNames) {
  Touch("pvt_v2_b0-mine.ckpt");
  Touch("pvt_v2_b2_li-mine.ckpt");
  EXPECT_EQ(*FindPretrained("pvt_v2_b0", "mindcv"), folder_ / "pvt_v2_b0-mine.ckpt");
  Touch("pvt_v2_b0-d9cd9d6a-910v2.ckpt");
  EXPECT_EQ(*FindPretrained("pvt_v2_b0", "mindcv"), folder_ / "pvt_v2_b0-d9cd9d6a-910v2.ckpt");
  Touch("pvt_v2_b0-1c4f6683.ckpt");
  EXPECT_EQ(*FindPretrained("pvt_v2_b0", "mindcv"), folder_ / "pvt_v2_b0-1c4f6683.ckpt");
  Touch("pvt_v2_b2.pth");
  EXPECT_EQ(*FindPretrained("pvt_v2_b2", "timm"), folder_ / "pvt_v2_b2.pth");
  Touch("pvt_v2_b2.in1k/model.safetensors");
  EXPECT_EQ(*FindPretrained("pvt_v2_b2", "timm"), folder_ / "pvt_v2_b2.in1k/model.safetensors");
  Touch("pvt_v2_b2.in1k.safetensors");
  EXPECT_EQ(*FindPretrained("pvt_v2_b2", "timm"), folder_ / "pvt_v2_b2.in1k.safetensors");
}

TEST_F(PretrainedTest, SaysWhichFileFromWhereIsMissing) {
  EXPECT_THAT(
      FindPretrained("pvt_v2_b3", "mindcv"),
      StatusIs(absl::StatusCode::kNotFound,
               AllOf(HasSubstr("pvt_v2_b3-feaae3fc.ckpt"), HasSubstr(folder_.path().string()),
                     HasSubstr("mindspore-lab/mindcv"), HasSubstr("PYRAMID_WEIGHTS"))));
  EXPECT_THAT(FindPretrained("pvt_v2_b5", "mindcv"),
              StatusIs(absl::StatusCode::kNotFound,
                       AllOf(HasSubstr("MindCV publishes no weights of pvt_v2_b5"),
                             HasSubstr("compat timm"))));
  EXPECT_THAT(
      FindPretrained("pvt_v2_b5", "timm"),
      StatusIs(absl::StatusCode::kNotFound,
               AllOf(HasSubstr("pvt_v2_b5.in1k.safetensors"), HasSubstr("pvt_v2_b5.pth"),
                     HasSubstr("release v2 of whai362/PVT"), HasSubstr("timm/pvt_v2_b5.in1k"))));
  EXPECT_THAT(FindPretrained("pvt_v2_b7", "timm"), StatusIs(kInvalidArgument, HasSubstr("b7")));
  EXPECT_THAT(FindPretrained("pvt_v2_b0", "jax"),
              StatusIs(kInvalidArgument, HasSubstr("use timm or mindcv")));
}

TEST_F(PretrainedTest, WithoutTheVariableTheCacheInTheHomeIsUsed) {
  unsetenv("PYRAMID_WEIGHTS");
  const char* home = std::getenv("HOME");
  const std::string kept = home == nullptr ? "" : home;
  setenv("HOME", folder_.path().c_str(), 1);
  Touch(".cache/pyramid/weights/pvt_v2_b1.pth");
  EXPECT_EQ(*FindPretrained("pvt_v2_b1", "timm"), folder_ / ".cache/pyramid/weights/pvt_v2_b1.pth");
  if (home != nullptr) setenv("HOME", kept.c_str(), 1);
}

// ---- The writers themselves ----

const std::vector<TensorHeader> kHeaders = {
    {"a", {2, 3}}, {"scalar", {}}, {"empty", {0, 4}}, {"b", {7}}};

absl::Status FillCounting(size_t index, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(100 * index + i);
  return absl::OkStatus();
}

absl::StatusOr<std::string> Written(absl::FunctionRef<absl::Status(ByteSink sink)> write) {
  std::string bytes;
  RETURN_IF_ERROR(write([&bytes](absl::string_view more) {
    absl::StrAppend(&bytes, more);
    return absl::OkStatus();
  }));
  return bytes;
}

void ExpectCounting(const std::string& bytes) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightBytes(MakeMemorySource(bytes)));
  ASSERT_EQ(file.tensors.size(), std::size(kHeaders));
  for (const StoredTensor& tensor : file.tensors) {
    size_t index = 0;
    while (kHeaders[index].name != tensor.name) ASSERT_LT(++index, std::size(kHeaders));
    EXPECT_EQ(tensor.shape, kHeaders[index].shape) << tensor.name;
    std::vector<float> values(static_cast<size_t>(tensor.elements()));
    std::vector<float> expected = values;
    ASSERT_OK(ReadTensorAsFloat(file, tensor, values));
    ASSERT_OK(FillCounting(index, expected));
    EXPECT_EQ(values, expected) << tensor.name;
  }
}

TEST(WeightWriterTest, EveryFormatIsReadBackWithScalarsAndEmptyTensors) {
  const Notes notes = {{"pyramid.origin", "timm"}};
  for (const auto& stream : {&StreamSafetensors, &StreamTorchZip}) {
    ASSERT_OK_AND_ASSIGN(const std::string bytes, Written([&](ByteSink sink) {
                           return stream(kHeaders, notes, FillCounting, sink);
                         }));
    ExpectCounting(bytes);
    ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightBytes(MakeMemorySource(bytes)));
    EXPECT_THAT(file.notes,
                ::testing::Contains(std::pair<std::string, std::string>("pyramid.origin", "timm")));
  }
}

TEST(WeightWriterTest, MindSporeTensorsOverTheLimitGoInSlices) {
  const TensorHeader headers[] = {{"a", {2, 3}}, {"scalar", {}}, {"b", {7}}};
  const auto fill = [](size_t index, std::span<float> out) { return FillCounting(index, out); };
  std::string whole;
  for (const int64_t limit : {kMindSporeSliceBytes, int64_t{8}, int64_t{4}}) {
    ASSERT_OK_AND_ASSIGN(const std::string bytes, Written([&](ByteSink sink) {
                           return StreamMindSpore(headers, {{"note", "a text"}}, fill, sink, limit);
                         }));
    if (limit == kMindSporeSliceBytes) whole = bytes;
    EXPECT_EQ(bytes.size() > whole.size(), limit != kMindSporeSliceBytes);
    ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightBytes(MakeMemorySource(bytes)));
    ASSERT_EQ(file.tensors.size(), 3u);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(file.tensors[i].name, headers[i].name);
      EXPECT_EQ(file.tensors[i].shape, headers[i].shape);
      std::vector<float> values(static_cast<size_t>(file.tensors[i].elements()));
      std::vector<float> expected = values;
      ASSERT_OK(ReadTensorAsFloat(file, file.tensors[i], values));
      ASSERT_OK(FillCounting(i, expected));
      EXPECT_EQ(values, expected);
    }
    EXPECT_THAT(file.notes, ElementsAre(std::pair<std::string, std::string>("note", "a text")));
  }
}

TEST(WeightWriterTest, TorchStoragesBeginAtMultiplesOf64AndDamageIsFound) {
  ASSERT_OK_AND_ASSIGN(std::string bytes, Written([](ByteSink sink) {
                         return StreamTorchZip(kHeaders, {}, FillCounting, sink);
                       }));
  ASSERT_OK_AND_ASSIGN(const WeightFile file, OpenWeightBytes(MakeMemorySource(bytes)));
  for (const StoredTensor& tensor : file.tensors) {
    for (const Extent& extent : tensor.storage) EXPECT_EQ(extent.offset % 64, 0) << tensor.name;
  }
  bytes[static_cast<size_t>(file.tensors[0].storage[0].offset) + 3] ^= 1;
  ASSERT_OK_AND_ASSIGN(const WeightFile damaged, OpenWeightBytes(MakeMemorySource(bytes)));
  std::vector<float> values(6);
  EXPECT_THAT(ReadTensorAsFloat(damaged, damaged.tensors[0], values),
              StatusIs(kDataLoss, HasSubstr("CRC-32")));
}

TEST(WeightWriterTest, ATorchZipOverFourGiBIsRefusedBeforeItsFirstByte) {
  const auto never = [](size_t, std::span<float>) { return absl::InternalError("read"); };
  int pieces = 0;
  const auto count = [&pieces](absl::string_view) { return ++pieces, absl::OkStatus(); };
  const TensorHeader one[] = {{"a", {int64_t{1} << 30}}};
  const TensorHeader several[] = {{"a", {1 << 15, 1 << 14}}, {"b", {1 << 15, 1 << 14}}};
  for (const std::span<const TensorHeader> headers :
       {std::span<const TensorHeader>(one), std::span<const TensorHeader>(several)}) {
    EXPECT_THAT(StreamTorchZip(headers, {}, never, count),
                StatusIs(kInvalidArgument,
                         HasSubstr("a PyTorch zip over 4 GiB isn't written; use safetensors")));
  }
  EXPECT_EQ(pieces, 0);
}

TEST(WeightWriterTest, PassesErrorsOnAndRefusesNamesThatComeTwice) {
  const TensorHeader twice[] = {{"a", {1}}, {"a", {1}}};
  const auto broken = [](size_t, std::span<float>) { return absl::DataLossError("torn"); };
  const auto full = [](absl::string_view) { return absl::ResourceExhaustedError("full"); };
  const auto any = [](absl::string_view) { return absl::OkStatus(); };
  const auto mindspore = [](std::span<const TensorHeader> tensors, const Notes& notes,
                            TensorFiller fill,
                            ByteSink sink) { return StreamMindSpore(tensors, notes, fill, sink); };
  using Stream = std::function<absl::Status(std::span<const TensorHeader>, const Notes&,
                                            TensorFiller, ByteSink)>;
  for (const Stream& stream :
       {Stream(StreamSafetensors), Stream(StreamTorchZip), Stream(mindspore)}) {
    EXPECT_THAT(stream(twice, {}, FillCounting, any),
                StatusIs(kInvalidArgument, HasSubstr("a comes twice")));
    EXPECT_THAT(stream(kHeaders, {}, broken, any), StatusIs(kDataLoss, HasSubstr("torn")));
    EXPECT_THAT(stream(kHeaders, {}, FillCounting, full),
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("full")));
  }
}

}  // namespace
}  // namespace pyramid
