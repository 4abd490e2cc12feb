// A checkpoint's manifest: as it is, and, because a wrong checksum ends it early, with the checksum
// and form that belong to its contents.
#include <nlohmann/json.hpp>
#include <string>

#include "model/checkpoint.h"
#include "model/preprocess.h"
#include "proto/base/hash.h"
#include "tests/fuzz/fuzz_target.h"

namespace pyramid {
namespace {

using fuzz::Require;
using nlohmann::json;

// Writing a tree recurses, so deep ones are left alone.
bool IsDeep(absl::string_view text) {
  int depth = 0;
  for (const char c : text) {
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (depth > 30) return true;
  }
  return false;
}

// Empty unless the text is a JSON object of moderate depth.
std::string WithChecksum(absl::string_view text) {
  if (IsDeep(text)) return "";
  json tree = json::parse(text.begin(), text.end(), nullptr, false);
  if (!tree.is_object()) return "";
  tree.erase("checksum");
  const std::string checksum = Sha256Hex(tree.dump());
  tree["checksum"] = checksum;
  return tree.dump(2) + "\n";
}

void TryPreprocessing(const v1::Preprocessing& preprocessing) {
  if (!CheckPreprocessing(preprocessing).ok() || preprocessing.crop() > 512) return;
  const RgbImage image = BlankImage(9, 7, preprocessing.channels());
  const auto pixels = Preprocess(image, preprocessing);
  const size_t side = static_cast<size_t>(preprocessing.crop());
  Require(
      !pixels.ok() || pixels->size() == static_cast<size_t>(preprocessing.channels()) * side * side,
      "preprocessing gives channels x crop x crop numbers");
}

void Try(absl::string_view text) {
  const auto manifest = ManifestFromJson(text);
  if (!manifest.ok()) return;
  const std::string again = ManifestToJson(*manifest);
  // Fields left out of the text are written too, so a long one may grow over what is written.
  Require(!again.empty() || text.size() > 300'000, "what was read can be written");
  if (again.empty()) return;
  const auto back = ManifestFromJson(again);
  Require(back.ok(), "what was written can be read");
  Require(ManifestToJson(*back) == again, "a second round changes nothing");
  TryPreprocessing(manifest->preprocessing());
}

}  // namespace
}  // namespace pyramid

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  pyramid::Try(text);
  const std::string repaired = pyramid::WithChecksum(text);
  if (!repaired.empty()) pyramid::Try(repaired);
  return 0;
}
