// One rank's network, loss and optimizer, and the five parts of a training step.
#ifndef PYRAMID_WORKER_TRAINER_H_
#define PYRAMID_WORKER_TRAINER_H_

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/packed_network.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"
#include "worker/collective.h"
#include "worker/data/loader.h"
#include "worker/optimizer.h"

namespace pyramid {

// What a rank wants at the next step boundary; a wish of any rank becomes every rank's.
struct Wishes {
  bool stop = false;
  bool save = false;
};

struct StepSeconds {
  double take = 0, forward = 0, backward = 0, step = 0, record = 0;
  double all() const { return take + forward + backward + step + record; }
  void operator+=(const StepSeconds& other) {
    take += other.take;
    forward += other.forward;
    backward += other.backward;
    step += other.step;
    record += other.record;
  }
};

struct StepReport {
  double loss = 0;        // mean over the step's pictures, all ranks
  int64_t images = 0;     // all ranks
  double grad_norm = -1;  // -1: not measured in this step
  Wishes agreed;          // the same on every rank
  StepSeconds seconds;    // `record` is the caller's
};

// One setting for the process: threads inside an operation, and memory that stays with the process
// from step to step.
void PrepareProcess(int threads);

// Not thread-safe.
class Trainer {
 public:
  // `collective` must outlive the trainer. `device` as from OpenDevice.
  //   InvalidArgument  the network; more than one rank on a device other than the CPU
  //   Aborted          another rank is gone, or has another network
  static absl::StatusOr<std::unique_ptr<Trainer>> Create(const Recipe& recipe,
                                                         const v1::NetworkConfig& network,
                                                         const std::string& device,
                                                         Collective& collective);

  // Gives every rank rank 0's weights and moments. After weights or state were loaded, and before
  // the first step.
  absl::Status ShareState(int64_t steps_done);

  // Takes the micro-batches of optimizer step `step` and updates the weights with `learning_rate`.
  // `measure_norm`: of the gradients.
  //   Aborted      a peer is gone (class COMM)
  //   OutOfRange   the loss isn't a finite number (class NOT_A_NUMBER); the weights are those
  //   before the step others       as the loader's; ResourceExhausted (out of memory), Internal
  absl::StatusOr<StepReport> RunStep(Loader& loader, int64_t step, double learning_rate,
                                     const Wishes& wishes, bool measure_norm);

  // Evaluation mode, fp32, as the checkpoint will answer when it is served: packed, in mode F
  // plain. [count, channels, side, side] → [count, classes].
  absl::StatusOr<std::vector<float>> Logits(std::span<const float> pixels, int count, int side);

  // Sums over ranks, in place.
  absl::Status Sum(std::span<double> values);

  // For reading and writing weights.
  PvtV2& network() {
    packed_.reset();
    return network_;
  }
  // "fused amx-f32math", "plain" …
  const std::string& path() const { return path_; }

  AdamW& optimizer() { return *optimizer_; }

 private:
  Trainer(const Recipe& recipe, PvtV2 network, torch::Device device, Collective& collective);
  void Fuse();
  void SettleBuckets();
  absl::StatusOr<const PackedNetwork*> Packed();

  Recipe recipe_;
  PvtV2 network_;
  torch::Device device_;
  Collective& collective_;
  const int threads_;  // LibTorch has one of its own while the fused path trains (FusedOps)
  std::unique_ptr<AdamW> optimizer_;
  std::string path_ = "plain";
  bool fused_ = false;
  std::unique_ptr<const PackedNetwork> packed_;  // of the weights as they are; null: not yet
  torch::Tensor
      shared_;  // loss, images and wishes, summed over ranks during the backward pass; f64
};

// Marks errors of collectives with their class, Aborted and COMM.
absl::Status ClassifyTorch(const absl::Status& status);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_TRAINER_H_
