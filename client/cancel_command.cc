#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"

namespace pyramid {
namespace {

struct Options {
  std::string id;
  std::string reason;
};

int Cancel(Environment& environment, const Options& options) {
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(environment);
  if (!connection.ok()) return Fail(environment, connection.status());
  v1::CancelJobRequest request;
  request.set_job_id(options.id);
  request.set_reason(options.reason);
  grpc::ClientContext context;
  SetDeadline(context, kCallTimeout);
  v1::Job job;
  const grpc::Status status = (*connection)->training()->CancelJob(&context, request, &job);
  if (!status.ok()) return Fail(environment, (*connection)->ToStatus(status));
  *environment.out << absl::StrCat("job ", OneLine(job.id()), " ", v1::JobState_Name(job.state()),
                                   "\n");
  return kDone;
}

}  // namespace

void AddCancelCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand("cancel", "Let a job save and stop");
  command->add_option("id", options->id, "The job")->type_name("ID")->required();
  command->add_option("--reason", options->reason, "Why; the job keeps it")->type_name("TEXT");
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return Cancel(line.environment, *options); };
  });
}

}  // namespace pyramid
