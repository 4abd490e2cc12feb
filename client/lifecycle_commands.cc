// alias, traffic, rollback, load, unload: what becomes of a promoted model.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "client/format.h"

namespace pyramid {
namespace {

struct Options {
  std::string model;
  std::string alias;
  int64_t version = 0;
  bool remove = false;
  double percent = 0;
  bool json = false;
};

// "fashion: canary 4 (10 % of the traffic), stable 3"
std::string StateText(const v1::ModelState& state) {
  std::vector<std::string> aliases;
  for (const auto& [alias, version] : state.aliases()) {
    std::string text = absl::StrCat(OneLine(alias), " ", version);
    if (alias == state.traffic_alias() && state.traffic_percent() > 0) {
      absl::StrAppend(&text, absl::StrFormat(" (%g %% of the traffic)", state.traffic_percent()));
    }
    aliases.push_back(std::move(text));
  }
  std::sort(aliases.begin(), aliases.end());
  return absl::StrCat(OneLine(state.name()), ": ",
                      aliases.empty() ? "no alias" : absl::StrJoin(aliases, ", "),
                      state.unloaded() ? "; unloaded" : "", "\n");
}

template <typename Request, typename Method>
int Call(Environment& environment, const Options& options, Method method, Request request) {
  request.set_model(options.model);
  request.set_actor(environment.user);
  const absl::StatusOr<v1::ModelState> state =
      CallModels(environment, method, request, kPromoteTimeout);
  if (!state.ok()) return Fail(environment, state.status());
  *environment.out << (options.json ? ToJson(*state) + "\n" : StateText(*state));
  return kDone;
}

int Alias(Environment& environment, const Options& options) {
  if (options.remove == (options.version != 0)) {
    return Fail(environment, UsageError("give a version, or --remove"));
  }
  if (options.remove) {
    v1::RemoveAliasRequest request;
    request.set_alias(options.alias);
    return Call(environment, options, &v1::ModelService::Stub::RemoveAlias, request);
  }
  v1::SetAliasRequest request;
  request.set_alias(options.alias);
  request.set_version(options.version);
  return Call(environment, options, &v1::ModelService::Stub::SetAlias, request);
}

int Traffic(Environment& environment, const Options& options) {
  v1::SetTrafficRequest request;
  request.set_alias(options.alias);
  request.set_percent(options.percent);
  return Call(environment, options, &v1::ModelService::Stub::SetTraffic, request);
}

using Run = int (*)(Environment&, const Options&);

CLI::App* AddCommand(CommandLine line, const std::shared_ptr<Options>& options, const char* name,
                     const char* what, Run run) {
  CLI::App* command = line.app.add_subcommand(name, what);
  command->add_option("model", options->model, "The model's name")->type_name("NAME")->required();
  command->add_flag("--json", options->json, "Print one JSON object");
  AddServerFlag(*command, line.environment);
  command->callback([line, options, run] {
    line.action = [line, options, run] { return run(line.environment, *options); };
  });
  return command;
}

}  // namespace

void AddLifecycleCommands(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* alias = AddCommand(line, options, "alias", "Let an alias name a version", Alias);
  alias
      ->add_option("alias", options->alias,
                   "stable answers requests that name nothing; any other name is free")
      ->type_name("ALIAS")
      ->required();
  alias->add_option("version", options->version, "The version to name")
      ->type_name("VERSION")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 62));
  alias->add_flag("--remove", options->remove, "Remove the alias");

  options = std::make_shared<Options>();
  CLI::App* traffic = AddCommand(line, options, "traffic",
                                 "Share the requests that name neither version nor alias", Traffic);
  traffic->add_option("percent", options->percent, "Of them, for the alias; 0: all to stable")
      ->type_name("PERCENT")
      ->check(CLI::Range(0.0, 100.0))
      ->required();
  traffic->add_option("--alias", options->alias, "Who gets it (canary)")->type_name("ALIAS");

  AddCommand(
      line, std::make_shared<Options>(), "rollback", "Put the version back that was stable before",
      [](Environment& environment, const Options& given) {
        return Call(environment, given, &v1::ModelService::Stub::Rollback, v1::RollbackRequest());
      });
  AddCommand(
      line, std::make_shared<Options>(), "load", "Load a model's versions, anew if they are loaded",
      [](Environment& environment, const Options& given) {
        return Call(environment, given, &v1::ModelService::Stub::LoadModel, v1::LoadModelRequest());
      });
  AddCommand(line, std::make_shared<Options>(), "unload",
             "Take a model out of service and free its memory",
             [](Environment& environment, const Options& given) {
               return Call(environment, given, &v1::ModelService::Stub::UnloadModel,
                           v1::UnloadModelRequest());
             });
}

}  // namespace pyramid
