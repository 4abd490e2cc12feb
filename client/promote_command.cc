#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"

namespace pyramid {
namespace {

struct Options {
  std::string checkpoint;
  std::string model;
  std::string dtype;
};

int Promote(Environment& environment, const Options& options) {
  const size_t colon = options.checkpoint.find(':');
  v1::PromoteCheckpointRequest request;
  request.set_job_id(options.checkpoint.substr(0, colon));
  if (colon != std::string::npos) request.set_checkpoint_id(options.checkpoint.substr(colon + 1));
  if (request.job_id().empty() || (colon != std::string::npos && request.checkpoint_id().empty())) {
    return Fail(environment, UsageError(absl::StrCat("\"", options.checkpoint,
                                                     "\" is not JOB or JOB:CHECKPOINT")));
  }
  request.set_model(options.model);
  request.set_dtype(options.dtype);
  const absl::StatusOr<v1::PromoteCheckpointResponse> response = CallTraining(
      environment, &v1::TrainingService::Stub::PromoteCheckpoint, request, kPromoteTimeout);
  if (!response.ok()) return Fail(environment, response.status());
  *environment.out << absl::StrCat("model ", OneLine(response->model()), " version ",
                                   response->version(),
                                   response->existed() ? " (it was there already)" : "",
                                   " in service, ", OneLine(response->digest()), "\n");
  for (const std::string& gate : response->gates()) {
    *environment.out << absl::StrCat("  ", OneLine(gate), "\n");
  }
  return kDone;
}

}  // namespace

void AddPromoteCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand("promote", "Put a job's checkpoint into service");
  command
      ->add_option("checkpoint", options->checkpoint,
                   "The job; its newest checkpoint if none is named")
      ->type_name("JOB[:CHECKPOINT]")
      ->required();
  command->add_option("--as", options->model, "The model's name")->type_name("NAME")->required();
  command->add_option("--dtype", options->dtype, "fp32 (default) or bf16")
      ->type_name("DTYPE")
      ->check(CLI::IsMember({"fp32", "bf16"}));
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return Promote(line.environment, *options); };
  });
}

}  // namespace pyramid
