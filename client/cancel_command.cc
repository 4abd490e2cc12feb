#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"

namespace pyramid {
namespace {

int Cancel(Environment& environment, const v1::CancelJobRequest& request) {
  const absl::StatusOr<v1::Job> job =
      CallTraining(environment, &v1::TrainingService::Stub::CancelJob, request);
  if (!job.ok()) return Fail(environment, job.status());
  *environment.out << absl::StrCat("job ", OneLine(job->id()), " ", v1::JobState_Name(job->state()),
                                   "\n");
  return kDone;
}

}  // namespace

void AddCancelCommand(CommandLine line) {
  auto request = std::make_shared<v1::CancelJobRequest>();
  CLI::App* command = line.app.add_subcommand("cancel", "Let a job save and stop");
  command->add_option("id", *request->mutable_job_id(), "The job")->type_name("ID")->required();
  command->add_option("--reason", *request->mutable_reason(), "Why; the job keeps it")
      ->type_name("TEXT");
  AddServerFlag(*command, line.environment);
  command->callback([line, request] {
    line.action = [line, request] { return Cancel(line.environment, *request); };
  });
}

}  // namespace pyramid
