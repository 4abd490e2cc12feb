// Speed of the training kernels at the stage shapes of b0 and b2 (224x224), one thread, operands as
// they lie in the caches after a few rounds, beside what the machine can do at that moment.
//
//   train_kernels_bench [KERNELS]     amx-f32math avx512 avx2 portable; all that run here
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "model/kernels/cpu_kernels.h"
#include "model/kernels/kernel_table.h"
#include "model/kernels/probe.h"
#include "model/kernels/train_table.h"

namespace pyramid::kernels {
namespace {

// Memory as the kernels want it, filled with numbers of the table's storage around zero.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes + kSlack), data_(::operator new(bytes_, kAlign)) {
    std::memset(data_, 0, bytes_);
  }
  Buffer(int64_t count, int element_bytes) : Buffer(static_cast<size_t>(count * element_bytes)) {
    uint32_t state = 1;
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      const float x = (static_cast<float>(state >> 8) / 16777216.0f - 0.5f) * 2.0f;
      if (element_bytes == 4) {
        static_cast<float*>(data_)[i] = x;
      } else {
        std::memcpy(static_cast<uint16_t*>(data_) + i, reinterpret_cast<const char*>(&x) + 2, 2);
      }
    }
  }
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* get() { return data_; }
  float* floats() { return static_cast<float*>(data_); }

 private:
  static constexpr std::align_val_t kAlign{64};
  size_t bytes_;
  void* data_;
};

// Seconds of one call: the fastest of 25 rounds of about 2 ms, which a neighbour seldom disturbs
// all.
template <typename Call>
double Seconds(const Call& call) {
  using Clock = std::chrono::steady_clock;
  const auto round = [&call](int calls) {
    const auto begin = Clock::now();
    for (int i = 0; i < calls; ++i) call();
    return std::chrono::duration<double>(Clock::now() - begin).count() / calls;
  };
  call();
  const int calls = std::max(1, static_cast<int>(0.002 / round(1)));
  double fastest = round(calls);
  for (int i = 1; i < 25; ++i) fastest = std::min(fastest, round(calls));
  return fastest;
}

struct Stage {
  const char* variant;
  int side, c, hidden, heads, keys;
};
constexpr Stage kStages[] = {{"b0", 56, 32, 256, 1, 49},   {"b0", 28, 64, 512, 2, 49},
                             {"b0", 14, 160, 640, 5, 49},  {"b0", 7, 256, 1024, 8, 49},
                             {"b2", 56, 64, 512, 1, 49},   {"b2", 28, 128, 1024, 2, 49},
                             {"b2", 14, 320, 1280, 5, 49}, {"b2", 7, 512, 2048, 8, 49}};

void PrintProbe() {
  const Probe probe = ProbeMachine(1);
  std::printf("probe, one thread: FMA f32 %.0f GFLOP/s, AMX bf16 %.0f GFLOP/s\n", probe.fma_gflops,
              probe.amx_gflops);
}

double LinearGrad(const TrainKernels& table, int64_t m, int n, int k) {
  Buffer dy(m * n, table.activation_bytes), x(m * k, table.activation_bytes);
  Buffer dw(sizeof(float) * static_cast<size_t>(n) * static_cast<size_t>(k));
  Buffer db(sizeof(float) * static_cast<size_t>(n));
  const LinearGradParams p = {dy.get(), n, x.get(), k, m, n, k, dw.floats(), db.floats()};
  return 2.0 * static_cast<double>(m) * n * k / Seconds([&] { table.linear_grad(p); }) / 1e9;
}

struct NormTimes {
  double forward, backward;
};
NormTimes LayerNorm(const TrainKernels& table, int64_t rows, int c) {
  const int bytes = table.activation_bytes;
  Buffer in(rows * c, bytes), out(rows * c, bytes), dy(rows * c, bytes), add(rows * c, bytes);
  Buffer gamma(c, 4), beta(c, 4), dgamma(c, 4), dbeta(c, 4), mean(rows, 4), inverse(rows, 4);
  const LayerNormTrainParams forward = {in.get(), out.get(), gamma.floats(), beta.floats(),   1e-6f,
                                        rows,     c,         mean.floats(),  inverse.floats()};
  const LayerNormGradParams backward = {
      dy.get(), in.get(), gamma.floats(),  mean.floats(), inverse.floats(), add.get(), out.get(),
      rows,     c,        dgamma.floats(), dbeta.floats()};
  const double elements = static_cast<double>(rows) * c;
  return {Seconds([&] { table.layer_norm(forward); }) / elements * 1e9,
          Seconds([&] { table.layer_norm_grad(backward); }) / elements * 1e9};
}

double DwconvGeluGrad(const TrainKernels& table, int n, int side, int c, Gelu gelu) {
  const int bytes = table.activation_bytes;
  const int64_t count = int64_t{n} * side * side * c;
  Buffer hidden(count, bytes), dout(count, bytes), dhidden(count, bytes);
  Buffer weight(9 * c, 4), bias(c, 4), dweight(9 * c, 4), dbias(c, 4);
  Buffer scratch(sizeof(float) * table.dwconv_grad_scratch_floats(side, c));
  const DwconvGeluGradParams p = {hidden.get(),
                                  dout.get(),
                                  weight.floats(),
                                  bias.floats(),
                                  dhidden.get(),
                                  dweight.floats(),
                                  dbias.floats(),
                                  scratch.floats(),
                                  n,
                                  side,
                                  side,
                                  0,
                                  c,
                                  c,
                                  gelu};
  return Seconds([&] { table.dwconv_gelu_grad(p); }) / static_cast<double>(count) * 1e9;
}

struct AttentionTimes {
  double microseconds, gflops;
};
// All heads of n pictures.
AttentionTimes AttentionGrad(const TrainKernels& table, int n, const Stage& s) {
  const int bytes = table.activation_bytes, d = s.c / s.heads;
  const int64_t queries = int64_t{s.side} * s.side, count = n * queries * s.c;
  Buffer q(count, bytes), out(count, bytes), dout(count, bytes), dq(count, bytes);
  Buffer kv(int64_t{n} * s.keys * 2 * s.c, bytes);
  Buffer dk(int64_t{s.keys} * d, 4), dv(int64_t{s.keys} * d, 4);
  Buffer scratch(sizeof(float) * table.attention_grad_scratch_floats(s.keys, d));
  const auto at = [bytes](Buffer& buffer, int64_t element) -> void* {
    return static_cast<char*>(buffer.get()) + element * bytes;
  };
  const double seconds = Seconds([&] {
    for (int picture = 0; picture < n; ++picture) {
      for (int head = 0; head < s.heads; ++head) {
        const int64_t query = picture * queries * s.c + head * d;
        const int64_t key = int64_t{picture} * s.keys * 2 * s.c + head * d;
        table.attention_grad({at(q, query), at(kv, key), at(kv, key + s.c), at(out, query),
                              at(dout, query), s.c, 2 * s.c, at(dq, query), dk.floats(),
                              dv.floats(), scratch.floats(), queries, s.keys, d});
      }
    }
  });
  return {seconds * 1e6 / n,
          10.0 * static_cast<double>(queries) * n * s.heads * s.keys * d / seconds / 1e9};
}

void Measure(const TrainKernels& table) {
  std::printf("\n%s\n", table.name);
  PrintProbe();
  std::printf("%-24s %5s %10s %10s %10s\n", "stage", "batch", "fc1", "fc2", "q, proj");
  for (const Stage& s : kStages) {
    for (const int batch : {1, 4}) {
      const int64_t m = int64_t{batch} * s.side * s.side;
      std::printf("%s %2dx%-2d c %3d hidden %4d %5d %10.0f %10.0f %10.0f  GFLOP/s linear_grad\n",
                  s.variant, s.side, s.side, s.c, s.hidden, batch,
                  LinearGrad(table, m, s.hidden, s.c), LinearGrad(table, m, s.c, s.hidden),
                  LinearGrad(table, m, s.c, s.c));
      std::fflush(stdout);
    }
  }
  PrintProbe();
  std::printf("%-24s %5s %10s %10s %10s %10s\n", "stage", "batch", "norm", "norm grad",
              "dwconv erf", "dwconv tanh");
  for (const Stage& s : kStages) {
    for (const int batch : {1, 4}) {
      const NormTimes norm = LayerNorm(table, int64_t{batch} * s.side * s.side, s.c);
      std::printf("%s %2dx%-2d c %3d hidden %4d %5d %10.3f %10.3f %10.3f %10.3f  ns/element\n",
                  s.variant, s.side, s.side, s.c, s.hidden, batch, norm.forward, norm.backward,
                  DwconvGeluGrad(table, batch, s.side, s.hidden, Gelu::kErf),
                  DwconvGeluGrad(table, batch, s.side, s.hidden, Gelu::kTanh));
      std::fflush(stdout);
    }
  }
  PrintProbe();
  for (const Stage& s : kStages) {
    for (const int batch : {1, 4}) {
      const AttentionTimes times = AttentionGrad(table, batch, s);
      std::printf("%s %2dx%-2d c %3d heads %d %9d %10.1f us/picture %8.0f GFLOP/s attention_grad\n",
                  s.variant, s.side, s.side, s.c, s.heads, batch, times.microseconds, times.gflops);
      std::fflush(stdout);
    }
  }
  PrintProbe();
  for (const int64_t n : {int64_t{1} << 15, int64_t{3666760}}) {  // in the caches; all of b0
    Buffer p(n, 4), m(n, 4), v(n * 4), g(n, 4), a(n, table.activation_bytes),
        b(n, table.activation_bytes);
    const AdamWParams adamw = {p.floats(), m.floats(), v.floats(), g.floats(), n,   1.0f, 1e-6,
                               0.05,       0.9,        0.999,      1e-8,       0.1, 0.001};
    const double adamw_seconds = Seconds([&] { table.adamw(adamw); });
    const double add_seconds =
        Seconds([&] { table.add_scaled(a.get(), b.get(), 0.5f, a.get(), n); });
    const double numbers = static_cast<double>(n);
    std::printf("%9lld numbers: adamw %.3f ns/element, %.1f GB/s; add_scaled %.3f ns/element\n",
                static_cast<long long>(n), adamw_seconds / numbers * 1e9,
                numbers * 28 / adamw_seconds / 1e9, add_seconds / numbers * 1e9);
  }
}

int Run(int argc, char** argv) {
  const CpuFeatures features = DetectCpu();
  std::vector<const TrainKernels*> tables;
#if defined(__x86_64__)
  if (features.amx_bf16) tables.push_back(&kAmxTrainKernels);
  if (features.avx512) tables.push_back(&kAvx512TrainKernels);
  if (features.avx2) tables.push_back(&kAvx2TrainKernels);
#endif
  tables.push_back(&kPortableTrainKernels);
  const std::string wanted = argc > 1 ? argv[1] : "";
  for (const TrainKernels* table : tables) {
    if (wanted.empty() || wanted == table->name) Measure(*table);
  }
  return 0;
}

}  // namespace
}  // namespace pyramid::kernels

int main(int argc, char** argv) { return pyramid::kernels::Run(argc, argv); }
