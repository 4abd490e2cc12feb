#include "client/program.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <exception>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/worker_process.h"
#include "proto/base/nearest.h"

namespace pyramid {
namespace {

constexpr absl::string_view kFooter =
    "The server: --server HOST:PORT (or a server.json), else PYRAMID_SERVER, else "
    "data/server.json, "
    "else 127.0.0.1:8001.\n"
    "A server with keys: --key KEY or @FILE, else PYRAMID_KEY.\n"
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused, 5 server unreachable.";

// The command's name if it is none of ours; empty otherwise.
std::string UnknownCommand(const std::vector<std::string>& arguments,
                           const std::vector<std::string>& known) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (ServerFlagTakesWord(arguments[i])) {
      ++i;
    } else if (!absl::StartsWith(arguments[i], "-")) {
      return std::find(known.begin(), known.end(), arguments[i]) == known.end() ? arguments[i] : "";
    }
  }
  return "";
}

int Usage(const Environment& environment, const CLI::App& app, absl::string_view message) {
  std::string command = "pyramid";
  for (const CLI::App* at = &app; !at->get_subcommands().empty();) {
    at = at->get_subcommands().front();
    absl::StrAppend(&command, " ", at->get_name());
  }
  return Fail(environment, UsageError(absl::StrCat(message, " (see ", command, " --help)")));
}

}  // namespace

std::vector<std::string> NormaliseFlags(std::vector<std::string> arguments) {
  for (std::string& argument : arguments) {
    if (argument == "--") break;
    if (!absl::StartsWith(argument, "--")) continue;
    const size_t end = std::min(argument.find('='), argument.size());
    std::replace(argument.begin(), argument.begin() + static_cast<std::ptrdiff_t>(end), '_', '-');
  }
  return arguments;
}

int RunProgram(const std::vector<std::string>& arguments, Environment& environment) {
  const std::vector<std::string> for_worker = WorkerArguments(arguments);
  if (!for_worker.empty()) return RunWorker(environment, for_worker);

  CLI::App app("Trains and serves PVT v2 image classifiers.", "pyramid");
  app.footer(std::string(kFooter));
  app.set_version_flag("--version", "pyramid " PYRAMID_VERSION, "Print the version and leave");
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  AddServerFlag(app, environment);
  Action action;
  const CommandLine line{app, environment, action};
  AddSubmitCommand(line);
  AddJobsCommand(line);
  AddJobCommand(line);
  AddWatchCommand(line);
  AddLogsCommand(line);
  AddSaveCommand(line);
  AddCancelCommand(line);
  AddPromoteCommand(line);
  AddModelsCommand(line);
  AddLifecycleCommands(line);
  AddClassifyCommand(line);
  AddValidateCommand(line);
  AddWorkerCommands(line);
  AddInspectCommand(line);
  AddConvertCommand(line);
  AddKeyCommand(line);

  std::vector<std::string> known;
  for (const CLI::App* sub : app.get_subcommands([](CLI::App*) { return true; })) {
    known.push_back(sub->get_name());
  }
  if (const std::string word = UnknownCommand(arguments, known); !word.empty()) {
    return Usage(
        environment, app,
        absl::StrCat("no command \"", word, "\"; did you mean ", Nearest(word, known), "?"));
  }
  if (arguments.empty()) {
    *environment.err << app.help();
    return kWrongUsage;
  }
  try {
    std::vector<std::string> reversed = NormaliseFlags(arguments);  // as CLI11 wants them
    std::reverse(reversed.begin(), reversed.end());
    app.parse(reversed);
  } catch (const CLI::CallForHelp&) {
    // Help of the subcommand, if one was chosen.
    *environment.out << app.help() << std::flush;
    return kDone;
  } catch (const CLI::CallForVersion&) {
    *environment.out << "pyramid " PYRAMID_VERSION "\n" << std::flush;
    return kDone;
  } catch (const CLI::ParseError& error) {
    return Usage(environment, app, error.what());
  }
  if (!action) return Usage(environment, app, "no command given");
  const int code = action();
  environment.out->flush();
  // Output that didn't get where it should (a full disk) is no success.
  if (code == kDone && environment.out->fail()) {
    return Fail(environment, absl::InternalError("can't write the output"));
  }
  return code;
}

}  // namespace pyramid
