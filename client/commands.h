// The commands of `pyramid`, one a file. Each Add… registers a subcommand; when the command line
// names it, `action` becomes what to do.
#ifndef PYRAMID_CLIENT_COMMANDS_H_
#define PYRAMID_CLIENT_COMMANDS_H_

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "client/environment.h"

namespace pyramid {

// What a command line comes to. The result is an exit code.
using Action = std::function<int()>;

struct CommandLine {
  CLI::App& app;
  Environment& environment;  // outlives the action
  Action& action;
};

void AddSubmitCommand(CommandLine line);
void AddJobsCommand(CommandLine line);
void AddJobCommand(CommandLine line);
void AddWatchCommand(CommandLine line);
void AddLogsCommand(CommandLine line);
void AddCancelCommand(CommandLine line);
void AddSaveCommand(CommandLine line);
void AddPromoteCommand(CommandLine line);
void AddModelsCommand(CommandLine line);
// alias, traffic, rollback, load, unload.
void AddLifecycleCommands(CommandLine line);
void AddClassifyCommand(CommandLine line);
void AddValidateCommand(CommandLine line);
void AddInspectCommand(CommandLine line);
void AddKeyCommand(CommandLine line);
void AddConvertCommand(CommandLine line);
// `bench` is one of those below; `serve` runs here.
void AddBenchServeCommand(CommandLine line, CLI::App& bench);
// train, bench, data: run as pyramid-worker, which has their flags and help.
void AddWorkerCommands(CommandLine line);

// Shared with submit --watch. `json`: events on stdout, one a line.
int WatchJobToItsEnd(Environment& environment, const std::string& job_id, bool json,
                     double patience_seconds);

// --server, --key and those of TLS, on every command that talks to a server.
void AddServerFlag(CLI::App& command, Environment& environment);
// Whether `argument` is one of them whose value is the next word.
bool ServerFlagTakesWord(absl::string_view argument);

// If `arguments` (without the program's name) are for pyramid-worker, those to give it: train,
// bench (but not bench serve) and data with all that follows, validate with a recipe or a
// checkpoint. Otherwise empty.
std::vector<std::string> WorkerArguments(const std::vector<std::string>& arguments);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_COMMANDS_H_
