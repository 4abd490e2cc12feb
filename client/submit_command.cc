#include <algorithm>
#include <nlohmann/json.hpp>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "client/format.h"
#include "model/recipe.h"
#include "proto/base/file.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

struct Options {
  std::string recipe;
  std::vector<std::string> overrides;
  std::string name;
  std::string request_id;
  bool watch = false;
  bool validate_only = false;
  bool dry_run = false;
  bool json = false;
};

// The recipe with defaults and overrides, and with paths that mean the same wherever the server
// runs.
absl::StatusOr<ParsedRecipe> Resolve(const Environment& environment, const Options& options) {
  ASSIGN_OR_RETURN(const std::string text,
                   ReadFile(environment.folder / options.recipe, int64_t{1} << 20));
  absl::StatusOr<ParsedRecipe> parsed = ParseRecipe(text, options.overrides);
  if (!parsed.ok()) return Annotate(parsed.status(), options.recipe);
  for (std::string* path : {&parsed->recipe.data_dir, &parsed->recipe.ckpt_path}) {
    if (path->empty()) continue;
    std::filesystem::path absolute = (environment.folder / *path).lexically_normal();
    if (!absolute.has_filename() && absolute != absolute.root_path()) {
      absolute = absolute.parent_path();  // "./" leaves a slash at the end
    }
    *path = absolute.string();
  }
  return parsed;
}

void Warn(const Environment& environment, const std::vector<std::string>& warnings) {
  for (const std::string& warning : warnings) {
    *environment.err << absl::StrCat("warning: ", OneLine(warning), "\n");
  }
}

int Submit(Environment& environment, Options options) {
  // "--set a=1 recipe.yaml": the list of --set takes every word that follows.
  if (options.recipe.empty()) {
    const auto recipe =
        std::find_if(options.overrides.begin(), options.overrides.end(),
                     [](const std::string& word) { return !absl::StrContains(word, '='); });
    if (recipe == options.overrides.end())
      return Fail(environment, UsageError("RECIPE is missing"));
    options.recipe = *recipe;
    options.overrides.erase(recipe);
  }
  for (const std::string& word : options.overrides) {
    if (!absl::StrContains(word, '=')) {
      return Fail(environment, UsageError(absl::StrCat("--set ", word, " is not key=value")));
    }
  }
  absl::StatusOr<ParsedRecipe> parsed = Resolve(environment, options);
  if (!parsed.ok()) return Fail(environment, parsed.status());
  Warn(environment, parsed->warnings);
  const std::string yaml = RecipeToYaml(parsed->recipe);
  if (options.dry_run) {
    if (options.json) {
      const nlohmann::json json = {{"recipe", yaml}, {"warnings", parsed->warnings}};
      *environment.out << json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
                       << "\n";
    } else {
      *environment.out << yaml;
    }
    return kDone;
  }

  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(environment);
  if (!connection.ok()) return Fail(environment, connection.status());
  v1::SubmitJobRequest request;
  request.set_request_id(options.request_id);
  request.set_name(options.name);
  request.set_recipe(yaml);
  request.set_validate_only(options.validate_only);
  grpc::ClientContext context;
  SetDeadline(context, kCallTimeout);
  v1::SubmitJobResponse response;
  const grpc::Status status = (*connection)->training()->SubmitJob(&context, request, &response);
  if (!status.ok()) return Fail(environment, (*connection)->ToStatus(status));
  // The server repeats what was said here.
  std::vector<std::string> warnings;
  for (const std::string& warning : response.warnings()) {
    if (std::find(parsed->warnings.begin(), parsed->warnings.end(), warning) ==
        parsed->warnings.end()) {
      warnings.push_back(warning);
    }
  }
  Warn(environment, warnings);

  const v1::Job& job = response.job();
  if (options.json) {
    *environment.out << ToJson(response) << "\n" << std::flush;
  } else if (options.validate_only) {
    *environment.out << absl::StrCat("the recipe is fine: ", parsed->recipe.model, " on ",
                                     parsed->recipe.dataset, ", ", parsed->recipe.epoch_size,
                                     " epochs, ", parsed->recipe.workers, " workers\n");
  } else {
    *environment.out << absl::StrCat("job ", OneLine(job.id()), " ", v1::JobState_Name(job.state()),
                                     response.existed() ? " (it was there already)" : "",
                                     job.reason().empty() ? "" : ": ", OneLine(job.reason()), "\n")
                     << std::flush;
  }
  if (options.validate_only) return kDone;
  if (options.watch) return WatchJobToItsEnd(environment, job.id(), options.json, 600);
  if (!options.json) {
    *environment.err << absl::StrCat("follow it with: pyramid watch ", OneLine(job.id()), "\n");
  }
  return kDone;
}

}  // namespace

void AddSubmitCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand("submit", "Queue a training job");
  command->add_option("recipe", options->recipe, "The recipe, a YAML file")->type_name("RECIPE");
  command
      ->add_option("--set", options->overrides,
                   "Values that win over the recipe's: --set lr=0.001 epoch_size=5")
      ->type_name("KEY=VALUE")
      ->expected(1, 1000);
  command->add_option("--name", options->name, "The job's name")->type_name("NAME");
  command
      ->add_option("--request-id", options->request_id,
                   "Sending the same id and recipe again returns the same job")
      ->type_name("ID");
  command->add_flag("--watch", options->watch, "Follow the job to its end");
  command->add_flag("--validate-only", options->validate_only,
                    "Let the server check the recipe, queue nothing");
  command->add_flag("--dry-run", options->dry_run,
                    "Print the recipe with all defaults filled in, send nothing");
  command->add_flag("--json", options->json, "Print the server's answer as JSON");
  AddServerFlag(*command, line.environment);
  command->footer(
      "A relative data_dir or ckpt_path is taken from here; a relative ckpt_save_dir lies in the "
      "job's folder.");
  command->callback([line, options] {
    line.action = [line, options] { return Submit(line.environment, *options); };
  });
}

}  // namespace pyramid
