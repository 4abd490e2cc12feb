#include <algorithm>
#include <array>
#include <cstdlib>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/variants.h"
#include "model/weights.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

// mindcv/models/pvtv2.py default_cfgs and configs/pvtv2/README.md (51b0636). No b5, no b2_li.
struct Published {
  absl::string_view variant;
  absl::string_view file;
};
constexpr std::array<Published, 6> kMindCv = {{
    {"pvt_v2_b0", "pvt_v2_b0-1c4f6683.ckpt"},
    {"pvt_v2_b0", "pvt_v2_b0-d9cd9d6a-910v2.ckpt"},
    {"pvt_v2_b1", "pvt_v2_b1-3ceb171a.ckpt"},
    {"pvt_v2_b2", "pvt_v2_b2-0565d18e.ckpt"},
    {"pvt_v2_b3", "pvt_v2_b3-feaae3fc.ckpt"},
    {"pvt_v2_b4", "pvt_v2_b4-1cf4bc03.ckpt"},
}};

fs::path WeightsFolder() {
  const char* own = std::getenv("PYRAMID_WEIGHTS");
  if (own != nullptr && *own != '\0') return own;
  const char* home = std::getenv("HOME");
  return fs::path(home == nullptr ? "." : home) / ".cache/pyramid/weights";
}

// Files of the folder called <variant>-….ckpt, by name.
std::vector<std::string> NamedLike(const fs::path& folder, const std::string& variant) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (absl::StartsWith(name, variant + "-") && absl::EndsWith(name, ".ckpt"))
      names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

absl::StatusOr<fs::path> FindPretrained(absl::string_view variant, absl::string_view compat) {
  if (FindVariant(variant) == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("no variant is called \"", variant, "\""));
  }
  if (compat != "timm" && compat != "mindcv") {
    return absl::InvalidArgumentError(
        absl::StrCat("compat is \"", compat, "\"; use timm or mindcv"));
  }
  const fs::path folder = WeightsFolder();
  const std::string name(variant);
  std::vector<std::string> files;
  std::string published;
  if (compat == "mindcv") {
    for (const Published& file : kMindCv) {
      if (file.variant == variant) files.emplace_back(file.file);
    }
    if (files.empty()) {
      published = absl::StrCat("MindCV publishes no weights of ", name,
                               ": use compat timm, or put a ", name, "-….ckpt of your own there");
    } else {
      published = absl::StrCat(
          "published in toolkits/mindcv/pvt_v2 of MindSpore's download site, linked from "
          "configs/pvtv2/README.md of mindspore-lab/mindcv");
    }
    for (std::string& other : NamedLike(folder, name)) files.push_back(std::move(other));
  } else {
    files = {name + ".in1k.safetensors", name + ".in1k/model.safetensors", name + ".pth"};
    published = absl::StrCat("published as model.safetensors of timm/", name,
                             ".in1k on the Hugging Face hub, and as ", name,
                             ".pth in release v2 of whai362/PVT on GitHub");
  }
  for (const std::string& file : files) {
    std::error_code error;
    if (fs::is_regular_file(folder / file, error)) return folder / file;
  }
  return absl::NotFoundError(
      absl::StrCat("pretrained weights of ", name, " (", compat, ") aren't in ", folder.string(),
                   files.empty() ? "" : absl::StrCat("; looked for ", absl::StrJoin(files, ", ")),
                   "; ", published,
                   ". Nothing is fetched from here: put the file into that folder, or say another "
                   "one in PYRAMID_WEIGHTS"));
}

}  // namespace pyramid
