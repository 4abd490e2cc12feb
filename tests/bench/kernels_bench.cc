// How fast each kernel set computes the network's shapes on one thread, beside what the machine
// can do at this moment.
//
//   kernels_bench [SET …]        all that this machine runs, or the named ones
//
// A line an operation and shape, a column a set: GFLOP/s for linear and attention, ns an element
// and GB/s for the rest. Medians of trials that take turns, so that a noisy second hits all sets.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "model/kernels/cpu_kernels.h"
#include "model/kernels/kernel_table.h"
#include "model/kernels/probe.h"
#include "tests/model/kernels/case_table.h"

namespace pyramid::kernels {
namespace {

constexpr int kTrials = 7;
constexpr double kTrialSeconds = 0.01;

std::vector<const CpuKernels*> RunnableSets(int count, char** names) {
  std::vector<const CpuKernels*> sets;
  const CpuFeatures features = DetectCpu();
  for (const char* name : {"portable", "avx2", "avx512", "avx512-bf16", "amx-f32math", "amx"}) {
    const bool named = std::any_of(names, names + count,
                                   [&](const char* each) { return std::strcmp(each, name) == 0; });
    if (count > 0 && !named) continue;
    const auto set = ChooseCpuKernels(features, "bf16", name);
    if (set.ok() && (*set)->prepare_thread()) sets.push_back(*set);
  }
  return sets;
}

// Memory as the contract asks for it.
class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : bytes_((bytes + kSlack + 63) / 64 * 64), data_(std::aligned_alloc(64, bytes_)) {
    std::memset(data_, 0, bytes_);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  size_t bytes_;
  void* data_;
};

size_t Bytes(int64_t elements, int each) { return static_cast<size_t>(elements * each); }

// Of this thread: others that want the core don't count.
double ProcessorSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Median seconds of each of the works; they take turns.
std::vector<double> Time(const std::vector<std::function<void()>>& works) {
  const auto seconds = [](const std::function<void()>& work, int64_t rounds) {
    const double begin = ProcessorSeconds();
    for (int64_t i = 0; i < rounds; ++i) work();
    return ProcessorSeconds() - begin;
  };
  std::vector<int64_t> rounds;
  for (const auto& work : works) {
    seconds(work, 1);  // warm
    rounds.push_back(1 + static_cast<int64_t>(kTrialSeconds / (seconds(work, 2) / 2 + 1e-9)));
  }
  std::vector<std::vector<double>> trials(works.size());
  for (int t = 0; t < kTrials; ++t) {
    for (size_t i = 0; i < works.size(); ++i) {
      trials[i].push_back(seconds(works[i], rounds[i]) / static_cast<double>(rounds[i]));
    }
  }
  std::vector<double> medians;
  for (auto& all : trials) {
    std::nth_element(all.begin(), all.begin() + kTrials / 2, all.end());
    medians.push_back(all[kTrials / 2]);
  }
  return medians;
}

using Sets = std::vector<const CpuKernels*>;
using Works = std::vector<std::function<void()>>;

void PrintHead(const Sets& sets, const char* unit) {
  absl::PrintF("\n%-34s", unit);
  for (const CpuKernels* set : sets) absl::PrintF(" %14s", set->name);
  absl::PrintF("\n");
}

void Linear(const Sets& sets, const char* what, LinearCase c, Output output, bool add) {
  Works works;
  for (const CpuKernels* set : sets) {
    const int bytes = set->activation_bytes;
    const auto a = std::make_shared<Buffer>(Bytes(c.m * c.k, bytes));
    set->from_float(Numbers(c.m * c.k, Values::kUnit, 1).data(), a->data(), c.m * c.k);
    const auto packed = std::make_shared<Buffer>(set->packed_linear_bytes(c.n, c.k));
    const auto weight = Numbers(int64_t{c.n} * c.k, Values::kUnit, 2, 0.1f);
    set->pack_linear(RowMajor(weight.data(), c.n, c.k, packed->data()));
    const auto bias = std::make_shared<Buffer>(Bytes((c.n + 31) / 32 * 32, 4));
    const auto residual = std::make_shared<Buffer>(Bytes(c.m * c.n, bytes));
    const auto out = std::make_shared<Buffer>(Bytes(c.m * c.n, 4));
    works.emplace_back([=] {
      set->linear({.a = a->data(),
                   .lda = c.k,
                   .weight = packed->data(),
                   .bias = static_cast<const float*>(bias->data()),
                   .residual = add ? residual->data() : nullptr,
                   .out = out->data(),
                   .ldo = c.n,
                   .m = c.m,
                   .n = c.n,
                   .k = c.k,
                   .output = output,
                   .relu = false});
    });
  }
  absl::PrintF("%-12s %6d x %4d x %4d    ", what, c.m, c.k, c.n);
  const double operations = 2.0 * static_cast<double>(c.m) * c.n * c.k;
  for (const double seconds : Time(works)) absl::PrintF(" %14.0f", operations / seconds / 1e9);
  absl::PrintF("\n");
}

void Attention(const Sets& sets, AttentionCase c) {
  Works works;
  for (const CpuKernels* set : sets) {
    const auto make = [&](int64_t rows, uint64_t seed) {
      const auto buffer = std::make_shared<Buffer>(Bytes(rows * c.d, set->activation_bytes));
      set->from_float(Numbers(rows * c.d, Values::kUnit, seed, 0.5f).data(), buffer->data(),
                      rows * c.d);
      return buffer;
    };
    const auto q = make(c.queries, 1), k = make(c.keys, 2), v = make(c.keys, 3);
    const auto out = make(c.queries, 4);
    const auto packed = std::make_shared<Buffer>(set->packed_keys_bytes(c.keys, c.d));
    works.emplace_back([=] {
      set->pack_keys({.k = k->data(),
                      .v = v->data(),
                      .ld = c.d,
                      .keys = c.keys,
                      .d = c.d,
                      .packed = packed->data()});
      set->attention({.q = q->data(),
                      .packed = packed->data(),
                      .out = out->data(),
                      .ld = c.d,
                      .queries = c.queries,
                      .keys = c.keys,
                      .d = c.d});
    });
  }
  absl::PrintF("attention    %6d x %4d, d %2d    ", c.queries, c.keys, c.d);
  const double operations = 4.0 * static_cast<double>(c.queries) * c.keys * c.d;
  for (const double seconds : Time(works)) absl::PrintF(" %14.0f", operations / seconds / 1e9);
  absl::PrintF("\n");
}

// Elements in and out, of so many bytes each.
void PrintPerElement(const Sets& sets, const Works& works, double elements, bool hidden_in) {
  const std::vector<double> times = Time(works);
  for (size_t i = 0; i < sets.size(); ++i) {
    const int in = hidden_in ? sets[i]->hidden_bytes : sets[i]->activation_bytes;
    absl::PrintF(" %6.3f %7.1f", times[i] / elements * 1e9,
                 elements * (in + sets[i]->activation_bytes) / times[i] / 1e9);
  }
  absl::PrintF("\n");
}

void LayerNorm(const Sets& sets, LayerNormCase c) {
  Works works;
  const int64_t elements = c.rows * c.c;
  const auto affine = std::make_shared<Buffer>(Bytes(c.c, 4));
  for (const CpuKernels* set : sets) {
    const auto in = std::make_shared<Buffer>(Bytes(elements, set->activation_bytes));
    const auto out = std::make_shared<Buffer>(Bytes(elements, set->activation_bytes));
    set->from_float(Numbers(elements, Values::kUnit, 1).data(), in->data(), elements);
    works.emplace_back([=] {
      set->layer_norm({.in = in->data(),
                       .out = out->data(),
                       .gamma = static_cast<const float*>(affine->data()),
                       .beta = static_cast<const float*>(affine->data()),
                       .eps = 1e-6f,
                       .rows = c.rows,
                       .c = c.c});
    });
  }
  absl::PrintF("layer_norm   %6d x %4d           ", c.rows, c.c);
  PrintPerElement(sets, works, static_cast<double>(elements), false);
}

void DwconvGelu(const Sets& sets, DwconvCase c) {
  Works works;
  const int64_t row = int64_t{c.width} * c.c;
  for (const CpuKernels* set : sets) {
    const size_t row_bytes = Bytes(row, set->hidden_bytes);
    const auto in = std::make_shared<Buffer>(row_bytes * static_cast<size_t>(c.height + 2));
    if (set->hidden_bytes == 4) {
      const auto numbers = Numbers(row * c.height, Values::kUnit, 1);
      std::memcpy(static_cast<char*>(in->data()) + row_bytes, numbers.data(),
                  row_bytes * static_cast<size_t>(c.height));
    } else {
      // 1 in fp16, a small number in bf16.
      std::fill_n(static_cast<uint16_t*>(in->data()) + row, row * c.height, uint16_t{0x3c00});
    }
    std::vector<const void*> rows;
    for (int y = 0; y < c.height + 2; ++y) {
      rows.push_back(static_cast<char*>(in->data()) + row_bytes * static_cast<size_t>(y));
    }
    const auto packed = std::make_shared<Buffer>(set->packed_dwconv_bytes(c.c));
    set->pack_dwconv(Numbers(int64_t{c.c} * 9, Values::kUnit, 2, 0.3f).data(),
                     Numbers(c.c, Values::kUnit, 3).data(), c.c, packed->data());
    const auto out = std::make_shared<Buffer>(Bytes(row * c.height, set->activation_bytes));
    works.emplace_back([=] {
      (void)in;  // keeps what `rows` point at
      set->dwconv_gelu({.rows = rows.data(),
                        .weight = packed->data(),
                        .out = out->data(),
                        .count = c.height,
                        .width = c.width,
                        .c = c.c,
                        .gelu = Gelu::kErf});
    });
  }
  absl::PrintF("dwconv_gelu  %3d x %3d x %4d       ", c.height, c.width, c.c);
  PrintPerElement(sets, works, static_cast<double>(row * c.height), true);
}

// The best of some, because a probe's own seconds may be noisy too.
void PrintProbe() {
  Probe best;
  for (int i = 0; i < 10; ++i) {
    const Probe probe = ProbeMachine(1);
    best.fma_gflops = std::max(best.fma_gflops, probe.fma_gflops);
    best.amx_gflops = std::max(best.amx_gflops, probe.amx_gflops);
  }
  absl::PrintF("probe, one thread, best of 10: FMA %.0f GFLOP/s, AMX %.0f\n", best.fma_gflops,
               best.amx_gflops);
}

void Main(int count, char** names) {
  const Sets sets = RunnableSets(count, names);
  PrintProbe();
  PrintHead(sets, "GFLOP/s (m x k x n)");
  for (size_t i = 0; i < 8; ++i) {  // b0, then b1 to b4
    const StageShape& s = kStages[i];
    const int64_t tokens = int64_t{s.side} * s.side;
    absl::PrintF("%s, stage %d\n", i < 4 ? "b0" : "b2", i % 4 + 1);
    Linear(sets, "q", {tokens, s.c, s.c}, Output::kActivation, false);
    Linear(sets, "proj + x", {tokens, s.c, s.c}, Output::kActivation, true);
    Linear(sets, "fc1", {tokens, s.hidden, s.c}, Output::kHidden, false);
    Linear(sets, "fc2 + x", {tokens, s.c, s.hidden}, Output::kActivation, true);
    if (s.reduction_k > 0) {
      Linear(sets, "reduction", {s.keys, s.c, s.reduction_k}, Output::kActivation, false);
    }
    Linear(sets, "embedding", {tokens, s.c, s.embed_k}, Output::kActivation, false);
    Attention(sets, {tokens, s.keys, s.c / s.heads});
  }
  PrintHead(sets, "ns/element, GB/s");
  for (size_t i = 0; i < 8; ++i) LayerNorm(sets, {kStages[i].side * kStages[i].side, kStages[i].c});
  for (size_t i = 0; i < 8; ++i) {
    DwconvGelu(sets, {kStages[i].side, kStages[i].side, kStages[i].hidden});
  }
  PrintProbe();
}

}  // namespace
}  // namespace pyramid::kernels

int main(int argc, char** argv) {
  pyramid::kernels::Main(argc - 1, argv + 1);
  return 0;
}
