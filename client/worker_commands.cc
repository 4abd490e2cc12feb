#include <algorithm>

#include "absl/strings/match.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/program.h"

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
  CLI::App* bench = line.app.add_subcommand(
      "bench", "Measure: bench model|train images/s on this machine, bench serve a server");
  bench->require_subcommand(1);
  AddBenchServeCommand(line, *bench);
  AddForHelp(line, "data", "Write out or check data: data export|verify");
}

std::vector<std::string> WorkerArguments(const std::vector<std::string>& arguments) {
  size_t at = 0;
  while (at < arguments.size() && absl::StartsWith(arguments[at], "-")) {
    at += ServerFlagTakesWord(arguments[at]) ? 2 : 1;
  }
  if (at >= arguments.size()) return {};
  const std::vector<std::string> rest(arguments.begin() + static_cast<std::ptrdiff_t>(at),
                                      arguments.end());
  if (rest[0] == "bench" && rest.size() > 1 && rest[1] == "serve") return {};
  if (rest[0] == "train" || rest[0] == "bench" || rest[0] == "data") return rest;
  if (rest[0] == "validate" && std::any_of(rest.begin() + 1, rest.end(), NamesRecipeOrCheckpoint)) {
    return rest;
  }
  return {};
}

void AddServerFlag(CLI::App& command, Environment& environment) {
  const std::string group = "Server";
  Environment::Security& flags = environment.flags;
  command
      .add_option("--server", environment.server_flag, "HOST:PORT, or the path of a server.json")
      ->type_name("ADDRESS")
      ->group(group);
  command.add_option("--key", flags.key, "key, or @FILE that holds it (else PYRAMID_KEY)")
      ->type_name("KEY")
      ->group(group);
  command.add_flag("--tls", flags.tls, "connect with TLS, trusting the system's authorities")
      ->group(group);
  command.add_option("--tls-ca", flags.tls_ca, "TLS, trusting the certificates in this file")
      ->type_name("FILE")
      ->group(group);
  command.add_option("--tls-cert", flags.tls_cert, "certificate to show to the server")
      ->type_name("FILE")
      ->group(group);
  command.add_option("--tls-key", flags.tls_key, "private key of --tls-cert")
      ->type_name("FILE")
      ->group(group);
  command.add_option("--tls-name", flags.tls_name, "name that the server's certificate must bear")
      ->type_name("NAME")
      ->group(group);
}

bool ServerFlagTakesWord(absl::string_view argument) {
  for (const absl::string_view flag :
       {"--server", "--key", "--tls-ca", "--tls-cert", "--tls-key", "--tls-name"}) {
    if (NormaliseFlags({std::string(argument)}).front() == flag) return true;
  }
  return false;
}

}  // namespace pyramid
