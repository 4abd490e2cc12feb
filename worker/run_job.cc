#include "worker/run_job.h"

#include <google/protobuf/util/json_util.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "model/checkpoint.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "proto/base/time.h"
#include "worker/collective.h"
#include "worker/coordinator_client.h"
#include "worker/data/order.h"
#include "worker/evaluate.h"
#include "worker/failure.h"
#include "worker/reporter.h"
#include "worker/saver.h"
#include "worker/schedule.h"
#include "worker/signals.h"
#include "worker/trainer.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

constexpr int kSelfTestPictures = 16;
constexpr double kProgressSeconds = 0.5;  // between measurements handed to the reporter

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Lines to the console or launcher's log, everything to the coordinator.
class CoordinatorReporter final : public Reporter {
 public:
  CoordinatorReporter(CoordinatorClient& client, bool rank0)
      : client_(client), rank0_(rank0), console_(MakeConsoleReporter(true, {})) {}
  void OnProgress(const v1::Progress& progress) override {
    if (rank0_) client_.SetProgress(progress);
  }
  void OnCheckpoint(const v1::Checkpoint& checkpoint) override {
    client_.AddCheckpoint(checkpoint);
  }
  void OnLine(absl::string_view line) override {
    console_->OnLine(line);
    if (rank0_) client_.AddLine(line);
  }
  bool StopAsked() const override { return client_.StopAsked(); }
  // Rank 0 alone decides on saves; its wish becomes everyone's.
  bool SaveAsked() const override { return rank0_ && client_.SaveAsked(); }
  void SaveDone() override {
    if (rank0_) client_.SaveDone();
  }

 private:
  CoordinatorClient& client_;
  const bool rank0_;
  std::unique_ptr<Reporter> console_;
};

// MindCV's result.log, one row an epoch; ours has the epoch's mean loss as a last column. Rows
// beyond `epochs_done` are of work that is done again.
class ResultLog {
 public:
  ResultLog(fs::path path, int64_t epochs_done) : path_(std::move(path)) {
    std::string kept;
    if (absl::StatusOr<std::string> old = ReadFile(path_); old.ok() && epochs_done > 0) {
      for (const absl::string_view row : absl::StrSplit(*old, '\n', absl::SkipEmpty())) {
        int64_t epoch = 0;
        const std::vector<absl::string_view> words = absl::StrSplit(row, ' ', absl::SkipEmpty());
        if (absl::SimpleAtoi(words.front(), &epoch) && epoch <= epochs_done)
          absl::StrAppend(&kept, row, "\n");
      }
    }
    rows_ = absl::StrCat(Row({"Epoch", "TrainLoss", "Top_1_Accuracy", "Top_5_Accuracy", "TrainTime",
                              "EvalTime", "TotalTime", "MeanLoss"}),
                         kept);
  }

  absl::Status Add(int64_t epoch, double last_loss, const EvalCounts& counts, double train_seconds,
                   double eval_seconds, double mean_loss) {
    absl::StrAppend(
        &rows_, Row({absl::StrCat(epoch), absl::StrFormat("%.6f", last_loss),
                     absl::StrFormat("%.4f", counts.Top1() * 100),
                     absl::StrFormat("%.4f", counts.Top5() * 100),
                     absl::StrFormat("%.2f", train_seconds), absl::StrFormat("%.2f", eval_seconds),
                     absl::StrFormat("%.2f", train_seconds + eval_seconds),
                     absl::StrFormat("%.6f", mean_loss)}));
    return WriteFileAtomically(path_, rows_);
  }

 private:
  static std::string Row(const std::vector<std::string>& cells) {
    std::string row;
    for (const std::string& cell : cells) absl::StrAppendFormat(&row, "%-20s", cell);
    return row + "\n";
  }

  fs::path path_;
  std::string rows_;
};

struct OpenedData {
  std::unique_ptr<Dataset> train;
  std::unique_ptr<Dataset> val;  // null: not validated while training
  int classes = 0;
  std::vector<std::string> labels;
};

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
    progress_.set_phase("start");
    RETURN_IF_ERROR(OpenData());
    RETURN_IF_ERROR(JoinRanks());
    RETURN_IF_ERROR(BuildTrainer());
    RETURN_IF_ERROR(Resume());
    Describe();
    StartLoader();
    ASSIGN_OR_RETURN(const bool stopped, Loop());
    collective_->Leave();
    return stopped;
  }

  const v1::Progress& progress() const { return progress_; }

 private:
  bool leads() const { return rank_ == 0; }
  void Say(absl::string_view line) { reporter_.OnLine(line); }

  absl::Status OpenData() {
    ASSIGN_OR_RETURN(data_.train,
                     OpenDataset(recipe_.dataset, recipe_.data_dir, recipe_.train_split));
    if (recipe_.val_while_train) {
      absl::StatusOr<std::unique_ptr<Dataset>> val =
          OpenDataset(recipe_.dataset, recipe_.data_dir, recipe_.val_split);
      if (!val.ok())
        return Annotate(val.status(),
                        "opening recipe.val_split (set val_while_train: False to train without)");
      data_.val = *std::move(val);
    }
    data_.labels = data_.train->classes();
    data_.classes =
        recipe_.num_classes > 0 ? recipe_.num_classes : static_cast<int>(data_.labels.size());
    RETURN_IF_ERROR(CheckLabels(*data_.train, data_.classes));
    if (data_.val != nullptr) RETURN_IF_ERROR(CheckLabels(*data_.val, data_.classes));
    data_.labels.resize(data_.classes);
    for (int c = 0; c < data_.classes; ++c) {
      if (data_.labels[c].empty()) data_.labels[c] = absl::StrCat(c);
    }
    const int64_t pictures = data_.train->size();
    used_ = recipe_.num_samples > 0 ? std::min(recipe_.num_samples, pictures) : pictures;
    global_batch_ = recipe_.global_batch();
    steps_per_epoch_ = StepsPerEpoch(used_, global_batch_, recipe_.drop_remainder);
    if (steps_per_epoch_ == 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "recipe.batch_size: a step takes ", global_batch_, " pictures (", recipe_.batch_size,
          " x ", recipe_.workers, " workers x ", recipe_.gradient_accumulation_steps,
          " accumulation) but there are ", used_, "; lower it or set drop_remainder: False"));
    }
    total_steps_ = steps_per_epoch_ * recipe_.epoch_size;
    bad_train_ = std::make_unique<BadPictures>(data_.train->size());
    if (data_.val != nullptr) bad_val_ = std::make_unique<BadPictures>(data_.val->size());
    return absl::OkStatus();
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

  absl::Status BuildTrainer() {
    network_ = NetworkOf(recipe_, data_.classes);
    ASSIGN_OR_RETURN(trainer_, Trainer::Create(recipe_, network_, options_.device, *collective_));
    return absl::OkStatus();
  }

  // Rank 0 reads; the others get its weights, moments and numbers.
  absl::Status Resume() {
    absl::Status status;
    std::vector<double> numbers(11, 0.0);
    if (leads()) {
      status = ResumeHere();
      numbers = {static_cast<double>(state_.step),         static_cast<double>(state_.epochs_done),
                 static_cast<double>(state_.position),     static_cast<double>(state_.images),
                 state_.epoch_closed ? 1.0 : 0.0,          state_.epoch_loss_sum,
                 static_cast<double>(state_.epoch_images), state_.best_top1,
                 static_cast<double>(state_.best_epoch),   status.ok() ? 0.0 : 1.0,
                 static_cast<double>(saved_step_)};
    }
    RETURN_IF_ERROR(trainer_->Sum(std::span<double>(numbers)));
    RETURN_IF_ERROR(status);
    if (numbers[9] != 0)
      return WithFailure(absl::AbortedError("rank 0 could not resume"), v1::CONFIG);
    state_ = {.step = static_cast<int64_t>(numbers[0]),
              .epochs_done = static_cast<int64_t>(numbers[1]),
              .position = static_cast<int64_t>(numbers[2]),
              .images = static_cast<int64_t>(numbers[3]),
              .epoch_closed = numbers[4] != 0,
              .epoch_loss_sum = numbers[5],
              .epoch_images = static_cast<int64_t>(numbers[6]),
              .best_top1 = numbers[7],
              .best_epoch = static_cast<int64_t>(numbers[8])};
    saved_step_ = static_cast<int64_t>(numbers[10]);
    return trainer_->ShareState(state_.step);
  }

  absl::Status ResumeHere() {
    SaverOptions saver{.folder = options_.checkpoints,
                       .recipe = recipe_,
                       .network = network_,
                       .labels = data_.labels,
                       .job_id = options_.job_id};
    saver.attempt_epoch = options_.attempt_epoch;
    saver.global_batch = global_batch_;
    if (data_.val != nullptr) RETURN_IF_ERROR(ReadSelfTest(saver));
    saver_ = std::make_unique<Saver>(std::move(saver));
    ASSIGN_OR_RETURN(const std::optional<RunState> resumed, saver_->Resume(*trainer_));
    if (resumed.has_value()) {
      state_ = *resumed;
      saved_step_ = state_.epoch_closed || state_.position != 0 ? state_.step : -1;
      Say(absl::StrCat("Resuming from ",
                       (options_.checkpoints / CheckpointName(state_.step)).string(), ": step ",
                       state_.step, ", epoch ", state_.epochs_done, " of ", recipe_.epoch_size));
    } else if (!recipe_.ckpt_path.empty()) {
      ASSIGN_OR_RETURN(state_, saver_->StartFrom(recipe_.ckpt_path, *trainer_));
      Say(absl::StrCat("Starting from ", recipe_.ckpt_path,
                       recipe_.resume_opt ? absl::StrCat(", step ", state_.step) : ""));
    }
    if (state_.step > total_steps_) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the checkpoint is at step ", state_.step, " but recipe.epoch_size ", recipe_.epoch_size,
          " ends at step ", total_steps_, "; raise epoch_size or choose another ckpt_save_dir"));
    }
    result_log_ =
        std::make_unique<ResultLog>(options_.checkpoints / "result.log", state_.epochs_done);
    return WriteFileAtomically(options_.checkpoints / absl::StrCat(recipe_.model, ".yaml"),
                               RecipeToYaml(recipe_));
  }

  absl::Status ReadSelfTest(SaverOptions& saver) {
    const v1::Preprocessing p = EvalPreprocessingOf(recipe_);
    for (int64_t i = 0; i < data_.val->size() && saver.self_test_count < kSelfTestPictures; ++i) {
      absl::StatusOr<RgbImage> image = data_.val->Read(i, p.channels());
      if (!image.ok()) continue;
      absl::StatusOr<std::vector<float>> pixels = Preprocess(*image, p);
      if (!pixels.ok()) return Annotate(pixels.status(), data_.val->NameOf(i));
      saver.self_test_pixels.insert(saver.self_test_pixels.end(), pixels->begin(), pixels->end());
      ++saver.self_test_count;
    }
    return absl::OkStatus();
  }

  // The block that MindCV's train.py logs.
  void Describe() {
    if (!leads()) return;
    for (const std::string& warning : options_.warnings) Say(absl::StrCat("WARNING: ", warning));
    int64_t parameters = 0;
    for (const torch::Tensor& parameter : trainer_->network()->parameters())
      parameters += parameter.numel();
    const bool grey = recipe_.in_channels == 1;
    std::string text = "Essential Experiment Configurations:";
    const auto add = [&](absl::string_view name, const std::string& value) {
      absl::StrAppend(&text, "\n", name, ": ", value);
    };
    add("MindSpore mode[GRAPH(0)/PYNATIVE(1)]", recipe_.mode == "G" ? "0" : "1");
    add("Distributed mode",
        absl::StrCat(world_ > 1 ? "True" : "False", " (", options_.placement.source, ")"));
    add("Number of devices", absl::StrCat(world_, " x ", options_.device, ", ", options_.threads,
                                          options_.threads == 1 ? " thread" : " threads", " each"));
    add("Number of training samples", absl::StrCat(used_));
    add("Number of validation samples",
        data_.val == nullptr ? "None" : absl::StrCat(data_.val->size()));
    add("Number of classes", absl::StrCat(data_.classes));
    add("Number of batches", absl::StrCat(steps_per_epoch_));
    add("Batch size",
        absl::StrCat(recipe_.batch_size, " per worker, ", global_batch_, " per step"));
    add("Auto augment", recipe_.auto_augment.empty() ? "None" : recipe_.auto_augment);
    add("Color jitter", grey ? "None (one channel)" : absl::StrCat(recipe_.color_jitter));
    add("MixUp", absl::StrCat(recipe_.mixup));
    add("CutMix", absl::StrCat(recipe_.cutmix));
    add("Model", recipe_.model);
    add("Model parameters", absl::StrCat(parameters));
    add("Number of epochs", absl::StrCat(recipe_.epoch_size));
    add("Optimizer", recipe_.opt);
    add("Learning rate", absl::StrCat(recipe_.lr));
    add("LR Scheduler", recipe_.scheduler);
    add("Weight decay",
        absl::StrCat(recipe_.weight_decay, " (filter: ", recipe_.weight_decay_filter, ")"));
    add("Auto mixed precision",
        recipe_.amp_level == "O0" ? "O0" : absl::StrCat(recipe_.amp_level, " ", recipe_.amp_dtype));
    add("Checkpoints", options_.checkpoints.string());
    for (const absl::string_view line : absl::StrSplit(text, '\n')) Say(line);
  }

  void StartLoader() {
    loader_ = MakeTrainLoader(*data_.train,
                              {.recipe = recipe_,
                               .rank = rank_,
                               .world = world_,
                               .first_step = state_.step,
                               .threads = LoaderThreads(recipe_, options_.placement.local_world)},
                              *bad_train_);
    epoch_began_ = last_report_ = Now();
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
      if (state_.step == total_steps_) break;
      ASSIGN_OR_RETURN(agreed, Step());
    }
    RETURN_IF_ERROR(Save());
    progress_.set_phase("done");
    progress_.set_seconds_left(0);
    Report();
    Say("Finish training!");
    if (state_.best_top1 >= 0) {
      Say(absl::StrFormat("The best validation Top_1_Accuracy is: %.4f%% at epoch %d.",
                          state_.best_top1 * 100, state_.best_epoch));
    }
    return false;
  }

  bool AtEpochEnd() const { return state_.position == 0 && state_.step > 0; }

  absl::StatusOr<Wishes> Step() {
    const double learning_rate = LearningRate(recipe_, state_.step, steps_per_epoch_);
    const int64_t batch = state_.step % steps_per_epoch_ + 1;
    const bool measure = Now() - last_report_ >= kProgressSeconds;
    const Wishes wishes = {.stop = StopSignalled() || reporter_.StopAsked(),
                           .save = reporter_.SaveAsked()};
    ASSIGN_OR_RETURN(StepReport report,
                     trainer_->RunStep(*loader_, state_.step, learning_rate, wishes, measure));
    // 5. Record.
    const double begin = Now();
    ++state_.step;
    state_.images += report.images;
    state_.position = batch == steps_per_epoch_ ? 0 : batch * global_batch_;
    state_.epoch_loss_sum =
        (batch == 1 ? 0 : state_.epoch_loss_sum) + report.loss * static_cast<double>(report.images);
    state_.epoch_images = (batch == 1 ? 0 : state_.epoch_images) + report.images;
    if (batch == steps_per_epoch_) ++state_.epochs_done;
    state_.epoch_closed = batch != steps_per_epoch_;
    last_loss_ = report.loss;
    Count(report, learning_rate);
    if (leads() && (batch == 1 || batch % recipe_.log_interval == 0 || batch == steps_per_epoch_)) {
      const int64_t epoch = (state_.step - 1) / steps_per_epoch_ + 1;
      Say(absl::StrFormat(
          "Epoch: [%d/%d], batch: [%d/%d], loss: %.6f, lr: %.6f, time: %.6fs, images/s: %.0f, "
          "left: %s",
          epoch, recipe_.epoch_size, batch, steps_per_epoch_, report.loss, learning_rate,
          report.seconds.all(), progress_.images_per_second(),
          absl::FormatDuration(absl::Seconds(std::max<int64_t>(0, std::llround(SecondsLeft()))))));
    }
    if (measure || batch == steps_per_epoch_) Report();
    report.seconds.record = Now() - begin;
    AddSeconds(report.seconds);
    return report.agreed;
  }

  // Sums since the last report.
  void Count(const StepReport& report, double learning_rate) {
    ++interval_steps_;
    interval_images_ += report.images;
    interval_loss_ += report.loss * static_cast<double>(report.images);
    step_seconds_ = step_seconds_ == 0 ? report.seconds.all()
                                       : 0.98 * step_seconds_ + 0.02 * report.seconds.all();
    if (report.grad_norm >= 0) progress_.set_grad_norm(report.grad_norm);
    progress_.set_learning_rate(learning_rate);
    const double elapsed = Now() - last_report_;
    if (elapsed > 0)
      progress_.set_images_per_second(static_cast<double>(interval_images_) / elapsed);
  }

  void AddSeconds(const StepSeconds& seconds) {
    epoch_seconds_.take += seconds.take;
    epoch_seconds_.forward += seconds.forward;
    epoch_seconds_.backward += seconds.backward;
    epoch_seconds_.step += seconds.step;
    epoch_seconds_.record += seconds.record;
  }

  double SecondsLeft() const {
    const double steps = static_cast<double>(total_steps_ - state_.step) * step_seconds_;
    return steps + eval_seconds_ * static_cast<double>(recipe_.epoch_size - state_.epochs_done) /
                       recipe_.val_interval;
  }

  void Report() {
    const double now = Now();
    if (progress_.phase() == "start") progress_.set_phase("train");
    progress_.set_step(state_.step);
    progress_.set_steps(total_steps_);
    progress_.set_epoch(static_cast<double>(state_.step) / static_cast<double>(steps_per_epoch_));
    progress_.set_epochs(recipe_.epoch_size);
    progress_.set_images(state_.images);
    if (interval_steps_ > 0) {
      progress_.set_loss(interval_loss_ /
                         std::max<double>(1, static_cast<double>(interval_images_)));
      progress_.set_step_seconds((now - last_report_) / static_cast<double>(interval_steps_));
      progress_.set_images_per_second(static_cast<double>(interval_images_) / (now - last_report_));
      progress_.set_data_wait_seconds((loader_->waited_seconds() - reported_wait_) /
                                      static_cast<double>(interval_steps_));
      reported_wait_ = loader_->waited_seconds();
    }
    if (progress_.phase() != "done") progress_.set_seconds_left(SecondsLeft());
    *progress_.mutable_time() = ToProto(absl::Now());
    interval_steps_ = interval_images_ = 0;
    interval_loss_ = 0;
    last_report_ = now;
    reporter_.OnProgress(progress_);
  }

  void EnterPhase(const char* phase) {
    progress_.set_phase(phase);
    Report();
  }

  // Validation, log row, checkpoint. Returns what the ranks agreed on meanwhile.
  absl::StatusOr<Wishes> CloseEpoch(bool save_asked) {
    const double train_seconds = Now() - epoch_began_;
    const int64_t epoch = state_.epochs_done;
    const bool last = state_.step == total_steps_;
    std::optional<EvalCounts> counts;
    double eval_seconds = 0;
    if (data_.val != nullptr && ((epoch - 1) % recipe_.val_interval == 0 || last)) {
      EnterPhase("validate");
      const double begin = Now();
      ASSIGN_OR_RETURN(counts, Validate());
      eval_seconds = Now() - begin;
      if (counts->interrupted)
        return Wishes{.stop = true};  // the epoch stays open: the resumed run validates it
      eval_seconds_ = eval_seconds;
      validation_ = counts;
      validated_step_ = state_.step;
      TellValidation(*counts, epoch, eval_seconds);
    }
    state_.epoch_closed = true;
    if (save_asked || last || epoch % recipe_.ckpt_save_interval == 0) RETURN_IF_ERROR(Save());
    const double all_seconds = Now() - epoch_began_;
    epoch_began_ = Now();
    if (leads()) {
      RETURN_IF_ERROR(result_log_->Add(
          epoch, last_loss_, counts.value_or(EvalCounts{}), train_seconds, eval_seconds,
          state_.epoch_loss_sum / std::max<double>(1, static_cast<double>(state_.epoch_images))));
      Say(absl::StrFormat("Total time since last epoch: %.6f(train: %.6f, val: %.6f)s, ETA: %.6fs",
                          all_seconds, train_seconds, eval_seconds, SecondsLeft()));
      const StepSeconds parts = std::exchange(epoch_seconds_, {});
      Say(
          absl::StrFormat("Parts of the training time: take %.1fs, forward %.1fs, backward %.1fs, "
                          "step %.1fs, record %.1fs",
                          parts.take, parts.forward, parts.backward, parts.step, parts.record));
      Say(std::string(80, '-'));
    }
    EnterPhase("train");
    // Who was asked to stop during validation?
    std::vector<double> asked = {StopSignalled() || reporter_.StopAsked() ? 1.0 : 0.0};
    RETURN_IF_ERROR(trainer_->Sum(std::span<double>(asked)));
    return Wishes{.stop = asked[0] > 0 && !last};
  }

  // Each rank scores its part; the counts add up. `interrupted` on all ranks as soon as one was
  // asked to stop.
  absl::StatusOr<EvalCounts> Validate() {
    const IndexRange part = PartOf(data_.val->size(), rank_, world_);
    const v1::Preprocessing preprocessing = EvalPreprocessingOf(recipe_);
    const std::unique_ptr<Loader> loader =
        MakeEvalLoader(*data_.val,
                       {.preprocessing = preprocessing,
                        .batch = recipe_.batch_size,
                        .begin = part.begin,
                        .end = part.end,
                        .threads = LoaderThreads(recipe_, options_.placement.local_world)},
                       *bad_val_);
    ASSIGN_OR_RETURN(EvalCounts counts,
                     Evaluate(
                         *loader, preprocessing.crop(), recipe_.label_smoothing,
                         [this](std::span<const float> pixels, int count, int side) {
                           return trainer_->Logits(pixels, count, side);
                         },
                         [this](int64_t) { return StopSignalled() || reporter_.StopAsked(); }));
    std::vector<double> sums = {static_cast<double>(counts.images),
                                static_cast<double>(counts.top1), static_cast<double>(counts.top5),
                                counts.loss_sum, counts.interrupted ? 1.0 : 0.0};
    RETURN_IF_ERROR(trainer_->Sum(std::span<double>(sums)));
    return EvalCounts{.images = std::llround(sums[0]),
                      .top1 = std::llround(sums[1]),
                      .top5 = std::llround(sums[2]),
                      .loss_sum = sums[3],
                      .interrupted = sums[4] > 0};
  }

  void TellValidation(const EvalCounts& counts, int64_t epoch, double seconds) {
    progress_.set_validated(true);
    progress_.set_val_top1(counts.Top1());
    progress_.set_val_top5(data_.classes >= 5 ? counts.Top5() : 0);
    progress_.set_val_loss(counts.Loss());
    const bool best = counts.Top1() > state_.best_top1;
    if (best) {
      state_.best_top1 = counts.Top1();
      state_.best_epoch = epoch;
    }
    if (!leads()) return;
    std::string line = absl::StrFormat("Validation Top_1_Accuracy: %.4f%%", counts.Top1() * 100);
    if (data_.classes >= 5)
      absl::StrAppendFormat(&line, ", Top_5_Accuracy: %.4f%%", counts.Top5() * 100);
    Say(absl::StrFormat("%s, time: %.6fs", line, seconds));
    if (best) Say(absl::StrFormat("=> New best val acc: %.4f%%", counts.Top1() * 100));
  }

  // Rank 0 writes; all hear how it went.
  absl::Status Save() {
    if (saved_step_ == state_.step) {
      reporter_.SaveDone();
      return absl::OkStatus();
    }
    const std::string phase = progress_.phase();
    EnterPhase("save");
    absl::Status status;
    std::vector<double> failed = {0.0};
    if (leads()) {
      Say(absl::StrCat("Saving model to ",
                       (options_.checkpoints / CheckpointName(state_.step)).string()));
      const absl::StatusOr<v1::Checkpoint> checkpoint = saver_->Save(
          *trainer_, state_, validated_step_ == state_.step ? validation_ : std::nullopt);
      status = checkpoint.status();
      if (checkpoint.ok()) reporter_.OnCheckpoint(*checkpoint);
      failed[0] = status.ok() ? 0 : FailureOf(status);
    }
    const absl::Status agreed = trainer_->Sum(std::span<double>(failed));
    RETURN_IF_ERROR(status);
    RETURN_IF_ERROR(agreed);
    if (failed[0] != 0) {
      return WithFailure(absl::AbortedError("rank 0 could not save a checkpoint"),
                         static_cast<v1::FailureClass>(std::lround(failed[0])));
    }
    saved_step_ = state_.step;
    reporter_.SaveDone();
    EnterPhase(phase.c_str());
    return absl::OkStatus();
  }

  const JobOptions& options_;
  const Recipe& recipe_;
  const int rank_;
  const int world_;
  Reporter& reporter_;

  OpenedData data_;
  std::unique_ptr<BadPictures> bad_train_, bad_val_;
  v1::NetworkConfig network_;
  std::unique_ptr<Collective> collective_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<Saver> saver_;           // rank 0's
  std::unique_ptr<ResultLog> result_log_;  // rank 0's
  std::unique_ptr<Loader> loader_;
  RunState state_;
  int64_t used_ = 0, global_batch_ = 0, steps_per_epoch_ = 0, total_steps_ = 0;
  int64_t saved_step_ = -1;      // of the newest checkpoint, if it needs no rewriting
  int64_t validated_step_ = -1;  // whose weights validation_ measured
  std::optional<EvalCounts> validation_;

  v1::Progress progress_;
  StepSeconds epoch_seconds_;
  double epoch_began_ = 0, last_report_ = 0, last_loss_ = 0;
  double step_seconds_ = 0, eval_seconds_ = 0, reported_wait_ = 0;
  int64_t interval_steps_ = 0, interval_images_ = 0;
  double interval_loss_ = 0;
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
  std::unique_ptr<CoordinatorClient> client;
  std::unique_ptr<Reporter> reporter;
  if (coordinated) {
    CoordinatorClient::Options client_options;
    client_options.worker = finish.worker();
    client_options.server_file = options.server_file;
    client_options.device = options.device;
    client_options.interval = rank == 0 ? absl::Seconds(1) : absl::Seconds(2);
    client_options.on_stale = [](const std::string& why) {
      std::fprintf(stderr,
                   "pyramid-worker: a newer attempt has begun, so this one ends at once: %s\n",
                   why.c_str());
      std::_Exit(kExitFailed);
    };
    client = CoordinatorClient::Start(std::move(client_options));
    reporter = std::make_unique<CoordinatorReporter>(*client, rank == 0);
  } else {
    reporter =
        MakeConsoleReporter(rank == 0, options.checkpoints / absl::StrCat("rank", rank, ".log"));
  }

  Job job(options, *reporter);
  const absl::StatusOr<bool> stopped = job.Run();
  *finish.mutable_progress() = job.progress();
  finish.set_succeeded(stopped.ok() && !*stopped);
  finish.set_stopped(stopped.ok() && *stopped);
  int code = stopped.ok() ? (*stopped ? kExitStopped : kExitDone) : ExitCodeOf(stopped.status());
  if (!stopped.ok()) {
    finish.set_failure(FailureOf(stopped.status()));
    finish.set_message(
        absl::StrReplaceAll(absl::StripAsciiWhitespace(stopped.status().message()), {{"\n", " "}}));
    std::fprintf(stderr, "pyramid-worker: rank %d: %s\n", rank, finish.message().c_str());
  } else if (*stopped) {
    finish.set_message("saved and stopped, as asked");
    reporter->OnLine(
        absl::StrCat("Saved and stopped, as asked, after step ", job.progress().step()));
  }
  std::fflush(nullptr);
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
  // LibTorch's and Gloo's own clean-up can wait for peers that are gone: everything is on disk, so
  // leave.
  std::fflush(nullptr);
  std::_Exit(code);
}

}  // namespace pyramid
