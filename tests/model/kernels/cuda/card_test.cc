// What only a card can show, and the card for ops_test.cc. Label gpu: needs libpyramid_cuda.so in
// the program's folder or in lib/ beside it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <memory>
#include <string>

#include "model/device.h"
#include "model/device_ops.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"
#include "tests/model/kernels/cuda/test_device.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {

torch::Device TestDevice() {
  static const absl::StatusOr<DeviceName> device = OpenDevice("cuda");
  TORCH_CHECK(device.ok(), std::string(device.status().message()));
  return torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(device->index));
}

namespace {

using torch::Tensor;

PvtV2 Network() {
  v1::NetworkConfig config;
  config.set_variant("pvt_v2_b0");
  config.set_num_classes(1000);
  config.set_in_channels(3);
  *config.mutable_numerics() = NumericsOf("timm");
  PvtV2 network = *MakePvtV2(config);
  network->Initialize(1);
  network->to(TestDevice());
  network->UseDeviceOps();
  return network;
}

TEST(CardTest, AttentionOfAllStagesIsAsGoodAsThePlainOne) {
  for (const auto& [queries, keys, heads, d] : {std::array{3136, 49, 1, 32},
                                                {784, 49, 2, 32},
                                                {196, 49, 5, 32},
                                                {49, 49, 8, 32},
                                                {3136, 49, 1, 64},
                                                {784, 49, 2, 64},
                                                {196, 49, 5, 64},
                                                {49, 49, 8, 64},
                                                {5776, 81, 1, 64},
                                                {784, 144, 2, 64},
                                                {1444, 256, 2, 64}}) {
    for (const torch::ScalarType type : {torch::kFloat32, torch::kHalf, torch::kBFloat16}) {
      const auto options = torch::TensorOptions(TestDevice()).dtype(type);
      const Tensor q = torch::randn({33, queries, heads * d}, options);
      const Tensor kv = torch::randn({33, keys, 2 * heads * d}, options);
      auto split = [&, h = heads, size = d](const Tensor& x) {
        return x.unflatten(-1, {h, size}).transpose(1, 2);
      };
      auto plain = [&](torch::ScalarType in, size_t size) {
        const auto parts = kv.to(in).chunk(2, -1);
        const Tensor scores = torch::matmul(split(q.to(in)), split(parts[0]).transpose(2, 3));
        return torch::matmul(torch::softmax(scores / std::sqrt(double(size)), -1), split(parts[1]))
            .transpose(1, 2)
            .flatten(2);
      };
      const Tensor exact = plain(torch::kFloat64, d);
      const Tensor ours = *DeviceAttention(q, kv, heads, 1 / std::sqrt(double(d)));
      const double error = (ours.to(torch::kFloat64) - exact).norm().item<double>();
      const double theirs = (plain(type, d).to(torch::kFloat64) - exact).norm().item<double>();
      EXPECT_LE(error, std::max(2 * theirs, exact.norm().item<double>() * 0x1p-22))
          << queries << " queries, " << keys << " keys, " << torch::toString(type);
    }
  }
}

TEST(CardTest, AReplayedForwardPassIsTheForwardPass) {
  const torch::InferenceMode inference;
  PvtV2 network = Network();
  network->eval();
  const auto options = torch::TensorOptions(TestDevice());
  const Tensor pixels = torch::zeros({4, 3, 224, 224}, options),
               logits = torch::empty({4, 1000}, options);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RecordedWork> work,
                       RecordWork({"cuda", TestDevice().index()}, [&] {
                         const torch::InferenceMode here;
                         logits.copy_(network->forward(pixels));
                       }));
  for (int i = 0; i < 3; ++i) {
    pixels.copy_(torch::randn(pixels.sizes(), options));
    ASSERT_OK(work->Replay());
    EXPECT_TRUE(torch::allclose(logits, network->forward(pixels), 1e-5, 1e-6)) << i;
  }
}

TEST(CardTest, AForwardPassThatFailsWhileRecordedSaysWhyAndLeavesTheCardUsable) {
  const absl::StatusOr<std::unique_ptr<RecordedWork>> work =
      RecordWork({"cuda", TestDevice().index()}, [] { TORCH_CHECK(false, "no such layer"); });
  EXPECT_THAT(
      work, testing::StatusIs(absl::StatusCode::kInternal, ::testing::HasSubstr("no such layer")));
  EXPECT_EQ(torch::ones({2}, torch::TensorOptions(TestDevice())).sum().item<float>(), 2);
}

TEST(CardTest, TrainingStepsLowerTheLoss) {
  PvtV2 network = Network();
  network->train();
  torch::optim::AdamW optimizer(network->parameters(), torch::optim::AdamWOptions(1e-3));
  const auto options = torch::TensorOptions(TestDevice());
  const Tensor pixels = torch::randn({16, 3, 64, 64}, options);
  const Tensor labels = torch::arange(16, options.dtype(torch::kLong));
  double first = 0, last = 0;
  for (int step = 0; step < 30; ++step) {
    optimizer.zero_grad();
    const Tensor loss = torch::cross_entropy_loss(network->forward(pixels), labels);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  EXPECT_LT(last, 0.7 * first);
}

}  // namespace
}  // namespace pyramid
