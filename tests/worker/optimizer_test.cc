#include "worker/optimizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

NamedTensors Parameters(torch::Dtype dtype = torch::kDouble) {
  torch::manual_seed(3);
  return {{"block1.0.attn.q.weight", torch::randn({4, 3}, dtype).requires_grad_()},
          {"block1.0.attn.q.bias", torch::randn({4}, dtype).requires_grad_()},
          {"norm1.weight", torch::randn({3}, dtype).requires_grad_()}};
}

// update = m̂ / (sqrt(v̂) + eps) + wd * p; p -= lr * update.
TEST(AdamWTest, FollowsTheFormula) {
  NamedTensors parameters = Parameters();
  AdamW optimizer(parameters, 0.05, "norm_and_bias");
  std::vector<torch::Tensor> expected, m, v;
  for (const auto& [name, p] : parameters) {
    expected.push_back(p.detach().clone());
    m.push_back(torch::zeros_like(p));
    v.push_back(torch::zeros_like(p));
  }
  for (int step = 1; step <= 5; ++step) {
    const double lr = 0.01 / step;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const torch::Tensor g = torch::randn_like(expected[i]);
      parameters[i].second.mutable_grad() = g.clone();
      m[i] = 0.9 * m[i] + 0.1 * g;
      v[i] = 0.999 * v[i] + 0.001 * g * g;
      const double decay = i == 0 ? 0.05 : 0;
      const torch::Tensor update =
          m[i] / (1 - std::pow(0.9, step)) / ((v[i] / (1 - std::pow(0.999, step))).sqrt() + 1e-8);
      expected[i] = expected[i] - lr * (update + decay * expected[i]);
    }
    optimizer.Step(lr);
    for (size_t i = 0; i < parameters.size(); ++i) {
      EXPECT_LT((parameters[i].second - expected[i]).abs().max().item<double>(), 1e-9)
          << step << " " << parameters[i].first;
    }
  }
}

TEST(AdamWTest, OurKernelsTakeLibTorchsSteps) {
  ASSERT_OK_AND_ASSIGN(const FusedOps ops, ChooseFusedOps("fp32"));
  NamedTensors a = Parameters(torch::kFloat), b = Parameters(torch::kFloat);
  AdamW plain(a, 0.05, "norm_and_bias"), fused(b, 0.05, "norm_and_bias");
  fused.Fuse(ops);
  for (int step = 0; step < 5; ++step) {
    for (size_t i = 0; i < a.size(); ++i) {
      a[i].second.mutable_grad() = torch::randn_like(a[i].second);
      b[i].second.mutable_grad() = a[i].second.grad().clone();
    }
    plain.Step(1e-2);
    fused.Step(1e-2);
  }
  for (size_t i = 0; i < a.size(); ++i)
    EXPECT_TRUE(torch::allclose(a[i].second, b[i].second, 1e-5, 1e-6)) << a[i].first;
  const NamedTensors plain_state = plain.State(), fused_state = fused.State();
  for (size_t i = 0; i < plain_state.size(); ++i)
    EXPECT_TRUE(torch::allclose(plain_state[i].second, fused_state[i].second, 1e-5, 1e-7))
        << plain_state[i].first;
}

TEST(AdamWTest, FiltersSpareWhatTheySay) {
  EXPECT_TRUE(IsDecayed("norm1.weight", "disable"));
  EXPECT_TRUE(IsDecayed("head.bias", "disable"));
  EXPECT_FALSE(IsDecayed("block1.0.norm1.weight", "norm_and_bias"));
  EXPECT_FALSE(IsDecayed("head.bias", "norm_and_bias"));
  EXPECT_TRUE(IsDecayed("head.weight", "norm_and_bias"));
  EXPECT_FALSE(IsDecayed("patch_embed1.norm.bias", "auto"));
  EXPECT_TRUE(IsDecayed("head.bias", "auto"));
}

TEST(AdamWTest, ClipsToTheGlobalNorm) {
  NamedTensors parameters = Parameters();
  AdamW optimizer(parameters, 0, "disable");
  double square = 0;
  for (auto& [name, p] : parameters) {
    p.mutable_grad() = torch::randn_like(p);
    square += p.grad().pow(2).sum().item<double>();
  }
  const double norm = std::sqrt(square);
  EXPECT_NEAR(optimizer.GradientNorm(0), norm, 1e-9);
  EXPECT_NEAR(optimizer.GradientNorm(norm * 2), norm, 1e-9);
  EXPECT_NEAR(optimizer.GradientNorm(0.5), norm, 1e-9);
  EXPECT_NEAR(optimizer.GradientNorm(0), 0.5, 1e-5);
}

TEST(AdamWTest, StateContinuesExactly) {
  NamedTensors a = Parameters(torch::kFloat);
  NamedTensors b = Parameters(torch::kFloat);
  AdamW first(a, 0.05, "disable");
  const auto step = [](AdamW& optimizer, NamedTensors& parameters, int seed) {
    torch::manual_seed(seed);
    for (auto& [name, p] : parameters) p.mutable_grad() = torch::randn_like(p);
    optimizer.Step(1e-3);
  };
  step(first, a, 1);
  step(first, a, 2);
  AdamW second(b, 0.05, "disable");
  {
    const torch::NoGradGuard no_grad;
    for (size_t i = 0; i < a.size(); ++i) b[i].second.copy_(a[i].second);
  }
  ASSERT_OK(second.LoadState(first.State(), 2));
  step(first, a, 3);
  step(second, b, 3);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(torch::equal(a[i].second, b[i].second));
}

TEST(AdamWTest, AMissingMomentIsNamed) {
  AdamW optimizer(Parameters(), 0, "disable");
  NamedTensors state = optimizer.State();
  state.erase(state.begin());
  EXPECT_THAT(optimizer.LoadState(state, 1), StatusIs(absl::StatusCode::kInvalidArgument,
                                                      HasSubstr("exp_avg.block1.0.attn.q.weight")));
}

}  // namespace
}  // namespace pyramid
