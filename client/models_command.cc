#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "client/format.h"

namespace pyramid {
namespace {

struct Options {
  bool json = false;
};

std::string ModelsText(const v1::ListModelsResponse& response) {
  Table table(
      {"MODEL", "VERSION", "SERVING", "NETWORK", "CLASSES", "INPUT", "TOP-1", "CREATED", "DIGEST"});
  table.Right(1).Right(4).Right(5).Right(6);
  for (const v1::ModelVersion& model : response.models()) {
    table.Add({OneLine(model.name()), absl::StrCat(model.version()), model.serving() ? "yes" : "",
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

}  // namespace

void AddModelsCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand("models", "List models and their versions");
  command->add_flag("--json", options->json, "Print one JSON object");
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return ListModels(line.environment, *options); };
  });
}

}  // namespace pyramid
