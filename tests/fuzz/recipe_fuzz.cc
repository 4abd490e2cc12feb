// A recipe's YAML.
#include <string>

#include "model/recipe.h"
#include "tests/fuzz/fuzz_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using pyramid::fuzz::Require;
  const absl::string_view yaml(reinterpret_cast<const char*>(data), size);
  const auto parsed = pyramid::ParseRecipe(yaml);
  if (!parsed.ok()) return 0;
  const std::string resolved = pyramid::RecipeToYaml(parsed->recipe);
  const auto again = pyramid::ParseRecipe(resolved);
  Require(again.ok(), "a resolved recipe is a recipe");
  Require(pyramid::RecipeToYaml(again->recipe) == resolved, "resolving twice changes nothing");
  pyramid::NetworkOf(parsed->recipe, 10);
  pyramid::EvalPreprocessingOf(parsed->recipe);
  return 0;
}
