#include "worker/run_job.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/time/time.h"
#include "model/checkpoint.h"
#include "model/exception_guard.h"
#include "model/tensors.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "worker/collective.h"
#include "worker/coordinator_client.h"
#include "worker/data/order.h"
#include "worker/evaluate.h"
#include "worker/failure.h"
#include "worker/job_data.h"
#include "worker/progress_meter.h"
#include "worker/reporter.h"
#include "worker/result_log.h"
#include "worker/saver.h"
#include "worker/schedule.h"
#include "worker/signals.h"
#include "worker/start.h"
#include "worker/trainer.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

constexpr int kSelfTestPictures = 16;
constexpr double kProgressSeconds = 0.5;  // between measurements handed to the reporter

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Every rank gets rank 0's text.
absl::StatusOr<std::string> Share(Collective& collective, std::string text) {
  const absl::Status status = Guard("sharing the start", absl::StatusCode::kInternal, [&] {
    torch::Tensor size = torch::tensor({static_cast<int64_t>(text.size())}, torch::kLong);
    collective.Broadcast({size});
    text.resize(static_cast<size_t>(size.item<int64_t>()));
    if (!text.empty()) {
      collective.Broadcast({torch::from_blob(text.data(), {size.item<int64_t>()}, torch::kUInt8)});
    }
    return absl::OkStatus();
  });
  RETURN_IF_ERROR(ClassifyTorch(status));
  return text;
}

class Job {
 public:
  Job(const JobOptions& options, Reporter& reporter)
      : options_(options),
        recipe_(options.recipe),
        rank_(options.placement.rank),
        world_(options.placement.world),
        reporter_(reporter) {}

  // True: saved and stopped as asked. False: done.
  absl::StatusOr<bool> Run() {
    ASSIGN_OR_RETURN(data_, OpenJobData(recipe_));
    meter_.emplace(data_.total_steps, data_.steps_per_epoch, recipe_.epoch_size, data_.evaluations);
    RETURN_IF_ERROR(JoinRanks());
    RETURN_IF_ERROR(AgreeOnNetwork());
    ASSIGN_OR_RETURN(trainer_, Trainer::Create(recipe_, network_, options_.device, *collective_));
    RETURN_IF_ERROR(Resume());
    Introduce();
    StartLoader();
    ASSIGN_OR_RETURN(const bool stopped, Loop());
    collective_->Leave();
    return stopped;
  }

  v1::Progress progress() const { return meter_.has_value() ? meter_->last() : v1::Progress(); }

 private:
  bool leads() const { return rank_ == 0; }
  bool StopAsked() const { return StopSignalled() || reporter_.StopAsked(); }
  void Say(absl::string_view line) { reporter_.OnLine(line); }
  std::string CheckpointPath() const {
    return (options_.checkpoints / CheckpointName(state_.step)).string();
  }

  absl::Status JoinRanks() {
    const Placement& placement = options_.placement;
    Collective::Options join{.rank = rank_,
                             .world = world_,
                             .master_host = placement.master_host,
                             .master_port = placement.master_port};
    join.meeting_file =
        options_.attempt_folder.empty()
            ? options_.checkpoints / absl::StrCat(".rendezvous-", placement.meeting_key)
            : options_.attempt_folder / "rendezvous";
    join.prefix = absl::StrCat("pyramid/", options_.job_id, "/", options_.attempt_epoch);
    ASSIGN_OR_RETURN(collective_, Collective::Join(join));
    return absl::OkStatus();
  }

  // Whose conventions the network follows is in the weights it starts from: rank 0 looks, the
  // others hear.
  absl::Status AgreeOnNetwork() {
    absl::StatusOr<Start> found =
        leads() ? FindStart(recipe_, data_.classes, options_.checkpoints) : Start();
    v1::Manifest agreed;
    if (leads() && found.ok()) {
      *agreed.mutable_network() = found->network;
      agreed.set_origin(found->origin);
      start_ = *std::move(found);
    }
    ASSIGN_OR_RETURN(const std::string shared, Share(*collective_, agreed.SerializeAsString()));
    RETURN_IF_ERROR(found.status());
    if (shared.empty() || !agreed.ParseFromString(shared)) {
      return WithFailure(absl::AbortedError("rank 0 could not read what to start from"),
                         v1::CONFIG);
    }
    network_ = agreed.network();
    recipe_.compat = CompatOf(agreed.origin(), network_.numerics());
    return absl::OkStatus();
  }

  // Rank 0 reads; the others get its weights, moments and numbers.
  absl::Status Resume() {
    const absl::Status status = leads() ? ResumeHere() : absl::OkStatus();
    std::vector<double> numbers = StateNumbers(state_);
    numbers.push_back(static_cast<double>(saved_step_));
    numbers.push_back(status.ok() ? 0 : 1);
    if (!leads()) std::fill(numbers.begin(), numbers.end(), 0.0);
    RETURN_IF_ERROR(trainer_->Sum(numbers));
    RETURN_IF_ERROR(status);
    if (numbers.back() != 0)
      return WithFailure(absl::AbortedError("rank 0 could not resume"), v1::CONFIG);
    numbers.pop_back();
    saved_step_ = std::llround(numbers.back());
    numbers.pop_back();
    state_ = StateFromNumbers(numbers);
    return trainer_->ShareState(state_.step);
  }

  absl::Status ResumeHere() {
    SaverOptions saver{.folder = options_.checkpoints,
                       .recipe = recipe_,
                       .network = network_,
                       .origin = start_.origin,
                       .labels = data_.labels,
                       .job_id = options_.job_id};
    saver.attempt_epoch = options_.attempt_epoch;
    saver.global_batch = data_.global_batch;
    saver.steps_per_epoch = data_.steps_per_epoch;
    if (data_.val != nullptr) {
      ASSIGN_OR_RETURN(PreparedPictures first,
                       PrepareFirst(*data_.val, EvalPreprocessingOf(recipe_), kSelfTestPictures));
      saver.self_test_pixels = std::move(first.pixels);
      saver.self_test_count = first.count;
    }
    saver_ = std::make_unique<Saver>(std::move(saver));
    ASSIGN_OR_RETURN(const std::optional<RunState> resumed, saver_->Resume(*trainer_));
    if (resumed.has_value()) {
      state_ = *resumed;
      // One that was written before its epoch's validation is written once more after it.
      saved_step_ = state_.epoch_closed || !AtEpochEnd() ? state_.step : -1;
      Say(absl::StrCat("Resuming from ", CheckpointPath(), ": step ", state_.step, " of ",
                       data_.total_steps, ", ", state_.epochs_done, " of ", recipe_.epoch_size,
                       " epochs done"));
    } else if (StartsFromWeights(recipe_)) {
      RETURN_IF_ERROR(StartFromWeights());
    }
    for (const std::string& line : start_.lines) Say(line);
    start_.weights.reset();
    if (state_.step > data_.total_steps) {
      return absl::FailedPreconditionError(
          absl::StrCat("the checkpoint is at step ", state_.step, " but recipe.epoch_size ",
                       recipe_.epoch_size, " ends at step ", data_.total_steps,
                       "; raise epoch_size or choose another ckpt_save_dir"));
    }
    result_log_.emplace(options_.checkpoints / "result.log",
                        state_.epochs_done - (state_.epoch_closed ? 0 : 1));
    Tolerate("writing the recipe",
             WriteFileAtomically(options_.checkpoints / absl::StrCat(recipe_.model, ".yaml"),
                                 RecipeToYaml(recipe_)));
    return absl::OkStatus();
  }

  absl::Status StartFromWeights() {
    if (start_.weights == nullptr) {  // none of the run's own checkpoints could be used
      ASSIGN_OR_RETURN(start_, OpenStart(recipe_, data_.classes));
    }
    if (!recipe_.resume_opt) return LoadWeightsInto(*trainer_->network(), *start_.weights);
    ASSIGN_OR_RETURN(state_, saver_->GoOnFrom(start_.path, *trainer_));
    start_.lines.push_back(absl::StrCat("Going on from its step ", state_.step));
    return absl::OkStatus();
  }

  // Files for people don't end a run.
  static void Tolerate(absl::string_view what, const absl::Status& status) {
    if (!status.ok()) log::Warning("file_not_written", {{"what", what}, {"why", status.message()}});
  }

  void Introduce() {
    if (!leads()) return;
    for (const std::string& warning : options_.warnings) Say(absl::StrCat("WARNING: ", warning));
    RunFacts facts{.launcher = options_.placement.source,
                   .device = options_.device,
                   .world = world_,
                   .threads = options_.threads};
    facts.classes = data_.classes;
    facts.train_pictures = data_.used;
    facts.val_pictures = data_.val == nullptr ? -1 : data_.val->size();
    facts.steps_per_epoch = data_.steps_per_epoch;
    facts.global_batch = data_.global_batch;
    for (const torch::Tensor& parameter : trainer_->network()->parameters())
      facts.parameters += parameter.numel();
    facts.kernels = trainer_->path();
    facts.checkpoints = options_.checkpoints.string();
    for (const std::string& line : ExperimentLines(recipe_, facts)) Say(line);
  }

  void StartLoader() {
    TrainLoaderOptions loader{
        .recipe = recipe_, .rank = rank_, .world = world_, .first_step = state_.step};
    loader.threads = LoaderThreads(recipe_, options_.placement.local_world);
    loader_ = MakeTrainLoader(*data_.train, loader, *data_.bad_train);
    epoch_began_ = Now();
    meter_->Start(epoch_began_, state_.step, state_.images);
  }

  // Steps, epoch ends, saves, until the last step or a wish to stop. Every decision is the same on
  // every rank.
  absl::StatusOr<bool> Loop() {
    Wishes agreed;
    while (true) {
      if (AtEpochEnd() && !state_.epoch_closed && !agreed.stop) {
        ASSIGN_OR_RETURN(agreed, CloseEpoch(agreed.save));
      }
      if (agreed.save || agreed.stop) RETURN_IF_ERROR(Save());
      if (agreed.stop) return true;
      if (state_.step == data_.total_steps) break;
      ASSIGN_OR_RETURN(agreed, Step());
    }
    RETURN_IF_ERROR(Save());
    EnterPhase("done");
    Say("Finish training!");
    if (state_.best_top1 >= 0) {
      Say(absl::StrFormat("The best validation Top_1_Accuracy is: %.4f%% at epoch %d.",
                          state_.best_top1 * 100, state_.best_epoch));
    }
    return false;
  }

  bool AtEpochEnd() const { return state_.position == 0 && state_.step > 0; }

  absl::StatusOr<Wishes> Step() {
    const double learning_rate = LearningRate(recipe_, state_.step, data_.steps_per_epoch);
    const int64_t epoch = state_.step / data_.steps_per_epoch + 1;
    const int64_t batch = state_.step % data_.steps_per_epoch + 1;
    const bool last = batch == data_.steps_per_epoch;
    const bool report_due = meter_->seconds_since_report(Now()) >= kProgressSeconds;
    ASSIGN_OR_RETURN(StepReport report,
                     trainer_->RunStep(*loader_, state_.step, learning_rate,
                                       {.stop = StopAsked(), .save = reporter_.SaveAsked()},
                                       /*measure_norm=*/report_due));
    // 5. Record.
    const double begin = Now();
    ++state_.step;
    state_.images += report.images;
    state_.position = last ? 0 : batch * data_.global_batch;
    if (batch == 1) state_.epoch_loss_sum = 0, state_.epoch_images = 0;
    state_.epoch_loss_sum += report.loss * static_cast<double>(report.images);
    state_.epoch_images += report.images;
    state_.epochs_done += last;
    state_.epoch_closed = !last;
    last_loss_ = report.loss;
    meter_->Step(report.loss, report.images, learning_rate, report.grad_norm, report.seconds.all());
    if (leads() && (batch == 1 || batch % recipe_.log_interval == 0 || last)) {
      Say(absl::StrFormat(
          "Epoch: [%d/%d], batch: [%d/%d], loss: %.6f, lr: %.6f, time: %.6fs, images/s: %.0f, "
          "left: %s",
          epoch, recipe_.epoch_size, batch, data_.steps_per_epoch, report.loss, learning_rate,
          report.seconds.all(), meter_->ImagesPerSecond(begin),
          absl::FormatDuration(absl::Seconds(std::llround(meter_->SecondsLeft())))));
    }
    if (report_due || last) Report();
    report.seconds.record = Now() - begin;
    epoch_seconds_ += report.seconds;
    return report.agreed;
  }

  void Report() { reporter_.OnProgress(meter_->Report(Now(), loader_->waited_seconds())); }

  void EnterPhase(const std::string& phase) {
    meter_->set_phase(phase);
    Report();
  }

  // Validation, checkpoint, log row. Returns what the ranks agreed on meanwhile.
  absl::StatusOr<Wishes> CloseEpoch(bool save_asked) {
    EpochRow row{.epoch = state_.epochs_done,
                 .last_loss = last_loss_,
                 .train_seconds = Now() - epoch_began_};
    row.mean_loss = state_.epoch_loss_sum / std::max(1.0, static_cast<double>(state_.epoch_images));
    const bool last = state_.step == data_.total_steps;
    if (data_.ValidatesAfter(recipe_, row.epoch)) {
      EnterPhase("validate");
      const double begin = Now();
      ASSIGN_OR_RETURN(const EvalCounts counts, Validate());
      if (counts.interrupted)
        return Wishes{.stop = true};  // the epoch stays open: the resumed run validates it
      row.eval_seconds = Now() - begin;
      row.top1 = counts.Top1();
      row.top5 = data_.classes >= 5 ? counts.Top5() : 0;
      validation_ = counts;
      validated_step_ = state_.step;
      TellValidation(row, counts.Loss());
    }
    state_.epoch_closed = true;
    if (save_asked || last || row.epoch % recipe_.ckpt_save_interval == 0) RETURN_IF_ERROR(Save());
    if (leads()) TellEpoch(row);
    epoch_began_ = Now();
    epoch_seconds_ = {};
    EnterPhase("train");
    // Who was asked to stop during validation?
    std::vector<double> asked = {StopAsked() ? 1.0 : 0.0};
    RETURN_IF_ERROR(trainer_->Sum(asked));
    return Wishes{.stop = asked[0] > 0 && !last};
  }

  // Each rank scores its part; the counts add up. `interrupted` on all ranks as soon as one was
  // asked to stop.
  absl::StatusOr<EvalCounts> Validate() {
    const IndexRange part = PartOf(data_.val->size(), rank_, world_);
    EvalLoaderOptions options{.preprocessing = EvalPreprocessingOf(recipe_),
                              .batch = recipe_.batch_size,
                              .begin = part.begin,
                              .end = part.end};
    options.threads = LoaderThreads(recipe_, options_.placement.local_world);
    const std::unique_ptr<Loader> loader = MakeEvalLoader(*data_.val, options, *data_.bad_val);
    const auto logits = [this](const Batch& batch) {
      return trainer_->Logits(batch.pixels, static_cast<int>(batch.count), recipe_.image_resize);
    };
    ASSIGN_OR_RETURN(const EvalCounts mine, Evaluate(*loader, recipe_.label_smoothing, logits,
                                                     [this](int64_t) { return StopAsked(); }));
    std::vector<double> sums = NumbersOf(mine, data_.classes);
    RETURN_IF_ERROR(trainer_->Sum(sums));
    return CountsFromNumbers(sums);
  }

  void TellValidation(const EpochRow& row, double loss) {
    meter_->Validated(row.top1, row.top5, loss, row.eval_seconds);
    const bool best = row.top1 > state_.best_top1;
    if (best) {
      state_.best_top1 = row.top1;
      state_.best_epoch = row.epoch;
    }
    if (!leads()) return;
    const std::string top5 =
        data_.classes >= 5 ? absl::StrFormat(", Top_5_Accuracy: %.4f%%", row.top5 * 100) : "";
    Say(absl::StrFormat("Validation Top_1_Accuracy: %.4f%%%s, time: %.6fs", row.top1 * 100, top5,
                        row.eval_seconds));
    if (best) Say(absl::StrFormat("=> New best val acc: %.4f%%", row.top1 * 100));
  }

  void TellEpoch(const EpochRow& row) {
    Tolerate("writing result.log", result_log_->Add(row));
    Say(absl::StrFormat("Total time since last epoch: %.6f(train: %.6f, val: %.6f)s, ETA: %.6fs",
                        Now() - epoch_began_, row.train_seconds, row.eval_seconds,
                        meter_->SecondsLeft()));
    const StepSeconds& parts = epoch_seconds_;
    Say(
        absl::StrFormat("Parts of the training time: take %.1fs, forward %.1fs, backward %.1fs, "
                        "step %.1fs, record %.1fs",
                        parts.take, parts.forward, parts.backward, parts.step, parts.record));
    Say(std::string(80, '-'));
  }

  // Rank 0 writes, unless this step's checkpoint is there; all hear how it went.
  absl::Status Save() {
    if (saved_step_ == state_.step) {
      reporter_.SaveDone();
      return absl::OkStatus();
    }
    const std::string phase = meter_->phase();
    EnterPhase("save");
    absl::Status status;
    if (leads()) {
      Say(absl::StrCat("Saving model to ", CheckpointPath()));
      const absl::StatusOr<v1::Checkpoint> checkpoint = saver_->Save(
          *trainer_, state_, validated_step_ == state_.step ? validation_ : std::nullopt);
      status = checkpoint.status();
      if (checkpoint.ok()) reporter_.OnCheckpoint(*checkpoint);
    }
    std::vector<double> failure = {static_cast<double>(FailureOf(status))};
    const absl::Status told = trainer_->Sum(failure);
    RETURN_IF_ERROR(status);
    RETURN_IF_ERROR(told);
    if (failure[0] != 0) {
      return WithFailure(absl::AbortedError("rank 0 could not save a checkpoint"),
                         static_cast<v1::FailureClass>(std::lround(failure[0])));
    }
    saved_step_ = state_.step;
    reporter_.SaveDone();
    EnterPhase(phase);
    return absl::OkStatus();
  }

  const JobOptions& options_;
  Recipe recipe_;  // compat is the network's
  const int rank_;
  const int world_;
  Reporter& reporter_;

  JobData data_;
  Start start_;  // rank 0's
  v1::NetworkConfig network_;
  std::unique_ptr<Collective> collective_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<Saver> saver_;         // rank 0's
  std::optional<ResultLog> result_log_;  // rank 0's
  std::unique_ptr<Loader> loader_;
  RunState state_;
  int64_t saved_step_ = -1;      // of the newest checkpoint, if it needs no rewriting
  int64_t validated_step_ = -1;  // whose weights validation_ measured
  std::optional<EvalCounts> validation_;
  std::optional<ProgressMeter> meter_;
  StepSeconds epoch_seconds_;
  double epoch_began_ = 0;
  double last_loss_ = 0;
};

// What happened, durably, before anyone is told.
absl::Status WriteExitRecord(const JobOptions& options, const v1::FinishRequest& request) {
  google::protobuf::util::JsonPrintOptions print;
  print.preserve_proto_field_names = true;
  print.always_print_primitive_fields = true;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(request, &json, print);
  if (!status.ok()) return absl::InternalError(std::string(status.message()));
  return WriteFileAtomically(
      options.attempt_folder / absl::StrCat("rank", options.placement.rank, ".exit.json"), json);
}

std::unique_ptr<CoordinatorClient> CallCoordinator(const JobOptions& options,
                                                   const v1::WorkerId& worker) {
  CoordinatorClient::Options client;
  client.worker = worker;
  client.server_file = options.server_file;
  client.device = options.device;
  CoordinatorClient::FromEnvironment(client);
  client.interval = worker.rank() == 0 ? absl::Seconds(1) : absl::Seconds(2);
  client.on_stale = [](const std::string& why) {
    std::fprintf(stderr,
                 "pyramid-worker: a newer attempt has begun, so this one ends at once: %s\n",
                 why.c_str());
    std::_Exit(kExitFailed);
  };
  return CoordinatorClient::Start(std::move(client));
}

// How the run ended, as the coordinator hears it; and the exit code.
int Conclude(const absl::StatusOr<bool>& stopped, v1::FinishRequest& finish) {
  finish.set_succeeded(stopped.ok() && !*stopped);
  finish.set_stopped(stopped.ok() && *stopped);
  if (stopped.ok()) {
    if (*stopped) finish.set_message("saved and stopped, as asked");
    return *stopped ? kExitStopped : kExitDone;
  }
  finish.set_failure(FailureOf(stopped.status()));
  finish.set_message(
      absl::StrReplaceAll(absl::StripAsciiWhitespace(stopped.status().message()), {{"\n", " "}}));
  return ExitCodeOf(stopped.status());
}

}  // namespace

void RunJob(const JobOptions& options) {
  InstallSignals();
  PrepareProcess(options.threads);
  const int rank = options.placement.rank;
  const bool coordinated = !options.job_id.empty();
  absl::Status ready = MakeFolders(options.checkpoints);
  if (ready.ok() && coordinated) ready = MakeFolders(options.attempt_folder);
  if (!ready.ok()) {
    std::fprintf(stderr, "pyramid-worker: %s\n", std::string(ready.message()).c_str());
    std::_Exit(kExitFailed);
  }

  v1::FinishRequest finish;
  finish.mutable_worker()->set_job_id(options.job_id);
  finish.mutable_worker()->set_epoch(options.attempt_epoch);
  finish.mutable_worker()->set_rank(rank);
  const std::unique_ptr<CoordinatorClient> client =
      coordinated ? CallCoordinator(options, finish.worker()) : nullptr;
  const std::unique_ptr<Reporter> reporter =
      coordinated ? MakeCoordinatorReporter(*client, rank)
                  : MakeConsoleReporter(rank == 0,
                                        options.checkpoints / absl::StrCat("rank", rank, ".log"));

  Job job(options, *reporter);
  const int code = Conclude(job.Run(), finish);
  *finish.mutable_progress() = job.progress();
  if (finish.stopped())
    reporter->OnLine(
        absl::StrCat("Saved and stopped, as asked, after step ", finish.progress().step()));
  if (!finish.succeeded() && !finish.stopped())
    std::fprintf(stderr, "pyramid-worker: rank %d: %s\n", rank, finish.message().c_str());
  if (coordinated) {
    if (const absl::Status status = WriteExitRecord(options, finish); !status.ok()) {
      std::fprintf(stderr, "pyramid-worker: exit record: %s\n",
                   std::string(status.message()).c_str());
    }
    if (const absl::Status status = client->Finish(finish); !status.ok()) {
      std::fprintf(stderr,
                   "pyramid-worker: the coordinator wasn't told (%s); the exit record is on disk\n",
                   std::string(status.message()).c_str());
    }
  }
  std::fflush(nullptr);
  std::_Exit(code);
}

}  // namespace pyramid
