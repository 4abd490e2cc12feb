// What the card makes of our kernels, beside what LibTorch makes of the same work. Run by hand, and
// by deploy/gpu-check. Prints the rows of docs/performance.md: work, ours, the others, in
// microseconds or pictures a second; medians of seven rounds in turns.
//
//   cuda_bench [--json] [--seconds X]      X a measurement, 0.2 unless told
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "model/device.h"
#include "model/device_ops.h"
#include "model/pvt_v2.h"
#include "model/recipe.h"

namespace pyramid {
namespace {

using torch::Tensor;

constexpr int kRounds = 7;

struct Contestant {
  std::string name;
  std::function<void()> run;
};

torch::TensorOptions OnCard(torch::ScalarType type) {
  return torch::TensorOptions(torch::kCUDA).dtype(type);
}

// Seconds of one run: `seconds` worth of them, queued without waiting in between.
double Measure(const std::function<void()>& run, double seconds) {
  using Clock = std::chrono::steady_clock;
  auto time = [&](int runs) {
    torch::cuda::synchronize();
    const auto start = Clock::now();
    for (int i = 0; i < runs; ++i) run();
    torch::cuda::synchronize();
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  time(2);
  const double once = std::max(time(2) / 2, 1e-6);
  const int runs = std::clamp(static_cast<int>(seconds / once), 1, 20000);
  return time(runs) / runs;
}

// Medians, the contestants in turns.
std::vector<double> Compare(const std::vector<Contestant>& all, double seconds) {
  std::vector<std::vector<double>> times(all.size());
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < all.size(); ++i)
      times[i].push_back(Measure(all[i].run, seconds / kRounds));
  }
  std::vector<double> medians;
  for (auto& each : times) {
    std::nth_element(each.begin(), each.begin() + kRounds / 2, each.end());
    medians.push_back(each[kRounds / 2]);
  }
  return medians;
}

class Table {
 public:
  explicit Table(bool json, double seconds) : json_(json), seconds_(seconds) {}

  // `pictures`: show pictures a second; 0: microseconds.
  void Row(const std::string& work, int pictures, const std::vector<Contestant>& all) {
    const std::vector<double> times = Compare(all, seconds_);
    std::string line =
        json_ ? absl::StrFormat("{\"work\": \"%s\"", work) : absl::StrFormat("| %s |", work);
    for (size_t i = 0; i < all.size(); ++i) {
      const double value = pictures > 0 ? pictures / times[i] : times[i] * 1e6;
      line += json_ ? absl::StrFormat(", \"%s\": %.1f", all[i].name, value)
                    : absl::StrFormat(" %s %.*f |", all[i].name, value < 100 ? 1 : 0, value);
    }
    // Of our first to the best of the others.
    double best = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i].name.rfind("ours", 0) != 0) best = std::min(best, times[i]);
    }
    if (std::isfinite(best)) {
      line += json_ ? absl::StrFormat(", \"ratio\": %.3f", best / times[0])
                    : absl::StrFormat(" %.2fx |", best / times[0]);
    }
    std::printf("%s%s\n", line.c_str(), json_ ? "}" : "");
    std::fflush(stdout);
  }

 private:
  bool json_;
  double seconds_;
};

// SDPA with one backend allowed.
std::function<Tensor(const Tensor&, const Tensor&, int64_t)> Sdpa(bool flash) {
  return [flash](const Tensor& q, const Tensor& kv, int64_t heads) {
    at::globalContext().setSDPUseFlash(flash);
    at::globalContext().setSDPUseMemEfficient(!flash);
    at::globalContext().setSDPUseMath(false);
    at::globalContext().setSDPUseCuDNN(false);
    const auto parts = kv.chunk(2, -1);
    auto split = [&](const Tensor& x) { return x.unflatten(-1, {heads, -1}).transpose(1, 2); };
    const Tensor out =
        torch::scaled_dot_product_attention(split(q), split(parts[0]), split(parts[1]));
    at::globalContext().setSDPUseFlash(true);
    at::globalContext().setSDPUseMemEfficient(true);
    at::globalContext().setSDPUseMath(true);
    at::globalContext().setSDPUseCuDNN(true);
    return out.transpose(1, 2).flatten(2);
  };
}

void Attention(Table& table) {
  for (const auto& [name, queries, heads, d] : {std::tuple("b0 stage 1", 3136, 1, 32),
                                                {"b0 stage 2", 784, 2, 32},
                                                {"b0 stage 3", 196, 5, 32},
                                                {"b0 stage 4", 49, 8, 32},
                                                {"b2 stage 1", 3136, 1, 64},
                                                {"b2 stage 3", 196, 5, 64}}) {
    const auto options = OnCard(torch::kBFloat16);
    const int64_t c = heads * d, h = heads;
    const double scale = 1 / std::sqrt(double(d));
    Tensor q = torch::randn({32, queries, c}, options), kv = torch::randn({32, 49, 2 * c}, options);
    const auto flash = Sdpa(true), efficient = Sdpa(false);
    {
      const torch::NoGradGuard no_grad;
      table.Row(std::string("attention ") + name + ", batch 32, bf16, us", 0,
                {{"ours", [&] { DeviceAttention(q, kv, h, scale); }},
                 {"flash", [&] { flash(q, kv, h); }},
                 {"mem-efficient", [&] { efficient(q, kv, h); }}});
    }
    q.requires_grad_();
    kv.requires_grad_();
    const Tensor d_out = torch::randn_like(q);
    auto both = [&](auto forward) {
      return [&, forward] { torch::autograd::grad({forward()}, {q, kv}, {d_out}); };
    };
    table.Row(std::string("attention forward and backward ") + name + ", batch 32, bf16, us", 0,
              {{"ours", both([&] { return *DeviceAttention(q, kv, h, scale); })},
               {"flash", both([&] { return flash(q, kv, h); })},
               {"mem-efficient", both([&] { return efficient(q, kv, h); })}});
  }
}

void Dwconv(Table& table) {
  for (const auto& [name, side, c] :
       {std::tuple("b0 stage 1", 56, 256), {"b0 stage 2", 28, 512}, {"b0 stage 3", 14, 640}}) {
    Tensor x = torch::randn({32, side * side, c}, OnCard(torch::kBFloat16));
    Tensor weight = torch::randn({c, 1, 3, 3}, OnCard(torch::kFloat32));
    Tensor bias = torch::randn({c}, OnCard(torch::kFloat32));
    auto plain = [&, s = side, n = c] {
      const Tensor map = x.view({32, s, s, n}).permute({0, 3, 1, 2});
      const Tensor y =
          torch::conv2d(map, weight.to(torch::kBFloat16), bias.to(torch::kBFloat16), 1, 1, 1, n);
      return torch::gelu(y).permute({0, 2, 3, 1}).flatten(1, 2);
    };
    auto ours = [&, s = side] { return *DeviceDwconvGelu(x, weight, bias, s, s, false); };
    {
      const torch::NoGradGuard no_grad;
      table.Row(std::string("dwconv + GELU ") + name + ", batch 32, bf16, us", 0,
                {{"ours", [&] { ours(); }}, {"eager", [&] { plain(); }}});
    }
    for (Tensor* leaf : {&x, &weight, &bias}) leaf->requires_grad_();
    const Tensor d_out = torch::randn_like(x);
    auto both = [&](auto forward) {
      return [&, forward] { torch::autograd::grad({forward()}, {x, weight, bias}, {d_out}); };
    };
    table.Row(std::string("dwconv + GELU forward and backward ") + name + ", batch 32, bf16, us", 0,
              {{"ours", both(ours)}, {"eager", both(plain)}});
  }
}

PvtV2 Network(const std::string& variant, bool device_ops) {
  v1::NetworkConfig config;
  config.set_variant(variant);
  config.set_num_classes(1000);
  config.set_in_channels(3);
  *config.mutable_numerics() = NumericsOf("timm");
  PvtV2 network = *MakePvtV2(config);
  network->Initialize(1);
  network->to(torch::kCUDA);
  if (device_ops) network->UseDeviceOps();
  return network;
}

class Autocast {
 public:
  Autocast() {
    at::autocast::set_autocast_dtype(torch::kCUDA, torch::kBFloat16);
    at::autocast::set_autocast_enabled(torch::kCUDA, true);
  }
  ~Autocast() {
    at::autocast::set_autocast_enabled(torch::kCUDA, false);
    at::autocast::clear_cache();
  }
};

void Networks(Table& table) {
  for (const std::string variant : {"pvt_v2_b0", "pvt_v2_b2"}) {
    PvtV2 plain = Network(variant, false), ours = Network(variant, true);
    for (const int batch : {1, 32}) {
      const Tensor pixels = torch::randn({batch, 3, 224, 224}, OnCard(torch::kFloat32));
      Tensor logits = torch::empty({batch, 1000}, OnCard(torch::kFloat32));
      auto forward = [&](PvtV2& network) {
        const torch::NoGradGuard no_grad;
        const Autocast autocast;
        network->eval();
        return network->forward(pixels);
      };
      auto recorded = RecordWork({"cuda", 0}, [&] {
        const torch::NoGradGuard no_grad;
        logits.copy_(forward(ours));
      });
      if (!recorded.ok())
        std::fprintf(stderr, "%s\n", std::string(recorded.status().message()).c_str());
      std::vector<Contestant> all;
      if (recorded.ok()) {
        all.push_back({"ours, recorded", [&] {
                         if (!(*recorded)->Replay().ok()) std::abort();
                       }});
      }
      all.push_back({"ours", [&] { forward(ours); }});
      all.push_back({"eager", [&] { forward(plain); }});
      table.Row(
          absl::StrFormat("%s inference, batch %d, bf16 autocast, pictures/s", variant, batch),
          batch, all);
    }
    for (int stage = 0; stage < 4; ++stage) {
      const int64_t side = 56 >> stage, c = FindVariant(variant)->dims[static_cast<size_t>(stage)];
      const Tensor tokens = torch::randn({32, side * side, c}, OnCard(torch::kFloat32));
      auto block = [&](PvtV2& network) {
        const torch::NoGradGuard no_grad;
        const Autocast autocast;
        network->FirstBlock(stage, tokens, side, side);
      };
      table.Row(absl::StrFormat("%s block of stage %d, batch 32, bf16 autocast, pictures/s",
                                variant, stage + 1),
                32, {{"ours", [&] { block(ours); }}, {"eager", [&] { block(plain); }}});
    }
    const Tensor pixels = torch::randn({32, 3, 224, 224}, OnCard(torch::kFloat32));
    const Tensor labels = torch::arange(32, OnCard(torch::kLong));
    auto step = [&](PvtV2& network) {
      network->train();
      Tensor loss;
      {
        const Autocast autocast;
        loss = torch::cross_entropy_loss(network->forward(pixels).to(torch::kFloat32), labels);
      }
      torch::autograd::grad({loss}, network->parameters());
    };
    table.Row(variant + " forward and backward, batch 32, bf16 autocast, pictures/s", 32,
              {{"ours", [&] { step(ours); }}, {"eager", [&] { step(plain); }}});
  }
}

int Main(int argc, char** argv) {
  bool json = false;
  double seconds = 0.2;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--json") == 0) {
      json = true;
    } else if (std::strcmp(argv[i], "--seconds") == 0 && i + 1 < argc) {
      seconds = std::atof(argv[++i]);
    } else {
      std::fprintf(stderr, "usage: cuda_bench [--json] [--seconds X]\n");
      return 2;
    }
  }
  const absl::StatusOr<DeviceName> device = OpenDevice("cuda");
  if (!device.ok()) {
    std::fprintf(stderr, "%s\n", std::string(device.status().message()).c_str());
    return 1;
  }
  Table table(json, seconds);
  Attention(table);
  Dwconv(table);
  Networks(table);
  return 0;
}

}  // namespace
}  // namespace pyramid

int main(int argc, char** argv) {
  try {
    return pyramid::Main(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
