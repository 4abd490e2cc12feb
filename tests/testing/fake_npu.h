// Two devices "npu:0" and "npu:1" for tests, without torch_npu and CANN: LibTorch's PrivateUse1
// under torch_npu's name. Their memory is the machine's, but closed: who reads or writes it without
// copying it to the CPU first dies by SIGSEGV. What they compute, the CPU computes: by LibTorch's
// boxed fallback, convolutions and the fused attention by kernels of their own.
//
// A library of its own: it and torch_npu can't be in one process.
#ifndef PYRAMID_TESTS_TESTING_FAKE_NPU_H_
#define PYRAMID_TESTS_TESTING_FAKE_NPU_H_

#include <torch/library.h>
#include <torch/torch.h>

#include <string>
#include <vector>

namespace pyramid::testing {

inline constexpr int kFakeNpus = 2;

// From now on torch::Device("npu:0") is there, for the life of the process. May be called again.
// Loading the fake plug-in (fake_npu_plugin.cc) calls it.
void RegisterFakeNpu();

// For the calling thread.
void SetCurrentFakeNpu(int index);

// How often an operation was left to the CPU, by all threads so far.
int64_t CpuFallbacks();

// The two lines of tests/golden/npu_schemas.txt: the operator, its gradient.
std::vector<std::string> NpuSchemas();

// torch_npu's fused attention and its gradient, registered as long as this lives. One at a time.
//
// As strict as torch_npu's documentation: layout BSH, tensors without gaps, f32, f16 or bf16, and
// every argument that attention without mask and dropout doesn't need has its default. Throws
// c10::Error for anything else.
class FakeFusionAttention {
 public:
  struct Calls {
    int forward = 0;
    int backward = 0;
    int64_t heads = 0;                         // of the last call
    double scale = 0;                          // likewise
    double keep_prob = 0;                      // likewise
    torch::ScalarType type = torch::kFloat32;  // of its query
  };

  explicit FakeFusionAttention(const std::vector<std::string>& schemas = NpuSchemas());
  ~FakeFusionAttention();
  FakeFusionAttention(const FakeFusionAttention&) = delete;
  FakeFusionAttention& operator=(const FakeFusionAttention&) = delete;

  // Since it lives. Not while another thread computes.
  Calls calls() const;

 private:
  std::vector<torch::Library> libraries_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_FAKE_NPU_H_
