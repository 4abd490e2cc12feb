#include "worker/recipe_flags.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "proto/base/file.h"
#include "proto/base/status.h"
#include "worker/failure.h"

namespace pyramid {

std::string BothSpellings(const std::string& flag) {
  const std::string dashes = absl::StrReplaceAll(flag, {{"_", "-"}});
  return dashes == flag ? flag : absl::StrCat(flag, ",", dashes);
}

RecipeFlags::RecipeFlags(CLI::App& app, const std::vector<std::string>& except) {
  app.add_option("-c,--config", config_, "Recipe (YAML)");
  app.add_option("--set", set_, "Override a key of the recipe: key=value")
      ->take_all()
      ->allow_extra_args(false);
  std::vector<RecipeKey> keys = RecipeKeys();
  keys.push_back({"device_target", "text", "CPU"});
  keys.push_back({"filter_bias_and_bn", "bool", "false"});
  for (const RecipeKey& key : keys) {
    if (std::find(except.begin(), except.end(), key.name) != except.end()) continue;
    CLI::Option* option = app.add_option(BothSpellings("--" + key.name), values_[key.name],
                                         "Default " + key.default_value);
    option->group("Keys of the recipe")->type_name(key.type);
    if (key.type == "bool")
      option->expected(0, 1);
    else if (key.type == "list")
      option->expected(1, 16);
    else
      option->expected(1);
    options_[key.name] = option;
  }
}

absl::StatusOr<ParsedRecipe> RecipeFlags::Parse(
    const std::vector<std::string>& more_overrides) const {
  std::string yaml;
  if (!config_.empty()) {
    ASSIGN_OR_RETURN(yaml, ReadFile(config_, 1 << 20));
  }
  std::vector<std::string> overrides = set_;
  for (const auto& [key, option] : options_) {
    if (option->count() == 0) continue;
    const std::vector<std::string>& values = values_.at(key);
    std::string value = absl::StrJoin(values, ", ");
    if (option->get_type_name() == "bool" && value.empty()) value = "true";
    if (option->get_type_name() == "list" && !absl::StartsWith(value, "["))
      value = absl::StrCat("[", value, "]");
    overrides.push_back(absl::StrCat(key, "=", value));
  }
  overrides.insert(overrides.end(), more_overrides.begin(), more_overrides.end());
  return ParseRecipe(yaml, overrides);
}

bool ParseOrExplain(CLI::App& app, const std::vector<std::string>& arguments, int& code) {
  std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());  // as CLI11 wants them
  try {
    app.parse(reversed);
    return true;
  } catch (const CLI::CallForHelp&) {
    std::fputs(app.help().c_str(), stdout);
    code = kExitDone;
  } catch (const CLI::ParseError& error) {
    std::fprintf(stderr, "pyramid-worker: %s; see %s --help\n", error.what(),
                 app.get_name().c_str());
    code = kExitUsage;
  }
  return false;
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "pyramid-worker: %s\n", std::string(status.message()).c_str());
  return ExitCodeOf(status);
}

}  // namespace pyramid
