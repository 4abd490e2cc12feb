#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"

namespace pyramid {
namespace {

struct Options {
  std::string id;
};

int Save(Environment& environment, const Options& options) {
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(environment);
  if (!connection.ok()) return Fail(environment, connection.status());
  v1::SaveCheckpointRequest request;
  request.set_job_id(options.id);
  grpc::ClientContext context;
  SetDeadline(context, kCallTimeout);
  v1::Job job;
  const grpc::Status status = (*connection)->training()->SaveCheckpoint(&context, request, &job);
  if (!status.ok()) return Fail(environment, (*connection)->ToStatus(status));
  *environment.out << absl::StrCat("job ", OneLine(job.id()),
                                   " saves at its next step; it was at step ",
                                   job.progress().step(), "\n");
  return kDone;
}

}  // namespace

void AddSaveCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand("save", "Let a running job write a checkpoint now");
  command->add_option("id", options->id, "The job")->type_name("ID")->required();
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return Save(line.environment, *options); };
  });
}

}  // namespace pyramid
