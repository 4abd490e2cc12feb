#include "model/formats/naming.h"

#include <array>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace pyramid {
namespace {

// One tensor's name in the four schemes, without ".weight" or ".bias". In patterns "#" is the stage
// from 1, "@" the stage from 0, "%" the block.
struct Row {
  std::array<absl::string_view, 4> patterns;  // by Naming
  int first_stage = 1;                        // stages the row holds for, to the 4th
  bool norm = false;                          // MindSpore calls its parameters gamma and beta
  int part = 0;
  int parts = 1;
};

// Sources: whai362/PVT classification/pvt_v2.py (57e2dfa); timm/models/pvt_v2.py (aa4b585);
// mindcv/models/pvtv2.py (51b0636); transformers models/pvt_v2/modeling_pvt_v2.py and
// convert_pvt_v2_to_pytorch.py (09cb93d).
constexpr Row kRows[] = {
    {.patterns = {"patch_embed1.proj", "patch_embed.proj", "patch_embed_list.0.proj",
                  "pvt_v2.encoder.layers.0.patch_embedding.proj"}},
    {.patterns = {"patch_embed1.norm", "patch_embed.norm", "patch_embed_list.0.norm",
                  "pvt_v2.encoder.layers.0.patch_embedding.layer_norm"},
     .norm = true},
    {.patterns = {"patch_embed#.proj", "stages.@.downsample.proj", "patch_embed_list.@.proj",
                  "pvt_v2.encoder.layers.@.patch_embedding.proj"},
     .first_stage = 2},
    {.patterns = {"patch_embed#.norm", "stages.@.downsample.norm", "patch_embed_list.@.norm",
                  "pvt_v2.encoder.layers.@.patch_embedding.layer_norm"},
     .first_stage = 2,
     .norm = true},
    {.patterns = {"block#.%.norm1", "stages.@.blocks.%.norm1", "block_list.@.%.norm1",
                  "pvt_v2.encoder.layers.@.blocks.%.layer_norm_1"},
     .norm = true},
    {.patterns = {"block#.%.attn.q", "stages.@.blocks.%.attn.q", "block_list.@.%.attn.q",
                  "pvt_v2.encoder.layers.@.blocks.%.attention.query"}},
    {.patterns = {"block#.%.attn.kv", "stages.@.blocks.%.attn.kv", "block_list.@.%.attn.kv", ""}},
    // Keys are the first half of kv's rows, values the second.
    {.patterns = {"", "", "", "pvt_v2.encoder.layers.@.blocks.%.attention.key"},
     .part = 0,
     .parts = 2},
    {.patterns = {"", "", "", "pvt_v2.encoder.layers.@.blocks.%.attention.value"},
     .part = 1,
     .parts = 2},
    {.patterns = {"block#.%.attn.proj", "stages.@.blocks.%.attn.proj", "block_list.@.%.attn.proj",
                  "pvt_v2.encoder.layers.@.blocks.%.attention.proj"}},
    {.patterns = {"block#.%.attn.sr", "stages.@.blocks.%.attn.sr", "block_list.@.%.attn.sr",
                  "pvt_v2.encoder.layers.@.blocks.%.attention.spatial_reduction"}},
    {.patterns = {"block#.%.attn.norm", "stages.@.blocks.%.attn.norm", "block_list.@.%.attn.norm",
                  "pvt_v2.encoder.layers.@.blocks.%.attention.layer_norm"},
     .norm = true},
    {.patterns = {"block#.%.norm2", "stages.@.blocks.%.norm2", "block_list.@.%.norm2",
                  "pvt_v2.encoder.layers.@.blocks.%.layer_norm_2"},
     .norm = true},
    {.patterns = {"block#.%.mlp.fc1", "stages.@.blocks.%.mlp.fc1", "block_list.@.%.mlp.fc1",
                  "pvt_v2.encoder.layers.@.blocks.%.mlp.dense1"}},
    {.patterns = {"block#.%.mlp.dwconv.dwconv", "stages.@.blocks.%.mlp.dwconv",
                  "block_list.@.%.mlp.dwconv.dwconv",
                  "pvt_v2.encoder.layers.@.blocks.%.mlp.dwconv.dwconv"}},
    {.patterns = {"block#.%.mlp.fc2", "stages.@.blocks.%.mlp.fc2", "block_list.@.%.mlp.fc2",
                  "pvt_v2.encoder.layers.@.blocks.%.mlp.dense2"}},
    {.patterns = {"norm#", "stages.@.norm", "norm_list.@", "pvt_v2.encoder.layers.@.layer_norm"},
     .norm = true},
    {.patterns = {"head", "head", "head", "classifier"}},
};

constexpr std::array<absl::string_view, 4> kNames = {"official", "timm", "mindcv", "transformers"};

constexpr absl::string_view kKvPattern = "block#.%.attn.kv";
constexpr absl::string_view kTransformersPrefix = "pvt_v2.";

struct Indices {
  int stage = 1;            // 1..4
  absl::string_view block;  // its digits
};

// Matches all of `name`; patterns without a stage leave `indices` alone.
bool Matches(absl::string_view name, absl::string_view pattern, Indices& indices) {
  if (pattern.empty()) return false;
  for (const char c : pattern) {
    if (name.empty()) return false;
    if (c == '#' || c == '@') {
      const int stage = name[0] - (c == '#' ? '0' : '0' - 1);
      if (stage < 1 || stage > 4) return false;
      indices.stage = stage;
      name.remove_prefix(1);
    } else if (c == '%') {
      size_t digits = 0;
      while (digits < name.size() && absl::ascii_isdigit(static_cast<unsigned char>(name[digits])))
        ++digits;
      // "00" would be a second name of the same block.
      if (digits == 0 || digits > 9 || (digits > 1 && name[0] == '0')) return false;
      indices.block = name.substr(0, digits);
      name.remove_prefix(digits);
    } else {
      if (name[0] != c) return false;
      name.remove_prefix(1);
    }
  }
  return name.empty();
}

std::string Filled(absl::string_view pattern, const Indices& indices) {
  std::string name;
  for (const char c : pattern) {
    if (c == '#') {
      absl::StrAppend(&name, indices.stage);
    } else if (c == '@') {
      absl::StrAppend(&name, indices.stage - 1);
    } else if (c == '%') {
      absl::StrAppend(&name, indices.block);
    } else {
      name += c;
    }
  }
  return name;
}

// "weight" or "bias" as MindSpore spells them in norms.
absl::string_view FieldName(bool weight, bool norm, Naming naming) {
  if (naming == Naming::kMindCv && norm) return weight ? "gamma" : "beta";
  return weight ? "weight" : "bias";
}

// A name taken apart: its row, indices, and which of its two parameters it is.
struct Found {
  const Row* row = nullptr;
  Indices indices;
  bool weight = false;
};

std::optional<Found> Find(absl::string_view name, Naming naming) {
  const size_t dot = name.rfind('.');
  if (dot == absl::string_view::npos) return std::nullopt;
  const absl::string_view field = name.substr(dot + 1);
  const absl::string_view stem = name.substr(0, dot);
  for (const Row& row : kRows) {
    Found found{.row = &row};
    if (!Matches(stem, row.patterns[static_cast<size_t>(naming)], found.indices)) continue;
    if (found.indices.stage < row.first_stage) continue;
    found.weight = field == FieldName(true, row.norm, naming);
    if (!found.weight && field != FieldName(false, row.norm, naming)) return std::nullopt;
    return found;
  }
  return std::nullopt;
}

}  // namespace

const char* NamingName(Naming naming) { return kNames[static_cast<size_t>(naming)].data(); }

absl::StatusOr<Naming> ParseNaming(absl::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<Naming>(i);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("naming is \"", name, "\"; use official, timm, mindcv or transformers"));
}

std::optional<Naming> DetectNaming(std::span<const std::string> names) {
  for (const std::string& name : names) {
    for (size_t i = 0; i < kNames.size(); ++i) {
      const auto naming = static_cast<Naming>(i);
      const std::optional<OfficialPlace> place = ToOfficial(name, naming);
      if (place && place->name == "patch_embed1.proj.weight") return naming;
    }
  }
  return std::nullopt;
}

std::optional<OfficialPlace> ToOfficial(absl::string_view name, Naming naming) {
  std::string whole;
  if (naming == Naming::kTransformers && absl::StartsWith(name, "encoder.")) {
    whole = absl::StrCat(kTransformersPrefix, name);
    name = whole;
  }
  const std::optional<Found> found = Find(name, naming);
  if (!found) return std::nullopt;
  const Row& row = *found->row;
  const absl::string_view pattern = row.parts == 2 ? kKvPattern : row.patterns[0];
  return OfficialPlace{.name = absl::StrCat(Filled(pattern, found->indices), ".",
                                            FieldName(found->weight, row.norm, Naming::kOfficial)),
                       .part = row.part,
                       .parts = row.parts};
}

std::string FromOfficial(absl::string_view official, Naming naming) {
  const std::optional<Found> found = Find(official, Naming::kOfficial);
  if (!found) return "";
  const absl::string_view pattern = found->row->patterns[static_cast<size_t>(naming)];
  if (pattern.empty()) return "";
  return absl::StrCat(Filled(pattern, found->indices), ".",
                      FieldName(found->weight, found->row->norm, naming));
}

}  // namespace pyramid
