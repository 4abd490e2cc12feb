#include "worker/trainer.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <c10/util/Exception.h>
#include <malloc.h>

#include <chrono>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "model/device.h"
#include "model/device_ops.h"
#include "model/exception_guard.h"
#include "model/kernels/cpu_kernels.h"
#include "model/tensors.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "worker/failure.h"
#include "worker/loss.h"

namespace pyramid {
namespace {

// Seconds since the last call.
class Timer {
 public:
  double Lap() {
    const auto now = std::chrono::steady_clock::now();
    return std::chrono::duration<double>(now - std::exchange(last_, now)).count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// bf16 where PyTorch's autocast list for the CPU says so, as long as it lives.
class Autocast {
 public:
  Autocast(bool enabled, torch::DeviceType device) : enabled_(enabled), device_(device) {
    if (!enabled_) return;
    at::autocast::set_autocast_dtype(device_, torch::kBFloat16);
    at::autocast::set_autocast_enabled(device_, true);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (!enabled_) return;
    at::autocast::decrement_nesting();
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device_, false);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  const bool enabled_;
  const torch::DeviceType device_;
};

// LibTorch's warnings (strides of a bucket, for instance) into the log instead of onto the console.
class QuietWarnings final : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override {
    log::Debug("libtorch_warning", {{"text", warning.msg()}});
  }
};

enum Shared { kLoss, kImages, kStop, kSave, kNotFinite, kSharedCount };

// A view of someone's floats; no copy on the CPU.
torch::Tensor PixelsOf(std::span<const float> pixels, int64_t count, int64_t side,
                       const torch::Device& device) {
  const int64_t channels = static_cast<int64_t>(pixels.size()) / (count * side * side);
  return torch::from_blob(const_cast<float*>(pixels.data()), {count, channels, side, side},
                          torch::kFloat)
      .to(device);
}

}  // namespace

void PrepareProcess(int threads) {
  static QuietWarnings quiet;
  c10::WarningUtils::set_warning_handler(&quiet);
  at::set_num_threads(threads);
  // Activations of tens of MB would be mapped and unmapped in every step, each page faulting anew:
  // keep them on the heap, and the heap with the process.
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, 2047 << 20);
  mallopt(M_TOP_PAD, 64 << 20);
}

absl::Status ClassifyTorch(const absl::Status& status) {
  if (status.ok() || !IsCommError(status.message())) return status;
  return WithFailure(
      absl::AbortedError(absl::StrCat("another rank is gone or stuck: ", status.message())),
      v1::COMM);
}

Trainer::Trainer(const Recipe& recipe, PvtV2 network, torch::Device device, Collective& collective)
    : recipe_(recipe),
      network_(std::move(network)),
      device_(device),
      collective_(collective),
      threads_(at::get_num_threads()) {
  network_->Initialize(static_cast<uint64_t>(recipe.seed));
  network_->to(device_);
  if (recipe.mode == "G" && !device_.is_cpu() && HasDeviceOps(device_)) {
    network_->UseDeviceOps();
    path_ = absl::StrCat("fused ", c10::DeviceTypeName(device_.type(), /*lower_case=*/true));
  }
  NamedTensors parameters;
  for (const auto& parameter : network_->named_parameters())
    parameters.emplace_back(parameter.key(), parameter.value());
  optimizer_ = std::make_unique<AdamW>(parameters, recipe.weight_decay, recipe.weight_decay_filter);
  if (recipe.mode == "G" && device_.is_cpu()) Fuse();
  shared_ = torch::zeros({kSharedCount}, torch::kDouble);
  int64_t bytes = 0;
  std::vector<torch::Tensor> tensors;
  for (const auto& [name, tensor] : parameters) {
    tensors.push_back(tensor);
    bytes += static_cast<int64_t>(tensor.nbytes());
  }
  collective_.AttachParameters(std::move(tensors), BucketBytes(bytes));
  SettleBuckets();
}

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(const Recipe& recipe,
                                                         const v1::NetworkConfig& network,
                                                         const std::string& device,
                                                         Collective& collective) {
  ASSIGN_OR_RETURN(const DeviceName name, OpenDevice(device));
  if (name.kind != "cpu" && collective.world() > 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "recipe.workers is ", collective.world(), " on ", device,
        "; several workers run on cpu only, not supported yet elsewhere: use workers: 1"));
  }
  ASSIGN_OR_RETURN(PvtV2 net, MakePvtV2(network, recipe.drop_path_rate));
  auto made = Guard("setting up the trainer", absl::StatusCode::kInternal,
                    [&]() -> absl::StatusOr<std::unique_ptr<Trainer>> {
                      const torch::Device torch_device(
                          name.kind == "cpu" ? "cpu" : absl::StrCat(name.kind, ":", name.index));
                      return std::unique_ptr<Trainer>(
                          new Trainer(recipe, std::move(net), torch_device, collective));
                    });
  if (!made.ok()) return ClassifyTorch(made.status());
  return made;
}

// Fused kernels where they fit; what doesn't is said once.
void Trainer::Fuse() {
  absl::StatusOr<FusedOps> ops = ChooseFusedOps(recipe_.amp_level == "O0" ? "fp32" : "bf16");
  if (!ops.ok()) {
    log::Warning("plain_path", {{"why", ops.status().message()}});
    return;
  }
  ops->threads = threads_;
  network_->Fuse(*ops);
  optimizer_->Fuse(*ops);
  fused_ = network_->Fuses(recipe_.image_resize, recipe_.image_resize);
  if (fused_) {
    at::set_num_threads(1);
    path_ = absl::StrCat("fused ", ops->forward->name);
  } else {
    log::Info("plain_path", {{"model", recipe_.model},
                             {"image_resize", recipe_.image_resize},
                             {"why", "too many keys"}});
  }
}

absl::StatusOr<const PackedNetwork*> Trainer::Packed() {
  if (packed_ != nullptr) return packed_.get();
  const torch::NoGradGuard no_grad;
  const auto parameters = network_->named_parameters();
  // A set that is forced and computes in bf16 is for training; here it is the best that there is.
  const kernels::CpuFeatures features = kernels::DetectCpu();
  auto kernels = kernels::ChooseCpuKernels(features, "fp32", kernels::ForcedCpuKernels());
  if (!kernels.ok()) kernels = kernels::ChooseCpuKernels(features, "fp32", "");
  RETURN_IF_ERROR(kernels.status());
  ASSIGN_OR_RETURN(
      packed_, PackedNetwork::Create(network_->config(), **kernels,
                                     [&](const std::string& name, std::span<float> out) {
                                       const torch::Tensor value = parameters[name].contiguous();
                                       std::copy_n(value.const_data_ptr<float>(), out.size(),
                                                   out.begin());
                                       return absl::OkStatus();
                                     }));
  return packed_.get();
}

// The reducer lays its buckets out by the order in which the first backward pass brings the
// gradients. One pass on a black picture settles that before training, so that a resumed run sums
// in the same order as one that wasn't interrupted.
void Trainer::SettleBuckets() {
  if (collective_.world() == 1) return;
  network_->train();
  network_->set_drop_path_key({.seed = 0, .step = 0, .first = 0});
  const int side = recipe_.image_resize;
  const torch::Tensor black =
      torch::zeros({1, network_->config().in_channels(), side, side}, device_);
  collective_.BeforeForward();
  const torch::Tensor output = network_->forward(black).sum();
  collective_.BeforeLastBackward();
  output.backward();
  optimizer_->DropGradients();
  collective_.BeforeForward();
}

absl::Status Trainer::ShareState(int64_t steps_done) {
  return ClassifyTorch(
      Guard("sharing rank 0's state", absl::StatusCode::kInternal, [&]() -> absl::Status {
        packed_.reset();
        std::vector<torch::Tensor> tensors;
        for (const torch::Tensor& parameter : network_->parameters())
          tensors.push_back(parameter.detach());
        NamedTensors state = optimizer_->State();
        for (const auto& [name, tensor] : state) tensors.push_back(tensor);
        collective_.Broadcast(tensors);
        return optimizer_->LoadState(state, steps_done);
      }));
}

absl::StatusOr<StepReport> Trainer::RunStep(Loader& loader, int64_t step, double learning_rate,
                                            const Wishes& wishes, bool measure_norm) {
  auto result = Guard("training", absl::StatusCode::kInternal, [&]() -> absl::StatusOr<StepReport> {
    packed_.reset();
    StepReport report;
    StepSeconds& seconds = report.seconds;
    Timer timer;
    network_->train();
    optimizer_->DropGradients();
    collective_.BeforeForward();
    double* shared = shared_.data_ptr<double>();
    std::fill_n(shared, static_cast<int>(kSharedCount), 0.0);
    bool last = false;
    while (!last) {
      // 1. Take.
      ASSIGN_OR_RETURN(const Batch* batch, loader.Take());
      if (batch == nullptr) return absl::InternalError(absl::StrCat("no data for step ", step));
      last = batch->plan.last_of_step;
      const torch::Tensor pixels =
          PixelsOf(batch->pixels, batch->count, recipe_.image_resize, device_);
      const torch::Tensor labels =
          torch::from_blob(const_cast<int64_t*>(batch->labels.data()), {batch->count}, torch::kLong)
              .to(device_);
      seconds.take += timer.Lap();

      // 2. Forward. The reducer averages over ranks, so a rank's share of the mean is its sum times
      // world / pictures.
      network_->set_drop_path_key({.seed = static_cast<uint64_t>(recipe_.seed),
                                   .step = static_cast<uint64_t>(step),
                                   .first = batch->plan.first_in_batch});
      torch::Tensor loss;
      {
        const Autocast autocast(recipe_.amp_level != "O0" && !fused_, device_.type());
        loss = SmoothedCrossEntropySum(network_->forward(pixels), labels, recipe_.label_smoothing);
      }
      const double weight = batch->plan.weightless ? 0.0
                                                   : static_cast<double>(collective_.world()) /
                                                         batch->plan.step_pictures;
      const double value = loss.item<double>();
      if (!batch->plan.weightless) {
        shared[kLoss] += value;
        shared[kImages] += static_cast<double>(batch->count);
      }
      shared[kNotFinite] += std::isfinite(value) ? 0 : 1;
      seconds.forward += timer.Lap();

      // 3. Backward; on the last micro-batch with the gradients' sums over ranks, bucket by bucket.
      if (last) {
        shared[kStop] = wishes.stop;
        shared[kSave] = wishes.save;
        collective_.StartSum(shared_);
        collective_.BeforeLastBackward();
      }
      (loss * weight).backward();
      seconds.backward += timer.Lap();
    }

    // 4. Step.
    collective_.WaitSum();
    report.images = std::llround(shared[kImages]);
    report.loss = shared[kLoss] / std::max<double>(1, shared[kImages]);
    report.agreed = {.stop = shared[kStop] > 0, .save = shared[kSave] > 0};
    if (shared[kNotFinite] > 0 || !std::isfinite(report.loss)) {
      return WithFailure(
          absl::OutOfRangeError(absl::StrFormat("the loss of step %d isn't a finite number "
                                                "(learning rate %g); lower lr, or clip gradients",
                                                step + 1, learning_rate)),
          v1::NOT_A_NUMBER);
    }
    if (recipe_.clip_grad || measure_norm)
      report.grad_norm = optimizer_->GradientNorm(recipe_.clip_grad ? recipe_.clip_value : 0);
    optimizer_->Step(learning_rate);
    seconds.step += timer.Lap();
    return report;
  });
  if (!result.ok()) return ClassifyTorch(result.status());
  return result;
}

absl::StatusOr<std::vector<float>> Trainer::Logits(std::span<const float> pixels, int count,
                                                   int side) {
  return Guard(
      "evaluating", absl::StatusCode::kInternal, [&]() -> absl::StatusOr<std::vector<float>> {
        if (recipe_.mode == "G" && device_.is_cpu()) {
          ASSIGN_OR_RETURN(const PackedNetwork* packed, Packed());
          if (packed->Takes(side, side)) {
            std::vector<float> logits(static_cast<size_t>(count) *
                                      network_->config().num_classes());
            packed->Forward(pixels, count, side, side, threads_, logits);
            return logits;
          }
        }
        const torch::InferenceMode inference;
        if (fused_) at::set_num_threads(threads_);
        network_->eval();
        const torch::Tensor logits = network_->forward(PixelsOf(pixels, count, side, device_))
                                         .to(torch::kCPU, torch::kFloat)
                                         .contiguous();
        network_->train();
        if (fused_) at::set_num_threads(1);
        const float* data = logits.const_data_ptr<float>();
        return std::vector<float>(data, data + logits.numel());
      });
}

absl::Status Trainer::Sum(std::span<double> values) {
  return ClassifyTorch(
      Guard("adding up over ranks", absl::StatusCode::kInternal, [&]() -> absl::Status {
        const torch::Tensor tensor =
            torch::from_blob(values.data(), {static_cast<int64_t>(values.size())}, torch::kDouble);
        collective_.SumNow(tensor);
        return absl::OkStatus();
      }));
}

}  // namespace pyramid
