#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"

namespace pyramid {
namespace {

int Save(Environment& environment, const v1::SaveCheckpointRequest& request) {
  const absl::StatusOr<v1::Job> job =
      CallTraining(environment, &v1::TrainingService::Stub::SaveCheckpoint, request);
  if (!job.ok()) return Fail(environment, job.status());
  *environment.out << absl::StrCat("job ", OneLine(job->id()),
                                   " saves at its next step; it was at step ",
                                   job->progress().step(), "\n");
  return kDone;
}

}  // namespace

void AddSaveCommand(CommandLine line) {
  auto request = std::make_shared<v1::SaveCheckpointRequest>();
  CLI::App* command = line.app.add_subcommand("save", "Let a running job write a checkpoint now");
  command->add_option("id", *request->mutable_job_id(), "The job")->type_name("ID")->required();
  AddServerFlag(*command, line.environment);
  command->callback([line, request] {
    line.action = [line, request] { return Save(line.environment, *request); };
  });
}

}  // namespace pyramid
