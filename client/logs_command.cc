#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "client/job_watch.h"

namespace pyramid {
namespace {

struct Options {
  std::string id;
  bool follow = false;
};

int PrintLogs(Environment& environment, const Options& options) {
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(environment);
  if (!connection.ok()) return Fail(environment, connection.status());
  int64_t attempt = 0;
  const auto print = [&](const v1::JobEvent& event) {
    if (!event.has_log()) return;
    const v1::LogLine& line = event.log();
    if (line.attempt_epoch() != attempt) {
      attempt = line.attempt_epoch();
      *environment.err << absl::StrCat("--- attempt ", attempt, "\n") << std::flush;
    }
    *environment.out << absl::StrCat("[", line.rank(), "] ", OneLine(line.text()), "\n")
                     << std::flush;
  };
  const auto note = [&](absl::string_view text) { *environment.err << text << "\n" << std::flush; };
  const FollowOptions follow{.logs = true, .history_only = !options.follow};
  const absl::StatusOr<v1::Job> job = FollowJob(**connection, options.id, follow, print, note);
  return job.ok() ? kDone : Fail(environment, job.status());
}

}  // namespace

void AddLogsCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      line.app.add_subcommand("logs", "Print what a job's workers wrote: [rank] line");
  command->add_option("id", options->id, "The job")->type_name("ID")->required();
  command->add_flag("--follow", options->follow, "Go on until the job ends");
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return PrintLogs(line.environment, *options); };
  });
}

}  // namespace pyramid
