#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "client/format.h"
#include "proto/base/nearest.h"

namespace pyramid {
namespace {

struct Options {
  std::vector<std::string> states;
  bool json = false;
};

absl::StatusOr<v1::JobState> ParseState(const std::string& text) {
  v1::JobState state;
  if (v1::JobState_Parse(absl::AsciiStrToUpper(text), &state) &&
      state != v1::JOB_STATE_UNSPECIFIED) {
    return state;
  }
  std::vector<std::string> known;
  for (int number = v1::QUEUED; number <= v1::FAILED; ++number) {
    known.push_back(v1::JobState_Name(static_cast<v1::JobState>(number)));
  }
  return UsageError(absl::StrCat("--state ", text, " is unknown; did you mean ",
                                 Nearest(absl::AsciiStrToUpper(text), known), "?"));
}

std::string ListText(const v1::ListJobsResponse& response) {
  Table table({"JOB", "NAME", "STATE", "EPOCH", "LOSS", "TOP-1", "IMAGES/S", "SUBMITTED", "WHY"});
  table.Right(3).Right(4).Right(5).Right(6);
  for (const v1::Job& job : response.jobs()) {
    const v1::Progress& progress = job.progress();
    table.Add({OneLine(job.id()), OneLine(job.name()), v1::JobState_Name(job.state()),
               absl::StrFormat("%.1f/%d", progress.epoch(), progress.epochs()),
               progress.loss() != 0 ? absl::StrFormat("%.4f", progress.loss()) : "-",
               progress.validated() ? FormatFraction(progress.val_top1()) : "-",
               progress.images_per_second() > 0 ? FormatRate(progress.images_per_second()) : "-",
               FormatTime(job.submitted()), OneLine(job.reason())});
  }
  return table.Text();
}

int ListJobs(Environment& environment, const Options& options) {
  v1::ListJobsRequest request;
  for (const std::string& text : options.states) {
    const absl::StatusOr<v1::JobState> state = ParseState(text);
    if (!state.ok()) return Fail(environment, state.status());
    request.add_states(*state);
  }
  const absl::StatusOr<v1::ListJobsResponse> response =
      CallTraining(environment, &v1::TrainingService::Stub::ListJobs, request);
  if (!response.ok()) return Fail(environment, response.status());
  if (options.json) {
    *environment.out << ToJson(*response) << "\n";
  } else if (response->jobs().empty()) {
    *environment.err << "no jobs\n";
  } else {
    *environment.out << ListText(*response);
  }
  return kDone;
}

}  // namespace

void AddJobsCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand("jobs", "List jobs, newest first");
  command
      ->add_option("--state", options->states,
                   "Only jobs in these states: queued, running, succeeded, failed, canceled ...")
      ->type_name("STATE")
      ->expected(1, 20);
  command->add_flag("--json", options->json, "Print one JSON object");
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] { return ListJobs(line.environment, *options); };
  });
}

}  // namespace pyramid
