#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "client/format.h"
#include "client/progress.h"

namespace pyramid {
namespace {

struct Options {
  std::string id;
  bool json = false;
};

std::string ExitText(const v1::WorkerExit& worker) {
  if (!worker.exited()) return absl::StrCat("rank ", worker.rank(), " hasn't ended");
  if (worker.signal() != 0) {
    return absl::StrCat("rank ", worker.rank(), " ended by signal ", worker.signal());
  }
  return absl::StrCat("rank ", worker.rank(), " exit code ", worker.exit_code());
}

std::string AttemptsText(const v1::Job& job) {
  if (job.attempts().empty()) return "";
  std::string text = "\nattempts\n";
  for (const v1::Attempt& attempt : job.attempts()) {
    const std::string devices = absl::StrJoin(attempt.devices(), ", ");
    absl::StrAppend(&text, "  epoch ", attempt.epoch(), "  ", FormatTime(attempt.started()), " to ",
                    attempt.has_ended() ? FormatTime(attempt.ended()) : "now", "  from step ",
                    attempt.resumed_step(), devices.empty() ? "" : "  on ", OneLine(devices), "\n");
    if (attempt.failure() != v1::FAILURE_CLASS_UNSPECIFIED) {
      absl::StrAppend(&text, "    ", v1::FailureClass_Name(attempt.failure()), ": ",
                      OneLine(attempt.cause()), "\n");
    }
    for (const v1::WorkerExit& worker : attempt.workers()) {
      const bool clean = worker.exited() && worker.signal() == 0 && worker.exit_code() == 0;
      if (!attempt.has_ended() || clean) continue;
      absl::StrAppend(&text, "    ", ExitText(worker), "\n");
      for (const std::string& log_line : worker.last_lines()) {
        absl::StrAppend(&text, "      | ", OneLine(log_line), "\n");
      }
    }
  }
  return text;
}

std::string JobText(const v1::Job& job) {
  const v1::Progress& progress = job.progress();
  Table facts;
  facts.Add({"job", OneLine(job.id())});
  if (!job.name().empty()) facts.Add({"name", OneLine(job.name())});
  if (!job.owner().empty()) facts.Add({"owner", OneLine(job.owner())});
  facts.Add({"state", v1::JobState_Name(job.state())});
  if (!job.reason().empty()) facts.Add({"why", OneLine(job.reason())});
  facts.Add({"workers", absl::StrCat(job.workers(), " on ", OneLine(job.device()))});
  facts.Add({"submitted", FormatTime(job.submitted())});
  if (job.has_started()) facts.Add({"started", FormatTime(job.started())});
  if (job.has_ended()) facts.Add({"ended", FormatTime(job.ended())});
  if (progress.steps() > 0) facts.Add({"progress", JobPlainLine(progress)});
  facts.Add({"restarts", absl::StrCat(job.restarts(), " of at most ", job.max_restarts())});
  if (!job.folder().empty()) facts.Add({"folder", OneLine(job.folder())});
  std::string text = facts.Text() + AttemptsText(job);
  if (!job.checkpoints().empty()) {
    Table table({"CHECKPOINT", "EPOCHS", "TOP-1", "SIZE", "WRITTEN"});
    table.Right(1).Right(2).Right(3);
    for (const v1::Checkpoint& checkpoint : job.checkpoints()) {
      table.Add({OneLine(checkpoint.id()), absl::StrCat(checkpoint.epochs_done()),
                 checkpoint.validated() ? FormatFraction(checkpoint.val_top1()) : "-",
                 FormatBytes(checkpoint.bytes()), FormatTime(checkpoint.created())});
    }
    absl::StrAppend(&text, "\n", table.Text());
  }
  return text;
}

int ShowJob(Environment& environment, const Options& options) {
  v1::GetJobRequest request;
  request.set_job_id(options.id);
  const absl::StatusOr<v1::Job> job =
      CallTraining(environment, &v1::TrainingService::Stub::GetJob, request);
  if (!job.ok()) return Fail(environment, job.status());
  *environment.out << (options.json ? ToJson(*job) + "\n" : JobText(*job));
  return kDone;
}

}  // namespace

void AddJobCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      line.app.add_subcommand("job", "Show one job: state, progress, attempts, checkpoints");
  command->add_option("id", options->id, "The job")->type_name("ID")->required();
  command->add_flag("--json", options->json, "Print one JSON object");
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return ShowJob(line.environment, *options); };
  });
}

}  // namespace pyramid
