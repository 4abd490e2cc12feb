#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/connection.h"
#include "client/exit_code.h"
#include "client/format.h"
#include "client/job_watch.h"
#include "client/progress.h"
#include "proto/base/time.h"

namespace pyramid {
namespace {

struct Options {
  std::string id;
  bool json = false;
  double patience = 600;
};

// Shows a job's events to a person.
class Watcher {
 public:
  explicit Watcher(Environment& environment)
      : display_(*environment.err, environment.err_is_terminal), columns_(environment.columns) {}

  void Show(const v1::JobEvent& event) {
    switch (event.event_case()) {
      case v1::JobEvent::kJob: {
        const v1::Job& job = event.job();
        if (job.state() == state_ && job.reason() == reason_) break;
        state_ = job.state();
        reason_ = job.reason();
        display_.Line(absl::StrCat(Clock(event), v1::JobState_Name(state_),
                                   reason_.empty() ? "" : ": ", OneLine(reason_)));
        break;
      }
      case v1::JobEvent::kProgress: {
        const v1::Progress& progress = event.progress();
        const bool milestone =
            progress.phase() != phase_ || (progress.validated() && progress.val_top1() != top1_);
        phase_ = progress.phase();
        if (progress.validated()) top1_ = progress.val_top1();
        display_.Update(JobBarLine(progress, columns_ - 1), JobPlainLine(progress),
                        JobFraction(progress), milestone, absl::Now());
        break;
      }
      case v1::JobEvent::kCheckpoint: {
        const v1::Checkpoint& checkpoint = event.checkpoint();
        display_.Line(
            absl::StrCat(Clock(event), "checkpoint ", OneLine(checkpoint.id()), ", ",
                         FormatBytes(checkpoint.bytes()), checkpoint.validated() ? ", top-1 " : "",
                         checkpoint.validated() ? FormatFraction(checkpoint.val_top1()) : ""));
        break;
      }
      case v1::JobEvent::kLog:
      case v1::JobEvent::EVENT_NOT_SET:
        break;
    }
  }

  void Note(absl::string_view text) { display_.Line(text); }
  void Finish() { display_.Finish(); }

 private:
  static std::string Clock(const v1::JobEvent& event) {
    if (!event.has_time()) return "";
    return absl::FormatTime("%H:%M:%S ", FromProto(event.time()), absl::LocalTimeZone());
  }

  ProgressDisplay display_;
  const int columns_;
  v1::JobState state_ = v1::JOB_STATE_UNSPECIFIED;
  std::string reason_;
  std::string phase_;
  double top1_ = -1;
};

std::string Summary(const v1::Job& job) {
  const v1::Progress& progress = job.progress();
  std::string text = absl::StrCat("job ", OneLine(job.id()), " ", v1::JobState_Name(job.state()));
  if (job.state() != v1::SUCCEEDED && !job.reason().empty()) {
    absl::StrAppend(&text, ": ", OneLine(job.reason()));
  }
  if (progress.validated()) absl::StrAppend(&text, ", top-1 ", FormatFraction(progress.val_top1()));
  if (progress.images_per_second() > 0) {
    absl::StrAppend(&text, ", ", FormatRate(progress.images_per_second()), " images/s");
  }
  if (job.has_started() && job.has_ended()) {
    absl::StrAppend(
        &text, ", ",
        FormatSeconds(absl::ToDoubleSeconds(FromProto(job.ended()) - FromProto(job.started()))));
  }
  if (job.restarts() > 0) absl::StrAppend(&text, ", ", job.restarts(), " restarts");
  return absl::StrCat(text, "\n");
}

}  // namespace

int WatchJobToItsEnd(Environment& environment, const std::string& job_id, bool json,
                     double patience_seconds) {
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(environment);
  if (!connection.ok()) return Fail(environment, connection.status());
  Watcher watcher(environment);
  const FollowOptions options{.patience = absl::Seconds(patience_seconds)};
  const absl::StatusOr<v1::Job> job = FollowJob(
      **connection, job_id, options,
      [&](const v1::JobEvent& event) {
        if (json) {
          *environment.out << ToJson(event) << "\n" << std::flush;
        } else {
          watcher.Show(event);
        }
      },
      [&](absl::string_view note) { watcher.Note(note); });
  watcher.Finish();
  if (!job.ok()) return Fail(environment, job.status());
  if (!json) *environment.out << Summary(*job) << std::flush;
  return job->state() == v1::SUCCEEDED ? kDone : kFailed;
}

void AddWatchCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand(
      "watch", "Follow a job to its end; exit code 0 if it succeeded (Ctrl-C leaves it running)");
  command->add_option("id", options->id, "The job")->type_name("ID")->required();
  command->add_flag("--json", options->json, "Print every event as JSON, one a line");
  command
      ->add_option("--patience", options->patience,
                   "Seconds to wait for a server that went away (600)")
      ->type_name("SECONDS")
      ->check(CLI::Range(0.0, 1e9));
  AddServerFlag(*command, line.environment);
  command->callback([line, options] {
    line.action = [line, options] {
      return WatchJobToItsEnd(line.environment, options->id, options->json, options->patience);
    };
  });
}

}  // namespace pyramid
