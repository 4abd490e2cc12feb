// torch_npu's fused attention on the fake device: what is asked of the operator, when, and that the
// network computes with it what it computes on the CPU, forward and backward.
#include "model/npu_attention.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_replace.h"
#include "model/device.h"
#include "model/device_ops.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"
#include "tests/testing/fake_npu.h"
#include "tests/testing/formula_network.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using testing::FakeFusionAttention;
using testing::FormulaPictures;
using testing::NpuSchemas;
using testing::SetFormulaWeights;
using torch::Tensor;

class NpuAttentionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(OpenDevice("npu:0"));
    at::set_num_threads(1);
  }
};

torch::Device Npu() { return torch::Device("npu:0"); }

Tensor Normal(torch::IntArrayRef shape, uint64_t seed) {
  return torch::randn(shape, at::detail::createCPUGenerator(seed),
                      torch::TensorOptions(torch::kFloat32));
}

double Scale(const Tensor& q, int64_t heads) { return 1 / std::sqrt(double(q.size(2) / heads)); }

Tensor Plain(const Tensor& q, const Tensor& kv, int64_t heads) {
  const auto split = [&](const Tensor& x) { return x.unflatten(2, {heads, -1}).transpose(1, 2); };
  const int64_t c = q.size(2);
  const Tensor k = split(kv.narrow(2, 0, c)), v = split(kv.narrow(2, c, c));
  const Tensor p = torch::softmax(torch::matmul(split(q), k.transpose(2, 3)) * Scale(q, heads), -1);
  return torch::matmul(p, v).transpose(1, 2).flatten(2);
}

// Relative to `expected`, but not to less than `floor`.
double Error(const Tensor& actual, const Tensor& expected, double floor = 0) {
  const Tensor wide = expected.to(torch::kCPU, torch::kFloat64);
  const Tensor difference = actual.to(torch::kCPU, torch::kFloat64) - wide;
  return difference.norm().item<double>() / std::max(wide.norm().item<double>(), floor);
}

// ---- The operator ----

struct Shape {
  int64_t pictures, queries, keys, heads, depth;
};
constexpr Shape kShapes[] = {{2, 196, 49, 2, 32}, {1, 70, 9, 5, 64},  {3, 49, 49, 8, 32},
                             {1, 63, 1, 1, 64},   {1, 5, 300, 2, 32}, {2, 4, 7, 3, 24}};

TEST_F(NpuAttentionTest, IsThePlainOneForwardAndBackward) {
  const FakeFusionAttention op;
  int calls = 0;
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(s.keys);
    const int64_t c = s.heads * s.depth;
    const Tensor q = Normal({s.pictures, s.queries, c}, 1),
                 kv = Normal({s.pictures, s.keys, 2 * c}, 2);
    const Tensor d_out = Normal(q.sizes(), 3);
    const Tensor q_plain = q.clone().requires_grad_(), kv_plain = kv.clone().requires_grad_();
    const Tensor expected = Plain(q_plain, kv_plain, s.heads);
    const auto expected_gradients = torch::autograd::grad({expected}, {q_plain, kv_plain}, {d_out});

    const Tensor q_npu = q.to(Npu()).requires_grad_(), kv_npu = kv.to(Npu()).requires_grad_();
    const std::optional<Tensor> out = DeviceAttention(q_npu, kv_npu, s.heads, Scale(q, s.heads));
    ASSERT_TRUE(out.has_value());
    EXPECT_EQ(out->device(), Npu());
    EXPECT_LE(Error(*out, expected), 1e-6);
    const auto gradients = torch::autograd::grad({*out}, {q_npu, kv_npu}, {d_out.to(Npu())});
    const double floor = 0.1 * d_out.norm().item<double>();  // one key: the queries don't matter
    EXPECT_LE(Error(gradients[0], expected_gradients[0], floor), 2e-6);
    EXPECT_LE(Error(gradients[1], expected_gradients[1], floor), 2e-6);

    ++calls;
    EXPECT_EQ(op.calls().forward, calls);
    EXPECT_EQ(op.calls().backward, calls);
    EXPECT_EQ(op.calls().heads, s.heads);
    EXPECT_EQ(op.calls().scale, Scale(q, s.heads));
    EXPECT_EQ(op.calls().keep_prob, 1);
  }
}

TEST_F(NpuAttentionTest, TakesHalfPrecision) {
  const FakeFusionAttention op;
  for (const torch::ScalarType type : {torch::kHalf, torch::kBFloat16}) {
    const Tensor q = Normal({2, 36, 64}, 1).to(type), kv = Normal({2, 9, 128}, 2).to(type);
    const std::optional<Tensor> out = DeviceAttention(q.to(Npu()), kv.to(Npu()), 2, Scale(q, 2));
    ASSERT_TRUE(out.has_value());
    EXPECT_EQ(out->scalar_type(), type);
    EXPECT_EQ(op.calls().type, type);
    const Tensor exact = Plain(q.to(torch::kFloat64), kv.to(torch::kFloat64), 2);
    EXPECT_LE(Error(*out, exact), type == torch::kHalf ? 0x1p-11 : 0x1p-8);
  }
}

TEST_F(NpuAttentionTest, TakesViews) {
  const FakeFusionAttention op;
  const Tensor both = Normal({2, 100, 96}, 1).to(Npu()), kv = Normal({2, 9, 128}, 2).to(Npu());
  const Tensor view = both.narrow(2, 16, 64);
  EXPECT_TRUE(torch::equal(DeviceAttention(view, kv, 2, 0.2)->cpu(),
                           DeviceAttention(view.contiguous(), kv, 2, 0.2)->cpu()));
}

TEST_F(NpuAttentionTest, NothingWhereTheOperatorIsntRegistered) {
  const Tensor q = Normal({2, 36, 64}, 1).to(Npu()), kv = Normal({2, 9, 128}, 2).to(Npu());
  EXPECT_FALSE(HasDeviceOps(Npu()));
  EXPECT_FALSE(DeviceAttention(q, kv, 2, 0.2).has_value());
  {
    const FakeFusionAttention op;
    EXPECT_TRUE(HasDeviceOps(Npu()));
    EXPECT_TRUE(DeviceAttention(q, kv, 2, 0.2).has_value());
  }
  EXPECT_FALSE(HasDeviceOps(Npu()));
}

TEST_F(NpuAttentionTest, NothingForTypesAndSizesThatItDoesntTake) {
  const FakeFusionAttention op;
  const auto taken = [](const Tensor& q, const Tensor& kv, int64_t heads) {
    return DeviceAttention(q.to(Npu()), kv.to(Npu()), heads, 0.2).has_value();
  };
  const Tensor q = Normal({2, 4, 64}, 1), kv = Normal({2, 9, 128}, 2);
  EXPECT_TRUE(taken(q, kv, 2));
  EXPECT_FALSE(taken(q.to(torch::kFloat64), kv.to(torch::kFloat64), 2));
  EXPECT_FALSE(taken(q, kv.to(torch::kHalf), 2));
  EXPECT_FALSE(taken(q.narrow(0, 0, 0), kv.narrow(0, 0, 0), 2));             // no picture
  EXPECT_FALSE(taken(Normal({1, 2, 257}, 1), Normal({1, 2, 514}, 2), 257));  // 256 heads at most
  EXPECT_FALSE(taken(Normal({1, 2, 769}, 1), Normal({1, 2, 1538}, 2), 1));   // of 768 channels
  EXPECT_EQ(op.calls().forward, 1);
}

TEST_F(NpuAttentionTest, TheCpuDoesntTakeIt) {
  const FakeFusionAttention op;
  EXPECT_FALSE(HasDeviceOps(torch::kCPU));
  EXPECT_FALSE(DeviceAttention(Normal({2, 36, 64}, 1), Normal({2, 9, 128}, 2), 2, 0.2).has_value());
  EXPECT_EQ(op.calls().forward, 0);
}

// ---- The schema ----

std::optional<std::vector<c10::IValue>> ArgumentsFor(const std::string& schema) {
  const Tensor q = torch::ones({1, 2, 32});
  return NpuAttentionArguments(torch::jit::parseSchema(schema), q, q + 1, q + 2, 1, 0.25);
}

TEST(NpuSchemaTest, GivesTheArgumentsInTorchNpusOrder) {
  const auto arguments = ArgumentsFor(NpuSchemas()[0]);
  ASSERT_TRUE(arguments.has_value());
  ASSERT_EQ(arguments->size(), 24);
  for (const int i : {0, 1, 2}) EXPECT_EQ((*arguments)[i].toTensor().max().item<float>(), i + 1);
  EXPECT_EQ((*arguments)[3].toInt(), 1);
  EXPECT_EQ((*arguments)[4].toStringRef(), "BSH");
  for (const int i : {5, 6, 7}) EXPECT_TRUE((*arguments)[i].isNone());  // pse and the masks
  EXPECT_EQ((*arguments)[8].toDouble(), 0.25);
  EXPECT_EQ((*arguments)[9].toDouble(), 1);
  EXPECT_EQ((*arguments)[10].toInt(), 2147483647);
}

// As of torch_npu 6.0 for CANN 8.0: five arguments fewer.
constexpr char kOlder[] =
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float "
    "keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, "
    "int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int "
    "sparse_mode=0, bool gen_mask_parallel=True, bool sync=False) -> (Tensor, Tensor, Tensor, "
    "Tensor, int, int, int)";

TEST_F(NpuAttentionTest, AnOlderSchemaWillDo) {
  const FakeFusionAttention op({kOlder, NpuSchemas()[1]});
  const Tensor q = Normal({2, 36, 64}, 1), kv = Normal({2, 9, 128}, 2);
  const std::optional<Tensor> out = DeviceAttention(q.to(Npu()), kv.to(Npu()), 2, Scale(q, 2));
  ASSERT_TRUE(out.has_value());
  EXPECT_LE(Error(*out, Plain(q, kv, 2)), 1e-6);
}

TEST_F(NpuAttentionTest, NothingForAnOperatorItDoesntKnow) {
  const std::string schema = NpuSchemas()[0];
  for (const auto& [before, after] : {std::pair("float scale=1., ", ""),
                                      {"float scale=1.", "float scale_value=1."},
                                      {"float keep_prob=1., ", ""},
                                      {"str input_layout", "int input_layout"},
                                      {"str input_layout", "str input_layout, int kv_head_num"},
                                      {"-> (Tensor, ", "-> (int, "}}) {
    const std::string changed = absl::StrReplaceAll(schema, {{before, after}});
    ASSERT_NE(changed, schema);
    EXPECT_FALSE(ArgumentsFor(changed).has_value()) << changed;
    const FakeFusionAttention op({changed, NpuSchemas()[1]});
    EXPECT_FALSE(
        DeviceAttention(Normal({2, 36, 64}, 1).to(Npu()), Normal({2, 9, 128}, 2).to(Npu()), 2, 0.2)
            .has_value());
  }
  EXPECT_TRUE(ArgumentsFor(schema).has_value());
}

// ---- The network ----

constexpr int64_t kSide = 96;  // nine keys in every stage
constexpr int kBlocks = 8;     // of b0

// With formula weights, drop path 0.1, in training mode.
PvtV2 Network(const std::string& origin, const torch::Device& device, bool device_ops) {
  v1::NetworkConfig config;
  config.set_variant("pvt_v2_b0");
  config.set_num_classes(10);
  config.set_in_channels(3);
  *config.mutable_numerics() = NumericsOf(origin);
  PvtV2 network = *MakePvtV2(config, 0.1);
  SetFormulaWeights(network);
  network->to(device);
  network->set_drop_path_key({.seed = 7, .step = 3, .first = 0});
  if (device_ops) network->UseDeviceOps();
  return network;
}

Tensor Pictures() { return FormulaPictures(2, 3, kSide, kSide); }

// On the CPU: logits, then the gradient of every parameter.
std::vector<Tensor> LogitsAndGradients(PvtV2& network, bool bf16 = false) {
  const torch::Device device = network->parameters()[0].device();
  const absl::Cleanup end = [&] {
    at::autocast::set_autocast_enabled(device.type(), false);
    at::autocast::clear_cache();
  };
  at::autocast::set_autocast_dtype(device.type(), torch::kBFloat16);
  at::autocast::set_autocast_enabled(device.type(), bf16);
  const Tensor logits = network->forward(Pictures().to(device));
  at::autocast::set_autocast_enabled(device.type(), false);
  const Tensor labels = torch::arange(2).to(device);
  const Tensor loss = torch::cross_entropy_loss(logits.to(torch::kFloat32), labels);
  std::vector<Tensor> all = {logits.detach().cpu()};
  for (Tensor& gradient : torch::autograd::grad({loss}, network->parameters()))
    all.push_back(gradient.cpu());
  return all;
}

// Errors of `actual` against `exact`, each relative to its tensor; gradients near zero relative to
// 1e-4 of all gradients together.
std::vector<double> Errors(const std::vector<Tensor>& actual, const std::vector<Tensor>& exact) {
  double square = 0;
  for (size_t i = 1; i < exact.size(); ++i) square += std::pow(exact[i].norm().item<double>(), 2);
  std::vector<double> errors;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double size =
        std::max(exact[i].norm().item<double>(), i == 0 ? 0 : 1e-4 * std::sqrt(square));
    const Tensor difference = actual[i].to(torch::kFloat32) - exact[i];
    errors.push_back(difference.norm().item<double>() / size);
  }
  return errors;
}

double Largest(const std::vector<double>& values, size_t from, size_t to) {
  return *std::max_element(values.begin() + from, values.begin() + to);
}

TEST_F(NpuAttentionTest, TheNetworkIsTheCpusForwardAndBackward) {
  for (const char* origin : {"timm", "mindcv"}) {
    SCOPED_TRACE(origin);
    const FakeFusionAttention op;
    PvtV2 on_cpu = Network(origin, torch::kCPU, false), on_npu = Network(origin, Npu(), true);
    const auto expected = LogitsAndGradients(on_cpu);
    EXPECT_EQ(op.calls().forward, 0);
    const int64_t fallbacks = testing::CpuFallbacks();
    const std::vector<double> errors = Errors(LogitsAndGradients(on_npu), expected);
    EXPECT_EQ(op.calls().forward, kBlocks);
    EXPECT_EQ(op.calls().backward, kBlocks);
    EXPECT_GT(testing::CpuFallbacks() - fallbacks, 300);  // the rest was there, too
    EXPECT_LE(errors[0], 1e-6);
    EXPECT_LE(Largest(errors, 1, errors.size()), 2e-5);
    std::printf("%s: logits %.2g, gradients %.2g from the CPU's\n", origin, errors[0],
                Largest(errors, 1, errors.size()));
  }
}

TEST_F(NpuAttentionTest, WithoutTheOperatorTheNetworkIsPlainAndTheSame) {
  PvtV2 on_cpu = Network("timm", torch::kCPU, false), on_npu = Network("timm", Npu(), true);
  const std::vector<double> errors = Errors(LogitsAndGradients(on_npu), LogitsAndGradients(on_cpu));
  EXPECT_LE(errors[0], 1e-6);
  EXPECT_LE(Largest(errors, 1, errors.size()), 2e-5);
}

TEST_F(NpuAttentionTest, ANetworkThatIsntToldToUseDeviceOpsDoesnt) {
  const FakeFusionAttention op;
  PvtV2 plain = Network("timm", Npu(), false), on_cpu = Network("timm", torch::kCPU, true);
  LogitsAndGradients(plain);
  LogitsAndGradients(on_cpu);
  EXPECT_EQ(op.calls().forward, 0);
}

TEST_F(NpuAttentionTest, TheNetworkUnderAutocastIsAsGoodAsTheCpus) {
  const FakeFusionAttention op;
  PvtV2 on_cpu = Network("timm", torch::kCPU, false), on_npu = Network("timm", Npu(), true);
  const auto exact = LogitsAndGradients(on_cpu);
  const std::vector<double> theirs = Errors(LogitsAndGradients(on_cpu, /*bf16=*/true), exact);
  const std::vector<double> ours = Errors(LogitsAndGradients(on_npu, /*bf16=*/true), exact);
  EXPECT_EQ(op.calls().forward, kBlocks);
  EXPECT_EQ(op.calls().type, torch::kBFloat16);
  EXPECT_GT(theirs[0], 1e-4);
  EXPECT_LE(ours[0], 2 * theirs[0]);
  EXPECT_LE(Largest(ours, 1, ours.size()), 3 * Largest(theirs, 1, theirs.size()));
  std::printf("bf16: logits %.2g (CPU %.2g), gradients %.2g (CPU %.2g) from f32\n", ours[0],
              theirs[0], Largest(ours, 1, ours.size()), Largest(theirs, 1, theirs.size()));
}

}  // namespace
}  // namespace pyramid
