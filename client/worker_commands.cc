#include <algorithm>

#include "absl/strings/match.h"
#include "client/commands.h"
#include "client/exit_code.h"

namespace pyramid {
namespace {

// True for the flags that make `validate` an offline one.
bool NamesRecipeOrCheckpoint(const std::string& argument) {
  std::string name = argument.substr(0, argument.find('='));
  std::replace(name.begin(), name.end(), '_', '-');
  // CLI11 and getopt both take a short flag's value in the same word.
  if (absl::StartsWith(argument, "-c") && !absl::StartsWith(argument, "--")) return true;
  return name == "--config" || name == "--ckpt-path" || name == "--ckpt";
}

void AddForHelp(CommandLine line, const std::string& name, const std::string& description) {
  // Runs are sent on before parsing (WorkerArguments); this entry is for the list in --help.
  line.app.add_subcommand(name, description)->prefix_command();
}

}  // namespace

void AddWorkerCommands(CommandLine line) {
  AddForHelp(line, "train", "Train here and now, without a server: train -c RECIPE");
  AddForHelp(line, "bench", "Measure images/s on this machine: bench model|train");
  AddForHelp(line, "data", "Write out or check data: data export|verify");
}

std::vector<std::string> WorkerArguments(const std::vector<std::string>& arguments) {
  size_t at = 0;
  while (at < arguments.size() && absl::StartsWith(arguments[at], "-")) {
    at += arguments[at] == "--server" ? 2 : 1;  // its value is a word of its own
  }
  if (at >= arguments.size()) return {};
  const std::vector<std::string> rest(arguments.begin() + static_cast<std::ptrdiff_t>(at),
                                      arguments.end());
  if (rest[0] == "train" || rest[0] == "bench" || rest[0] == "data") return rest;
  if (rest[0] == "validate" && std::any_of(rest.begin() + 1, rest.end(), NamesRecipeOrCheckpoint)) {
    return rest;
  }
  return {};
}

void AddServerFlag(CLI::App& command, Environment& environment) {
  command
      .add_option("--server", environment.server_flag, "HOST:PORT, or the path of a server.json")
      ->type_name("ADDRESS");
}

}  // namespace pyramid
