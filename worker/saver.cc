#include "worker/saver.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <span>
#include <system_error>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "model/checkpoint.h"
#include "model/tensors.h"
#include "model/weights.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "proto/base/time.h"
#include "worker/failure.h"

namespace pyramid {
namespace {

namespace fs = std::filesystem;

torch::Tensor Whole(int64_t value) { return torch::tensor({value}, torch::kLong); }
torch::Tensor Real(double value) { return torch::tensor({value}, torch::kDouble); }

NamedTensors TensorsOf(const RunState& state, const Recipe& recipe, int64_t global_batch) {
  return {{"run.step", Whole(state.step)},
          {"run.epochs_done", Whole(state.epochs_done)},
          {"run.position", Whole(state.position)},
          {"run.images", Whole(state.images)},
          {"run.epoch_closed", Whole(state.epoch_closed)},
          {"run.epoch_loss_sum", Real(state.epoch_loss_sum)},
          {"run.epoch_images", Whole(state.epoch_images)},
          {"run.best_top1", Real(state.best_top1)},
          {"run.best_epoch", Whole(state.best_epoch)},
          {"run.seed", Whole(recipe.seed)},
          {"run.global_batch", Whole(global_batch)}};
}

absl::StatusOr<RunState> StateFrom(const NamedTensors& tensors) {
  const std::map<std::string, torch::Tensor> by_name(tensors.begin(), tensors.end());
  absl::Status status;
  const auto number = [&](const char* name) -> double {
    const auto found = by_name.find(name);
    if (found != by_name.end() && found->second.numel() == 1) return found->second.item<double>();
    status = absl::DataLossError(absl::StrCat(kStateFile, " has no ", name));
    return 0;
  };
  RunState state;
  state.step = static_cast<int64_t>(number("run.step"));
  state.epochs_done = static_cast<int64_t>(number("run.epochs_done"));
  state.position = static_cast<int64_t>(number("run.position"));
  state.images = static_cast<int64_t>(number("run.images"));
  state.epoch_closed = number("run.epoch_closed") != 0;
  state.epoch_loss_sum = number("run.epoch_loss_sum");
  state.epoch_images = static_cast<int64_t>(number("run.epoch_images"));
  state.best_top1 = number("run.best_top1");
  state.best_epoch = static_cast<int64_t>(number("run.best_epoch"));
  RETURN_IF_ERROR(status);
  return state;
}

std::string Describe(const v1::NetworkConfig& network) {
  return absl::StrCat(network.variant(), " with ", network.num_classes(), " classes and ",
                      network.in_channels(), " channels");
}

// The weights as they stand in a network, to be written in another format.
class NetworkWeights final : public Weights {
 public:
  NetworkWeights(const torch::nn::Module& network, const v1::Manifest& manifest)
      : manifest_(manifest) {
    for (const auto& [name, tensor] : StateOf(network)) {
      parameters_.push_back({name, tensor.sizes().vec()});
      tensors_.emplace(name, tensor);
    }
  }

  const v1::Manifest& manifest() const override { return manifest_; }
  const std::vector<WeightParameter>& parameters() const override { return parameters_; }
  const std::vector<std::pair<std::string, std::string>>& facts() const override { return facts_; }

  absl::Status Read(const WeightParameter& parameter, std::span<float> out) const override {
    const torch::Tensor values =
        tensors_.at(parameter.name).detach().to(torch::kCPU, torch::kFloat32).contiguous();
    std::copy_n(values.const_data_ptr<float>(), out.size(), out.begin());
    return absl::OkStatus();
  }

 private:
  const v1::Manifest manifest_;
  std::vector<WeightParameter> parameters_;
  std::map<std::string, torch::Tensor> tensors_;
  const std::vector<std::pair<std::string, std::string>> facts_;
};

bool SameNetwork(const v1::NetworkConfig& a, const v1::NetworkConfig& b) {
  return a.SerializeAsString() == b.SerializeAsString();
}

}  // namespace

std::vector<double> StateNumbers(const RunState& s) {
  return {static_cast<double>(s.step),         static_cast<double>(s.epochs_done),
          static_cast<double>(s.position),     static_cast<double>(s.images),
          static_cast<double>(s.epoch_closed), s.epoch_loss_sum,
          static_cast<double>(s.epoch_images), s.best_top1,
          static_cast<double>(s.best_epoch)};
}

RunState StateFromNumbers(const std::vector<double>& numbers) {
  return {.step = static_cast<int64_t>(numbers[0]),
          .epochs_done = static_cast<int64_t>(numbers[1]),
          .position = static_cast<int64_t>(numbers[2]),
          .images = static_cast<int64_t>(numbers[3]),
          .epoch_closed = numbers[4] != 0,
          .epoch_loss_sum = numbers[5],
          .epoch_images = static_cast<int64_t>(numbers[6]),
          .best_top1 = numbers[7],
          .best_epoch = static_cast<int64_t>(numbers[8])};
}

absl::StatusOr<v1::Checkpoint> Saver::Save(Trainer& trainer, const RunState& state,
                                           const std::optional<EvalCounts>& validation) {
  const auto begin = std::chrono::steady_clock::now();
  const Recipe& recipe = options_.recipe;
  const fs::path folder = options_.folder / CheckpointName(state.step);

  ASSIGN_OR_RETURN(const std::string weights, TensorsToSafetensors(StateOf(*trainer.network())));
  NamedTensors run = TensorsOf(state, recipe, options_.global_batch);
  for (auto& tensor : trainer.optimizer().State()) run.push_back(std::move(tensor));
  ASSIGN_OR_RETURN(const std::string run_bytes, TensorsToSafetensors(run));
  std::vector<CheckpointFile> files = {{std::string(kWeightsFile), weights},
                                       {std::string(kStateFile), run_bytes}};
  std::string self_test;
  if (options_.self_test_count > 0) {
    const int count = options_.self_test_count;
    const int side = recipe.image_resize;
    ASSIGN_OR_RETURN(std::vector<float> logits,
                     trainer.Logits(options_.self_test_pixels, count, side));
    const NamedTensors tensors = {
        {"pixels", torch::from_blob(options_.self_test_pixels.data(),
                                    {count, recipe.in_channels, side, side}, torch::kFloat)},
        {"logits",
         torch::from_blob(logits.data(), {count, static_cast<int64_t>(logits.size()) / count},
                          torch::kFloat)}};
    ASSIGN_OR_RETURN(self_test, TensorsToSafetensors(tensors));
    files.push_back({std::string(kSelfTestFile), self_test});
  }

  v1::Manifest manifest;
  *manifest.mutable_network() = options_.network;
  manifest.set_origin(options_.origin);
  *manifest.mutable_preprocessing() = EvalPreprocessingOf(recipe);
  manifest.mutable_labels()->Assign(options_.labels.begin(), options_.labels.end());
  v1::TrainingRecord& training = *manifest.mutable_training();
  training.set_job_id(options_.job_id);
  training.set_attempt_epoch(options_.attempt_epoch);
  training.set_step(state.step);
  training.set_epochs_done(static_cast<int32_t>(state.epochs_done));
  training.set_global_batch(options_.global_batch);
  training.set_seed(recipe.seed);
  training.set_recipe(RecipeToYaml(recipe));
  if (validation.has_value()) {
    training.set_validated(true);
    training.set_val_top1(validation->Top1());
    training.set_val_top5(options_.network.num_classes() >= 5 ? validation->Top5() : 0);
    training.set_val_loss(validation->Loss());
    training.set_val_images(validation->images);
    v1::AnswerMix& answers = *training.mutable_val_answers();
    answers.mutable_classes()->Assign(validation->classes.begin(), validation->classes.end());
    answers.mutable_confidence()->Assign(validation->confidence.begin(),
                                         validation->confidence.end());
  }

  // A checkpoint of this step that was written before the epoch's validation steps aside until the
  // new one is whole.
  const fs::path aside = folder.string() + ".replaced";
  std::error_code error;
  fs::remove_all(aside, error);
  const bool replaces = fs::exists(folder, error);
  if (replaces) RETURN_IF_ERROR(RenameSynced(folder, aside));
  absl::StatusOr<v1::Manifest> written = WriteCheckpoint(folder, manifest, files);
  if (!written.ok()) {
    if (replaces) RenameSynced(aside, folder).IgnoreError();
    if (!absl::IsResourceExhausted(written.status())) return written.status();
    return WithFailure(Annotate(written.status(), "older checkpoints are untouched"),
                       v1::DISK_FULL);
  }
  fs::remove_all(aside, error);
  RETURN_IF_ERROR(WriteOtherFormat(trainer, *written));
  RemoveOld();

  v1::Checkpoint checkpoint;
  checkpoint.set_id(folder.filename().string());
  checkpoint.set_step(state.step);
  checkpoint.set_epochs_done(static_cast<int32_t>(state.epochs_done));
  checkpoint.set_path(fs::absolute(folder, error).string());
  checkpoint.set_digest(written->digest());
  for (const v1::FileEntry& file : written->files())
    checkpoint.set_bytes(checkpoint.bytes() + file.bytes());
  checkpoint.set_validated(validation.has_value());
  checkpoint.set_val_top1(training.val_top1());
  *checkpoint.mutable_created() = written->created();
  checkpoint.set_write_seconds(
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  return checkpoint;
}

fs::path Saver::OtherFormat(int64_t step) const {
  const Recipe& recipe = options_.recipe;
  if (recipe.ckpt_format == "pyramid") return {};
  const int64_t each = options_.steps_per_epoch;
  const int64_t epoch = step == 0 ? 0 : (step - 1) / each + 1;
  const int64_t steps = step == 0 ? 0 : (step - 1) % each + 1;  // of that epoch
  return options_.folder /
         absl::StrCat(recipe.model, "-", epoch, "_", steps,
                      recipe.ckpt_format == "mindspore" ? ".ckpt" : ".safetensors");
}

absl::Status Saver::WriteOtherFormat(Trainer& trainer, const v1::Manifest& manifest) const {
  const fs::path path = OtherFormat(manifest.training().step());
  if (path.empty()) return absl::OkStatus();
  const NetworkWeights weights(*trainer.network(), manifest);
  const bool mindspore = options_.recipe.ckpt_format == "mindspore";
  const absl::Status status =
      WriteWeights(weights, path, mindspore ? OutputFormat::kMindSpore : OutputFormat::kSafetensors,
                   mindspore ? Naming::kMindCv : Naming::kOfficial);
  return absl::IsResourceExhausted(status) ? WithFailure(status, v1::DISK_FULL) : status;
}

// latest_k: the newest; top_k: the best by validation, older first among equals; the newest stays
// in any case, it is the one to resume from.
void Saver::RemoveOld() {
  if (options_.recipe.ckpt_save_policy == "none") return;
  std::vector<fs::path> all = ListCheckpoints(options_.folder);
  const size_t keep = options_.recipe.keep_checkpoint_max;
  if (all.size() <= keep) return;
  const fs::path newest = all.back();
  if (options_.recipe.ckpt_save_policy == "top_k") {
    std::vector<std::pair<double, fs::path>> ranked;
    for (const fs::path& path : all) {
      const absl::StatusOr<v1::Manifest> manifest = ReadManifest(path);
      ranked.emplace_back(manifest.ok() && manifest->training().validated()
                              ? manifest->training().val_top1()
                              : -1.0,
                          path);
    }
    std::stable_sort(ranked.begin(), ranked.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    all.clear();
    for (auto& [score, path] : ranked) all.push_back(std::move(path));
  }
  size_t remove = all.size() - keep;
  for (const fs::path& path : all) {
    if (remove == 0) break;
    if (path == newest) continue;
    // Renamed first, so that a half removed folder doesn't look like a checkpoint.
    const fs::path trash = path.string() + ".removed";
    std::error_code error;
    fs::rename(path, trash, error);
    if (!error) fs::remove_all(trash, error);
    int64_t step = 0;
    if (absl::SimpleAtoi(absl::StripPrefix(path.filename().string(), "step-"), &step)) {
      if (const fs::path other = OtherFormat(step); !other.empty()) fs::remove(other, error);
    }
    --remove;
  }
}

absl::Status Saver::CheckSameRun(const v1::Manifest& manifest, const fs::path& checkpoint) const {
  std::string difference;
  const v1::TrainingRecord& training = manifest.training();
  if (!SameNetwork(manifest.network(), options_.network)) {
    difference = absl::StrCat("of ", Describe(manifest.network()), ", this job trains ",
                              Describe(options_.network));
  } else if (training.global_batch() != options_.global_batch) {
    difference = absl::StrCat("made with ", training.global_batch(),
                              " pictures a step, this job has ", options_.global_batch);
  } else if (training.seed() != options_.recipe.seed) {
    difference =
        absl::StrCat("made with seed ", training.seed(), ", this job has ", options_.recipe.seed);
  }
  if (difference.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("can't go on from ", checkpoint.string(), ": it is ", difference,
                   "; choose another ckpt_save_dir to start anew"));
}

absl::StatusOr<RunState> Saver::Load(const fs::path& checkpoint, Trainer& trainer) {
  ASSIGN_OR_RETURN(const v1::Manifest manifest, ReadManifest(checkpoint));
  ASSIGN_OR_RETURN(const std::string weights,
                   ReadCheckpointFile(checkpoint, manifest, kWeightsFile));
  ASSIGN_OR_RETURN(const NamedTensors tensors, TensorsFromSafetensors(weights));
  ASSIGN_OR_RETURN(const std::string bytes, ReadCheckpointFile(checkpoint, manifest, kStateFile));
  ASSIGN_OR_RETURN(const NamedTensors run, TensorsFromSafetensors(bytes));
  ASSIGN_OR_RETURN(const RunState state, StateFrom(run));
  RETURN_IF_ERROR(LoadState(*trainer.network(), tensors));
  RETURN_IF_ERROR(trainer.optimizer().LoadState(run, state.step));
  return state;
}

absl::StatusOr<std::optional<RunState>> Saver::Resume(Trainer& trainer) {
  std::vector<fs::path> checkpoints = ListCheckpoints(options_.folder);
  std::reverse(checkpoints.begin(), checkpoints.end());
  for (const fs::path& checkpoint : checkpoints) {
    absl::StatusOr<v1::Manifest> manifest = ReadManifest(checkpoint);
    if (manifest.ok()) RETURN_IF_ERROR(CheckSameRun(*manifest, checkpoint));
    absl::StatusOr<RunState> state = manifest.ok() ? Load(checkpoint, trainer) : manifest.status();
    if (state.ok()) {
      // A run that ended between the two writes lacks the second.
      std::error_code error;
      if (const fs::path other = OtherFormat(state->step);
          !other.empty() && !fs::exists(other, error)) {
        RETURN_IF_ERROR(WriteOtherFormat(trainer, *manifest));
      }
      return *state;
    }
    log::Warning("checkpoint_skipped",
                 {{"path", checkpoint.string()}, {"why", state.status().message()}});
    // Out of the way: the run will write this step again.
    std::error_code error;
    const fs::path damaged = checkpoint.string() + ".damaged";
    fs::remove_all(damaged, error);
    fs::rename(checkpoint, damaged, error);
  }
  return std::nullopt;
}

absl::StatusOr<RunState> Saver::GoOnFrom(const fs::path& checkpoint, Trainer& trainer) {
  ASSIGN_OR_RETURN(const v1::Manifest manifest, ReadManifest(checkpoint));
  RETURN_IF_ERROR(CheckSameRun(manifest, checkpoint));
  return Load(checkpoint, trainer);
}

}  // namespace pyramid
