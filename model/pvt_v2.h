// PVT v2: the network as a LibTorch module. Wang et al., arXiv 2106.13797.
//
// Parameters carry the official code's names (block1.0.attn.q.weight …), in its order. The plain
// path: ordinary tensor operations, any dtype, any device, differentiable. Not thread-safe while
// training; forward in eval mode under torch::InferenceMode is.
#ifndef PYRAMID_MODEL_PVT_V2_H_
#define PYRAMID_MODEL_PVT_V2_H_

#include <torch/torch.h>

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/fused_training.h"
#include "model/variants.h"
#include "proto/model.pb.h"

namespace pyramid {

// Which pictures of the global batch are dropped on which path: keyed by position in the global
// batch, so that results don't depend on how many workers share it. The trainer sets it before each
// forward pass.
struct DropPathKey {
  uint64_t seed = 0;  // of the run
  uint64_t step = 0;  // optimizer step
  int64_t first = 0;  // position in the global batch of this forward pass's first picture
};

class PvtV2Impl : public torch::nn::Module {
 public:
  // `drop_path_rate` of the last block; block k of D has drop_path_rate * k / (D - 1).
  PvtV2Impl(const v1::NetworkConfig& config, double drop_path_rate);
  ~PvtV2Impl() override;

  // x [B, in_channels, H, W] → logits [B, num_classes]. H, W ≥ 29 (linear variant: any); need not
  // be equal. Throws c10::Error for any other shape.
  torch::Tensor forward(torch::Tensor x);

  // Fresh weights from `seed`: linear N(0, 0.02), convolution N(0, sqrt(2 / fan_out)), norms 1 and
  // 0, biases 0. The same on every rank.
  void Initialize(uint64_t seed);

  void set_drop_path_key(const DropPathKey& key);

  // From now on forward computes with fused kernels (fused_training.h) where they fit: pictures in
  // f32 on the CPU, at most kernels::kMostKeys keys. Else the plain path.
  void Fuse(const FusedOps& ops);
  // From now on forward uses what a device plug-in brings along (device_ops.h) where it fits.
  void UseDeviceOps();
  // The first block of `stage` (0 to 3) alone, for measurements: tokens [B, height * width, C of
  // the stage] → the same shape. Not fused on the CPU.
  torch::Tensor FirstBlock(int stage, const torch::Tensor& tokens, int64_t height, int64_t width);
  // Does forward fuse pictures of this size (on the CPU, f32)?
  bool Fuses(int64_t height, int64_t width) const;

  const v1::NetworkConfig& config() const;

 private:
  struct Parts;
  torch::Tensor FusedForward(const torch::Tensor& x);
  std::unique_ptr<Parts> parts_;
};
TORCH_MODULE(PvtV2);

// InvalidArgument for an unknown variant (the known ones are named), class or channel counts under
// 1, unknown numerics, a drop path rate outside [0, 1).
absl::StatusOr<PvtV2> MakePvtV2(const v1::NetworkConfig& config, double drop_path_rate = 0.0);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_PVT_V2_H_
