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
  std::string history;
  int limit = 0;
  bool json = false;
};

// "stable 90 %, canary"
std::string ServingText(const v1::ModelVersion& model) {
  std::vector<std::string> aliases;
  for (const std::string& alias : model.aliases()) aliases.push_back(OneLine(alias));
  if (aliases.empty() && model.serving()) aliases.emplace_back("stable");
  std::string text = absl::StrJoin(aliases, ",");
  if (model.unloaded()) return absl::StrCat(text, text.empty() ? "" : " ", "unloaded");
  if (model.traffic_percent() > 0 && model.traffic_percent() < 100) {
    absl::StrAppend(&text, absl::StrFormat(" %g %%", model.traffic_percent()));
  }
  return text;
}

std::string ModelsText(const v1::ListModelsResponse& response) {
  Table table(
      {"MODEL", "VERSION", "SERVING", "NETWORK", "CLASSES", "INPUT", "TOP-1", "CREATED", "DIGEST"});
  table.Right(1).Right(4).Right(5).Right(6);
  for (const v1::ModelVersion& model : response.models()) {
    table.Add({OneLine(model.name()), absl::StrCat(model.version()), ServingText(model),
               OneLine(model.network().variant()), absl::StrCat(model.network().num_classes()),
               absl::StrCat(model.network().in_channels(), "x", model.preprocessing().crop(), "x",
                            model.preprocessing().crop()),
               model.training().validated() ? FormatFraction(model.training().val_top1()) : "-",
               FormatTime(model.created()),
               // Enough to tell versions apart; --json has all of it.
               OneLine(model.digest().substr(0, 19))});
  }
  return table.Text();
}

int ListModels(Environment& environment, const Options& options) {
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(environment);
  if (!connection.ok()) return Fail(environment, connection.status());
  grpc::ClientContext context;
  SetDeadline(context, kCallTimeout);
  v1::ListModelsResponse response;
  const grpc::Status status =
      (*connection)->classification()->ListModels(&context, v1::ListModelsRequest(), &response);
  if (!status.ok()) return Fail(environment, (*connection)->ToStatus(status));
  if (options.json) {
    *environment.out << ToJson(response) << "\n";
  } else if (response.models().empty()) {
    *environment.err << "no models; put one into service with: pyramid promote JOB --as NAME\n";
  } else {
    *environment.out << ModelsText(response);
  }
  return kDone;
}

// "promote stable", "traffic canary 10 %", "load"
std::string ActionText(const v1::ModelEvent& event) {
  std::string text = OneLine(event.action());
  if (!event.alias().empty()) absl::StrAppend(&text, " ", OneLine(event.alias()));
  if (event.traffic_percent() > 0) {
    absl::StrAppend(&text, absl::StrFormat(" %g %%", event.traffic_percent()));
  }
  return text;
}

std::string VersionsText(const v1::ModelEvent& event) {
  const std::string version = event.version() == 0 ? "-" : absl::StrCat(event.version());
  if (event.previous_version() == 0 || event.previous_version() == event.version()) return version;
  return absl::StrCat(event.previous_version(), " → ", version);
}

std::string HistoryText(const v1::ListModelEventsResponse& response) {
  Table table({"TIME", "ACTOR", "ACTION", "VERSION", "CHECKPOINT", "RESULT"});
  for (const v1::ModelEvent& event : response.events()) {
    std::vector<std::string> gates;
    for (const v1::GateResult& gate : event.gates()) gates.push_back(OneLine(gate.text()));
    std::string result = event.code() == 0 ? absl::StrJoin(gates, "; ")
                                           : absl::StrCat("refused: ", OneLine(event.error()));
    if (event.code() == 0 && result.empty()) result = "done";
    table.Add({FormatTime(event.time()), event.actor().empty() ? "-" : OneLine(event.actor()),
               ActionText(event), VersionsText(event),
               event.job_id().empty()
                   ? "-"
                   : absl::StrCat(OneLine(event.job_id()), " step ", event.step()),
               std::move(result)});
  }
  return table.Text();
}

int ShowHistory(Environment& environment, const Options& options) {
  v1::ListModelEventsRequest request;
  request.set_model(options.history);
  request.set_limit(options.limit);
  const absl::StatusOr<v1::ListModelEventsResponse> response =
      CallModels(environment, &v1::ModelService::Stub::ListModelEvents, request);
  if (!response.ok()) return Fail(environment, response.status());
  if (options.json) {
    *environment.out << ToJson(*response) << "\n";
  } else {
    *environment.out << HistoryText(*response);
  }
  return kDone;
}

}  // namespace

void AddModelsCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand("models", "List models and their versions");
  CLI::Option* history =
      command
          ->add_option(
              "--history", options->history,
              "What happened to a model: promotions with their numbers, aliases, rollbacks")
          ->type_name("NAME");
  command->add_option("--limit", options->limit, "The newest entries of the history (100)")
      ->type_name("N")
      ->check(CLI::Range(1, 10'000))
      ->needs(history);
  command->add_flag("--json", options->json, "Print one JSON object");
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] {
      return options->history.empty() ? ListModels(line.environment, *options)
                                      : ShowHistory(line.environment, *options);
    };
  });
}

}  // namespace pyramid
