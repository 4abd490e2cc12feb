#include "model/formats/naming.h"

#include <array>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/variants.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::HasSubstr;

constexpr Naming kAll[] = {Naming::kOfficial, Naming::kTimm, Naming::kMindCv,
                           Naming::kTransformers};

// A parameter in the four schemes, in the order of the enum.
struct Names {
  std::array<const char*, 4> in;
  int part = 0;
  int parts = 1;
};

// pvtv2 table of docs/formats.md.
const Names kTable[] = {
    {{"patch_embed1.proj.weight", "patch_embed.proj.weight", "patch_embed_list.0.proj.weight",
      "pvt_v2.encoder.layers.0.patch_embedding.proj.weight"}},
    {{"patch_embed1.norm.bias", "patch_embed.norm.bias", "patch_embed_list.0.norm.beta",
      "pvt_v2.encoder.layers.0.patch_embedding.layer_norm.bias"}},
    {{"patch_embed2.proj.bias", "stages.1.downsample.proj.bias", "patch_embed_list.1.proj.bias",
      "pvt_v2.encoder.layers.1.patch_embedding.proj.bias"}},
    {{"patch_embed4.norm.weight", "stages.3.downsample.norm.weight",
      "patch_embed_list.3.norm.gamma",
      "pvt_v2.encoder.layers.3.patch_embedding.layer_norm.weight"}},
    {{"block1.0.norm1.weight", "stages.0.blocks.0.norm1.weight", "block_list.0.0.norm1.gamma",
      "pvt_v2.encoder.layers.0.blocks.0.layer_norm_1.weight"}},
    {{"block3.17.attn.q.weight", "stages.2.blocks.17.attn.q.weight",
      "block_list.2.17.attn.q.weight", "pvt_v2.encoder.layers.2.blocks.17.attention.query.weight"}},
    {{"block1.1.attn.proj.bias", "stages.0.blocks.1.attn.proj.bias",
      "block_list.0.1.attn.proj.bias", "pvt_v2.encoder.layers.0.blocks.1.attention.proj.bias"}},
    {{"block2.0.attn.sr.weight", "stages.1.blocks.0.attn.sr.weight",
      "block_list.1.0.attn.sr.weight",
      "pvt_v2.encoder.layers.1.blocks.0.attention.spatial_reduction.weight"}},
    {{"block2.0.attn.norm.bias", "stages.1.blocks.0.attn.norm.bias",
      "block_list.1.0.attn.norm.beta",
      "pvt_v2.encoder.layers.1.blocks.0.attention.layer_norm.bias"}},
    {{"block4.1.norm2.bias", "stages.3.blocks.1.norm2.bias", "block_list.3.1.norm2.beta",
      "pvt_v2.encoder.layers.3.blocks.1.layer_norm_2.bias"}},
    {{"block4.1.mlp.fc1.weight", "stages.3.blocks.1.mlp.fc1.weight",
      "block_list.3.1.mlp.fc1.weight", "pvt_v2.encoder.layers.3.blocks.1.mlp.dense1.weight"}},
    {{"block3.4.mlp.dwconv.dwconv.weight", "stages.2.blocks.4.mlp.dwconv.weight",
      "block_list.2.4.mlp.dwconv.dwconv.weight",
      "pvt_v2.encoder.layers.2.blocks.4.mlp.dwconv.dwconv.weight"}},
    {{"block1.0.mlp.fc2.bias", "stages.0.blocks.0.mlp.fc2.bias", "block_list.0.0.mlp.fc2.bias",
      "pvt_v2.encoder.layers.0.blocks.0.mlp.dense2.bias"}},
    {{"norm2.weight", "stages.1.norm.weight", "norm_list.1.gamma",
      "pvt_v2.encoder.layers.1.layer_norm.weight"}},
    {{"head.weight", "head.weight", "head.weight", "classifier.weight"}},
    {{"head.bias", "head.bias", "head.bias", "classifier.bias"}},
};

TEST(NamingTest, EverySchemeGoesToTheOfficialNameAndBack) {
  for (const Names& names : kTable) {
    for (const Naming naming : kAll) {
      const char* name = names.in[static_cast<size_t>(naming)];
      const auto place = ToOfficial(name, naming);
      ASSERT_TRUE(place) << NamingName(naming) << " " << name;
      EXPECT_EQ(place->name, names.in[0]) << name;
      EXPECT_EQ(place->part, 0) << name;
      EXPECT_EQ(place->parts, 1) << name;
      EXPECT_EQ(FromOfficial(names.in[0], naming), name);
    }
  }
}

TEST(NamingTest, TransformersKeysAndValuesAreTheHalvesOfKv) {
  for (const char* field : {"weight", "bias"}) {
    const std::string block = "pvt_v2.encoder.layers.2.blocks.11.attention.";
    const auto key = ToOfficial(absl::StrCat(block, "key.", field), Naming::kTransformers);
    const auto value = ToOfficial(absl::StrCat(block, "value.", field), Naming::kTransformers);
    ASSERT_TRUE(key && value);
    EXPECT_EQ(key->name, absl::StrCat("block3.11.attn.kv.", field));
    EXPECT_EQ(value->name, key->name);
    EXPECT_EQ(key->part, 0);
    EXPECT_EQ(value->part, 1);
    EXPECT_EQ(key->parts, 2);
    EXPECT_EQ(value->parts, 2);
    EXPECT_EQ(FromOfficial(key->name, Naming::kTransformers), "");
    EXPECT_EQ(FromOfficial(key->name, Naming::kTimm),
              absl::StrCat("stages.2.blocks.11.attn.kv.", field));
  }
}

TEST(NamingTest, TransformersBackbonesHaveNoPrefix) {
  const auto place =
      ToOfficial("encoder.layers.3.patch_embedding.proj.bias", Naming::kTransformers);
  ASSERT_TRUE(place);
  EXPECT_EQ(place->name, "patch_embed4.proj.bias");
}

TEST(NamingTest, OtherNamesAreNoParameters) {
  const std::pair<Naming, const char*> others[] = {
      {Naming::kOfficial, ""},
      {Naming::kOfficial, "head"},
      {Naming::kOfficial, ".weight"},
      {Naming::kOfficial, "head.weight.weight"},
      {Naming::kOfficial, "head.gamma"},
      {Naming::kOfficial, "norm1.gamma"},
      {Naming::kOfficial, "norm0.weight"},
      {Naming::kOfficial, "norm5.weight"},
      {Naming::kOfficial, "block1..norm1.weight"},
      {Naming::kOfficial, "block1.00.norm1.weight"},
      {Naming::kOfficial, "block1.1234567890.norm1.weight"},
      {Naming::kOfficial, "block1.-1.norm1.weight"},
      {Naming::kOfficial, "block1.0.mlp.dwconv.weight"},
      {Naming::kOfficial, "module.head.weight"},
      {Naming::kTimm, "stages.0.downsample.proj.weight"},
      {Naming::kTimm, "stages.4.norm.weight"},
      {Naming::kTimm, "patch_embed1.proj.weight"},
      {Naming::kMindCv, "norm_list.0.weight"},
      {Naming::kMindCv, "head.beta"},
      {Naming::kMindCv, "adam_m.head.weight"},
      {Naming::kTransformers, "pvt_v2.encoder.layers.0.blocks.0.attention.kv.weight"},
      {Naming::kTransformers, "pvt_v2.pvt_v2.encoder.layers.0.layer_norm.weight"},
      {Naming::kTransformers, "head.weight"},
  };
  for (const auto& [naming, name] : others) {
    EXPECT_FALSE(ToOfficial(name, naming)) << NamingName(naming) << " \"" << name << "\"";
  }
  for (const char* name : {"", "head", "stages.0.norm.weight", "block9.0.norm1.weight"}) {
    for (const Naming naming : kAll) EXPECT_EQ(FromOfficial(name, naming), "") << name;
  }
}

TEST(NamingTest, EveryParameterOfEveryVariantHasANameOfItsOwnInEveryScheme) {
  for (const Variant& variant : Variants()) {
    for (const Naming naming : {Naming::kOfficial, Naming::kTimm, Naming::kMindCv}) {
      std::set<std::string> names;
      for (const ParameterShape& parameter : ParametersOf(variant, 3, 1000)) {
        const std::string name = FromOfficial(parameter.name, naming);
        EXPECT_TRUE(names.insert(name).second) << name;
        const auto place = ToOfficial(name, naming);
        ASSERT_TRUE(place) << name;
        EXPECT_EQ(place->name, parameter.name);
      }
    }
  }
}

// The names and shapes of timm's and transformers' own networks (tests/golden/README.md).
TEST(NamingTest, NamesOfTimmAndTransformersCoverTheNetworkExactly) {
  std::ifstream in(PYRAMID_SOURCE_DIR "/tests/golden/parameter_names.json");
  const auto golden = nlohmann::ordered_json::parse(in);
  int networks = 0;
  for (const auto& [program, variants] : golden.items()) {
    const Naming naming = program.rfind("timm", 0) == 0 ? Naming::kTimm : Naming::kTransformers;
    for (const auto& [variant, tensors] : variants.items()) {
      std::map<std::string, std::vector<int64_t>> found;
      std::vector<std::string> names;
      for (const auto& tensor : tensors) {
        names.push_back(tensor[0]);
        const auto place = ToOfficial(names.back(), naming);
        ASSERT_TRUE(place) << names.back();
        const auto shape = tensor[1].get<std::vector<int64_t>>();
        auto [at, fresh] = found.emplace(place->name, shape);
        EXPECT_EQ(fresh, place->part == 0) << names.back();
        if (!fresh) at->second[0] += shape[0];
      }
      EXPECT_EQ(DetectNaming(names), naming);
      const auto expected = ParametersOf(*FindVariant(variant), 3, 1000);
      EXPECT_EQ(found.size(), expected.size()) << program << " " << variant;
      for (const ParameterShape& parameter : expected) {
        EXPECT_EQ(found[parameter.name], parameter.shape) << program << " " << parameter.name;
      }
      ++networks;
    }
  }
  EXPECT_EQ(networks, 4);
}

TEST(NamingTest, IsDetectedByTheFirstPatchEmbedding) {
  const std::string others[] = {"epoch", "head.weight", "optimizer.lr"};
  EXPECT_EQ(DetectNaming(others), std::nullopt);
  EXPECT_EQ(DetectNaming({}), std::nullopt);
  for (const Naming naming : kAll) {
    const std::string names[] = {"head.weight", FromOfficial("patch_embed1.proj.weight", naming)};
    EXPECT_EQ(DetectNaming(names), naming);
    const std::string second[] = {FromOfficial("patch_embed2.proj.weight", naming)};
    EXPECT_EQ(DetectNaming(second), std::nullopt);
  }
}

TEST(NamingTest, ParsesItsOwnNamesAndNoOthers) {
  for (const Naming naming : kAll) {
    ASSERT_OK_AND_ASSIGN(const Naming parsed, ParseNaming(NamingName(naming)));
    EXPECT_EQ(parsed, naming);
  }
  for (const char* name : {"", "MindCV", "torch"}) {
    EXPECT_THAT(ParseNaming(name),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr("use official, timm, mindcv or transformers")));
  }
}

}  // namespace
}  // namespace pyramid
