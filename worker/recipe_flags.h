// Command lines that describe a recipe, MindCV style: -c FILE, and any key as a flag of its own.
#ifndef PYRAMID_WORKER_RECIPE_FLAGS_H_
#define PYRAMID_WORKER_RECIPE_FLAGS_H_

#include <CLI/CLI.hpp>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/recipe.h"

namespace pyramid {

// Adds --config/-c, --set key=value and --<key> for every key of the recipe; long flags take '-'
// and '_' alike. A boolean key may stand without a value. `except`: keys the command has its own
// flag for. Must outlive the parsing.
class RecipeFlags {
 public:
  RecipeFlags(CLI::App& app, const std::vector<std::string>& except = {});

  // Reads the file, applies what was given. NotFound: no such file. InvalidArgument: as
  // ParseRecipe.
  absl::StatusOr<ParsedRecipe> Parse(const std::vector<std::string>& more_overrides = {}) const;
  bool has_config() const { return !config_.empty(); }

 private:
  std::string config_;
  std::vector<std::string> set_;
  std::map<std::string, std::vector<std::string>> values_;  // by key
  std::map<std::string, CLI::Option*> options_;
};

// Adds "--a-b,--a_b" for "--a_b".
std::string BothSpellings(const std::string& flag);

// Parses; on --help or an error prints and returns the exit code in `code`, and false.
bool ParseOrExplain(CLI::App& app, const std::vector<std::string>& arguments, int& code);

// "pyramid-worker: message" on standard error; the exit code.
int Fail(const absl::Status& status);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_RECIPE_FLAGS_H_
