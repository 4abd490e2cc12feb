// The four naming schemes of PVT v2's parameters, and whose weights go by which. Layouts are the
// same in all (OIHW, [out, in]); transformers keeps keys and values of attention apart. Torch-free.
#ifndef PYRAMID_MODEL_FORMATS_NAMING_H_
#define PYRAMID_MODEL_FORMATS_NAMING_H_

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pyramid {

enum class Naming { kOfficial, kTimm, kMindCv, kTransformers };

// "official", "timm", "mindcv", "transformers".
const char* NamingName(Naming naming);
absl::StatusOr<Naming> ParseNaming(absl::string_view name);  // InvalidArgument: names the known

// By the first patch embedding's key (patch_embed1.proj.weight, patch_embed.proj.weight,
// patch_embed_list.0.proj.weight, transformers'); none: not a PVT v2.
std::optional<Naming> DetectNaming(std::span<const std::string> names);

// Where a stored tensor goes: the official name, and which part of it (transformers' key: rows 0 of
// 2 of kv, value: 1 of 2).
struct OfficialPlace {
  std::string name;  // "block1.0.attn.kv.weight"
  int part = 0;
  int parts = 1;
};

// nullopt: not a parameter's name in this scheme. Knows nothing of variants: any block index goes.
// transformers: with or without the leading "pvt_v2.", which a bare backbone hasn't.
std::optional<OfficialPlace> ToOfficial(absl::string_view name, Naming naming);

// The official parameter's name in another scheme. Empty: not an official name, or kTransformers'
// kv, which is two there.
std::string FromOfficial(absl::string_view official, Naming naming);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FORMATS_NAMING_H_
